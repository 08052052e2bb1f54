"""`dbscale fit` on the one engine: every option reaches the fit, and what is printed is what the laws say."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from dbscale.launch.cli import main
from dbscale.launch.commands.laws import allocation_lines
from dbscale.laws import Allocation, fit_law, parameter_intervals, select_law

X = np.repeat(np.geomspace(100, 1e5, 8), 2)
Y = (0.1 + 3 * X**-0.4) * np.exp(0.05 * np.random.default_rng(0).standard_normal(16))
RUNS = [f"r{i // 2}" for i in range(16)]


@pytest.fixture
def table(tmp_path: Path) -> str:
    rows = (
        f"{x!r},{y!r},{run},{1 + i % 3}" for i, (x, y, run) in enumerate(zip(X.tolist(), Y.tolist(), RUNS, strict=True))
    )
    (tmp_path / "t.csv").write_text("seen,loss,run,trust\n" + "\n".join(rows) + "\n")
    return str(tmp_path / "t.csv")


def fit(table: str, *options: str) -> int:
    return main(["fit", table, "--x", "seen", "--y", "loss", *options])


def test_auto_prints_every_law_and_writes_the_selection(table: str, tmp_path: Path, capsys) -> None:
    assert fit(table, "--law", "auto", "--out", str(tmp_path / "fit.json"), "--seed", "2") == 0
    own, written = select_law(X, Y, seed=2), json.loads((tmp_path / "fit.json").read_text())
    assert written == own.to_dict() | {"columns": ["x"]}
    assert own.report(parameter_intervals(own.best)) in capsys.readouterr().out


def test_weights_loss_ceiling_and_bounds_reach_a_named_law(table: str, tmp_path: Path) -> None:
    weights, out = [1 + i % 3 for i in range(16)], tmp_path / "fit.json"

    def params(*options: str) -> dict:
        assert fit(table, "--out", str(out), *options) == 0
        return json.loads(out.read_text())["params"]

    law = ("--law", "power_plus", "--weights", "trust")
    assert params(*law) == pytest.approx(fit_law("power_plus", X, Y, weights=weights).params, rel=1e-6)
    squares = fit_law("power_plus", X, Y, weights=weights, loss="least_squares_log").params
    assert params(*law, "--loss", "least_squares_log") == pytest.approx(squares, rel=1e-6)
    assert params(*law, "--bound", "E=0.2:")["E"] >= 0.2
    assert params("--law", "m4", "--ceiling", "0.8")["E0"] <= 0.8


def test_intervals_come_from_the_curvature_or_from_resampled_clusters(table: str, capsys) -> None:
    own = select_law(X, Y, laws=["power"], clusters=RUNS, num_resamples=1000)
    for options, found in (((), parameter_intervals(own.best)), (("--cluster", "run"), own.bootstrap.interval())):
        assert fit(table, "--law", "power", "--loss", "least_squares_log", *options) == 0
        low, high = found["c"]
        assert f"(90 %: {low:.6g} to {high:.6g})" in capsys.readouterr().out


def test_predictions_carry_their_interval_and_say_when_they_extrapolate(table: str, capsys) -> None:
    assert fit(table, "--law", "auto", "--at", "2e3", "--at", "seen=1e6") == 0
    inside, outside = re.findall(r"  at [2s].*", capsys.readouterr().out)
    own = select_law(X, Y)
    (low,), (high,) = own.interval(2e3)
    assert inside == f"  at 2e3: {own.predict(2e3)[0]:.6g} (90 %: {low:.6g} to {high:.6g})"
    assert outside.endswith("; outside what was measured")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--law", "auto", "--bound", "E=0:1"), "name the law instead of --law auto"),
        (("--law", "auto", "--at", "loss=3"), "write a value for each of seen=…"),
        (("--law", "power", "--at", "seen=many"), "write a value for each of seen=…"),
        (("--law", "power", "--bound", "E=none:1"), "--bound 'E=none:1': write PARAM=LOW:HIGH"),
        (("--law", "power", "--bound", "E=1"), "--bound 'E=1': write PARAM=LOW:HIGH"),
        (("--law", "power", "--weights", "run"), "'r0'"),
        (("--law", "power", "--cluster", "rum"), "did you mean 'run'"),
        (("--law", "power", "--ceiling", "0.1"), "ceiling 0.1: y reaches"),
        (("--law", "auto", "--x", "trust"), "--law auto takes one --x COLUMN, or a study's variables"),
    ],
)
def test_what_cannot_be_done_is_said(table: str, options: tuple[str, ...], words: str, capsys) -> None:
    assert fit(table, *options) == 1
    assert words in capsys.readouterr().err


def test_auto_knows_a_studys_columns(tmp_path: Path, capsys) -> None:
    d_p, d_f = (c.ravel() for c in np.meshgrid(np.geomspace(1e3, 1e5, 4), np.geomspace(100, 1e4, 4)))
    rows = (f"{a!r},{b!r},{0.05 + 4 * a**-0.3 * b**-0.2!r}" for a, b in zip(d_p.tolist(), d_f.tolist(), strict=True))
    (tmp_path / "t.csv").write_text("upstream_samples,df,error\n" + "\n".join(rows) + "\n")
    at = "upstream_samples=1e4,df=1e3"
    assert main(["fit", str(tmp_path / "t.csv"), "--law", "auto", "--y", "error", "--at", at]) == 0
    out = capsys.readouterr().out
    assert re.search(r"product +0\.\d+ ", out) and "transfer_gap" in out
    assert float(re.search(r"  at .*: ([\d.]+) ", out)[1]) == pytest.approx(0.05 + 4 * 1e4**-0.3 * 1e3**-0.2, rel=0.01)


def study(folder: Path) -> str:
    """Both arms of a study in which distilling lowers every error by a tenth."""
    head = "arm,student,num_params,upstream_samples,downstream_samples,dataset,seed,error_rate"
    rows = [
        f"{arm},h1,1e6,{n},{f},digits,{seed},{scale * (0.05 + 4 * n**-0.3 * f**-0.2) * (1 + 0.01 * seed):.6f}"
        for arm, scale in (("plain", 1.0), ("distilled", 0.9))
        for n in (1000, 4000, 16000, 64000) for f in (100, 1000, 10000) for seed in (0, 1)
    ]  # fmt: skip
    (folder / "rows.csv").write_text("\n".join([head, *rows]) + "\n")
    return str(folder / "rows.csv")


def test_a_budget_is_split_by_the_laws_of_both_arms(tmp_path: Path, capsys) -> None:
    words = [
        "allocate",
        "--table",
        study(tmp_path),
        "--price",
        "upstream_image=0.01",
        "--price",
        "downstream_label=0.1",
    ]
    assert main([*words, "--budget", "500"]) == 0
    out = capsys.readouterr().out
    assert "digits: distilled (better in 100% of the draws)" in out
    own, other = re.search(r"expected error ([\d.]+) \([\d.]+ to [\d.]+\); the other arm ([\d.]+)\n", out).groups()
    assert float(own) == pytest.approx(0.9 * float(other), rel=0.02)
    assert "0.00\n" not in out, "what costs nothing has no line"
    spent = {name: float(re.search(rf"{name} +([\d.,]+)\n", out)[1].replace(",", "")) for name in
             ("upstream_images", "downstream_labels")}  # fmt: skip
    # Exponents .3 : .2 spend 3 : 2.
    assert spent == pytest.approx({"upstream_images": 300, "downstream_labels": 200}, rel=0.1)
    assert "outside what was measured" not in out
    assert main([*words, "--budget", "500", "--price", "teacher_params=1e9", "--price", "train_flop=1e-9"]) == 1
    assert "the smallest point within the limits costs" in capsys.readouterr().err
    assert main([*words, "--budget", "500", "--price", "upstream=1"]) == 1
    assert "did you mean 'upstream_image'" in capsys.readouterr().err
    assert main([*words, "--budget", "500", "--dataset", "digit"]) == 1
    assert "did you mean 'digits'" in capsys.readouterr().err


def test_a_split_is_told_line_by_line() -> None:
    found = Allocation(
        arm="distilled", arm_probability=0.75, point={"upstream_samples": 20_000.0, "downstream_samples": 300.0},
        expected_error=0.125, error_interval=(0.1, 0.15), spend={"upstream_images": 0.5, "teacher": 0.0, "left": 1200.0},
        ranges={"upstream_samples": (10_000.0, 30_000.0), "downstream_samples": (200.0, 400.0)},
        exchange_rates={"upstream_samples_per_downstream_sample": (12.5, 10.0, 1500.0)},
        extrapolated=("downstream_samples",), other_error=0.25, level=0.9,
    )  # fmt: skip
    lines = [re.sub(" +", " ", line) for line in allocation_lines("digits", found)]
    assert lines == [
        "digits: distilled (better in 75% of the draws)",
        " expected error 0.1250 (0.1000 to 0.1500); the other arm 0.2500",
        " upstream_samples 20,000 (10,000 to 30,000)",
        " downstream_samples 300 (200 to 400); outside what was measured",
        " upstream_images 0.50",
        " left 1,200.00",
        " upstream samples per downstream sample: 12.5 (10 to 1.5e+03)",
    ]
    alone = list(allocation_lines("digits", dataclasses.replace(found, other_error=None)))
    assert alone[1] == "  expected error 0.1250 (0.1000 to 0.1500)"


def test_fit_and_advise_speak_json(table: str, tmp_path: Path, capsys) -> None:
    assert fit(table, "--law", "power", "--at", "1e4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["params"]) == set(found["intervals"])
    (predicted,) = found["predictions"]
    assert predicted["low"] < predicted["value"] < predicted["high"]
    assert predicted["at"] == "1e4"
    words = ["advise", "--table", study(tmp_path), "--dp", "8k", "--df", "1k", "--params", "1M", "--json"]
    assert main(words) == 0
    (advice,) = json.loads(capsys.readouterr().out)
    assert advice["sentence"].startswith("digits: ")
    assert advice["record"]["verdict"]["kind"] in ("one_sign", "excluded", "undecided")
    assert set(advice["expected"]) == {"plain", "distilled"}


@pytest.mark.parametrize("value", ["0", "-5", "inf", "nan"])
def test_a_place_where_no_law_is_defined_is_refused(table: str, value: str, capsys) -> None:
    assert fit(table, "--law", "power", "--at", value) == 1
    assert f"--at '{value}': laws are defined above 0 alone; write finite numbers above 0" in capsys.readouterr().err


def test_auto_says_that_the_average_predicts_and_not_the_law_it_names(table: str, capsys) -> None:
    said = f"by the average of all laws with a weight above 0, not by {select_law(X, Y).best.form.name} alone"
    assert fit(table, "--law", "auto", "--at", "1e5") == 0
    assert said in capsys.readouterr().out
    assert fit(table, "--law", "power", "--at", "1e5") == 0
    assert "average" not in capsys.readouterr().out
