"""Every kind of sentence against verdicts built by hand, and no two that disagree."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbscale.laws import boundary as laws_boundary
from dbscale.report import words
from dbscale.report.schema import BoundaryFile, HalfRecord, LawRecord, LawsFile, Note, ParamRecord
from dbscale.report.table import Run, RunTable
from tests.report.verdicts import HELPS_THEN_HURTS, make_contrast, make_noise, make_power, make_verdict

REVERSED = tuple((x, -delta, half) for x, delta, half in HELPS_THEN_HURTS)
HELPS = ((1000.0, 0.05, 0.02), (4000.0, 0.01, 0.012))
SAME = ((1000.0, 0.001, 0.003), (4000.0, -0.001, 0.003))
SMALL_GAIN = ((1000.0, 0.003, 0.001), (4000.0, 0.0, 0.003))
NO_HARM = ((1000.0, 0.01, 0.012), (4000.0, 0.0, 0.004))
NO_HARM_SOME_GAIN = ((1000.0, 0.01, 0.009), (4000.0, 0.0, 0.004))
NO_HARM_SOME_LOSS = ((1000.0, -0.003, 0.001), (4000.0, 0.01, 0.012))
OPEN = ((1000.0, 0.01, 0.03), (4000.0, -0.01, 0.03))
OPEN_SOME_GAIN = ((1000.0, 0.05, 0.02), (4000.0, -0.01, 0.03))


def mirrored(points):
    return tuple((x, -delta, half) for x, delta, half in points)


ANSWERS = [
    (HELPS_THEN_HURTS,
     "distillation gives the lower error up to about 4,000 upstream images (90 % interval 2,700 to 6,000); with more, "
     "plain pretraining does."),
    (REVERSED,
     "plain pretraining gives the lower error up to about 4,000 upstream images (90 % interval 2,700 to 6,000); with "
     "more, distillation does."),
    (HELPS,
     "distillation gives the lower error: by more than 0.5 points at 1,000 upstream images, and at no measured point from "
     "1,000 to 4,000 upstream images a higher one by more than that."),
    (mirrored(HELPS),
     "plain pretraining gives the lower error: by more than 0.5 points at 1,000 upstream images, and at no measured point "
     "from 1,000 to 4,000 upstream images a higher one by more than that."),
    (SAME,
     "plain pretraining and distillation give the same error to within 0.5 points at every measured point from 1,000 to "
     "4,000 upstream images."),
    (SMALL_GAIN,
     "plain pretraining and distillation give the same error to within 0.5 points at every measured point from 1,000 to "
     "4,000 upstream images; at 1,000 upstream images distillation gives the lower one, by less than that."),
    (NO_HARM,
     "distillation does not raise error by more than 0.5 points at any measured point from 1,000 to 4,000 upstream "
     "images; whether it lowers it at all is open."),
    (NO_HARM_SOME_GAIN,
     "distillation does not raise error by more than 0.5 points at any measured point from 1,000 to 4,000 upstream "
     "images; it lowers it at 1,000 upstream images, though perhaps by less than that."),
    (NO_HARM_SOME_LOSS,
     "distillation does not raise error by more than 0.5 points at any measured point from 1,000 to 4,000 upstream "
     "images; at 1,000 upstream images plain pretraining gives the lower one, by less than that."),
    (mirrored(NO_HARM),
     "distillation does not lower error by more than 0.5 points at any measured point from 1,000 to 4,000 upstream "
     "images; whether it raises it at all is open."),
    (mirrored(NO_HARM_SOME_GAIN),
     "distillation does not lower error by more than 0.5 points at any measured point from 1,000 to 4,000 upstream "
     "images; it raises it at 1,000 upstream images, though perhaps by less than that."),
    (OPEN,
     "whether distillation or plain pretraining gives the lower error from 1,000 to 4,000 upstream images is undecided. "
     "8 seeds find a difference of 2.1 points four times in five. About 24 seeds in all would decide it, if the measured "
     "means are right."),
    (OPEN_SOME_GAIN,
     "whether distillation or plain pretraining gives the lower error from 1,000 to 4,000 upstream images is undecided. "
     "Established so far: distillation gives the lower one at 1,000 upstream images. 8 seeds find a difference of 2.1 "
     "points four times in five. About 24 seeds in all would decide it, if the measured means are right."),
]  # fmt: skip


@pytest.mark.parametrize(("points", "expected"), ANSWERS)
def test_a_verdict_is_said_as_it_is(points, expected):
    record = make_contrast(make_verdict(points))
    assert words.answer(record) == expected
    assert list(words.answers([record])) == [f"On digits: {expected}"]


def test_the_range_runs_from_the_first_point_to_the_last():
    record = make_contrast(make_verdict([(1000, 0.0, 0.001), (2000, 0.0, 0.001), (4000, 0.0, 0.001)]))
    assert words.answer(record).endswith("at every measured point from 1,000 to 4,000 upstream images.")


def test_a_sentence_begins_with_a_capital_and_keeps_the_rest():
    assert [words.cap(text) for text in ("", "on MNIST", "Δ of E")] == ["", "On MNIST", "Δ of E"]


BRIEF = [
    (HELPS_THEN_HURTS, "distillation lower up to 4,000 (2,700 to 6,000), then plain pretraining"),
    (HELPS, "distillation lower"),
    (SAME, "the same to within 0.5 points"),
    (NO_HARM, "distillation at most 0.5 points higher"),
    (mirrored(NO_HARM), "distillation at most 0.5 points lower"),
    (OPEN, "undecided"),
    (OPEN_SOME_GAIN, "undecided; distillation lower at 1,000"),
]


@pytest.mark.parametrize(("points", "expected"), BRIEF)
def test_tables_say_it_in_a_few_words(points, expected):
    assert words.brief(make_contrast(make_verdict(points))) == expected


ADVICE = [
    (HELPS_THEN_HURTS, 2000, "distillation: 2,000 upstream images lie below the boundary, about 4,000 (2,700 to 6,000)."),
    (HELPS_THEN_HURTS, 9000, "plain pretraining: 9,000 upstream images lie above the boundary, about 4,000 (2,700 to "
     "6,000)."),
    (HELPS_THEN_HURTS, 4500, "either side may win: 4,500 upstream images lie inside the interval of the boundary, 2,700 to "
     "6,000."),
    (REVERSED, 2000, "plain pretraining: 2,000 upstream images lie below the boundary, about 4,000 (2,700 to 6,000)."),
    (HELPS, 2000, "distillation: it gives the lower error, somewhere by more than 0.5 points and nowhere a higher one by "
     "more than that."),
    (SAME, 2000, "either: the two differ by less than 0.5 points."),
    (NO_HARM, 2000, "no advice: distillation does not raise error by more than 0.5 points, and whether it lowers it is "
     "open."),
    (mirrored(NO_HARM), 2000, "no advice: distillation does not lower error by more than 0.5 points, and whether it raises "
     "it is open."),
    (NO_HARM_SOME_GAIN, 2000, "distillation: it gives the lower error at 1,000 upstream images, and nowhere a higher one by "
     "more than 0.5 points."),
    (mirrored(NO_HARM_SOME_GAIN), 2000, "plain pretraining: it gives the lower error at 1,000 upstream images, and nowhere "
     "a higher one by more than 0.5 points."),
    (NO_HARM_SOME_LOSS, 2000, "no advice: plain pretraining gives the lower error at 1,000 upstream images, but by less "
     "than 0.5 points."),
    (OPEN_SOME_GAIN, 2000, "no advice: which side gives the lower error is undecided."),
]  # fmt: skip


@pytest.mark.parametrize(("points", "x", "expected"), ADVICE)
def test_advice_follows_from_the_verdict(points, x, expected):
    record = make_contrast(make_verdict(points))
    assert words.advice(record, x) == expected
    outside = words.say("outside_axis", value=5e6, axis="parameters", side="above", span=words.span(50_000, 50_000))
    told = " This point is an extrapolation: 5,000,000 parameters are above the measured 50,000."
    assert words.advice(record, x, (outside,)) == expected + told


def test_a_sign_that_turns_twice_is_no_boundary_to_advise_by():
    twice = make_verdict(((1000.0, -0.05, 0.02), *((4 * x, d, h) for x, d, h in HELPS_THEN_HURTS)),
                         direction="b_to_a", notes=("several_crossings",))  # fmt: skip
    record = make_contrast(twice)
    assert words.answer(record) == (
        "distillation gives the lower error just below about 8,000 upstream images (90 % interval 5,300 to 12,000) and "
        "plain pretraining just above; over the whole range the sign turns more than once, and this is the last turn from "
        "distillation to plain pretraining."
    )
    assert words.brief(record) == (
        "turns more than once, at 8,000 (5,300 to 12,000) from distillation to plain pretraining lower"
    )
    assert words.advice(record, 2000) == (
        "no advice: which side gives the lower error turns more than once over the measured range."
    )


@pytest.mark.parametrize(
    ("ends", "expected"),
    [((2666.7, 6000), "2,700 to 6,000"), ((4010, 4040), "4,010 to 4,040"), ((50_000, 50_000), "50,000"),
     ((0.5, 0.504), "0.5 to 0.504"), ((1e15, 4e15), "1e15 to 4e15"),
     ((0.1, 0.1 + 2**-56), "0.10000000000000001 to 0.10000000000000002")],
)  # fmt: skip
def test_the_ends_of_a_range_are_told_apart(ends, expected):
    assert words.span(*ends) == expected


def test_what_an_undecided_answer_says_its_evidence_does_not_say_again():
    record = make_contrast(make_verdict(OPEN), power=make_power())
    assert "8 seeds find a difference of 2.1 points" in words.answer(record)
    assert list(words.evidence(record))[1] == "To find differences half as small as now takes 30 seeds in all."
    bare = list(words.evidence(make_contrast(make_verdict(OPEN))))
    assert len(bare) == 2 and bare[1].startswith("A repetition on two disjoint halves")


def test_every_sentence_of_the_table_is_said_somewhere():
    source = "".join(
        path.read_text() for path in Path(words.__file__).parent.rglob("*.*") if path.suffix in (".py", ".j2")
    )
    table = Path(words.__file__).parent / "templates" / "sentences.toml"
    for code in words.SENTENCES:
        by_engine = code in words.TABLE["notes"] and code in Path(laws_boundary.__file__).read_text()
        assert by_engine or f'"{code}"' in source or f"{{{code}}}" in table.read_text(), code
    for state, texts in words.TABLE["states"].items():
        assert set(texts) == {"answer", "brief", "advice"} and f'"{state}"' in source


def test_laws_sharpen_a_crossing():
    verdict = make_verdict(HELPS_THEN_HURTS, law_root=5000.0, law_interval=(4500.0, 5600.0), law_name="additive")
    assert words.answer(make_contrast(verdict)).endswith(
        " The fitted laws put the turn at about 5,000 (4,500 to 5,600)."
    )


def test_laws_that_do_not_sharpen_are_not_said():
    verdict = make_verdict(HELPS_THEN_HURTS, law_root=5000.0, law_interval=(2000.0, 8000.0), law_name="additive")
    assert words.answer(make_contrast(verdict)) == ANSWERS[0][1]


@pytest.mark.parametrize("metric", ["error_rate", "test_loss"])
def test_notes_on_a_verdict_name_its_metric(metric):
    codes = ("incomplete_pairs", "single_seed_points", "within_min_effect", "several_crossings", "laws_do_not_cross",
             "laws_disagree")  # fmt: skip
    verdict = make_verdict(HELPS_THEN_HURTS, notes=codes)
    notes = {each.code: each.text for each in words.notes_of(make_contrast(verdict, metric=metric), "digits")}
    assert list(notes) == list(codes)
    for text in notes.values():
        assert words.metric_of(metric) in text and text.startswith("On digits ") and "{" not in text
    assert notes["several_crossings"].endswith("the last turn from distillation to plain pretraining.")


def test_a_study_that_no_seeds_decide_says_so():
    record = make_contrast(make_verdict(OPEN, more_seeds=None))
    assert words.answer(record).endswith("No number of seeds up to 1,000 is sure to decide it.")


def test_no_verdict_gives_its_reason():
    record = make_contrast(None, reason="there is one seed")
    assert words.answer(record) == "there is no verdict on the error, because there is one seed"
    assert words.brief(record) == "no verdict: there is one seed"
    assert words.advice(record, 2000) == words.answer(record)
    assert list(words.evidence(record)) == [] and words.noise_text(record) == ""


def test_any_two_values_of_any_column_can_be_told_apart():
    names = {"column": "model", "a": "vit", "b": "resnet", "along": "train_flops", "metric": "test_loss"}
    record = make_contrast(make_verdict(((1e15, 0.05, 0.02), (4e15, 0.3, 0.1)), min_effect=0.02), **names)
    assert words.answer(record) == (
        "model resnet gives the lower test loss: by more than 0.02 at 1e15 and 4e15 "
        "FLOPs, and at no measured point from 1e15 to 4e15 FLOPs a higher one by more "
        "than that."
    )
    assert next(words.evidence(record)) == (
        "Measured differences (all pairs, 8 seeds): +0.05 at 1e15 and +0.3 at 4e15 FLOPs."
    )


def test_evidence_holds_means_power_and_the_repetition():
    half = make_verdict(HELPS, seeds=2)
    record = make_contrast(
        make_verdict(HELPS_THEN_HURTS), power=make_power(width_octaves=1.26, finetunes_for_half=5), held=0.75,
        halves=(HalfRecord(seeds=("0", "2"), verdict=half), HalfRecord(seeds=("1", "3"), verdict=make_verdict(OPEN))),
    )  # fmt: skip
    assert list(words.evidence(record)) == [
        "Measured differences in points (pooled, 8 seeds): +5.0 at 1,000, +0.0 at 4,000 and −4.0 at 16,000 upstream images.",
        "8 seeds find a difference of 2.1 points four times in five. The interval of a boundary would span about 1.3 "
        "octaves. To find differences half as small as now takes 30 seeds in all or 5 finetunes of each upstream run.",
        "The same question put to two disjoint halves of the seeds: seeds 0 and 2: distillation lower; seeds 1 and 3: "
        "undecided. 75 % of one half’s 90 % intervals, widened for the other half’s own noise, hold the other’s mean.",
    ]


@pytest.mark.parametrize(
    ("num_seeds", "said"),
    [(8, "seeds 0, 1, 2, 3, 4, 5, 6 and 7: undecided"), (9, "9 seeds (0, 1, … 8): undecided")],
)
def test_of_many_seeds_only_the_ends_are_named(num_seeds: int, said: str):
    seeds = tuple(str(seed) for seed in range(num_seeds))
    half = HalfRecord(seeds=seeds, verdict=make_verdict(OPEN))
    *_, last = words.evidence(make_contrast(make_verdict(OPEN), halves=(half, half)))
    assert last == f"The same question put to two disjoint halves of the seeds: {said}; {said}."


@pytest.mark.parametrize(
    ("share", "said"), [(1.0, "over 99 %"), (0.991, "over 99 %"), (0.99, "99 %"), (0.01, "1 %"), (0.0, "under 1 %")]
)
def test_no_design_is_sure(share: float, said: str):
    assert words.chance(share) == said


def test_two_seeds_have_no_halves():
    *_, last = words.evidence(make_contrast(make_verdict(OPEN, seeds=2)))
    assert last == "A repetition on two disjoint halves needs at least four seeds; there are 2."


def test_noise_says_its_size_and_what_is_confounded():
    record = make_contrast(make_verdict(OPEN), noise=make_noise())
    assert words.noise_text(record) == (
        "One difference of one seed, student and number of labels scatters by 5.7 points (standard deviation). These runs "
        "do not tell teacher run from upstream run: they are counted together."
    )
    more = replace(make_noise(), confounded=("teacher_in_upstream", "finetune_in_upstream", "seed_in_test_set"))
    assert words.noise_text(make_contrast(make_verdict(OPEN), noise=more)).endswith(
        " These runs do not tell teacher run and finetune draw from upstream run: they are counted together. These runs do "
        "not tell seed (images drawn, initialisation) from test images: they are counted together."
    )


def test_the_family_is_counted_without_the_main_verdict():
    main = make_contrast(make_verdict(OPEN))
    others = [make_contrast(make_verdict(OPEN, family=2), main=False, student=s, downstream_samples=9) for s in "xy"]
    assert words.family_text([main, *others]) == (
        "The main verdict answers the study’s one question. The other 2 share one family: all their intervals together "
        "hold with 90 % probability."
    )
    assert words.family_text([main]) == ""


@pytest.mark.parametrize(
    ("value", "expected"), [(8123, "8,100"), (97, "97"), (0.1234, "0.12"), (1.26e6, "1,300,000"), (4.44e15, "4.4e15")]
)
def test_counts_are_said_with_two_digits(value, expected):
    assert words.about(value) == expected


@pytest.mark.parametrize(
    ("value", "metric", "size", "signed"),
    [(-0.0123, "error_rate", "1.2 points", "−1.2"), (0.0123, "test_loss", "0.012", "+0.0123"),
     (0.3, "upstream_error_rate", "30 points", "+30.0")],
)  # fmt: skip
def test_shares_are_said_in_points_and_losses_in_their_own_unit(value, metric, size, signed):
    assert words.size_text(value, metric) == size
    assert words.effect(value, metric) == signed


@pytest.mark.parametrize(
    ("value", "metric", "said"),
    [(0.25, "error_rate", "25.0 %"), (1.2345, "test_loss", "1.23"), (None, "test_loss", "–"), (None, "error_rate", "–")],
)  # fmt: skip
def test_values_are_said_in_their_unit(value, metric, said):
    assert words.level_text(value, metric) == said


@pytest.mark.parametrize(
    ("param", "expected"),
    [(ParamRecord(value=0.5, low=0.25, high=None, status="determined"), "0.5 [0.25, open]"),
     (ParamRecord(value=0.0, low=0.0, high=0.45, status="at_bound"), "0 [0, 0.45] (at its bound)"),
     (ParamRecord(value=None, status="not_determined"), "not determined")],
)  # fmt: skip
def test_parameters_that_the_table_leaves_open_have_no_value(param, expected):
    assert words.param_text(param) == expected


def test_what_an_error_is_is_said_where_it_is_not_top_1():
    runs = [Run(variant="base", arm="plain", student="h2", num_params=1, upstream_samples=1, dataset=task, seed=0, task=task,
                downstream_samples=1, error_rate=0.5) for task in ("detection", "classification", "detection")]  # fmt: skip
    (told,) = words.task_notes(RunTable(tuple(runs)))
    assert told.startswith("On detection the error is 1 − mAP")
    assert words.predicted(RunTable(tuple(runs))).endswith(" and top-1 error rate")


@pytest.mark.parametrize(("items", "expected"), [([], ""), (["a"], "a"), (["a", "b", "c"], "a, b and c")])
def test_lists_end_with_and(items, expected):
    assert words.listed(items) == expected


def test_records_are_named_by_what_tells_them_apart():
    here = make_contrast(None)
    other = make_contrast(None, upstream_dataset="photos", variant="large")
    assert words.where(here, [here]) == "digits"
    assert words.where(other, [here, other]) == "digits from photos (large)"
    assert words.stratum(make_contrast(None, student="h2", downstream_samples=1000)) == "h2, 1,000 labels"


def test_the_terminal_shows_answers_verdicts_laws_and_notes():
    main = make_contrast(make_verdict(OPEN))
    single = make_contrast(make_verdict(HELPS, family=1), main=False, student="h2", downstream_samples=100)
    boundary = BoundaryFile(grid="g", source="s", level=0.9, min_effect=0.005, answers=("On digits: …",),
                            contrasts=(main, single), notes=(Note(code="x", text="Beware."),))  # fmt: skip
    params = {"alpha": ParamRecord(value=0.5, low=0.4, high=0.6, status="determined")}
    law = LawRecord(dataset="digits", metric="error_rate", arm="plain", num_runs=9, law="power", params=params,
                    residual=0.05)  # fmt: skip
    unfitted = LawRecord(dataset="digits", metric="test_loss", arm="plain", num_runs=2, reason="too few runs")
    laws = LawsFile(grid="g", source="s", level=0.9, num_draws=9, seed=0, laws=(law, unfitted), curves=(),
                    predictions=(), transfer=(), levers=(), predictors=(), notes=())  # fmt: skip
    lines = [re.sub(" +", " ", line).strip() for line in words.summary(laws, boundary).splitlines()]
    assert lines == [
        "On digits: …", "", words.family_text([main, single]), "digits error h2, 100 labels distillation lower",
        "digits error plain power, off by 5.0 %, held out –: α 0.5 [0.4, 0.6]",
        "digits test loss plain no law: too few runs", "note: Beware.",
    ]  # fmt: skip


def test_a_plan_says_what_it_finds_and_what_more_would_cost():
    power = make_power(width_octaves=0.8, chance_of_crossing=0.95, cost_of_seeds=3.75, finetunes_for_half=6,
                       cost_of_finetunes=1.5, best_finetunes=3)  # fmt: skip
    assert words.power_lines(power, "the rows at hand", 0.02) == [
        "this design finds a ΔE of 2.1 points at one D_p four times in five (noise of the rows at hand)",
        "it finds a boundary where ΔE turns by 2 points per octave with a probability of 95 %, to within about 0.8 octaves",
        "to find half as small a ΔE takes 30 seeds in all (3.8 times the device time) or 6 finetunes of each upstream run "
        "(1.5 times the device time)",
        "the most accuracy per device-hour: 3 finetunes of each upstream run",
    ]


# No two sentences disagree: each names a side only where its sign is established.

SIDE = "(distillation|plain pretraining)"
SIGN = {"distillation": 1, "plain pretraining": -1}
sizes = st.floats(-0.05, 0.05, allow_nan=False)
halves = st.floats(0.001, 0.05)


@st.composite
def verdicts(draw):
    points = [(float(x), draw(sizes), draw(halves)) for x in (1000, 2000, 4000, 8000)]
    signs = [1 if delta > half else -1 for _, delta, half in points if abs(delta) > half]
    turns = sum(before != after for before, after in pairwise(signs))
    fields = (
        {"notes": ("several_crossings",), "direction": "b_to_a" if signs[-1] < 0 else "a_to_b"} if turns > 1 else {}
    )
    return make_verdict(points, min_effect=draw(st.floats(0.001, 0.02)), **fields)


def claims(text):
    """Side and places of every clause that names where a side is the lower one."""
    for match in re.finditer(rf"{SIDE} gives the lower (?:one|error) at ((?:[\d,]+(?:, | and )?)+) upstream", text):
        yield SIGN[match[1]], {float(x.replace(",", "")) for x in re.findall(r"\d[\d,]*\d", match[2])}


@settings(max_examples=300, deadline=None)
@given(verdict=verdicts(), x=st.sampled_from([500.0, 1000.0, 3000.0, 8000.0, 20000.0]))
def test_no_sentence_contradicts_another(verdict, x):
    record = make_contrast(verdict)
    text, short, advice = words.answer(record), words.brief(record), words.advice(record, x)
    sign = {p.x: 1 if p.low_all > 0 else -1 if p.high_all < 0 else 0 for p in verdict.points}
    established = set(sign.values()) - {0}
    for side, places in (*claims(text), *claims(advice)):
        assert places == {place for place, its in sign.items() if its == side}
    winner = re.match(f"{SIDE}:", advice)
    if winner and verdict.kind != "crossing":
        assert established == {SIGN[winner[1]]}
    assert ("undecided" in text) == ("undecided" in short) == ("undecided" in advice) == (verdict.kind == "undecided")
    assert ("same" in text) == ("same" in short) == (advice.startswith("either: ")) == (len(words.excludes(verdict)) == 2
                                                                              and verdict.kind == "excluded")  # fmt: skip
    lower = re.match(f"{SIDE} lower", short)
    if lower and verdict.kind == "one_sign":
        assert established == {SIGN[lower[1]]} and advice.startswith(f"{lower[1]}:") and text.startswith(lower[1])
    if verdict.kind == "crossing":
        assert established == {1, -1} and ("more than once" in text) == ("more than once" in short)
