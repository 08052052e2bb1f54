"""What a study found: the verdict of every contrast, and what to know of the runs; what boundary.json and laws.json hold.

A pure function of the table (and the per-sample results where they are at hand), stored and made anew by digest. Laws
are `law_findings`', sentences `words`'; drawing is `figures`' and `page`'s.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np

from dbscale import __version__
from dbscale.errors import ConfigError, FileError, LawError, TableError
from dbscale.laws import DeltaCurves, NoiseModel, Pairs, Power, Verdict, fit_noise, judge, power
from dbscale.report import schema
from dbscale.report.law_findings import ArmLaws, Options, law_delta, study_laws
from dbscale.report.pairing import pair_arms, pair_upstream
from dbscale.report.reduce import Mistakes, load_mistakes, reduce_grid
from dbscale.report.schema import BoundaryFile, ContrastRecord, HalfRecord, LawsFile, Note
from dbscale.report.table import MAIN_ARMS, RunTable, Setting, read_table, to_csv
from dbscale.report.words import answers, count, listed, note, notes_of, where
from dbscale.study.cell import canonical_json
from dbscale.study.store import Store

METHOD_VERSION = 11
"""Bumped when equal rows would give other findings, so that stored ones are made anew."""
QUESTION = "Does distilling from a smaller teacher pay, and up to how many upstream images?"
"""What is asked of a table that comes without a grid."""
ALONG = "upstream_samples"
FEWEST_FOR_HALVES = 4
MOST_DEGREES = 1e9
"""Stands for infinity, which JSON does not know."""
CONTROLS = (("plain_matched", "distilled"), ("plain", "self_distilled"))
"""Does distilling pay at equal cost? Does a teacher have to be smaller?"""
NEAR_CHANCE = 0.8
"""Upstream error of a model that has hardly begun to learn: guessing among ten classes errs in .9, among more in more."""
SAME_STEPS = 1.15


@dataclass(frozen=True)
class Findings:
    """Both files of a study."""

    laws: LawsFile
    boundary: BoundaryFile

    def write(self, folder: Path) -> None:
        schema.write(folder / "laws.json", self.laws)
        schema.write(folder / "boundary.json", self.boundary)


# Stored and refreshed.


def refresh(store: Store, grid_name: str, options: Options | None = None) -> tuple[RunTable, Findings]:
    """Reduce and, where rows changed, judge; rows.csv, rows.parquet, laws.json and boundary.json are current then."""
    table = reduce_grid(store, grid_name)
    keys = {key for run in table for key in (run.key, run.upstream_key) if key}
    return table, _current(table, store.grid_dir(grid_name), options, lambda: load_mistakes(store, keys))


def refresh_table(
    path: Path, folder: Path, options: Options | None = None, columns: Mapping[str, str] | None = None
) -> tuple[RunTable, Findings]:
    """The same from a table alone, anyone's: laws.json and boundary.json in `folder` are current then.

    `columns` says where a column of ours stands (`error_rate` -> `top1_err`).
    """
    path = path.resolve()
    name = path.parent.name if path.stem == "rows" else path.stem
    table = replace(read_table(path, columns), grid=name, question=QUESTION)
    return table, _current(table, folder, options, lambda: ({}, ()))


def _current(table: RunTable, folder: Path, options: Options | None, load_wrong: Callable[[], Mistakes]) -> Findings:
    """The findings stored in `folder` where they are of this table, else new ones."""
    options = options or Options(level=table.level, min_effect=table.min_effect)
    wanted = digest(table, options)
    with suppress(ConfigError, TableError, FileError):
        found = Findings(
            schema.read(LawsFile, folder / "laws.json"), schema.read(BoundaryFile, folder / "boundary.json")
        )
        if found.laws.source == found.boundary.source == wanted:
            return found
    wrong, damaged = load_wrong()
    found = find(replace(table, warnings=(*table.warnings, *damaged)), wrong=wrong, options=options, source=wanted)
    found.write(folder)
    return found


def digest(table: RunTable, options: Options) -> str:
    """Equal for equal rows, gaps and options under the same version."""
    rest = {
        "missing": [asdict(point) for point in table.missing], "options": asdict(options),
        "version": [__version__, METHOD_VERSION], "study": [table.grid, table.question, *table.targets],
    }  # fmt: skip
    return hashlib.sha256((to_csv(table) + canonical_json(rest)).encode()).hexdigest()[:16]


def find(
    table: RunTable, *, wrong: Mapping[str, np.ndarray] | None = None, options: Options | None = None, source: str = ""
) -> Findings:
    """Judge every contrast of a study and fit the laws of its arms.

    `wrong` maps keys of runs to their mistakes [test samples]; with it intervals cover the test set too. What cannot be
    judged or fitted is recorded with its reason; nothing here raises for poor data.
    """
    options = options or Options(level=table.level, min_effect=table.min_effect)
    arms, laws = study_laws(table, options, source)
    questions = study_questions(table, wrong or {}, options)
    contrasts = tuple(question.record(arms, options, family_of(questions)) for question in questions)
    odd = (each for record in contrasts if record.pooled for each in notes_of(record, where(record, contrasts)))
    notes = (*_notes_on_table(table), *_notes_on_regime(table), *odd)
    boundary = BoundaryFile(
        grid=table.grid, source=source, level=options.level, min_effect=options.min_effect,
        answers=tuple(answers(contrasts)), contrasts=contrasts, notes=notes,
    )  # fmt: skip
    return Findings(laws, boundary)


# Contrasts of a study.


@dataclass(frozen=True)
class Question:
    """One contrast of a study before it is judged; without pairs, `reason` says why."""

    setting: Setting
    metric: str
    pairs: Pairs | None
    reason: str
    min_effect: float
    student: str | None = None
    labels: int | None = None
    main: bool = False
    own_level: bool = False
    """Judged at the level as it is, outside the family: the main question, and the targets of a hunt, which the level
    allows for."""
    arms: tuple[str, str] = MAIN_ARMS

    @property
    def target(self) -> str:
        """Name of the hunt's target that this is, if it is one."""
        parts = (self.setting.dataset, self.student, self.labels)
        return " ".join(str(part) for part in parts if part is not None)

    def record(self, arms: ArmLaws, options: Options, family: int) -> ContrastRecord:
        """Judged, with the laws' ΔE where both arms have laws; `family` counts the verdicts that share one."""
        names = {**self.setting._asdict(), "student": self.student, "downstream_samples": self.labels,
                 "main": self.main, "a": self.arms[0], "b": self.arms[1]}  # fmt: skip
        if self.metric.startswith("upstream_"):
            names["dataset"] = self.setting.upstream_dataset
        if self.pairs is None:
            return _record(names, self.metric, reason=self.reason)
        laws = law_delta(arms, self.setting, self.metric, self.pairs, self.arms)
        options = replace(options, min_effect=self.min_effect)
        whole = self.student is None and self.labels is None
        return contrast(
            self.pairs, names, self.metric, options, family=1 if self.own_level else family, laws=laws, halves=whole
        )


def study_questions(table: RunTable, wrong: Mapping[str, np.ndarray], options: Options) -> list[Question]:
    """Every contrast of a page, the main one first: each downstream set, then the upstream tests; error, then loss.

    Of the controls, errors alone and pooled: they say what a difference of the main arms may be due to.
    """
    found: list[Question] = []
    upstreams = {(s.variant, s.upstream_dataset): s for s in reversed(table.settings)}.values()
    for arms in [MAIN_ARMS, *(arms for arms in CONTROLS if {*arms} <= {*table.arms})]:
        of_arms: list[Question] = []
        for setting in table.settings:
            runs = table.pretrained.where(setting=setting)
            for metric in ("error_rate", "test_loss") if arms == MAIN_ARMS else ("error_rate",):
                if any(getattr(run, metric) is not None for run in runs):
                    paired = pair_arms(table, setting, metric=metric, wrong=wrong, arms=arms)
                    of_arms += _questions(setting, metric, *paired, _min_effect(runs, metric, options))
        for setting in upstreams:
            runs = table.pretrained.where(variant=setting.variant, upstream_dataset=setting.upstream_dataset)
            if any(run.upstream_error_rate is not None for run in runs):
                paired = pair_upstream(table, setting, wrong=wrong, arms=arms)
                of_arms += _questions(setting, "upstream_error_rate", *paired, options.min_effect)
        found += [replace(each, arms=arms) for each in of_arms if arms == MAIN_ARMS or each.student is None]
    hunted = {
        number for number, each in enumerate(found)
        if each.target in table.targets and each.arms == MAIN_ARMS and each.metric == "error_rate"
        and each.setting.variant == table.settings[0].variant
    }  # fmt: skip
    return [
        replace(question, main=number == 0, own_level=number == 0 or number in hunted)
        for number, question in enumerate(found)
    ]


def family_of(questions: Sequence[Question]) -> int:
    """Number of verdicts that share one family: all but the main one and the targets of a hunt."""
    return max(sum(question.pairs is not None and not question.own_level for question in questions), 1)


def _questions(
    setting: Setting, metric: str, pairs: Pairs | None, notes: Sequence[str], min_effect: float
) -> Iterator[Question]:
    """Pooled, then for each student and D_f where there are several."""
    yield Question(setting, metric, pairs, "; ".join(notes), min_effect)
    if pairs is None:
        return
    strata = sorted(set(zip(pairs.student.tolist(), pairs.labels.tolist(), strict=True)), key=str)
    for student, labels in strata if len(strata) > 1 else ():
        known = None if metric.startswith("upstream_") else int(labels)
        yield Question(setting, metric, pairs.of(student, labels), "", min_effect, str(student), known)


def _min_effect(runs: RunTable, metric: str, options: Options) -> float:
    """δ of error rates as it is; of another metric the same share of its mean."""
    if metric == "error_rate":
        return options.min_effect
    measured = [(getattr(run, metric), run.error_rate) for run in runs if getattr(run, metric) is not None]
    value, error = np.mean(measured, axis=0)
    return float(options.min_effect * value / max(error, options.min_effect))


def contrast(
    pairs: Pairs, names: Mapping[str, Any], metric: str, options: Options, *, family: int = 1,
    laws: DeltaCurves | None = None, halves: bool = True,
) -> ContrastRecord:  # fmt: skip
    """Judge pairs, of any two procedures; `names` are further fields of the record. δ is `options.min_effect`."""

    def verdict_of(part: Pairs, laws: DeltaCurves | None = None, *, curve: bool = True) -> Verdict:
        found = judge(part, min_effect=options.min_effect, level=options.level, family=family,
                      num_draws=options.num_draws, seed=options.seed, law_curves=laws)  # fmt: skip
        drawn = {name: [float(f"{value:.5g}") for value in values] for name, values in found.curve.items()}
        return replace(found, curve=drawn if curve else {})

    try:
        verdict = verdict_of(pairs, laws)
    except LawError as error:
        return _record(names, metric, reason=f"{error} (x is {names.get('along', ALONG)})")
    parts: tuple[HalfRecord, ...] = ()
    seeds = sorted(set(pairs.seed.tolist()), key=lambda seed: (str(type(seed)), seed))
    if halves and len(seeds) >= FEWEST_FOR_HALVES:
        with suppress(LawError):  # a half may lack what a verdict needs: then there is no repetition
            parts = tuple(
                HalfRecord(
                    seeds=tuple(map(str, half)),
                    verdict=verdict_of(pairs.rows(np.flatnonzero(np.isin(pairs.seed, np.array(half)))), curve=False),
                )
                for half in (seeds[::2], seeds[1::2])
            )
    noise = fit_noise(pairs)
    return _record(
        names, metric, num_incomplete=pairs.pooled().left_out, verdict=verdict, halves=parts, held=_held(parts),
        noise=noise and _without_infinity(noise), power=noise and _power(pairs, noise, verdict),
    )  # fmt: skip


def _record(names: Mapping[str, Any], metric: str, **found: Any) -> ContrastRecord:
    return ContrastRecord(**({"a": "plain", "b": "distilled", "along": ALONG, "metric": metric} | dict(names)), **found)


def _held(halves: Sequence[HalfRecord]) -> float | None:
    """Share of one half's intervals, widened for the other half's own noise, that hold the other's mean."""
    means = [{point.x: point for point in half.verdict.points} for half in halves]
    hits = [
        abs(one[x].delta - other[x].delta) <= (one[x].high - one[x].delta) * np.hypot(1, other[x].stderr / one[x].stderr)
        for one, other in permutations(means, 2) for x in one.keys() & other.keys() if one[x].stderr > 0
    ]  # fmt: skip
    return float(np.mean(hits)) if hits else None


def _without_infinity(noise: NoiseModel) -> NoiseModel:
    """The noise with its infinite degrees of freedom capped, for JSON knows none."""
    capped = tuple(replace(each, degrees=min(each.degrees, MOST_DEGREES)) for each in noise.components)
    return replace(noise, components=capped, degrees=min(noise.degrees, MOST_DEGREES))


def _power(pairs: Pairs, noise: NoiseModel, verdict: Verdict) -> Power | None:
    """What more runs of the same design would buy; None for designs that have none."""
    axes = {"num_x": pairs.x, "num_students": pairs.student, "num_labels": pairs.labels, "finetunes": pairs.draw}
    sizes = {name: len(set(values.tolist())) for name, values in axes.items()}
    octaves, slope = np.log2(pairs.x.max() / pairs.x.min()), None
    if verdict.root is not None:  # the change of Δ per octave there
        near = np.log2(verdict.root) + np.array([-0.5, 0.5])
        slope = float(np.diff(np.interp(near, np.log2(verdict.curve["x"]), verdict.curve["delta"]))[0]) or None
    try:
        return power(
            noise, **sizes, num_seeds=verdict.num_seeds, level=verdict.level, family=verdict.family, slope=slope,
            step_octaves=float(octaves / max(sizes["num_x"] - 1, 1)),
        )  # fmt: skip
    except LawError:
        return None


# What a reader must know of the runs.


def _notes_on_table(table: RunTable) -> Iterator[Note]:
    yield from (Note(code="table", text=text) for text in table.warnings)
    if not len(table.pretrained):
        yield note("nothing")
    if not table.missing:
        return
    states = Counter(point.state for point in table.missing)
    yield note("missing", missing=len(table.missing), total=len(table) + len(table.missing),
               states=", ".join(f"{number} {state}" for state, number in states.items()))  # fmt: skip
    gone: dict[tuple[str, str], set[int]] = {}
    for point in table.missing:
        if not len(table.where(dataset=point.dataset, arm=point.arm, upstream_samples=point.upstream_samples)):
            gone.setdefault((point.dataset, point.arm), set()).add(point.upstream_samples)
    for (dataset, arm), sizes in gone.items():
        told = "" if sizes == {0} else f" at {listed(map(count, sorted(sizes)))} upstream images"
        yield note("gap", arm=arm, dataset=dataset, sizes=told)


def _notes_on_regime(table: RunTable) -> Iterator[Note]:
    """Whether upstream training is limited by data, as the question supposes, or by its number of steps."""
    for variant, dataset in dict.fromkeys((s.variant, s.upstream_dataset) for s in table.settings):
        runs = table.pretrained.where(variant=variant, upstream_dataset=dataset)
        for student in runs.both_arms.students:
            curve = _curve(runs.where(arm="plain", student=student), "upstream_error_rate")
            yield from _notes_on_curve(f"plain {student}", "not_falling", curve, dataset)
        teacher = _curve(runs.where(arm="distilled"), "teacher_error_rate")
        yield from _notes_on_curve("the teacher", "teacher_flat", teacher, dataset)
        falls = [(before - after) / octaves for (_, before), (_, after), octaves in _steps(teacher)]
        if len(falls) > 1 and falls[-1] == max(falls) and falls[-1] > 0:  # by the octave
            (_, first), (size, last) = list(teacher.items())[-2:]
            yield note("steepest_last", who="the teacher", first=first, last=last, after=size)
        # D_p whose runs saw no more images, repeats counted, than those of the smallest D_p: a floor, unless all do.
        seen = {run.upstream_samples: run.upstream_samples_seen for run in runs if run.upstream_samples_seen}
        floor = min(seen.values(), default=0)
        sizes = sorted(size for size, number in seen.items() if number <= SAME_STEPS * floor)
        if 1 < len(sizes) < len(seen):
            yield note("same_steps", sizes=listed(map(count, sizes)), seen=floor)


def _curve(runs: RunTable, column: str) -> dict[int, float]:
    """Mean over upstream runs of a column by D_p."""
    found: dict[int, dict[Any, float]] = {}
    for run in runs:
        if (value := getattr(run, column)) is not None:
            found.setdefault(run.upstream_samples, {})[(run.seed, run.student, run.teacher_key)] = value
    return {size: float(np.mean(list(values.values()))) for size, values in sorted(found.items())}


def _steps(curve: Mapping[int, float]) -> Iterator[tuple[tuple[int, float], tuple[int, float], float]]:
    """Neighbouring points of a curve, and the octaves between them."""
    for before, after in pairwise(curve.items()):
        yield before, after, float(np.log2(after[0] / before[0]))


def _notes_on_curve(who: str, code: str, curve: Mapping[int, float], dataset: str) -> Iterator[Note]:
    """Steps at which error does not fall, and the largest D_p at which it is near chance."""
    for (before, first), (after, last), _ in _steps(curve):
        if last >= first:
            yield note(code, who=who, before=before, after=after, first=first, last=last)
    bad = {size: error for size, error in curve.items() if error >= NEAR_CHANCE}
    if bad:
        yield note("near_chance", who=who, size=max(bad), error=bad[max(bad)], where=dataset)
