"""What a study found: the verdict of every contrast, and what to know of the runs; what boundary.json and laws.json hold.

A pure function of the table (and the per-sample results where they are at hand), stored and made anew by digest. Laws
are `law_findings`', sentences `words`'; drawing is `figures`' and `page`'s.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dbscale import __version__
from dbscale.errors import ConfigError, LawError, TableError
from dbscale.laws import DeltaCurves, NoiseModel, Pairs, Power, Verdict, fit_noise, judge, power
from dbscale.report import schema
from dbscale.report.law_findings import ArmLaws, Options, law_delta, study_laws
from dbscale.report.pairing import pair_arms, pair_upstream
from dbscale.report.reduce import load_mistakes, reduce_grid
from dbscale.report.schema import BoundaryFile, ContrastRecord, HalfRecord, LawsFile, Note
from dbscale.report.table import RunTable, Setting, read_table, to_csv
from dbscale.report.words import answers, count, listed, note, size_text, where
from dbscale.study.cell import canonical_json
from dbscale.study.store import Store

METHOD_VERSION = 9
"""Bumped when equal rows would give other findings, so that stored ones are made anew."""
QUESTION = "Does distilling from a smaller teacher pay, and up to how many upstream images?"
"""Of a table that comes without a grid."""
ALONG = "upstream_samples"
FEWEST_FOR_HALVES = 4
MOST_DEGREES = 1e9
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
    return table, _current(table, folder, options, dict)


def _current(
    table: RunTable, folder: Path, options: Options | None, load_wrong: Callable[[], dict[str, np.ndarray]]
) -> Findings:
    """The findings stored in `folder` where they are of this table, else new ones."""
    options = options or Options(level=table.level, min_effect=table.min_effect)
    wanted = digest(table, options)
    try:
        found = Findings(
            schema.read(LawsFile, folder / "laws.json"), schema.read(BoundaryFile, folder / "boundary.json")
        )
    except (ConfigError, TableError):
        found = None
    if found is None or (found.laws.source, found.boundary.source) != (wanted, wanted):
        found = find(table, wrong=load_wrong(), options=options, source=wanted)
        found.write(folder)
    return found


def digest(table: RunTable, options: Options) -> str:
    """Equal for equal rows, gaps and options under the same version."""
    rest = {
        "missing": [asdict(point) for point in table.missing], "options": asdict(options),
        "version": [__version__, METHOD_VERSION], "study": [table.grid, table.question],
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
    notes = (*_notes_on_table(table), *_notes_on_regime(table), *_notes_on_contrasts(contrasts))
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

    def record(self, arms: ArmLaws, options: Options, family: int) -> ContrastRecord:
        dataset = self.setting.upstream_dataset if self.metric.startswith("upstream_") else self.setting.dataset
        names = {
            "variant": self.setting.variant, "upstream_dataset": self.setting.upstream_dataset, "dataset": dataset,
            "student": self.student, "downstream_samples": self.labels, "main": self.main,
        }  # fmt: skip
        options = replace(options, min_effect=self.min_effect)
        if self.pairs is None:
            return _record(names, self.metric, reason=self.reason)
        curves = law_delta(arms, self.setting, self.metric, self.pairs)
        return contrast(self.pairs, names, self.metric, options, family=1 if self.main else family, laws=curves,
                        halves=self.student is None and self.labels is None)  # fmt: skip


def study_questions(table: RunTable, wrong: Mapping[str, np.ndarray], options: Options) -> list[Question]:
    """Every contrast of a page, the main one first: each downstream set, then the upstream tests; error, then loss."""
    found: list[Question] = []
    for setting in table.settings:
        runs = table.pretrained.where(setting=setting)
        for metric in ("error_rate", "test_loss"):
            if any(getattr(run, metric) is not None for run in runs):
                pairs, notes = pair_arms(table, setting, metric=metric, wrong=wrong)
                found += _questions(setting, metric, pairs, notes, _min_effect(runs, metric, options))
    for setting in {(s.variant, s.upstream_dataset): s for s in reversed(table.settings)}.values():
        runs = table.pretrained.where(variant=setting.variant, upstream_dataset=setting.upstream_dataset)
        if any(run.upstream_error_rate is not None for run in runs):
            pairs, notes = pair_upstream(table, setting, wrong=wrong)
            found += _questions(setting, "upstream_error_rate", pairs, notes, options.min_effect)
    return [replace(question, main=number == 0) for number, question in enumerate(found)]


def family_of(questions: Sequence[Question]) -> int:
    """Number of verdicts that share one family: all but the main one."""
    return max(sum(question.pairs is not None for question in questions) - 1, 1)


def _questions(
    setting: Setting, metric: str, pairs: Pairs | None, notes: Sequence[str], min_effect: float
) -> Iterator[Question]:
    """Pooled, then for each student and D_f where there are several."""
    yield Question(setting, metric, pairs, "; ".join(notes), min_effect)
    strata = sorted(set(zip(pairs.student.tolist(), pairs.labels.tolist(), strict=True)), key=str) if pairs else []
    for student, labels in strata if len(strata) > 1 else ():
        part = pairs.of(student, labels) if pairs else None
        known = None if metric.startswith("upstream_") else int(labels)
        yield Question(setting, metric, part, "", min_effect, str(student), known)


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
    try:
        verdict = _judge(pairs, options, family, laws)
    except LawError as error:
        return _record(names, metric, reason=f"{error} (x is {names.get('along', ALONG)})")
    noise = _finite(fit_noise(pairs))
    parts = _halves(pairs, options, family) if halves else ()
    return _record(
        names, metric, num_incomplete=pairs.pooled().left_out, verdict=_tidy(verdict), noise=noise,
        power=_power(pairs, noise, verdict) if noise else None, halves=parts, held=_held(parts) if parts else None,
    )  # fmt: skip


def _record(names: Mapping[str, Any], metric: str, **found: Any) -> ContrastRecord:
    sides = {"a": "plain", "b": "distilled", "along": ALONG, "metric": metric}
    return ContrastRecord(**(sides | dict(names)), **found)


def _judge(pairs: Pairs, options: Options, family: int, laws: DeltaCurves | None = None) -> Verdict:
    return judge(pairs, min_effect=options.min_effect, level=options.level, family=family,
                 num_draws=options.num_draws, seed=options.seed, law_curves=laws)  # fmt: skip


def _halves(pairs: Pairs, options: Options, family: int) -> tuple[HalfRecord, ...]:
    """The verdict of every other seed, and of the rest; none with fewer than four seeds, or where one cannot be judged."""
    seeds = sorted(set(pairs.seed.tolist()), key=lambda seed: (str(type(seed)), seed))
    if len(seeds) < FEWEST_FOR_HALVES:
        return ()
    try:
        return tuple(
            HalfRecord(seeds=tuple(map(str, half)),
                       verdict=_tidy(_judge(pairs.rows(rows), options, family), curve=False))
            for half in (seeds[::2], seeds[1::2])
            for rows in (np.flatnonzero(np.isin(pairs.seed, np.array(half))),)
        )  # fmt: skip
    except LawError:
        return ()


def _held(halves: Sequence[HalfRecord]) -> float | None:
    """Share of one half's intervals, widened for the other half's own noise, that hold the other's mean."""
    means = [{point.x: point for point in half.verdict.points} for half in halves]
    hits = [
        abs(one[x].delta - other[x].delta) <= (one[x].high - one[x].delta) * np.hypot(1, other[x].stderr / one[x].stderr)
        for one, other in (means, means[::-1]) for x in one.keys() & other.keys() if one[x].stderr > 0
    ]  # fmt: skip
    return float(np.mean(hits)) if hits else None


def _tidy(verdict: Verdict, *, curve: bool = True) -> Verdict:
    """Curves with five digits; none where no figure draws it."""
    rows = {name: [float(f"{value:.5g}") for value in values] for name, values in verdict.curve.items()}
    return replace(verdict, curve=rows if curve else {})


def _finite(noise: NoiseModel | None) -> NoiseModel | None:
    """JSON knows no infinite degrees of freedom."""
    if noise is None:
        return None
    capped = tuple(replace(each, degrees=min(each.degrees, MOST_DEGREES)) for each in noise.components)
    return replace(noise, components=capped, degrees=min(noise.degrees, MOST_DEGREES))


def _power(pairs: Pairs, noise: NoiseModel, verdict: Verdict) -> Power | None:
    """What more runs of the same design would buy; None for designs that have none."""
    sizes = [len(set(getattr(pairs, name).tolist())) for name in ("x", "student", "labels", "draw")]
    try:
        return power(
            noise, num_x=sizes[0], num_seeds=verdict.num_seeds, num_students=sizes[1], num_labels=sizes[2],
            finetunes=sizes[3], level=verdict.level, family=verdict.family, slope=_slope(verdict),
            step_octaves=float(np.log2(pairs.x.max() / pairs.x.min()) / max(sizes[0] - 1, 1)),
        )  # fmt: skip
    except LawError:
        return None


def _slope(verdict: Verdict) -> float | None:
    """Change of Δ per octave at the root."""
    if verdict.root is None:
        return None
    x, y = np.log2(verdict.curve["x"]), verdict.curve["delta"]
    before, after = np.interp(np.log2(verdict.root) + np.array([-0.5, 0.5]), x, y)
    return float(after - before) or None


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


def _notes_on_contrasts(contrasts: Sequence[ContrastRecord]) -> Iterator[Note]:
    """What the engine found odd about the evidence of pooled contrasts."""
    for record in contrasts:
        verdict = record.verdict
        if verdict is not None and record.pooled:
            delta = size_text(verdict.min_effect, record.metric)
            for code in verdict.notes:
                yield note(code, where=where(record, contrasts), delta=delta, count=record.num_incomplete)


def _notes_on_regime(table: RunTable) -> Iterator[Note]:
    """Whether upstream training is limited by data, as the question supposes, or by its number of steps."""
    for variant, dataset in dict.fromkeys((s.variant, s.upstream_dataset) for s in table.settings):
        runs = table.pretrained.where(variant=variant, upstream_dataset=dataset)
        curves = {f"plain {name}": _curve(runs.where(arm="plain", student=name), "upstream_error_rate")
                  for name in runs.both_arms.students}  # fmt: skip
        teacher = {"the teacher": _curve(runs.where(arm="distilled"), "teacher_error_rate")}
        for who, curve in curves.items():
            yield from _not_falling("not_falling", who, curve)
        for who, curve in teacher.items():
            yield from (*_not_falling("teacher_flat", who, curve), *_steepest_last(who, curve))
        for who, curve in (curves | teacher).items():
            yield from _near_chance(who, curve, f"the test images of {dataset}")
        yield from _same_steps(runs)


def _curve(runs: RunTable, column: str) -> dict[int, float]:
    """Mean over upstream runs of a column by D_p."""
    found: dict[int, dict[Any, float]] = {}
    for run in runs:
        value = getattr(run, column)
        if value is not None:
            found.setdefault(run.upstream_samples, {})[(run.seed, run.student, run.teacher_key)] = value
    return {size: float(np.mean(list(values.values()))) for size, values in sorted(found.items())}


def _not_falling(code: str, who: str, curve: Mapping[int, float]) -> Iterator[Note]:
    for (before, first), (after, last) in pairwise(curve.items()):
        if last >= first:
            yield note(code, who=who, before=before, after=after, first=first, last=last)


def _steepest_last(who: str, curve: Mapping[int, float]) -> Iterator[Note]:
    """Error falls by the octave faster at the last step than at any before."""
    points = list(curve.items())
    falls = [(first - last) / np.log2(after / before) for (before, first), (after, last) in pairwise(points)]
    if len(falls) > 1 and falls[-1] == max(falls) and falls[-1] > 0:
        (_, first), (after, last) = points[-2:]
        yield note("steepest_last", who=who, first=first, last=last, after=after)


def _near_chance(who: str, curve: Mapping[int, float], what: str) -> Iterator[Note]:
    bad = {size: error for size, error in curve.items() if error >= NEAR_CHANCE}
    if bad:
        size = max(bad)
        yield note("near_chance", who=who, size=size, error=bad[size], where=what)


def _same_steps(runs: RunTable) -> Iterator[Note]:
    """D_p whose runs saw no more images, repeats counted, than those of the smallest D_p; a floor, unless all do."""
    seen = {run.upstream_samples: run.upstream_samples_seen for run in runs if run.upstream_samples_seen}
    floor = min(seen.values(), default=0)
    sizes = sorted(size for size, number in seen.items() if number <= SAME_STEPS * floor)
    if 1 < len(sizes) < len(seen):
        yield note("same_steps", sizes=listed(map(count, sizes)), seen=floor)
