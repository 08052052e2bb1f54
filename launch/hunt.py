"""Where a hunt stands, and its next wave: a pure function of the grid, the rows and what is under way.

Reads the store and never writes. Asked again after any interruption it gives the wave that the rows call for; a fixed
grid's finished runs count like its own. `commands.hunt` runs the wave, `dbscale.laws.design` chooses it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from dbscale.launch.status import device_seconds
from dbscale.launch.study import Study, base_cost, finished_sample, standings_of
from dbscale.study import hunt as hunts
from dbscale.study.cell import Cell
from dbscale.study.cost import CostModel
from dbscale.study.grid import Hunt, Point, check_sizes, merged_cells
from dbscale.study.hunt import Pair, Target, hunt_of
from dbscale.study.plan import Plan, Wave, make_plan, record
from dbscale.study.store import Standing

if TYPE_CHECKING:
    from dbscale.laws import Pairs, Verdict, design
    from dbscale.laws.design import Choice, Offer

PairState = Literal["done", "failed", "running", "begun", "open"]
"""`begun`: a run of it was broken off and none is under way; it is finished with the next wave, unasked."""
MOST_FAILED, FEWEST_FAILED = 0.25, 3
"""The hunt stops where more than this share of its pairs fail, once that many have: what is left would mislead."""
AUTO_START = 2
"""Finetunes of each upstream run until the noise says what is cheapest; with one, the noise cannot be told apart."""
FEWEST_FOR_NOISE = 6


@dataclass(frozen=True)
class Survey:
    """A hunt's pairs as the store has them now, up to the first seeds that nobody began."""

    study: Study
    pairs: tuple[Pair, ...]
    standings: Mapping[str, Standing]
    cost: CostModel

    @property
    def hunt(self) -> Hunt:
        return hunt_of(self.study.grid)

    @property
    def level(self) -> float:
        """Level of each verdict: looking after every wave and the number of targets are paid for."""
        from dbscale.laws.design import looking_level

        return looking_level(self.hunt.level, len(self.targets))

    @property
    def min_effect(self) -> float:
        return self.hunt.min_effect or self.study.grid.min_effect

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        return tuple(dict.fromkeys(pair.target for pair in self.pairs))

    @cached_property
    def _states(self) -> Mapping[Pair, PairState]:
        return {pair: self._state(pair) for pair in self.pairs}

    def _state(self, pair: Pair) -> PairState:
        standings = [self.standings[cell.key] for cell in pair.cells]
        if all(standing.state == "done" for standing in standings):
            return "done"
        if any(map(has_failed, standings)):
            return "failed"
        if any(standing.state == "running" for standing in standings):
            return "running"
        return "begun" if any(standing.state in ("interrupted", "damaged") for standing in standings) else "open"

    def having(self, *states: PairState) -> list[Pair]:
        return [pair for pair in self.pairs if self._states[pair] in states]

    @property
    def num_running(self) -> int:
        return sum(standing.state == "running" for standing in self.standings.values())

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        return merged_cells([point for pair in self.pairs for point in pair.points])

    @cached_property
    def spent_s(self) -> float:
        """Device-seconds of all runs of the hunt so far, failed ones included."""
        known = {key: each for key, each in self.standings.items() if each.state != "new"}
        return sum(device_seconds(self.study.store, key, each, each.state) for key, each in known.items())

    @cached_property
    def pending_s(self) -> float:
        """Predicted device-seconds of the runs that are under way, and of begun pairs, which are finished unasked."""
        begun = {cell.key for pair in self.having("running", "begun") for cell in pair.cells}
        begun |= {key for key, each in self.standings.items() if each.state == "running"}
        return sum(
            self.cost.seconds(cell)
            for cell in self.cells if cell.key in begun and self.standings[cell.key].state != "done"
        )  # fmt: skip

    def to_pay(self, cells: Sequence[Cell]) -> dict[str, float]:
        """Predicted device-seconds of the runs among `cells` that are neither done nor under way."""
        open_ = (cell for cell in cells if self.standings[cell.key].state not in ("done", "running"))
        return {cell.key: self.cost.seconds(cell) for cell in open_}


def has_failed(standing: Standing) -> bool:
    """Whether a run failed by its own doing, or builds on one that did; what a machine spoilt is tried again."""
    failure = standing.attempt.failure if standing.attempt is not None else None
    return standing.state in ("failed", "blocked") and not (failure is not None and failure.passes)


def survey(study: Study, active: Collection[str] | None = None) -> Survey:
    """Read how the hunt's pairs stand; `active` are the cells that a scheduler holds. Raises ConfigError."""
    grid, hunt = study.grid, hunt_of(study.grid)
    check_sizes(hunts.widest(grid), study.sizes)
    draws = hunts.MOST_DRAWS if hunt.finetunes == "auto" else hunt.finetunes
    pairs: list[Pair] = []
    standings: dict[str, Standing] = {}
    seeds, step = hunts.seeds_of(grid), max(hunt.wave, 8)
    for first in range(0, len(seeds), step):
        pairs += (more := hunts.pairs_of(grid, study.fingerprints, seeds[first : first + step], draws))
        keys = [cell.key for cell in merged_cells([point for pair in more for point in pair.points])]
        found = standings_of(study.store, keys, active)
        standings |= found
        if all(standing.state == "new" for standing in found.values()):
            break
    new = Survey(study, tuple(pairs), standings, base_cost(study))
    return replace(new, cost=new.cost.calibrated(finished_sample(new.cells, standings)))


@dataclass(frozen=True)
class NextWave:
    """What is known, and what should be run next."""

    survey: Survey
    findings: tuple[hunts.Finding, ...]
    bought: tuple[hunts.Bought, ...]
    chosen: tuple[Pair, ...]
    """The pairs of `bought`."""
    finetunes: int
    """How many finetunes each upstream run of the chosen pairs gets."""
    stopped: str | None
    """Why the hunt is over; None while it is not, even where nothing can be chosen before what is under way ends."""

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """All points that the hunt asks for: those whose run was begun, those of begun pairs, and the chosen ones."""
        found = self.survey
        asked = [p for pair in found.pairs for p in pair.points if found.standings[p.cell.key].state != "new"]
        for pair in (*found.having("begun", "running"), *self.chosen):
            asked += [p for p in pair.points if p.finetune < self.finetunes]
        return tuple({(p.variant, p.cell.key): p for p in asked}.values())

    @property
    def page_targets(self) -> tuple[str, ...]:
        """Its targets, where the report judges the same contrasts."""
        from dbscale.report.hunt import on_page

        return tuple(map(str, self.survey.targets)) if on_page(self.survey.hunt) else ()

    def plan(self) -> Plan:
        """The wave as jobs, with what was begun before it; runs that failed are not tried again."""
        found, cluster = self.survey, self.survey.study.cluster
        grid = found.study.grid.model_copy(update={"min_effect": found.min_effect})  # the report's, too
        plan = make_plan(
            grid, self.points, states={key: each.state for key, each in found.standings.items()},
            cost=found.cost, target_s=cluster.target_min * 60, workers=cluster.num_workers(),
        )  # fmt: skip
        return without_failed(plan, {key for key, each in found.standings.items() if has_failed(each)})


def wave_record(wave: NextWave) -> hunts.WaveRecord:
    """The wave for the log, which numbers it."""
    found = wave.survey
    return hunts.WaveRecord(
        number=0, created=time.time(), spent_s=round(found.spent_s, 1), failed_pairs=len(found.having("failed")),
        verdict_level=found.level, findings=wave.findings, bought=wave.bought, stopped=wave.stopped,
    )  # fmt: skip


def without_failed(plan: Plan, failed: Collection[str]) -> Plan:
    """The plan without the runs that failed, and without bundles that hold no other."""
    waves = []
    for wave in plan.waves:
        bundles = [(tuple(cell for cell in bundle.cells if cell.key not in failed), bundle) for bundle in wave.bundles]
        kept = tuple(replace(bundle, cells=cells) for cells, bundle in bundles if cells)
        waves += [Wave(kept)] if kept else []
    return replace(plan, waves=tuple(waves))


@dataclass(frozen=True)
class Place:
    """An offer, and the pairs (one of each of its targets) that the next repetition there would measure, and so on."""

    offer: Offer
    repetitions: tuple[tuple[Pair, ...], ...]


def next_wave(study: Study, active: Collection[str] | None = None) -> NextWave:
    """Where the hunt stands and what to run next. Raises ConfigError where the grid cannot be hunted."""
    from dbscale.laws.design import choose_wave

    found = survey(study, active)
    hunt, measured = found.hunt, measured_pairs(found)
    findings = tuple(finding_of(found, target, pairs) for target, pairs in measured.items())
    draws, stopped = finetunes_of(found, measured), why_stopped(found, findings)
    open_targets = {each.target for each in findings if each.stop is None}
    places = [] if stopped else list(places_of(found, open_targets, draws))
    under_way = found.having("running", "begun")
    # Pairs of several targets that share their upstream runs are one for the machines.
    repetitions = {(pair.x, pair.seed, pair.target.student) for pair in under_way}
    room = hunt.wave * (1 + hunt.waves_ahead) - len(repetitions)
    left_s = hunt.budget_hours * 3600 - found.spent_s - found.pending_s
    choices = choose_wave(
        [each for target, pairs in measured.items() if (each := as_target(found, target, pairs)).name in open_targets],
        [place.offer for place in places], num_pairs=max(min(hunt.wave, room), 0), level=found.level,
        pending=Counter((str(pair.target), float(pair.x)) for pair in under_way),
        most_cost=left_s,
    )  # fmt: skip
    if not (stopped or choices or under_way):
        prices = [sum(place.offer.runs[0].values()) for place in places]
        stopped = "seeds" if not prices else "budget" if min(prices) > left_s else "gain"
    return NextWave(found, findings, *bought_by(choices, places), draws, stopped)


def bought_by(choices: Sequence[Choice], places: Sequence[Place]) -> tuple[tuple[hunts.Bought, ...], tuple[Pair, ...]]:
    """The choices as the log has them, those at one place together, and their pairs."""
    chosen: list[Pair] = []
    bought: dict[int, hunts.Bought] = {}
    for choice in choices:
        place, earlier = places[choice.offer], bought.get(choice.offer)
        first, gain, cost_s = (earlier.num_pairs, earlier.gain, earlier.cost_s) if earlier else (0, None, 0.0)
        chosen += [pair for pairs in place.repetitions[first : first + choice.num_pairs] for pair in pairs]
        bought[choice.offer] = hunts.Bought(
            x=int(place.offer.x), targets=place.offer.targets, num_pairs=first + choice.num_pairs,
            gain=choice.gain if gain is None else gain + (choice.gain or 0.0), cost_s=cost_s + choice.cost,
            reason=earlier.reason if earlier else choice.reason,
        )  # fmt: skip
    return tuple(bought.values()), tuple(chosen)


def places_of(found: Survey, targets: Collection[str], draws: int) -> Iterator[Place]:
    """Where something can still be measured of these targets.

    Targets that share upstream runs share an offer, as far as they lack the same seeds.
    """
    from dbscale.laws.design import Offer

    by_repetition: dict[tuple[int, str | None, int], list[Pair]] = {}
    for pair in found.having("open"):
        if str(pair.target) in targets:
            by_repetition.setdefault((pair.x, pair.target.student, pair.seed), []).append(pair)
    groups: dict[tuple[int, tuple[str, ...]], list[tuple[Pair, ...]]] = {}
    for (x, _, _), pairs in by_repetition.items():
        groups.setdefault((x, tuple(str(pair.target) for pair in pairs)), []).append(tuple(pairs))
    for (x, names), repetitions in groups.items():
        runs = tuple(found.to_pay([c for pair in pairs for c in pair.runs(draws)]) for pairs in repetitions)
        yield Place(Offer(float(x), names, runs), tuple(repetitions))


def measured_pairs(found: Survey) -> dict[Target, Pairs | None]:
    """Δ of every target from its finished pairs."""
    from dbscale.report.hunt import target_pairs
    from dbscale.report.reduce import collect, load_mistakes

    done = [point for pair in found.having("done") for point in pair.points]
    done = [point for point in done if found.standings[point.cell.key].state == "done"]
    if not done:
        return dict.fromkeys(found.targets)
    plan = make_plan(found.study.grid, done, states={}, cost=found.cost, target_s=1.0)
    table = collect(found.study.store, record(plan, found.cost))
    wrong, _ = load_mistakes(found.study.store, {point.cell.key for point in done})  # the report names damaged files
    sizes = hunts.student_sizes(found.study.grid) if found.hunt.along == "num_params" else None
    return {target: target_pairs(table, found.hunt, target, wrong, sizes) for target in found.targets}


def as_target(found: Survey, target: Target, pairs: Pairs | None) -> design.Target:
    from dbscale.laws import design

    return design.Target(str(target), pairs, found.min_effect)


def finding_of(found: Survey, target: Target, pairs: Pairs | None) -> hunts.Finding:
    """What is known of a target; its verdict is the engine's."""
    from dbscale.laws.design import doubt_left, why_stop

    hunt, values = found.hunt, hunts.axis_values(found.study.grid)
    if pairs is None:
        return hunts.Finding(target=str(target))
    count = len(set(zip(pairs.x.tolist(), pairs.seed.tolist(), strict=True)))
    verdict = verdict_of(found, pairs)
    if verdict is None:
        return hunts.Finding(target=str(target), num_pairs=count)
    low, high = verdict.interval or (None, None)
    stop = why_stop(verdict, (values[0], values[-1]), target_octaves=hunt.target_octaves, least_doubt=hunt.least_doubt)
    return hunts.Finding(
        target=str(target), kind=verdict.kind, better=verdict.better, root=verdict.root, low=low, high=high,
        doubt=doubt_left(as_target(found, target, pairs), values), num_pairs=count, stop=stop,
    )  # fmt: skip


def verdict_of(found: Survey, pairs: Pairs) -> Verdict | None:
    """The verdict on the pairs of a target; None while there is too little to judge."""
    from dbscale.laws import NotEnoughData, judge

    try:
        return judge(pairs, min_effect=found.min_effect, level=found.level)
    except NotEnoughData:
        return None


def verdicts(found: Survey) -> dict[str, Verdict]:
    """The verdict of every target that can be judged, by its name."""
    judged = {target: pairs and verdict_of(found, pairs) for target, pairs in measured_pairs(found).items()}
    return {str(target): verdict for target, verdict in judged.items() if verdict is not None}


def finetunes_of(found: Survey, measured: Mapping[Target, Pairs | None]) -> int:
    """Finetunes of each upstream run of the next pairs: as the grid says, or as the noise makes cheapest."""
    from dbscale.laws import fit_noise

    asked = found.hunt.finetunes
    if asked != "auto":
        return asked
    wanted = []
    for target, pairs in measured.items():
        noise = fit_noise(pairs) if pairs is not None and len(pairs.x) >= FEWEST_FOR_NOISE else None
        if noise is not None:
            cells = next(pair for pair in found.pairs if pair.target == target).cells
            upstream = sum(found.cost.seconds(cell) for cell in cells if cell.recipe.stage != "finetune")
            finetune = sum(found.cost.seconds(cell) for cell in cells if cell.recipe.stage == "finetune")
            wanted.append(min(noise.best_finetunes(upstream, finetune), hunts.MOST_DRAWS))
    return max(wanted, default=AUTO_START)


def why_stopped(found: Survey, findings: Sequence[hunts.Finding]) -> str | None:
    """Why the hunt as a whole is over, as far as results tell."""
    failed, done = len(found.having("failed")), len(found.having("done"))
    if failed >= FEWEST_FAILED and failed > MOST_FAILED * (failed + done):
        return "failures"
    stops = [each.stop for each in findings]
    return None if None in stops else ", ".join(dict.fromkeys(map(str, stops)))
