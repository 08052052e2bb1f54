"""`dbscale hunt` (make hunt): look for a grid's boundary wave after wave, each run where it removes most doubt per hour.

On this machine the command stays until the hunt is over; on SLURM it submits a wave and a job behind it, which reduces,
plans and submits the next. Typed again after any interruption it continues: the wave follows from the grid and the rows.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from dbscale.errors import FileError
from dbscale.files import driver_lock
from dbscale.launch.cluster import cluster_path
from dbscale.launch.commands import submit
from dbscale.launch.commands.results import report_is_current, write_results
from dbscale.launch.hunt import NextWave, next_wave, wave_record
from dbscale.launch.slurm.queue import Uid
from dbscale.launch.status import hunt_lines, pairs_text
from dbscale.launch.study import AddCommand, Study, add_run, study_of
from dbscale.strict import Strict
from dbscale.study.cost import duration
from dbscale.study.hunt import WHY, Bought, HuntLog, axis_values, hunt_of, read_log, with_wave, write_log
from dbscale.study.plan import Plan

if TYPE_CHECKING:
    from dbscale.launch.slurm.queue import Queued, SubmitRecord

LOCK_WAIT_S = 600.0
"""How long the job between two waves waits for a command that works on the store."""
NO_PROGRESS = 3
"""Exit code where a wave finished no pair."""
MOST_TRIES = 3
"""Waves in a row that may finish no pair before the job between them gives up; a person who types the command may not."""


def add_commands(add: AddCommand) -> None:
    parser = add("hunt", run, "look for the grid's boundary in waves, each run where it removes most doubt per hour")
    add_run(parser)
    parser.add_argument("--dry-run", action="store_true", help="show the next wave with gain, price and reason")
    parser.add_argument("--json", action="store_true", help="print each wave as one line of JSON instead of sentences")
    parser.add_argument("--step", metavar="JSON", help="for the job behind a wave: plan and submit the next one")


def run(arguments: argparse.Namespace) -> int:
    study = study_of(arguments)
    hunt_of(study.grid)
    submit.check_cluster(study)
    if arguments.dry_run:
        return dry_run(study, arguments)
    if arguments.step is not None:
        return next_step(study, arguments, Step.model_validate_json(arguments.step))
    with driver_lock(study.store.root, "dbscale hunt", study.grid.name):
        study = submit.pack_missing(study)
        return (hunt_on_slurm if study.cluster.executor == "slurm" else hunt_here)(study, arguments)


def dry_run(study: Study, arguments: argparse.Namespace) -> int:
    """The next wave as the rows call for it, and on SLURM the scripts that would be submitted; writes nothing."""
    queued, max_size = submit.queue_seen(study)
    wave = next_wave(study, queued and queued.cells)
    show(log_with(study, wave)[0], arguments)
    if queued is not None and wave.chosen and not arguments.json:
        last = command_behind(arguments, wave, 0)
        submit.hand_in(study, wave.plan(), wave.survey.cost, queued, max_size=max_size, last=last)
    return 0


def hunt_here(study: Study, arguments: argparse.Namespace) -> int:
    """Run wave after wave on this machine until the hunt is over; says why it is."""
    before = None
    while True:
        wave = submit.settled(lambda: next_wave(study), lambda found: found.survey.num_running)
        plan = wave.plan()
        submit.refuse_what_would_fail(study, plan, trial=not arguments.no_smoke)
        record(study, wave, plan, arguments)
        if wave.stopped:
            return submit.finish(study, plan, report=not arguments.no_report)
        now = [(key, each.state) for key, each in sorted(wave.survey.standings.items()) if each.state != "new"]
        if now == before:
            print("the last wave finished no run; `dbscale status` says why. The same command tries again",
                  file=sys.stderr)  # fmt: skip
            return NO_PROGRESS
        before = now
        stop = submit.execute(study, plan, wave.survey.cost)
        if stop.requested:
            return submit.say_stopped(study, plan, stop)


# The log, and what people read of it.


def log_with(study: Study, wave: NextWave) -> tuple[HuntLog, bool]:
    """The hunt's log with this wave at its end, and whether that says anything new."""
    hunt, values, known = hunt_of(study.grid), axis_values(study.grid), None
    try:
        known = read_log(study.store, study.grid.name)
    except FileError as error:
        print(f"{error}; the log of the hunt begins anew, its runs are kept", file=sys.stderr)
    old = known.waves if known else ()
    log = HuntLog(grid=study.grid.name, along=hunt.along, span=(values[0], values[-1]),
                  target_octaves=hunt.target_octaves, level=hunt.level,
                  budget_s=hunt.budget_hours * 3600, waves=old)  # fmt: skip
    log = with_wave(log, wave_record(wave))
    new = log.waves[-1]
    return log, not old or old[-1].model_copy(update={"created": new.created}) != new


def record(study: Study, wave: NextWave, plan: Plan, arguments: argparse.Namespace) -> None:
    """Write the wave into the hunt's log (one that says nothing new leaves the file as it is), show it, and write what
    its jobs and the report need."""
    log, is_new = log_with(study, wave)
    if is_new:
        write_log(study.store, log)
    show(log, arguments)
    submit.write_records(study, plan, wave.survey.cost, level=wave.survey.level, targets=wave.page_targets)


def show(log: HuntLog, arguments: argparse.Namespace) -> None:
    """The last wave of the log: what is known, what it cost, and what comes next, one sentence for each choice."""
    wave = log.waves[-1]
    if arguments.json:
        print(wave.model_dump_json(), flush=True)
        return
    lines = hunt_lines(log)
    for bought in wave.bought:
        targets = f" of {', '.join(bought.targets)}" if len(wave.findings) > 1 else ""
        lines.append(f"  {pairs_text(bought.num_pairs)} at {log.along} {bought.x:,}{targets}: {why(bought)}")
    print("\n".join(lines), flush=True)


def why(bought: Bought) -> str:
    """The reason of a choice in words, with gain and price."""
    price = f"for {duration(bought.cost_s)}"
    if bought.gain is None:
        return f"{WHY[bought.reason]}, {price}"
    return f"{WHY[bought.reason]}; worth {bought.gain:.2g} octaves {price}"


# On SLURM.


class Step(Strict):
    """What the job behind a wave knows of how it came about, beside the words of the command."""

    uid: Uid
    """Name of its record."""
    done: int
    """Pairs that were finished, or had failed, when it was submitted."""
    tries: int
    """Waves before it, in a row, that finished none."""


def command_behind(arguments: argparse.Namespace, wave: NextWave, tries: int) -> Callable[[SubmitRecord], str]:
    """The same hunt as a command line for the job of a record, which starts in another folder."""
    where = {"grid": arguments.grid, "cluster": cluster_path(arguments.cluster), "store": arguments.store,
             "data": arguments.data}  # fmt: skip
    words = [word for name, path in where.items() for word in (f"--{name}", str(path.absolute()))]
    words += [word for override in arguments.overrides for word in ("--set", override)]
    done = num_ended(wave)

    def command(record: SubmitRecord) -> str:
        step = Step(uid=record.uid, done=done, tries=tries).model_dump_json()
        return shlex.join([sys.executable, "-u", "-m", "dbscale.launch.cli", "hunt", *words, "--step", step])

    return command


def num_ended(wave: NextWave) -> int:
    """Pairs that are finished, or lack a run that failed."""
    return len(wave.survey.having("done", "failed"))


def next_step(study: Study, arguments: argparse.Namespace, step: Step) -> int:
    """What the job behind a wave does. Started again at any point it finds in the queue what it had submitted; a start
    that a dead node gives back ends as soon as it sees that a later one has taken over."""
    from dbscale.launch.slurm.job import Fence, JobIdentity

    folder = study.store.grid_dir(study.grid.name).absolute() / "jobs" / step.uid
    fence = Fence(folder / "0.fence", JobIdentity.of_job(), study.store)
    fence.raise_token()
    with driver_lock(study.store.root, "the job between two waves", study.grid.name, wait_s=LOCK_WAIT_S):
        return hunt_on_slurm(study, arguments, step, fence.check)


def hunt_on_slurm(
    study: Study, arguments: argparse.Namespace, step: Step | None = None, check: Callable[[], object] = lambda: None
) -> int:
    """Submit the next wave and the job behind it, as far as the hunt may have waves in flight; report when it is over.

    `step` is what the job that this runs in knows; `check` ends the process if a newer start of it has taken over.
    Raises SlurmError.
    """
    from dbscale.launch.slurm.submit import settle_queue

    for _ in range(1 + hunt_of(study.grid).waves_ahead):
        queued = settle_queue(study.store, study.grid.name, without=step and step.uid)
        wave = next_wave(study, queued.cells)
        check()
        plan = wave.plan()
        if step is None:
            submit.refuse_what_would_fail(study, plan, trial=not arguments.no_smoke)
        record(study, wave, plan, arguments)
        in_flight = frozenset(cell.key for cell in plan.cells if cell.key in queued.cells)
        if wave.stopped and step is not None and not in_flight:
            print(write_results(study.store, study.grid.name)[0])
            return 0
        if wave.stopped:
            plan = replace(plan, waves=())
        if not plan.waves and says_nothing_to_do(study, plan, queued, in_flight):
            return 0
        tries = step.tries + 1 if step is not None and step.done == num_ended(wave) else 0
        if tries > MOST_TRIES:
            print(
                f"the last {MOST_TRIES} waves finished no pair; `dbscale status` says why. The same command tries again"
            )
            return 0
        # With waves ahead the job behind a wave waits for the earlier wave alone.
        behind = in_flight if hunt_of(study.grid).waves_ahead and in_flight else None
        last = command_behind(arguments, wave, tries)
        submit.hand_in(study, plan, wave.survey.cost, queued, last=last, behind=behind, check=check)
        if not wave.chosen:
            return 0
    return 0


def says_nothing_to_do(study: Study, plan: Plan, queued: Queued, in_flight: frozenset[str]) -> bool:
    """Whether a job waits behind what is in flight (with waves ahead: behind the oldest), or all is reported."""
    keys = [cell.key for cell in plan.cells]
    planned = bool(hunt_of(study.grid).waves_ahead and queued.reducers) or queued.will_be_reduced(keys)
    if planned:
        print(f"nothing to submit: {len(in_flight)} runs wait or run in SLURM; the job behind them plans what is next")
    elif not in_flight and report_is_current(study.store, study.grid.name, keys):
        print(f"the report is up to date: {submit.report_path(study)}")
        return True
    return planned
