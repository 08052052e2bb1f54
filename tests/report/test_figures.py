"""What figures draw of records by hand, and that page and paper take the same declaration."""

from __future__ import annotations

from typing import Any

import pytest

from dbscale.report import figures
from dbscale.report.figures import Figure, delta_figure, error_figure, export, halves_figure, log_ticks, noise_figure
from dbscale.report.schema import Band, HalfRecord, LawCurve, LawsFile, Prediction
from dbscale.report.table import Run, RunTable, Setting
from tests.report.verdicts import HELPS_THEN_HURTS, make_contrast, make_noise, make_verdict

SETTING = Setting("base", "fractals", "digits")


def rows_of(figure: Figure | None, part: str) -> list[dict[str, Any]]:
    assert figure is not None
    return [row for row in figure.rows if row.get("part") == part]


def layers_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return spec["spec"]["layer"] if "facet" in spec else spec["layer"]


def scales(figure: Figure, channel: str) -> set[str]:
    encodings = [layer["encoding"] for layer in layers_of(figure.spec())]
    return {each[channel]["scale"]["type"] for each in encodings if "scale" in each.get(channel, {})}


def laws_file(**fields: Any) -> LawsFile:
    empty = dict.fromkeys(("laws", "curves", "predictions", "transfer", "levers", "predictors", "notes"), ())
    return LawsFile(**({"grid": "g", "source": "s", "level": 0.9, "num_draws": 9, "seed": 0} | empty | fields))


def run(arm: str, upstream: int, error: float, **fields: Any) -> Run:
    names = {"variant": "base", "student": "h2", "num_params": 5000, "upstream_dataset": "fractals" if upstream else "",
             "dataset": "digits", "downstream_samples": 100, "seed": 0, "key": f"{arm}-{upstream}"}  # fmt: skip
    return Run(**(names | {"arm": arm, "upstream_samples": upstream, "error_rate": error} | fields))


def prediction(**fields: Any) -> Prediction:
    names = {"student": "h2", "upstream_samples": 1, "downstream_samples": 1, "seed": 0, "key": "k", "arm": "plain",
             "metric": "error_rate", "measured": 0.4, "predicted": 0.5, "held_out": False}  # fmt: skip
    return Prediction(**SETTING._asdict(), **(names | fields))


def test_differences_are_drawn_in_points_with_the_sign_that_is_established():
    figure = delta_figure("verdict", [make_contrast(make_verdict(HELPS_THEN_HURTS))])
    points = rows_of(figure, "point")
    assert [(row["x"], row["y"], row["low_all"], row["high_all"]) for row in points] == [
        (1000, pytest.approx(5), pytest.approx(3), pytest.approx(7)),
        (4000, pytest.approx(0), pytest.approx(-2), pytest.approx(2)),
        (16000, pytest.approx(-4), pytest.approx(-6), pytest.approx(-2)),
    ]
    assert (points[0]["low"], points[0]["high"]) == (pytest.approx(4), pytest.approx(6))
    assert [row["sign"] for row in points] == ["distillation lower", "sign not established", "plain pretraining lower"]
    assert [row["y"] for row in rows_of(figure, "seed")] == [pytest.approx(y) for y in (4, 6, -1, 1, -5, -3)]
    assert rows_of(figure, "zone") == [{"panel": "pooled", "part": "zone", "low": -0.5, "high": 0.5, "y": 0}]
    (root,) = rows_of(figure, "root")
    assert (root["x"], root["low"], root["high"]) == (4000, pytest.approx(4000 / 1.5), 6000)
    assert [row["y"] for row in rows_of(figure, "curve")] == [pytest.approx(y) for y in (5, 0, -4)]


def test_differences_of_a_loss_keep_their_unit_and_have_no_root_without_a_crossing():
    verdict = make_verdict(((1000.0, 0.3, 0.1), (4000.0, 0.2, 0.1)), min_effect=0.02)
    figure = delta_figure("delta", [make_contrast(verdict, metric="test_loss")])
    assert [row["y"] for row in rows_of(figure, "point")] == [0.3, 0.2]
    assert rows_of(figure, "root") == [] and "root-line" not in str(figure and figure.spec())


def test_the_axis_is_logarithmic_with_a_tick_at_every_measured_value():
    figure = delta_figure("verdict", [make_contrast(make_verdict(HELPS_THEN_HURTS))])
    assert figure is not None and scales(figure, "x") == {"log"}
    axes = [layer["encoding"]["x"]["axis"]["values"] for layer in layers_of(figure.spec()) if "axis" in
            layer["encoding"].get("x", {})]  # fmt: skip
    assert axes and all(values == [1000, 4000, 16000] for values in axes)


def test_every_contrast_has_a_panel_of_its_own():
    verdict = make_verdict(HELPS_THEN_HURTS)
    records = [
        make_contrast(verdict),
        make_contrast(verdict, student="h2", downstream_samples=100),
        make_contrast(None),
    ]
    figure = delta_figure("delta", records)
    assert figure is not None
    spec = figure.spec()
    assert spec["facet"]["sort"] == ["pooled", "h2, 100 labels"] and spec["columns"] == 2
    assert len(rows_of(figure, "point")) == 6
    assert delta_figure("none", [make_contrast(None)]) is None


def test_halves_stand_side_by_side():
    halves = tuple(
        HalfRecord(seeds=seeds, verdict=make_verdict(((1000.0, delta, 0.02), (2000.0, 0.0, 0.02))))
        for seeds, delta in ((("0", "2"), 0.01), (("1", "3"), -0.03))
    )
    figure = halves_figure("halves", make_contrast(make_verdict(HELPS_THEN_HURTS), halves=halves))
    drawn = [(row["panel"], row["x"], row["y"], row["low"], row["high"]) for row in rows_of(figure, "point")]
    assert drawn[0] == ("seeds 0 and 2", 1000, pytest.approx(1), pytest.approx(0), pytest.approx(2))
    assert drawn[2] == ("seeds 1 and 3", 1000, pytest.approx(-3), pytest.approx(-4), pytest.approx(-2))
    assert figure is not None and figure.spec()["facet"]["sort"] == ["seeds 0 and 2", "seeds 1 and 3"]
    assert halves_figure("halves", make_contrast(None)) is None


def test_noise_is_a_bar_of_shares_for_every_pooled_contrast():
    record = make_contrast(make_verdict(HELPS_THEN_HURTS), noise=make_noise())
    single = record.model_copy(update={"student": "h2"})
    figure = noise_figure("noise", [record, single])
    assert figure is not None
    assert [(row["contrast"], row["source"], row["share"]) for row in figure.rows] == [
        ("error, digits", "seed (images drawn, initialisation)", 0.5), ("error, digits", "upstream run", 0.5)
    ]  # fmt: skip
    assert noise_figure("noise", [make_contrast(None)]) is None


def test_errors_are_drawn_run_by_run_with_the_laws_of_their_own_panel():
    table = RunTable((run("plain", 1000, 0.3), run("distilled", 1000, 0.25), run("scratch", 0, 0.6),
                      run("plain", 4000, 0.2, test_loss=0.7)))  # fmt: skip
    band = Band(x=(1000.0, 4000.0), y=(0.31, None), low=(0.3, None), high=(0.32, None))
    names = {**SETTING._asdict(), "arm": "plain", "axis": "upstream_samples", "student": "h2", "band": band}
    curve = LawCurve(**names, metric="error_rate", upstream_samples=None, downstream_samples=100)
    elsewhere = curve.model_copy(update={"downstream_samples": 999})
    laws = laws_file(curves=(curve, elsewhere, curve.model_copy(update={"metric": "test_loss"})))
    figure = error_figure("error", table, laws, SETTING)
    assert [(row["arm"], row["x"], row["y"]) for row in rows_of(figure, "run")] == [
        ("plain", 1000, 0.3), ("distilled", 1000, 0.25), ("plain", 4000, 0.2)
    ]  # fmt: skip
    assert [(row["arm"], row["y"]) for row in rows_of(figure, "level")] == [("scratch", 0.6)]
    assert [(row["x"], row["y"], row["low"], row["high"]) for row in rows_of(figure, "law")] == [
        (1000, 0.31, 0.3, 0.32)
    ]
    assert scales(figure, "x") == {"log"} and scales(figure, "y") == {"log"}
    loss = error_figure("loss", table, laws, SETTING, metric="test_loss")
    assert [row["y"] for row in rows_of(loss, "run")] == [0.7]


def test_arms_can_be_hidden_and_only_those_that_are_there_have_an_entry():
    table = RunTable((run("plain", 1000, 0.3), run("distilled", 1000, 0.25)))
    spec = error_figure("error", table, laws_file(), SETTING).spec()
    assert {"name": "hidden", "value": []} in spec["params"]
    marks = layers_of(spec)[-1]["encoding"]
    assert marks["opacity"] == {
        "condition": [{"test": "indexof(hidden, datum.arm) < 0", "value": 0.85}], "value": 0
    }  # fmt: skip
    assert marks["color"]["scale"]["domain"] == ["plain", "distilled"]
    # A law's band is pale: line and runs stand out before it.
    full = RunTable((*table, run("scratch", 0, 0.6)))
    names = {
        **SETTING._asdict(),
        "arm": "plain",
        "axis": "upstream_samples",
        "student": "h2",
        "downstream_samples": 100,
    }
    band = Band(x=(1000.0, 2000.0), y=(0.31, 0.2), low=(0.3, 0.1), high=(0.32, 0.3))
    curve = LawCurve(**names, upstream_samples=None, metric="error_rate", band=band)
    layers = layers_of(error_figure("error", full, laws_file(curves=(curve,)), SETTING).spec())
    seen = [(layer["mark"]["type"], layer["encoding"]["opacity"]["condition"][0]["value"]) for layer in layers]
    assert seen == [("rule", 0.7), ("area", 0.16), ("line", 1), ("point", 0.85)]


def test_over_labels_only_the_ends_of_the_other_axis_are_drawn():
    table = RunTable(
        tuple(run("plain", size, 0.3, downstream_samples=labels) for size in (1, 2, 3) for labels in (10, 99))
    )
    figure = error_figure("labels", table, laws_file(), SETTING, axis="downstream_samples")
    assert {row["panel"] for row in rows_of(figure, "run")} == {"h2, 1 upstream images", "h2, 3 upstream images"}


def test_upstream_errors_count_every_run_once_and_show_the_teacher():
    shared = {"upstream_error_rate": 0.5, "upstream_key": "up"}
    table = RunTable((run("plain", 1000, 0.3, **shared), run("plain", 1000, 0.2, downstream_samples=999, **shared),
                      run("distilled", 1000, 0.25, teacher_error_rate=0.7, **shared)))  # fmt: skip
    figure = figures.upstream_figure("upstream", table, SETTING)
    assert [(row["arm"], row["y"]) for row in rows_of(figure, "run")] == [
        ("plain", 0.5), ("distilled", 0.5), ("teacher", 0.7)
    ]  # fmt: skip
    assert figures.upstream_figure("upstream", RunTable((run("plain", 1000, 0.3),)), SETTING) is None


def test_predictions_stand_against_measurements_seen_and_held_out():
    made = [prediction(predicted=value, held_out=out) for value, out in ((0.5, False), (0.2, True), (None, True))]
    figure = figures.predicted_figure("predicted", laws_file(predictions=tuple(made)), SETTING)
    assert [(row["panel"], row["x"], row["y"]) for row in rows_of(figure, "run")] == [
        ("laws fitted to all runs", 0.4, 0.5), ("largest D_p held out", 0.4, 0.2)
    ]  # fmt: skip
    assert {(row["x"], row["y"]) for row in rows_of(figure, "guide")} == {(0.2, 0.2), (0.5, 0.5)}
    assert figures.predicted_figure("predicted", laws_file(), SETTING) is None


def test_scales_end_where_the_measurements_do():
    """A quarter beyond the outermost x, which no tool may round further; errors have their log scale as they are."""
    figure = delta_figure("verdict", [make_contrast(make_verdict(HELPS_THEN_HURTS))])
    assert figure is not None
    (mean,) = [layer for layer in layers_of(figure.spec()) if layer["mark"]["type"] == "point"]
    assert mean["encoding"]["x"]["scale"] == {"type": "log", "domain": [800, 20_000], "nice": False}
    made = prediction(measured=0.4, predicted=0.5)
    predicted = figures.predicted_figure("predicted", laws_file(predictions=(made,)), SETTING)
    assert predicted is not None
    for layer in layers_of(predicted.spec()):
        assert {layer["encoding"][axis]["scale"]["nice"] for axis in "xy"} == {False}


def test_a_panel_alone_is_twice_as_wide_and_three_stand_in_a_row():
    verdict = make_verdict(HELPS_THEN_HURTS)
    records = [make_contrast(verdict, student=name, downstream_samples=100) for name in ("h1", "h2", "h3", "h4")]
    one, two, four = (delta_figure("delta", records[:number]) for number in (1, 2, 4))
    assert one is not None and two is not None and four is not None
    assert (one.spec()["width"], two.spec()["spec"]["width"]) == (420, 210)
    assert "facet" not in one.spec() and (two.spec()["columns"], four.spec()["columns"]) == (2, 3)


def test_the_path_of_a_hunt_has_a_panel_a_target():
    assert figures.hunt_figure([]) is None
    rows = [{"part": "path", "panel": panel, "series": "wrong advice left", "x": 1.0, "y": 2.0} for panel in "ab"]
    figure = figures.hunt_figure(rows)
    assert figure is not None and figure.name == "hunt" and figure.rows == rows
    assert figure.spec()["facet"]["sort"] == ["a", "b"]


def test_a_study_has_every_figure_that_its_runs_allow():
    """One student, one label count: nothing to draw over labels or sizes. More of both, and losses: all of them."""
    record = make_contrast(make_verdict(HELPS_THEN_HURTS), noise=make_noise())
    laws = laws_file(predictions=(prediction(), prediction(metric="test_loss")))
    small = RunTable((run("plain", 1000, 0.3), run("distilled", 1000, 0.25)))
    assert list(figures.study_figures([record], small, laws)) == [
        "verdict", "noise", "delta-error_rate-digits", "error-digits", "predicted-digits", "predicted_loss-digits",
    ]  # fmt: skip
    full = RunTable(tuple(
        run("plain", 1000, 0.3, test_loss=0.7, upstream_error_rate=0.5, student=student, downstream_samples=labels)
        for student in ("h2", "h3") for labels in (100, 200)
    ))  # fmt: skip
    found = figures.study_figures([record], full, laws)
    assert list(found) == [
        "verdict", "noise", "delta-error_rate-digits", "upstream-base-fractals", "error-digits", "loss-digits",
        "labels-digits", "size-digits", "predicted-digits", "predicted_loss-digits",
    ]  # fmt: skip
    heights = {name: (figure.spec().get("spec") or figure.spec())["height"] for name, figure in found.items()}
    arms = ("upstream-base-fractals", "error-digits", "loss-digits", "labels-digits", "size-digits")
    assert heights == dict.fromkeys(arms, 190) | {
        "verdict": 330, "noise": 28, "delta-error_rate-digits": 190, "predicted-digits": 260, "predicted_loss-digits": 260,
    }  # fmt: skip
    assert found["noise"].spec()["width"] == 420
    assert list(figures.study_figures([record], None, laws)) == list(figures.study_figures([record], full)) == [
        "verdict", "noise"]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "expected"), [([0.04, 0.7], [0.05, 0.1, 0.2, 0.5]), ([0.5, 1.8], [0.5, 0.6, 0.8, 1, 1.2, 1.5])]
)
def test_ticks_are_round(values, expected):
    assert log_ticks(values) == pytest.approx(expected)


def test_themes_differ_in_colours_alone():
    figure = delta_figure("verdict", [make_contrast(make_verdict(HELPS_THEN_HURTS))])
    assert figure is not None
    light, dark = (figure.spec(theme) for theme in ("light", "dark"))
    assert light["config"]["background"] == "#ffffff" and dark["config"]["background"] == "#12161d"
    assert light["config"]["range"]["category"] != dark["config"]["range"]["category"]
    assert {**light, "config": 0} == {**dark, "config": 0} == {**figure.spec(), "config": 0}


def test_figures_are_valid_and_go_to_paper_as_svg_and_pdf(tmp_path):
    verdict = make_verdict(HELPS_THEN_HURTS)
    record = make_contrast(verdict, noise=make_noise(), halves=(HalfRecord(seeds=("0",), verdict=verdict),) * 2)
    made = figures.study_figures([record])
    assert list(made) == ["verdict", "halves", "noise"]
    for figure in made.values():
        figure.chart.to_dict(validate=True)
    paths = export(made.values(), tmp_path / "new")
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in made for kind in ("svg", "pdf")]
    text = (tmp_path / "new" / "verdict.svg").read_text()
    assert "distillation lower" in text and "upstream images" in text and "http://www.w3.org/2000/svg" in text
    assert all(path.read_bytes().startswith(b"%PDF") for path in paths if path.suffix == ".pdf")
