"""Every sentence of a report, once: verdicts, notes, advice, power, checklist and what the terminal prints.

Says records of `schema`; judges nothing. A sentence follows from the verdict of its record alone, so that no two can
disagree: page, terminal and advice all take them from here.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dbscale.laws import Power, Verdict
from dbscale.report.schema import (
    BoundaryFile,
    ContrastRecord,
    LawRecord,
    LawsFile,
    Note,
    OfSetting,
    ParamRecord,
    established,
    excludes,
)  # fmt: skip

SIDES = {
    "plain": "plain pretraining", "distilled": "distillation", "plain_matched": "plain pretraining at equal cost",
    "self_distilled": "distillation from a teacher of equal size",
}  # fmt: skip
AXES = {
    "upstream_samples": "upstream images", "downstream_samples": "labels", "num_params": "parameters",
    "train_flops": "FLOPs", "upstream_train_flops": "upstream FLOPs",
}  # fmt: skip
METRICS = {"error_rate": "error", "test_loss": "test loss", "upstream_error_rate": "upstream error"}
COMPONENTS = {
    "seed": "seed (images drawn, initialisation)", "teacher": "teacher run", "upstream": "upstream run",
    "interaction": "upstream run × labels", "finetune": "finetune draw", "test_set": "test images",
}  # fmt: skip
SYMBOLS = (
    ("E_inf", "E∞"), ("^-alpha", "^(−α)"), ("^-beta", "^(−β)"), ("^-gamma", "^(−γ)"), ("alpha", "α"), ("beta", "β"),
    ("gamma", "γ"), ("*", "·"), (" - ", " − "), ("E0", "E₀"),
)  # fmt: skip

SENTENCES = {
    # Verdicts. {first} and {second} are the sides at small and at large x, {winner} is the better side.
    "on": "On {where}: {what}",
    "crossing": "{first} gives the lower {metric} up to about {root:about} {axis} ({level:percent0} interval {interval}); "
    "with more, {second} does.",
    "several": "{first} gives the lower {metric} just below about {root:about} {axis} ({level:percent0} interval "
    "{interval}) and {second} just above; over the whole range the sign turns more than once.",
    "law_root": "The fitted laws put the turn at about {root:about} ({interval}).",
    "one_sign": "{winner} gives the lower {metric}: by more than {delta} at {places}, and at no measured point from "
    "{low:count} to {high:count} {axis} a higher one by more than that.",
    "same": "{a} and {b} give the same {metric} to within {delta} at every measured point from {low:count} to "
    "{high:count} {axis}",
    "one_side": "{b} does not {does} {metric} by more than {delta} at any measured point from {low:count} to {high:count} "
    "{axis}",
    "open": "; whether it {other} it at all is open.",
    "small": "; it {other} it at {places}, though perhaps by less than that.",
    "smaller": "; at {places} {winner} gives the lower one, by less than that.",
    "end": ".",
    "undecided": "whether {b} or {a} gives the lower {metric} from {low:count} to {high:count} {axis} is undecided.",
    "finds": "{seeds:seeds} find a difference of {smallest} four times in five.",
    "partly": "Established so far: {winner} gives the lower one at {places}.",
    "more_seeds": "About {more:count} seeds in all would decide it, if the measured means are right.",
    "never": "No number of seeds up to 1,000 is sure to decide it.",
    "no_verdict": "there is no verdict, because {reason}",
    # The same in a few words.
    "brief_none": "no verdict: {reason}",
    "brief_crossing": "{first} lower up to {root:about} ({interval}), then {second}",
    "brief_several": "turns more than once, at {root:about} ({interval}) from {first} to {second} lower",
    "brief_one_sign": "{winner} lower",
    "brief_same": "the same to within {delta}",
    "brief_harm": "{b} at most {delta} higher",
    "brief_gain": "{b} at most {delta} lower",
    "brief_undecided": "undecided",
    "brief_partly": "undecided; {winner} lower at {xs}",
    # What stands beside a verdict.
    "measured": "Measured differences{unit} ({pooling}, {seeds:seeds}): {values} {axis}.",
    "family": "The main verdict answers the study’s one question. The other {count} share one family: all their "
    "intervals together hold with {level:percent0} probability.",
    "halves": "The same question put to two disjoint halves of the seeds: {halves}.",
    "held": " {held:percent0} of one half’s {level:percent0} intervals, widened for the other half’s own noise, hold the "
    "other’s mean.",
    "no_halves": "A repetition on two disjoint halves needs at least four seeds; there are {seeds:count}.",
    "width": " The interval of a boundary would span about {width:.1f} octaves.",
    "half_seeds": " {seeds:count} seeds in all would find half of that",
    "half_finetunes": ", and so would {finetunes:count} finetunes of each upstream run",
    "noise": "One difference of one seed, student and number of labels scatters by {sd} (standard deviation).",
    "confounded": " These runs do not tell {first} from {second}: the two are counted together.",
    # Notes on the verdicts.
    "incomplete_pairs": "On {where} {count:count} incomplete sets of pairs are left out of the pooled means.",
    "several_crossings": "On {where} the sign turns more than once; the boundary given is the last turn.",
    "within_min_effect": "On {where} a sign is established, but no difference beyond {delta} is.",
    "single_seed_points": "On {where} some points rest on one seed: their intervals borrow the spread of the others.",
    "laws_do_not_cross": "On {where} the fitted laws do not cross, although the measured points do: the laws misfit.",
    "laws_disagree": "On {where} the laws’ root lies outside the interval from the measured points: the laws misfit.",
    # Notes on the regime: limited by data, or by steps?
    "not_falling": "Upstream error of {who} does not fall from {before:count} to {after:count} upstream images "
    "({first:percent} to {last:percent}): training there may be limited by steps rather than by data.",
    "teacher_flat": "Upstream error of {who} does not fall from {before:count} to {after:count} upstream images "
    "({first:percent} to {last:percent}): it has learnt what its size and its number of steps allow.",
    "steepest_last": "Upstream error of {who} falls fastest at the last step, from {first:percent} to {last:percent} at "
    "{after:count} upstream images: training has not begun to level off, and on such a slope the luck of a seed is largest.",
    "near_chance": "{who} errs on {error:percent} of {where} at {size:count} upstream images, close to chance: "
    "comparisons there say little.",
    "same_steps": "Upstream runs of {sizes} images all saw about {seen:about} images in training: a floor of steps, not "
    "the data, sets how long they train.",
    # Notes on the laws.
    "misfit": "On {where} the laws miss {metric} of the {arm} arm by {size:percent0}, {times:.1f} times the spread between "
    "seeds: take their curves as a guide only.",
    "far_out": "Fitted without the largest number of upstream images, the laws miss {metric} of the {arm} arm there by "
    "{size:percent0} on {where}: do not extrapolate them.",
    "two_values": "On {where} {axis} were measured at two values only: no law is determined along them.",
    "no_law": "No law could be fitted to {metric} of the {arm} arm on {where}: {reason}",
    # Notes on what is missing.
    "missing": "{missing:count} of {total:count} points have no result ({states}); everything here rests on the others.",
    "gap": "No {arm} run on {dataset}{sizes} has finished.",
    "nothing": "No finished run with upstream data yet: there is nothing to conclude.",
    # Advice for one point.
    "advise_side": "{winner}: {x:about} {axis} lie {side} the boundary, about {root:about} ({interval}).",
    "advise_several": "no advice: which side gives the lower {metric} turns more than once over the measured range.",
    "advise_inside": "either side may win: {x:about} {axis} lie inside the interval of the boundary, {interval}.",
    "advise_one_sign": "{winner}: it gives the lower {metric}, somewhere by more than {delta} and nowhere a higher one by "
    "more than that.",
    "advise_same": "either: the two differ by less than {delta}.",
    "advise_helps": "{winner}: it gives the lower {metric} at {places}, and nowhere a higher one by more than {delta}.",
    "advise_harmless": "no advice: {b} does not {does} {metric} by more than {delta}, and whether it {other} it is open.",
    "advise_small": "no advice: {winner} gives the lower {metric} at {places}, but by less than {delta}.",
    "advise_undecided": "no advice: which side gives the lower {metric} is undecided.",
    "outside": " This point is an extrapolation: {axes}.",
    "outside_axis": "{value:about} {axis} are {side} the measured {low:about} to {high:about}",
    "laws_alone": "  (each arm’s laws alone; the verdict rests on pairs, which tell the arms apart more finely)",
    # What it cost.
    "no_cost": "The table does not say what its {count:count} runs cost.",
    "cost": "{done:count} of {cells:count} cells took {time} of device time",
    "cost_so_far": "; the plan predicts {predicted} for all of them.",
    "cost_share": ", {share:percent0} of the {predicted} that the plan predicted.",
    # Power of a plan.
    "plan_power": "this design finds a ΔE of {smallest} at one D_p four times in five (noise of {source})",
    "plan_width": "it finds a boundary where ΔE turns by {slope} per octave with {chance:percent0} probability, to within "
    "about {width:.1f} octaves",
    "plan_half": "to find half as small a ΔE takes {ways}",
    "plan_seeds": "{number:count} seeds{cost}",
    "plan_finetunes": "{number:count} finetunes of each upstream run{cost}",
    "plan_best": "the most accuracy per device-hour: {finetunes:count} finetunes of each upstream run",
    "plan_nothing": "this design finds nothing: {reason}",
}


CHECKLIST = (
    ("The law", (
        ("Which forms are considered?", "{tried}"),
        ("Which is used, and why?", "an average, weighted by how well each law foretold runs that it had not seen; named "
         "where one must be: {forms}"),
        ("What are the variables?", "D_p unique upstream images, M parameters with the downstream head, D_f unique labelled "
         "downstream images"),
        ("What is predicted?", "top-1 error and test loss on the downstream test split after finetuning"),
        ("Are the arms tied?", "no: each arm has its laws; resamples are paired"),
    )),
    ("Training", (
        ("How many models, of which sizes?", "{students}"),
        ("On how much data?", "{data}; seeds {seeds}"),
        ("Are images repeated in training?", "upstream runs see each image {epochs}; the laws speak of this schedule alone"),
        ("Which architecture and optimiser?", "{optimiser}"),
        ("How were hyperparameters chosen?", "fixed per stage over all sizes, as the grid states; not tuned per point"),
        ("How is compute counted?", "multiply-adds as two operations, backward as two forwards, the teacher’s forward "
         "included"),
    )),
    ("What was measured", (
        ("Which metric, on which data?", "{datasets}; test sets of {test_sizes} images"),
        ("How many checkpoints per run?", "one: the last; no intermediate checkpoint enters a fit"),
        ("Are runs left out?", "{left_out}"),
        ("Are runs and code available?", "rows.csv holds every run; `dbscale report --table rows.csv` makes this page "
         "from it"),
    )),
    ("The fit and the verdict", (
        ("How many points?", "{points}"),
        ("How uncertain?", "{level} intervals: of laws from resampled upstream runs, the choice among laws and their "
         "misfit; of differences from t intervals with moderated variances"),
        ("How was it validated?", "the largest D_p held out: root mean square log error {held_out}"),
        ("How many questions were asked?", "{verdicts} verdicts; the main one is judged alone, the others share one family"),
        ("Is any claim extrapolated?", "no verdict is; what twice of a lever would do is, and is left out where the laws "
         "foretell poorly"),
    )),
)  # fmt: skip
"""Part, then question and answer, worded anew after the survey of arXiv 2502.18969."""
UNKNOWN = "not recorded in rows.csv; see the grid’s YAML"


class _Formatter(string.Formatter):
    """`str.format` with formats for counts, shares and lists."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec in FORMATS:
            return FORMATS[format_spec](value)
        return super().format_field(value, format_spec)


def say(code: str, **values: Any) -> str:
    """A sentence of the table above."""
    return _Formatter().format(SENTENCES[code], **values)


def note(code: str, **values: Any) -> Note:
    return Note(code=code, text=say(code, **values))


# Numbers and names as people say them.

NAMELESS = 1e11


def about(value: float) -> str:
    """A count as one would say it: two significant digits, thousands apart."""
    return count(float(f"{value:.2g}")) if value >= 10 else f"{value:.2g}"


def count(value: float) -> str:
    """Exact where it is whole and has a name; FLOPs as 1e15."""
    if value >= NAMELESS or not float(value).is_integer():
        return f"{value:.3g}".replace("e+", "e")
    return f"{value:,.0f}"


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def listed(items: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = list(items) or [""]
    return f"{', '.join(most)} and {last}" if most else last


def seeds_text(number: int) -> str:
    return "one seed" if number == 1 else f"{number:,} seeds"


FORMATS = {
    "about": about, "count": count, "percent": percent, "percent0": lambda share: percent(share, 0), "seeds": seeds_text,
    "cap": lambda text: text[:1].upper() + text[1:],
}  # fmt: skip


def is_rate(metric: str) -> bool:
    """Whether a metric is a share, of which differences are said in percentage points."""
    return metric.endswith(("error_rate", "_error", "accuracy"))


def size_text(value: float, metric: str) -> str:
    """How large a difference is, without a sign."""
    return f"{100 * abs(value):.2g} points" if is_rate(metric) else f"{abs(value):.2g}"


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


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return "–"
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def side_of(record: ContrastRecord, side: str | None) -> str:
    """What a side of a contrast is called."""
    value = record.b if side == "b" else record.a
    return SIDES.get(value, value) if record.column == "arm" else f"{record.column} {value}"


def axis_of(record: ContrastRecord) -> str:
    return AXES.get(record.along, record.along.replace("_", " "))


def metric_of(metric: str) -> str:
    return METRICS.get(metric, metric.replace("_", " "))


def stratum(record: ContrastRecord) -> str:
    """Of which student and D_f a contrast is."""
    if record.pooled:
        return "pooled" if record.column == "arm" else "all pairs"
    parts = [record.student or "all students"]
    if record.downstream_samples is not None:
        parts.append(f"{record.downstream_samples:,} labels")
    return ", ".join(parts)


def _places(record: ContrastRecord, x: Sequence[float]) -> str:
    return f"{listed(map(count, x))} {axis_of(record)}"


# Verdicts.


def _values(record: ContrastRecord, verdict: Verdict) -> dict[str, Any]:
    """What the sentences on a verdict may name."""
    first, _, second = (verdict.direction or "").partition("_to_")
    return {
        "a": side_of(record, "a"), "b": side_of(record, "b"), "winner": side_of(record, verdict.better),
        "first": side_of(record, first), "second": side_of(record, second), "metric": metric_of(record.metric),
        "axis": axis_of(record), "low": verdict.points[0].x, "high": verdict.points[-1].x, "level": verdict.level,
        "seeds": verdict.num_seeds, "delta": size_text(verdict.min_effect, record.metric),
        "smallest": size_text(verdict.smallest_effect, record.metric),
        "places": _places(record, established(verdict, verdict.better)),
    }  # fmt: skip


def answer(record: ContrastRecord) -> str:
    """The verdict of a contrast in a sentence or two."""
    return " ".join(sentences(record))


def sentences(record: ContrastRecord) -> list[str]:
    """The same sentence by sentence: what is established, then what is open or how to decide it."""
    verdict = record.verdict
    if verdict is None:
        return [say("no_verdict", reason=record.reason)]
    values = _values(record, verdict)
    if verdict.kind == "crossing":
        code = "several" if turns_again(verdict) else "crossing"
        law = [say("law_root", **_root(verdict.law_root, verdict.law_interval))] if verdict.law_root else []
        return [say(code, **values, **_root(verdict.root, verdict.interval)), *law]
    if verdict.kind == "one_sign":
        beyond = _places(record, established(verdict, verdict.better, verdict.min_effect))
        return [say("one_sign", **values | {"places": beyond})]
    return [_excluded(verdict, values)] if verdict.kind == "excluded" else _undecided(verdict, values)


def _root(root: float | None, interval: tuple[float, float] | None) -> dict[str, Any]:
    return {"root": root, "interval": " to ".join(map(about, interval or ()))}


def turns_again(verdict: Verdict) -> bool:
    """Whether Δ has more than the one turn that `root` names."""
    return "several_crossings" in verdict.notes


def _excluded(verdict: Verdict, values: dict[str, Any]) -> str:
    """What is excluded, and what is known of the rest."""
    if len(excludes(verdict)) == 2:
        return say("same", **values) + (say("smaller", **values) if verdict.better else say("end"))
    helpful = "b" if "harm" in excludes(verdict) else "a"
    rest = {helpful: "small", None: "open"}.get(verdict.better, "smaller")
    return say("one_side", **values, **_verbs(verdict)) + say(rest, **values, **_verbs(verdict))


def _undecided(verdict: Verdict, values: dict[str, Any]) -> list[str]:
    partly = [say("partly", **values)] if verdict.better else []
    more = say("never") if verdict.more_seeds is None else say("more_seeds", more=verdict.more_seeds)
    return [say("undecided", **values), *partly, say("finds", **values), more]


def brief(record: ContrastRecord, verdict: Verdict | None = None) -> str:
    """A verdict in a few words, for tables; of `verdict` where a part of the record's seeds gave it."""
    verdict = verdict or record.verdict
    if verdict is None:
        return say("brief_none", reason=record.reason)
    values = _values(record, verdict)
    if verdict.kind == "crossing":
        code = "brief_several" if turns_again(verdict) else "brief_crossing"
        return say(code, **values, **_root(verdict.root, verdict.interval))
    if verdict.kind == "undecided" and verdict.better:
        return say("brief_partly", **values, xs=listed(map(count, established(verdict, verdict.better))))
    if verdict.kind in ("one_sign", "undecided"):
        return say(f"brief_{verdict.kind}", **values)
    excluded = excludes(verdict)
    return say("brief_same" if len(excluded) == 2 else f"brief_{min(excluded)}", **values)


def evidence(record: ContrastRecord) -> Iterator[str]:
    """What stands beside a verdict: the measured means, what the design finds, and its repetition."""
    verdict = record.verdict
    if verdict is None:
        return
    means = listed(f"{effect(p.delta, record.metric)} at {count(p.x)}" for p in verdict.points)
    unit = " in points" if is_rate(record.metric) else ""
    yield say(
        "measured", pooling=stratum(record), seeds=verdict.num_seeds, unit=unit, values=means, axis=axis_of(record)
    )
    yield _power(record, verdict)
    if record.halves:
        told = "; ".join(f"seeds {listed(half.seeds)}: {brief(record, half.verdict)}" for half in record.halves)
        held = "" if record.held is None else say("held", held=record.held, level=verdict.level)
        yield say("halves", halves=told) + held
    else:
        yield say("no_halves", seeds=verdict.num_seeds)


def _power(record: ContrastRecord, verdict: Verdict) -> str:
    """What the design finds, and what would halve it."""
    text, power = say("finds", **_values(record, verdict)), record.power
    if power is None:
        return text
    if power.width_octaves is not None:
        text += say("width", width=power.width_octaves)
    if power.seeds_for_half is not None:
        text += say("half_seeds", seeds=power.seeds_for_half)
        text += say("half_finetunes", finetunes=power.finetunes_for_half) if power.finetunes_for_half else ""
        text += say("end")
    return text


def noise_text(record: ContrastRecord) -> str:
    """How large the noise of a contrast is and what could not be told apart."""
    noise = record.noise
    if noise is None:
        return ""
    pairs = (code.split("_in_") for code in noise.confounded)
    names = [(COMPONENTS.get(a, a), COMPONENTS.get(b, b)) for a, b in pairs]
    apart = "".join(say("confounded", first=first, second=second) for first, second in names)
    return say("noise", sd=size_text(noise.sd, record.metric)) + apart


def family_text(contrasts: Sequence[ContrastRecord]) -> str:
    """How many questions a page asks, and what its intervals pay for that."""
    verdicts = [record.verdict for record in contrasts if record.verdict is not None and not record.main]
    return say("family", count=verdicts[0].family, level=verdicts[0].level) if verdicts else ""


def where(record: OfSetting, all_records: Iterable[OfSetting] = ()) -> str:
    """Names the test set, and of variant and upstream set what differs among `all_records`."""
    others, words = list(all_records), [record.dataset]
    if len({other.upstream_dataset for other in others}) > 1 and record.upstream_dataset != record.dataset:
        words.append(f"from {record.upstream_dataset}")
    if len({other.variant for other in others}) > 1:
        words.append(f"({record.variant})")
    return " ".join(words)


def answers(contrasts: Sequence[ContrastRecord]) -> Iterator[str]:
    """The verdicts on the pooled contrasts, the main one first."""
    pooled = sorted((record for record in contrasts if record.pooled), key=lambda record: not record.main)
    for record in pooled:
        yield say("on", where=where(record, contrasts), what=answer(record))


def advice(record: ContrastRecord, x: float, outside: Sequence[str] = ()) -> str:
    """What a verdict means for one x, and whether the point lies outside what was measured."""
    verdict = record.verdict
    if verdict is None:
        return answer(record)
    return _advice(verdict, _values(record, verdict), x) + (say("outside", axes=listed(outside)) if outside else "")


def _advice(verdict: Verdict, values: dict[str, Any], x: float) -> str:
    if turns_again(verdict):
        return say("advise_several", **values)
    if verdict.interval is not None:
        root = _root(verdict.root, verdict.interval)
        if verdict.interval[0] <= x <= verdict.interval[1]:
            return say("advise_inside", **values, **root, x=x)
        side, winner = ("below", "first") if x < verdict.interval[0] else ("above", "second")
        return say("advise_side", **values | {"winner": values[winner]}, **root, x=x, side=side)
    return say(_advice_code(verdict), **values, **_verbs(verdict))


def _advice_code(verdict: Verdict) -> str:
    excluded = excludes(verdict)
    if verdict.kind != "excluded":
        return f"advise_{verdict.kind}"
    if len(excluded) == 2:
        return "advise_same"
    helpful = "b" if "harm" in excluded else "a"
    return {helpful: "advise_helps", None: "advise_harmless"}.get(verdict.better, "advise_small")


def _verbs(verdict: Verdict) -> dict[str, str]:
    """What an exclusion on one side says that B does not do beyond δ, and what it leaves open."""
    harm = "harm" in excludes(verdict)
    return {"does": "raise", "other": "lowers"} if harm else {"does": "lower", "other": "raises"}


def checklist(**facts: str) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Parts with their questions and answers; an answer whose fact is empty says that it is not recorded."""

    def filled(text: str) -> str:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name]
        return text.format(**facts) if all(facts[name] for name in names) else UNKNOWN

    return tuple((title, tuple((question, filled(text)) for question, text in part)) for title, part in CHECKLIST)


# What the terminal prints.


def summary(laws: LawsFile, boundary: BoundaryFile) -> str:
    """A screenful; laws.json and boundary.json hold the rest."""
    return "\n".join(_summary(laws, boundary))


def _summary(laws: LawsFile, boundary: BoundaryFile) -> Iterator[str]:
    yield from boundary.answers
    single = [record for record in boundary.contrasts if not record.pooled]
    if single:
        yield f"\n{family_text(boundary.contrasts)}"
    for record in single:
        yield f"  {where(record, single):<18} {metric_of(record.metric):<15} {stratum(record):<20} {brief(record)}"
    for law in laws.laws:
        yield f"{law_text(law)}"
    yield from (f"note: {each.text}" for each in (*boundary.notes, *laws.notes))


def law_text(law: LawRecord) -> str:
    """A law's fit in a line."""
    name = f"  {law.dataset:<18} {metric_of(law.metric):<15} {law.arm:<20} "
    if law.reason:
        return f"{name}no law: {law.reason}"
    params = "  ".join(f"{symbols(key)} {param_text(param)}" for key, param in law.params.items())
    return f"{name}{law.law}, off by {percent(law.residual)}, held out {percent(law.held_out)}: {params}"


# Power of a plan.


def power_lines(power: Power, source: str, slope: float) -> list[str]:
    """What a planned design could tell apart ; `source` names the noise, `slope` is the supposed
    change of ΔE per octave at a boundary.
    """
    lines = [say("plan_power", source=source, smallest=size_text(power.smallest_effect, "error_rate"))]
    if power.width_octaves is not None:
        lines.append(say("plan_width", width=power.width_octaves, chance=power.chance_of_crossing,
                         slope=size_text(slope, "error_rate")))  # fmt: skip
    ways = [
        say(code, number=number, cost="" if price is None else f" ({price:.1f} times the device time)")
        for code, number, price in (
            ("plan_seeds", power.seeds_for_half, power.cost_of_seeds),
            ("plan_finetunes", power.finetunes_for_half, power.cost_of_finetunes),
        ) if number is not None
    ]  # fmt: skip
    lines += [say("plan_half", ways=" or ".join(ways))] if ways else []
    return [*lines, *([say("plan_best", finetunes=power.best_finetunes)] if power.best_finetunes else [])]
