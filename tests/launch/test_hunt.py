"""`dbscale hunt` with a stand-in for training: to its end, through kills between and within waves, on a faked SLURM."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import dbscale
from dbscale.launch.cli import main
from dbscale.launch.hunt import Place, bought_by, measured_pairs, next_wave, survey
from dbscale.launch.study import Study, load_study
from dbscale.laws import judge
from dbscale.laws.design import Choice, Offer
from dbscale.study.hunt import HuntLog, read_log
from dbscale.study.plan import read_plan

from .conftest import GRID

HUNT = {"range": [16, 256], "per_octave": 1, "budget_hours": 1, "wave": 4, "finetunes": 1}
ROOT = 70.0
"""Where the stand-in's ΔE crosses 0."""


@pytest.fixture
def hunted(workplace: Any, fakes: ModuleType) -> Any:
    return prepare(workplace)


def write_grid(workplace: Any, changes: dict[str, Any], **hunt: Any) -> None:
    grid = GRID | {"hunt": HUNT | hunt, "students": ["h2"], "min_effect": 0.01} | changes
    (workplace.folder / "grid.yaml").write_text(yaml.safe_dump(grid))


def prepare(workplace: Any, **changes: Any) -> Any:
    write_grid(workplace, {}, **changes)
    workplace.behave(steps=1, step_s=0.0, boundary={"root": ROOT, "slope": 0.1, "noise": 0.1})
    return workplace


def hunt(workplace: Any, *options: str) -> int:
    return main(["hunt", *workplace.where, "--cluster", "inline", *options])


def log_of(workplace: Any) -> HuntLog:
    log = read_log(workplace.store, "tiny")
    assert log is not None
    return log


def study_of(workplace: Any) -> Study:
    return load_study(grid=workplace.folder / "grid.yaml", cluster="inline", store=workplace.store.root,
                      data=workplace.folder / "data")  # fmt: skip


def test_a_hunt_runs_wave_after_wave_until_the_boundary_is_sharp(hunted: Any, capsys: Any) -> None:
    assert hunt(hunted) == 0
    log = log_of(hunted)
    last = log.waves[-1]
    (found,) = last.findings
    assert (last.stopped, found.kind, last.bought) == ("crossing", "crossing", ())
    assert found.low is not None and found.high is not None
    assert found.low < ROOT < found.high <= 2 * found.low
    assert [wave.number for wave in log.waves] == list(range(1, len(log.waves) + 1))
    assert [bought.reason for bought in log.waves[0].bought] == ["start", "start"]  # a third would not fit the wave
    assert all(sum(bought.num_pairs for bought in wave.bought) <= 4 for wave in log.waves)
    assert sum(bought.num_pairs for wave in log.waves for bought in wave.bought) == found.num_pairs
    out = capsys.readouterr().out
    assert "hunt, wave 1: 0.00 of 1.00 device-hours used" in out
    assert "2 pairs at upstream_samples 16: a first look where runs are cheap" in out
    assert "it is over: every boundary is as sharp as was asked" in out
    assert main(["status", *hunted.where]) == 0
    assert "down: crossing at" in capsys.readouterr().out


def test_each_pair_is_both_arms_of_one_seed_and_the_log_says_what_it_cost(hunted: Any) -> None:
    hunt(hunted)
    log = log_of(hunted)
    cells = hunted.done()
    num_pairs = log.waves[-1].findings[0].num_pairs
    # a pair is a teacher, two upstream runs and, at two D_f, a finetune of each: 7 runs of 2 s in the stand-in
    assert len(cells) == 7 * num_pairs
    assert log.waves[-1].spent_s == 14 * num_pairs
    assert not [key for key in cells if key.startswith("pretrain-deit_h1") and key.replace("h1", "h2") in cells]


def test_typed_again_a_finished_hunt_runs_nothing_and_leaves_its_log(hunted: Any, capsys: Any) -> None:
    hunt(hunted)
    path, rows = hunted.store.grid_dir("tiny") / "hunt.json", hunted.rows()
    before = path.read_text()
    assert hunt(hunted) == 0
    assert (path.read_text(), hunted.rows()) == (before, rows)
    assert "the report is up to date" in capsys.readouterr().out


def interrupted(workplace: Any, monkeypatch: pytest.MonkeyPatch, num_cells: int) -> None:
    """A hunt whose process dies once `num_cells` more runs are done."""
    from dbscale.launch import worker

    real, left = worker.run_bundle, [num_cells]

    def run_bundle(keys: Any, *rest: Any, **options: Any) -> Any:
        for key in keys:
            if not left[0]:
                raise SystemExit("killed")
            real([key], *rest, **options)
            left[0] -= 1

    with monkeypatch.context() as patch:
        patch.setattr(worker, "run_bundle", run_bundle)
        with pytest.raises(SystemExit, match="killed"):
            hunt(workplace)


@pytest.mark.parametrize("num_cells", [0, 5, 28, 33])  # 28 runs are the first wave
def test_a_hunt_that_was_killed_continues_and_ends_alike(
    hunted: Any, monkeypatch: pytest.MonkeyPatch, num_cells: int
) -> None:
    interrupted(hunted, monkeypatch, num_cells)
    assert len(hunted.done()) == num_cells
    assert hunt(hunted) == 0
    log = log_of(hunted)
    assert log.waves[-1].stopped == "crossing"
    assert log.waves[-1].findings[0].num_pairs * 7 == len(hunted.done())  # nothing is left half done


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_driver_that_dies_in_the_middle_of_a_wave_is_made_up_for(
    workplace: Any, wait_until: Callable[..., None], number: int
) -> None:
    """In processes of its own, as a user starts it; killed outright, or asked to stop."""
    prepare(workplace)
    workplace.behave(steps=3, step_s=0.3, boundary={"root": ROOT, "slope": 0.1, "noise": 0.1})
    driver = workplace.start("hunt", "--set", "cluster.workers=1")
    wait_until(lambda: len(workplace.done()) > 2)
    driver.send_signal(number)
    _, err = driver.communicate(timeout=120)
    assert driver.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL), err
    before = workplace.rows()
    prepare(workplace)
    again = workplace.run("hunt", "--set", "cluster.workers=1")
    assert again.returncode == 0, again.stderr
    assert log_of(workplace).waves[-1].stopped == "crossing"
    assert before.items() <= workplace.rows().items()


def test_killed_between_two_waves_the_rest_is_the_same_to_the_byte(
    hunted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupted(hunted, monkeypatch, 28)
    hunt(hunted)
    rows, bought = hunted.rows(), [wave.bought for wave in log_of(hunted).waves]
    hunted.store.root.rename(tmp_path / "first")
    prepare(hunted)
    hunt(hunted)
    assert hunted.rows() == rows
    assert [wave.bought for wave in log_of(hunted).waves] == bought


def test_the_same_rows_give_the_same_wave(hunted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(hunted, monkeypatch, 28)
    one, other = next_wave(study_of(hunted)), next_wave(study_of(hunted))
    assert one.bought == other.bought
    assert [point.cell.key for point in one.points] == [point.cell.key for point in other.points]


def test_finished_runs_of_the_fixed_grid_count(hunted: Any) -> None:
    assert main(["submit", *hunted.where, "--cluster", "inline"]) == 0  # D_p 16 and 32, seed 0
    fixed = set(hunted.done())
    wave = next_wave(study_of(hunted))
    assert wave.findings[0].num_pairs == 2
    assert wave.survey.spent_s == 14 * 2
    chosen = {(pair.x, pair.seed) for pair in wave.chosen}
    assert (16, 0) not in chosen and (16, 1) in chosen
    hunt(hunted)
    assert fixed < set(hunted.done())


def test_pairs_whose_runs_fail_are_counted_and_neither_replaced_nor_tried_again(hunted: Any, capsys: Any) -> None:
    hunted.behave(steps=1, step_s=0.0, fail=["n16-s0"], boundary={"root": ROOT, "slope": 0.1, "noise": 0.1})
    code = hunt(hunted)
    assert code == 3  # some cells failed, as after a fixed grid
    log = log_of(hunted)
    assert log.waves[-1].failed_pairs == 1
    out, err = capsys.readouterr()
    assert "1 pair failed and not replaced" in out
    assert "failed: " in err
    failed = [
        key for key in hunted.store.standings(p.name for p in hunted.store.root.glob("cells/*")) if "n16-s0" in key
    ]
    assert all(len(hunted.store.attempts(key)) <= 1 for key in failed)


def test_a_hunt_most_of_whose_runs_fail_stops(hunted: Any, capsys: Any) -> None:
    hunted.behave(steps=1, step_s=0.0, fail=["distill"], boundary={"root": ROOT, "slope": 0.1, "noise": 0.1})
    assert hunt(hunted) == 3
    assert log_of(hunted).waves[-1].stopped == "failures"
    assert "too many of its runs fail" in capsys.readouterr().out


def test_choices_at_one_place_are_bought_together() -> None:
    def choice(offer: int, num_pairs: int, gain: float | None, cost: float, reason: Any) -> Choice:
        return Choice(offer=offer, num_pairs=num_pairs, gain=gain, cost=cost, reason=reason)

    places = [Place(Offer(x, ("up",), ()), tuple((f"{x}-{n}",) for n in range(4))) for x in (10.0, 20.0)]  # type: ignore[arg-type]
    choices = [
        choice(0, 1, 0.5, 30.0, "explore"), choice(1, 2, None, 8.0, "start"), choice(0, 2, 0.25, 12.0, "replicate")
    ]  # fmt: skip
    bought, pairs = bought_by(choices, places)
    assert [(each.x, each.num_pairs, each.gain, each.cost_s, each.reason) for each in bought] == [
        (10, 3, 0.75, 42.0, "explore"), (20, 2, None, 8.0, "start")
    ]  # fmt: skip
    assert pairs == ("10.0-0", "20.0-0", "20.0-1", "10.0-1", "10.0-2")


def test_the_budget_is_kept(hunted: Any, capsys: Any) -> None:
    """Seven runs of 2 s are a pair; before rows calibrate it, the cost model predicts less."""
    prepare(hunted, budget_hours=14 * 6 / 3600, target_octaves=0.01)
    assert hunt(hunted) == 0
    last = log_of(hunted).waves[-1]
    assert last.stopped == "budget"
    assert 14 * 4 <= last.spent_s <= 14 * 6
    assert "nothing more fits its budget" in capsys.readouterr().out


def test_a_budget_for_nothing_runs_nothing_and_says_so(hunted: Any, capsys: Any) -> None:
    prepare(hunted, budget_hours=1e-6)
    assert hunt(hunted) == 0
    said = capsys.readouterr().out
    assert "nothing more fits its budget" in said and "no cell was run" in said and "all 0 cells" not in said
    assert not hunted.done()


def test_a_dry_run_writes_nothing_and_json_holds_the_wave(hunted: Any, capsys: Any) -> None:
    assert hunt(hunted, "--dry-run", "--json") == 0
    wave = json.loads(capsys.readouterr().out)
    assert [(each["x"], each["num_pairs"], each["reason"]) for each in wave["bought"]] == [
        (16, 2, "start"), (64, 2, "start"),
    ]  # fmt: skip
    assert not (hunted.store.root / "cells").exists()
    assert not (hunted.store.root / "grids").exists()


def test_what_a_scheduler_holds_is_conditioned_on(hunted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(hunted, monkeypatch, 28)
    prepare(hunted, waves_ahead=1)
    first = next_wave(study_of(hunted))
    active = {cell.key for pair in first.chosen for cell in pair.cells}
    second = next_wave(study_of(hunted), active)
    assert second.chosen
    assert not {(p.x, p.seed) for p in first.chosen} & {(p.x, p.seed) for p in second.chosen}
    assert sum(each.num_pairs for each in second.bought) <= 8 - len(first.chosen)
    prepare(hunted, waves_ahead=0)
    third = next_wave(study_of(hunted), active)
    assert (third.chosen, third.stopped) == ((), None)  # it waits
    assert third.survey.pending_s > 0


def test_plan_says_that_the_grid_is_hunted(hunted: Any, capsys: Any) -> None:
    assert main(["plan", *hunted.where]) == 0
    assert "`dbscale hunt` chooses its runs" in capsys.readouterr().out


def test_a_hunted_grid_is_not_run_whole_by_the_way(hunted: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Its plan.json, which status and the report go by, stays the hunt's; nothing that it asked for counts as stale."""
    assert main(["status", *hunted.where]) == 1
    assert "grid tiny was never hunted in" in (err := capsys.readouterr().err)
    assert f"`dbscale hunt {hunted.where[1]}` does it" in err
    interrupted(hunted, monkeypatch, 28)
    plan = hunted.store.grid_dir("tiny") / "plan.json"
    before = plan.read_bytes()
    for command in (["submit"], ["submit", "--dry-run"], ["work"]):
        capsys.readouterr()
        assert main([*command, *hunted.where, "--cluster", "local"]) == 1
        err = capsys.readouterr().err
        assert "grid tiny is hunted in" in err and f"`dbscale {command[0]} … --set name=tiny_whole`" in err
    assert plan.read_bytes() == before
    assert main(["plan", *hunted.where]) == 0
    out = capsys.readouterr().out
    assert "hunt, wave 2:" in out and "no longer asked for" not in out
    assert main(["plan", "--json", *hunted.where]) == 0
    assert len(json.loads(capsys.readouterr().out)["hunt"]["waves"]) == 1
    assert main(["status", *hunted.where]) == 0
    assert "28/56 cells done" in capsys.readouterr().out
    assert main(["status", "--json", *hunted.where]) == 0
    assert json.loads(capsys.readouterr().out)["hunt"]["waves"][0]["number"] == 2
    assert plan.read_bytes() == before
    # under a name of its own the whole grid finds the hunt's runs
    assert main(["plan", *hunted.where, "--set", "name=tiny_whole", "--json"]) == 0
    assert sum(stage.get("done", 0) for stage in json.loads(capsys.readouterr().out)["cells_by_stage"].values()) > 0


TWO = {
    "datasets": GRID["datasets"] | {"other": {"source": "digits"}},
    "downstream": [{"dataset": "down", "num_samples": [10]}, {"dataset": "other", "num_samples": [10]}],
}


def test_two_targets_share_the_error_of_the_hunt(workplace: Any, fakes: ModuleType, capsys: Any) -> None:
    """Each is judged at √.95 = .9747, so that both hold at .95, half the error of .9; the report likewise."""
    prepare(workplace)
    write_grid(workplace, TWO)
    assert hunt(workplace) == 0
    log, plan = log_of(workplace), read_plan(workplace.store, "tiny")
    assert plan is not None
    assert [found.target for found in log.waves[-1].findings] == ["down", "other"]
    assert {round(wave.verdict_level, 6) for wave in log.waves} == {0.974679}
    assert (round(plan.level, 6), plan.targets) == (0.974679, ("down", "other"))
    assert "(each verdict at level 97.5%, so that all hold at 90%)" in capsys.readouterr().out
    found = measured_pairs(survey(study_of(workplace)))
    for (target, pairs), told in zip(found.items(), log.waves[-1].findings, strict=True):
        assert pairs is not None
        verdict = judge(pairs, min_effect=0.01, level=0.95**0.5)
        assert (str(target), verdict.kind, verdict.interval) == (told.target, told.kind, (told.low, told.high))


def test_one_target_keeps_its_level_when_the_other_is_found(workplace: Any, fakes: ModuleType) -> None:
    """The number of targets is the hunt's, not that of those still open."""
    prepare(workplace)
    write_grid(workplace, TWO, downstream=["down"])
    assert survey(study_of(workplace)).level == pytest.approx(0.95)
    write_grid(workplace, TWO, pooled=False)
    assert survey(study_of(workplace)).level == pytest.approx(0.95**0.5)


def test_two_recipes_are_hunted_along_the_labels(workplace: Any, fakes: ModuleType) -> None:
    """Any contrast, any axis: which of two temperatures distils better, by the number of labels."""
    prepare(workplace)
    recipes = [{"name": name, "set": {"distill.temperature": t}} for name, t in (("cool", 1.0), ("warm", 4.0))]
    write_grid(workplace, {"variants": recipes, "upstream": GRID["upstream"] | {"num_samples": [16]}},
               along="downstream_samples", range=[8, 128], a={"arm": "distilled", "variant": "cool"},
               b={"arm": "distilled", "variant": "warm"})  # fmt: skip
    workplace.behave(steps=1, step_s=0.0,
                     boundary={"root": 40.0, "slope": 0.1, "noise": 0.05, "along": "D_f", "temperature": 4.0})  # fmt: skip
    assert hunt(workplace) == 0
    log, plan = log_of(workplace), read_plan(workplace.store, "tiny")
    (found,) = log.waves[-1].findings
    assert (log.along, log.span, log.waves[-1].stopped, found.kind) == (
        "downstream_samples", (8, 128), "crossing", "crossing",
    )  # fmt: skip
    assert found.low is not None and found.high is not None and found.low < 40.0 < found.high
    assert plan is not None and plan.targets == ()  # no verdict of the report is this one


def test_the_verdicts_so_far_are_values(hunted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"grid": hunted.folder / "grid.yaml", "store": hunted.store.root, "data": hunted.folder / "data"}
    assert dbscale.hunt_verdicts(**where) == {}
    interrupted(hunted, monkeypatch, 28)
    verdicts, wave = dbscale.hunt_verdicts(**where), dbscale.hunt_next(**where)
    assert [*verdicts] == ["down"]
    assert (verdicts["down"].kind, verdicts["down"].level) == (wave.findings[0].kind, wave.verdict_level)
    assert sum(point.num_seeds for point in verdicts["down"].points) == wave.findings[0].num_pairs == 4


def test_a_grid_without_a_hunt_says_what_to_write(workplace: Any, fakes: ModuleType, capsys: Any) -> None:
    assert main(["hunt", *workplace.where]) == 1
    assert "grid tiny has no `hunt:` section" in capsys.readouterr().err


# On SLURM, against stand-ins for its commands.


@pytest.fixture
def on_slurm(hunted: Any, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    return hunted


def records(workplace: Any) -> list[dict[str, Any]]:
    paths = sorted(workplace.store.grid_dir("tiny").glob("submits/*.json"))
    return [json.loads(path.read_text()) for path in paths]


def hold(slurm: Path, *jobs: str) -> None:
    """What squeue lists."""
    (slurm / "queue").write_text("".join(f"{job}\n" for job in jobs))


def waiting(record: dict[str, Any]) -> list[str]:
    number = len(record["elements"])
    return [f"{record['job']}|{k if number > 1 else 'N/A'}|PENDING" for k in range(max(number, 1))]


def run_arrays(workplace: Any, made: list[dict[str, Any]]) -> None:
    """What SLURM does with the arrays of a wave."""
    from dbscale.launch.worker import run_bundle
    from dbscale.study.resources import Resources, StopRequest

    for record in made:
        for keys in record["elements"]:
            run_bundle(keys, workplace.store, workplace.folder / "data", Resources(), StopRequest())


def run_job(workplace: Any, slurm: Path, monkeypatch: pytest.MonkeyPatch, *others: str, restart: int = 0) -> None:
    """The job behind the wave that was submitted first among those that did not run yet, as SLURM starts it."""
    record = next(each for each in reversed(records(workplace)) if each["kind"] == "reduce")
    hold(slurm, f"{record['job']}|N/A|RUNNING", *others)
    start_job(slurm, record, monkeypatch, restart)


def start_job(slurm: Path, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch, restart: int = 0) -> None:
    """What its script runs, in this process."""
    lines = (slurm / f"script-{record['job']}").read_text().splitlines()
    words = shlex.split(next(line for line in lines if line.startswith("srun ")))
    monkeypatch.setenv("SLURM_JOB_ID", str(record["job"]))
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    assert main(words[words.index("dbscale.launch.cli") + 1 :]) == 0


def num_pairs(workplace: Any) -> int:
    return sum(bought.num_pairs for wave in log_of(workplace).waves for bought in wave.bought)


def test_on_slurm_a_wave_is_submitted_with_a_job_behind_it(on_slurm: Any, slurm: Path, submit: Any) -> None:
    code, out, _ = submit(command="hunt")
    assert code == 0
    made = records(on_slurm)
    assert [record["kind"] for record in made] == ["bundles", "bundles", "reduce"]
    assert made[-1]["after"] == [made[0]["job"], made[1]["job"]]
    cells = {key for record in made for keys in record["elements"] for key in keys}
    assert len(cells) == 7 * 4
    assert "submitted the job that plans the next wave as job 103, after 101, 102" in out
    hold(slurm, *(line for record in made for line in waiting(record)))
    _, out, _ = submit(command="hunt")
    assert "nothing to submit: 28 runs wait or run in SLURM" in out
    assert len(records(on_slurm)) == 3


def test_the_job_behind_a_wave_submits_the_next_one_once(
    on_slurm: Any, slurm: Path, submit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(command="hunt")
    run_arrays(on_slurm, records(on_slurm))
    run_job(on_slurm, slurm, monkeypatch)
    made = records(on_slurm)[3:]
    assert [record["kind"] for record in made] == ["bundles", "bundles", "reduce"]
    assert "scancel" not in (slurm / "calls").read_text()  # least of all itself
    assert num_pairs(on_slurm) == 8
    # its node dies; started again, it finds its wave in the queue
    hold(slurm, "103|N/A|RUNNING", *(line for record in made for line in waiting(record)))
    start_job(slurm, records(on_slurm)[2], monkeypatch, restart=1)
    assert len(records(on_slurm)) == 6
    # the same, but it died before it had submitted the job behind the wave
    (on_slurm.store.grid_dir("tiny") / "submits" / f"{made[-1]['uid']}.json").unlink()
    hold(slurm, "103|N/A|RUNNING", *(line for record in made[:-1] for line in waiting(record)))
    start_job(slurm, records(on_slurm)[2], monkeypatch, restart=2)
    assert [record["kind"] for record in records(on_slurm)[5:]] == ["reduce"]
    assert records(on_slurm)[5]["after"] == [record["job"] for record in made[:-1]]


def test_an_older_start_of_the_job_that_a_dead_node_gives_back_ends_at_once(
    on_slurm: Any, slurm: Path, submit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(command="hunt")
    run_arrays(on_slurm, records(on_slurm))
    run_job(on_slurm, slurm, monkeypatch, restart=1)

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("dbscale.launch.slurm.job.os._exit", leave)
    before = len(records(on_slurm))
    with pytest.raises(SystemExit, match="81"):
        start_job(slurm, records(on_slurm)[2], monkeypatch, restart=0)
    assert len(records(on_slurm)) == before


def test_on_slurm_the_hunt_ends_with_a_report_as_it_does_here(
    on_slurm: Any, slurm: Path, submit: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submit(command="hunt")
    seen = 0
    while log_of(on_slurm).waves[-1].stopped is None:
        made = records(on_slurm)
        run_arrays(on_slurm, made[seen:])
        seen = len(made)
        run_job(on_slurm, slurm, monkeypatch)
    assert (on_slurm.store.grid_dir("tiny") / "report.html").exists()
    assert len(records(on_slurm)) == seen
    rows = on_slurm.rows()
    hold(slurm)
    assert "the report is up to date" in submit(command="hunt")[1]
    monkeypatch.delenv("SLURM_JOB_ID")
    on_slurm.store.root.rename(tmp_path / "on_slurm")
    prepare(on_slurm)
    hunt(on_slurm)
    assert on_slurm.rows() == rows


def test_with_waves_ahead_the_job_waits_for_the_earlier_wave_alone(
    on_slurm: Any, slurm: Path, submit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(command="hunt")
    run_arrays(on_slurm, records(on_slurm))
    prepare(on_slurm, waves_ahead=1)
    hold(slurm)
    sbatch = (slurm / "calls").read_text().count("sbatch")

    def queue_what_was_submitted(self: Any, *words: Any) -> Any:
        for record in list(run(self, *words)):
            lines.extend(waiting(record.model_dump(mode="json")))
            hold(slurm, *lines)
            yield record

    lines: list[str] = []
    from dbscale.launch.slurm.submit import Submission

    run = Submission.run
    monkeypatch.setattr(Submission, "run", queue_what_was_submitted)
    submit(command="hunt")
    made = records(on_slurm)[3:]
    assert [record["kind"] for record in made] == ["bundles", "bundles", "reduce", "bundles", "bundles", "reduce"]
    first, second = (tuple(record["job"] for record in made[k : k + 2]) for k in (0, 3))
    assert made[2]["after"] == list(first)
    assert made[5]["after"] == list(first)  # not the second: the next wave is planned while that one runs
    assert second
    assert f"scancel {made[2]['job']}" in (slurm / "calls").read_text()
    assert (slurm / "calls").read_text().count("sbatch") == sbatch + 6
    first_pairs, second_pairs = (wave.bought for wave in log_of(on_slurm).waves[-2:])
    assert sum(each.num_pairs for each in first_pairs) == sum(each.num_pairs for each in second_pairs) == 4


def test_a_hunt_whose_waves_come_to_nothing_gives_up_after_three(
    on_slurm: Any, slurm: Path, submit: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """No array runs anything, as where the data cannot be reached."""
    submit(command="hunt")
    for wave in range(1, 5):
        assert len(records(on_slurm)) == 3 * wave
        run_job(on_slurm, slurm, monkeypatch)
    assert len(records(on_slurm)) == 12
    assert "the last 3 waves finished no pair" in capsys.readouterr().out
    monkeypatch.delenv("SLURM_JOB_ID")
    hold(slurm)
    assert submit(command="hunt")[0] == 0  # a person may try again
    assert len(records(on_slurm)) == 15
