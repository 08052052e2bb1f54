"""How a report speaks: sentences from the table in templates/sentences.toml, numbers and names as people say them.

Says records of `schema`; judges nothing. What is said of a verdict follows from its state alone, so that no two
sentences can disagree: page, terminal and advice all take them from here.
"""

from __future__ import annotations

import string
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dbscale.laws import Power, Verdict
from dbscale.report.schema import BoundaryFile, ContrastRecord, LawRecord, LawsFile, Note, OfSetting, ParamRecord
from dbscale.report.table import MAIN_ARMS, RunTable
from dbscale.study.task import ERRORS

TABLE = tomllib.loads((Path(__file__).parent / "templates" / "sentences.toml").read_text(encoding="utf-8"))
SIDES, AXES, METRICS, COMPONENTS = (TABLE[name] for name in ("sides", "axes", "metrics", "components"))
SENTENCES: dict[str, str] = TABLE["sentences"] | TABLE["notes"]
SYMBOLS = (
    ("E_inf", "E∞"), ("^-alpha", "^(−α)"), ("^-beta", "^(−β)"), ("^-gamma", "^(−γ)"), ("alpha", "α"), ("beta", "β"),
    ("gamma", "γ"), ("*", "·"), (" - ", " − "), ("E0", "E₀"),
)  # fmt: skip
NAMELESS = 1e11
"""Counts from here on have no name that people use."""
MOST_SEEDS_NAMED = 8
"""Longer lists are named by their ends alone."""


# Numbers and names as people say them.


def about(value: float) -> str:
    """A count as one would say it: two significant digits, thousands apart."""
    return count(float(f"{value:.2g}")) if value >= 10 else f"{value:.2g}"


def count(value: float) -> str:
    """Exact where it is whole and has a name; FLOPs as 1e15."""
    if value >= NAMELESS or not float(value).is_integer():
        return f"{value:.3g}".replace("e+", "e")
    return f"{value:,.0f}"


def span(low: float, high: float) -> str:
    """Two ends with as many digits, two at least, as tell them apart; one value where they are equal."""
    for digits in range(2, 18):
        ends = [count(float(f"{end:.{digits}g}")) if end >= 10 else f"{end:.{digits}g}" for end in (low, high)]
        if ends[0] != ends[1]:
            return " to ".join(ends)
    return count(low)


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def chance(share: float) -> str:
    """A probability: never said to be 0 or 100 %, which no design promises."""
    return "over 99 %" if share > 0.99 else "under 1 %" if share < 0.01 else percent(share, 0)


def listed(items: Iterable[str]) -> str:
    """The items joined as people list them: a, b and c."""
    *most, last = list(items) or [""]
    return f"{', '.join(most)} and {last}" if most else last


def is_rate(metric: str) -> bool:
    """Whether a metric is a share, of which differences are said in percentage points."""
    return metric.endswith(("error_rate", "_error", "accuracy"))


def size_text(value: float, metric: str) -> str:
    """How large a difference is, without a sign."""
    return f"{100 * abs(value):.2g} points" if is_rate(metric) else f"{abs(value):.2g}"


def level_text(value: float | None, metric: str) -> str:
    """A measured or predicted value of a metric."""
    return percent(value) if is_rate(metric) or value is None else f"{value:.3g}"


def effect(value: float, metric: str) -> str:
    """A difference with its sign."""
    text = f"{100 * value:+.1f}" if is_rate(metric) else f"{value:+.3g}"
    return text.replace("-", "−")


def symbols(text: str) -> str:
    """A law's equation or parameter in mathematics' own letters."""
    for plain, letter in SYMBOLS:
        text = text.replace(plain, letter)
    return text


def param_text(param: ParamRecord) -> str:
    if param.status == "not_determined" or param.value is None:
        return "not determined"
    ends = (f"{end:.3g}" if end is not None else "open" for end in (param.low, param.high))
    return f"{param.value:.3g} [{', '.join(ends)}]" + (" (at its bound)" if param.status == "at_bound" else "")


def cap(text: str) -> str:
    """The same as the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def task_notes(table: RunTable) -> list[str]:
    """What an error is, for every dataset where it is not that of a classification."""
    tasks = {run.dataset: run.task for run in table if run.task != "classification"}
    return [say("task", dataset=dataset, error=ERRORS.get(task, task)) for dataset, task in tasks.items()]


def predicted(table: RunTable) -> str:
    """The errors that laws of this table foretell."""
    return listed(ERRORS.get(task, task) for task in dict.fromkeys(run.task for run in table))


def side_of(record: ContrastRecord, side: str | None) -> str:
    """What a side of a contrast is called."""
    value = record.b if side == "b" else record.a
    return SIDES.get(value, value) if record.column == "arm" else f"{record.column} {value}"


def axis_of(record: ContrastRecord) -> str:
    return AXES.get(record.along, record.along.replace("_", " "))


def metric_of(metric: str) -> str:
    return METRICS.get(metric, metric.replace("_", " "))


def stratum(record: ContrastRecord) -> str:
    """Which student and D_f a contrast is about."""
    if record.pooled:
        return "pooled" if record.column == "arm" else "all pairs"
    labels = [] if record.downstream_samples is None else [f"{record.downstream_samples:,} labels"]
    return ", ".join([record.student or "all students", *labels])


def where(record: OfSetting, all_records: Iterable[OfSetting] = ()) -> str:
    """Names the test set, of variant and upstream set what differs among `all_records`, and a control's sides."""
    place = record.setting.among(other.setting for other in all_records)
    if isinstance(record, ContrastRecord) and record.column == "arm" and (record.a, record.b) != MAIN_ARMS:
        return f"{place} ({side_of(record, 'a')} against {side_of(record, 'b')})"
    return place


# Sentences.

FORMATS = {
    "about": about, "count": count, "percent": percent, "percent0": lambda share: percent(share, 0), "chance": chance,
    "seeds": lambda number: "one seed" if number == 1 else f"{number:,} seeds",
}  # fmt: skip


class _Sentence(string.Formatter):
    """`str.format` with formats for counts and shares, in which a sentence may name another."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Any) -> Any:
        return kwargs[key] if key in kwargs else say(str(key), **kwargs)

    def format_field(self, value: Any, format_spec: str) -> str:
        return FORMATS[format_spec](value) if format_spec in FORMATS else super().format_field(value, format_spec)


def fill(text: str, /, **values: Any) -> str:
    return _Sentence().format(text, **values)


def say(code: str, /, **values: Any) -> str:
    """A sentence of the table."""
    return fill(SENTENCES[code], **values)


def note(code: str, /, **values: Any) -> Note:
    return Note(code=code, text=say(code, **values))


def notes_of(record: ContrastRecord, place: str) -> Iterator[Note]:
    """What the engine found odd about the evidence of a verdict."""
    if record.verdict is not None:
        values = _values(record, record.verdict) | {"where": place, "incomplete": record.num_incomplete}
        yield from (note(code, **values) for code in record.verdict.notes)


# Verdicts.


def established(verdict: Verdict, side: str | None, beyond: float = 0.0) -> list[float]:
    """Measured x where `side` is established to have the lower y, by more than `beyond`."""
    lowest = {p.x: p.low_all if side == "b" else -p.high_all for p in verdict.points}
    return [x for x, size in lowest.items() if side and size > beyond]


def excludes(verdict: Verdict) -> frozenset[str]:
    """`harm`: B's y exceeds A's by δ at no measured x; `gain`: it is below A's by δ at none; both, or neither."""
    harm = all(point.low_all > -verdict.min_effect for point in verdict.points)
    gain = all(point.high_all < verdict.min_effect for point in verdict.points)
    return frozenset(name for name, holds in (("harm", harm), ("gain", gain)) if holds)


def state_of(verdict: Verdict) -> str:
    """Which of the table's states a verdict is in."""
    if verdict.kind == "crossing":
        return "several" if "several_crossings" in verdict.notes else "crossing"
    if verdict.kind == "undecided":
        return "partly" if verdict.better else "undecided"
    if verdict.kind == "one_sign":
        return "one_sign"
    excluded = excludes(verdict)
    if len(excluded) == 2:
        return "nearly_same" if verdict.better else "same"
    helpful = "b" if "harm" in excluded else "a"
    return {helpful: "harmless_gain", None: "harmless"}.get(verdict.better, "harmless_loss")


def _values(record: ContrastRecord, verdict: Verdict) -> dict[str, Any]:
    """What the sentences on a verdict may name."""
    first, _, second = (verdict.direction or "").partition("_to_")
    places, beyond = (established(verdict, verdict.better, by) for by in (0.0, verdict.min_effect))
    harm = "harm" in excludes(verdict)
    return {
        "a": side_of(record, "a"), "b": side_of(record, "b"), "winner": side_of(record, verdict.better),
        "first": side_of(record, first), "second": side_of(record, second), "metric": metric_of(record.metric),
        "axis": axis_of(record), "low": verdict.points[0].x, "high": verdict.points[-1].x, "level": verdict.level,
        "seeds": verdict.num_seeds, "delta": size_text(verdict.min_effect, record.metric),
        "smallest": size_text(verdict.smallest_effect, record.metric), "xs": listed(map(count, places)),
        "places": _places(record, places), "beyond": _places(record, beyond),
        "does": "raise" if harm else "lower", "opposite": "lowers" if harm else "raises",
        "more": "higher" if harm else "lower", "root": verdict.root, "interval": span(*(verdict.interval or (0, 0))),
        "would_decide": say("never" if verdict.more_seeds is None else "more_seeds", seeds_needed=verdict.more_seeds),
    }  # fmt: skip


def _places(record: ContrastRecord, x: Sequence[float]) -> str:
    return f"{listed(map(count, x))} {axis_of(record)}"


def answer(record: ContrastRecord) -> str:
    """The verdict of a contrast in a sentence or two."""
    return " ".join(sentences(record))


def sentences(record: ContrastRecord) -> list[str]:
    """The same sentence by sentence: what is established, then what is open or how to decide it."""
    verdict = record.verdict
    if verdict is None:
        return [say("no_verdict", metric=metric_of(record.metric), reason=record.reason)]
    values = _values(record, verdict)
    told = [fill(text, **values) for text in TABLE["states"][state_of(verdict)]["answer"]]
    ends, laws = verdict.interval, verdict.law_interval
    if ends and laws and laws[1] / laws[0] < ends[1] / ends[0]:  # laws sharpen a root, or are not worth a sentence
        told.append(say("law_root", root=verdict.law_root, interval=span(*laws)))
    return told


def brief(record: ContrastRecord, verdict: Verdict | None = None) -> str:
    """A verdict in a few words, for tables; of `verdict` where a part of the record's seeds gave it."""
    verdict = verdict or record.verdict
    if verdict is None:
        return say("no_verdict_brief", reason=record.reason)
    return fill(TABLE["states"][state_of(verdict)]["brief"], **_values(record, verdict))


def advice(record: ContrastRecord, x: float, outside: Sequence[str] = ()) -> str:
    """What a verdict means for one x, and whether the point lies outside what was measured."""
    verdict = record.verdict
    if verdict is None:
        return answer(record)
    values, state = _values(record, verdict) | {"x": x}, state_of(verdict)
    if state == "crossing" and verdict.interval is not None:
        low, high = verdict.interval
        side, winner = ("below", "first") if x < low else ("above", "second")
        values |= {"winner": values[winner], "side": side}
        values["at"] = say("inside" if low <= x <= high else "beside", **values)
    told = fill(TABLE["states"][state]["advice"], **values)
    return told + (say("outside", axes=listed(outside)) if outside else "")


def evidence(record: ContrastRecord) -> Iterator[str]:
    """What stands beside a verdict: the measured means, what the design finds, and its repetition."""
    verdict = record.verdict
    if verdict is None:
        return
    values = _values(record, verdict)
    means = listed(f"{effect(p.delta, record.metric)} at {count(p.x)}" for p in verdict.points)
    unit = " in points" if is_rate(record.metric) else ""
    yield say("measured", **values | {"pooling": stratum(record), "unit": unit, "values": means})
    power = " ".join(_power(record, verdict, values))
    yield from [power] if power else []
    if record.halves:
        told = "; ".join(f"{_seeds(half.seeds)}: {brief(record, half.verdict)}" for half in record.halves)
        held = "" if record.held is None else say("held", held=record.held, level=verdict.level)
        yield say("halves", halves=told) + held
    else:
        yield say("no_halves", **values)


def _seeds(seeds: Sequence[str]) -> str:
    """All of a few seeds; the ends of many."""
    if len(seeds) <= MOST_SEEDS_NAMED:
        return f"seeds {listed(seeds)}"
    return f"{len(seeds)} seeds ({seeds[0]}, {seeds[1]}, … {seeds[-1]})"


def _power(record: ContrastRecord, verdict: Verdict, values: dict[str, Any]) -> Iterator[str]:
    """What the design finds, unless the answer said it, and what would halve it."""
    if verdict.kind != "undecided":
        yield say("finds", **values)
    power = record.power
    if power is not None and power.width_octaves is not None:
        yield say("width", width=power.width_octaves)
    if power is not None and (ways := _ways(power)):
        yield say("half", ways=ways)


def _ways(power: Power, *, with_cost: bool = False) -> str:
    """What halves the smallest effect that a design finds; empty where nothing does."""
    ways = (
        ("half_seeds", power.seeds_for_half, power.cost_of_seeds),
        ("half_finetunes", power.finetunes_for_half, power.cost_of_finetunes),
    )
    return " or ".join(
        say(code, number=number) + (say("plan_cost", price=price) if with_cost and price is not None else "")
        for code, number, price in ways if number is not None
    )  # fmt: skip


def noise_text(record: ContrastRecord) -> str:
    """How large the noise of a contrast is and what could not be told apart."""
    noise = record.noise
    if noise is None:
        return ""
    hidden: dict[str, list[str]] = {}
    for first, second in (code.split("_in_") for code in noise.confounded):
        hidden.setdefault(COMPONENTS.get(second, second), []).append(COMPONENTS.get(first, first))
    apart = "".join(say("confounded", first=listed(names), second=name) for name, names in hidden.items())
    return say("noise", sd=size_text(noise.sd, record.metric)) + apart


def family_text(contrasts: Sequence[ContrastRecord]) -> str:
    """How many questions a page asks, and what its intervals pay for that."""
    verdicts = [record.verdict for record in contrasts if record.verdict is not None and not record.main]
    widest = max(verdicts, key=lambda verdict: verdict.family, default=None)
    return say("family", count=widest.family, level=widest.level) if widest else ""


def answers(contrasts: Sequence[ContrastRecord]) -> Iterator[str]:
    """The verdicts on the pooled contrasts, the main one first."""
    pooled = sorted((record for record in contrasts if record.pooled), key=lambda record: not record.main)
    for record in pooled:
        yield say("on", where=where(record, contrasts), what=answer(record))


# What the terminal prints.


def summary(laws: LawsFile, boundary: BoundaryFile) -> str:
    """A screenful; laws.json and boundary.json hold the rest."""
    single = [record for record in boundary.contrasts if not record.pooled]
    lines = [*boundary.answers, *([f"\n{family_text(boundary.contrasts)}"] if single else [])]
    for record in single:
        lines.append(
            f"  {where(record, single):<18} {metric_of(record.metric):<15} {stratum(record):<20} {brief(record)}"
        )
    lines += map(law_text, laws.laws)
    return "\n".join([*lines, *(f"note: {each.text}" for each in (*boundary.notes, *laws.notes))])


def law_text(law: LawRecord) -> str:
    """A law's fit in a line."""
    name = f"  {law.dataset:<18} {metric_of(law.metric):<15} {law.arm:<20} "
    if law.reason:
        return f"{name}no law: {law.reason}"
    params = "  ".join(f"{symbols(key)} {param_text(param)}" for key, param in law.params.items())
    return f"{name}{law.law}, off by {percent(law.residual)}, held out {percent(law.held_out)}: {params}"


def power_lines(power: Power, source: str, slope: float) -> list[str]:
    """What a planned design could tell apart; `source` names the noise, `slope` is the supposed change of ΔE per octave
    at a boundary.
    """
    lines = [say("plan_power", source=source, smallest=size_text(power.smallest_effect, "error_rate"))]
    if power.width_octaves is not None:
        lines.append(say("plan_width", width=power.width_octaves, chance=power.chance_of_crossing,
                         slope=size_text(slope, "error_rate")))  # fmt: skip
    ways = _ways(power, with_cost=True)
    lines += [say("plan_half", ways=ways)] if ways else []
    return [*lines, *([say("plan_best", finetunes=power.best_finetunes)] if power.best_finetunes else [])]
