"""Laws of one variable that are no plain power law: they saturate, bend or break. Gradients by hand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dbscale.laws.form import Columns, Contains, Form, Param, Scaling, Values
from dbscale.laws.forms_m4 import sigmoid
from dbscale.laws.forms_power import ANY

EXPONENT = (-10.0, 10.0)


def saturating_value(x: Columns, p: Values) -> np.ndarray:
    """β·(1/x + γ)^c."""
    return p["b"] * np.exp(p["c"] * np.log(1.0 / x["x"] + p["g"]))


def saturating_gradient(x: Columns, p: Values) -> tuple[np.ndarray, Values]:
    """y and its slopes."""
    inner = 1.0 / x["x"] + p["g"]
    log = np.log(inner)
    bare = np.exp(p["c"] * log)
    y = p["b"] * bare
    return y, {"b": bare, "c": y * log, "g": y * p["c"] / inner}


SATURATING = Form(
    "saturating",
    "y = b*(1/x + g)^c",
    (ANY,),
    (
        Param("b", "log", (0.02, 5.0), unit="y_mid"),
        Param("g", "log", (1e-3, 3.0)),
        Param("c", "linear", (0.05, 1.2), *EXPONENT),
    ),
    value=saturating_value,
    gradient=saturating_gradient,
    scaling=(Scaling("b", "x", "c", 1.0), Scaling("g", "x", None, -1.0)),
    contains=(Contains("power", lambda p: {"b": p["b"], "g": 0.0, "c": -p["c"]}),),
    domain="x > 0",
    source="M3 of 2209.06640",
)


def bnsl_value(x: Columns, p: Values) -> np.ndarray:
    """a + b·x^-c0·(1 + (x/d1)^(1/f1))^(-c1·f1)."""
    t = (np.log(x["x"]) - np.log(p["d1"])) / p["f1"]
    bend = np.where(np.real(t) > 0, t, 0) + np.log1p(np.exp(-np.where(np.real(t) > 0, t, -t)))
    return p["a"] + p["b"] * np.exp(-p["c0"] * np.log(x["x"]) - p["c1"] * p["f1"] * bend)


def bnsl_gradient(x: Columns, p: Values) -> tuple[np.ndarray, Values]:
    """y and its slopes."""
    log = np.log(x["x"])
    t = (log - np.log(p["d1"])) / p["f1"]
    bend, gate = np.logaddexp(0.0, t), sigmoid(t)
    bare = np.exp(-p["c0"] * log - p["c1"] * p["f1"] * bend)
    part = p["b"] * bare
    return p["a"] + part, {
        "a": np.ones_like(part),
        "b": bare,
        "c0": -part * log,
        "c1": -part * p["f1"] * bend,
        "d1": part * p["c1"] * gate / p["d1"],
        "f1": part * p["c1"] * (gate * t - bend),
    }


def rectified_as_bnsl(p: Mapping[str, float]) -> dict[str, float]:
    """B/(D_l + D^β) + E as a break of width 1/|β|: from a flat start where it falls, to a flat end where it rises."""
    size = max(abs(p["beta"]), 1e-3)
    place = float(np.exp(np.clip(np.log(max(p["D_l"], 1e-300)) / size, -700.0, 700.0)))
    if p["beta"] < 0:
        return {"a": p["E"], "b": p["B"], "c0": -size, "c1": size, "d1": 1 / place, "f1": 1 / size}
    return {"a": p["E"], "b": p["B"] / p["D_l"], "c0": 0.0, "c1": size, "d1": place, "f1": 1 / size}


BNSL = Form(
    "bnsl",
    "y = a + b*x^-c0*(1 + (x/d1)^(1/f1))^(-c1*f1)",
    (ANY,),
    (
        Param("a", "linear", (0.0, 0.98), 0.0, np.inf, unit="y_low"),
        Param("b", "log", (0.02, 3.0), unit="y_mid"),
        Param("c0", "linear", (-0.1, 0.8), *EXPONENT),
        Param("c1", "linear", (-0.5, 1.0), *EXPONENT),
        Param("d1", "log", (0.03, 30.0)),
        Param("f1", "log", (0.05, 2.0), 1e-2, 1e2),
    ),
    value=bnsl_value,
    gradient=bnsl_gradient,
    scaling=(Scaling("b", "x", "c0", 1.0), Scaling("d1", "x", None, 1.0)),
    contains=(
        Contains("power_plus", lambda p: {"a": p["E"], "b": p["b"], "c0": -p["c"], "c1": 0.0, "d1": 1.0, "f1": 0.5}),
        Contains(
            "saturating", lambda p: {"a": 0.0, "b": p["b"], "c0": p["c"], "c1": -p["c"], "d1": 1 / p["g"], "f1": 1.0}
        ),
        Contains("rectified", rectified_as_bnsl),
    ),
    domain="x > 0; one break",
    source="Caballero et al. 2210.14891",
)


def rectified_value(x: Columns, p: Values) -> np.ndarray:
    """B/(D_l + D^β) + E."""
    return p["B"] / (p["D_l"] + np.exp(p["beta"] * np.log(x["x"]))) + p["E"]


def rectified_gradient(x: Columns, p: Values) -> tuple[np.ndarray, Values]:
    """y and its slopes."""
    log = np.log(x["x"])
    power = np.exp(p["beta"] * log)
    bare = 1.0 / (p["D_l"] + power)
    part = p["B"] * bare
    return part + p["E"], {"B": bare, "D_l": -part * bare, "beta": -part * bare * power * log, "E": np.ones_like(part)}


RECTIFIED = Form(
    "rectified",
    "y = B/(D_l + D^beta) + E",
    (ANY,),
    (
        Param("E", "linear", (0.0, 0.98), 0.0, np.inf, unit="y_low"),
        Param("B", "log", (0.05, 5.0), unit="y_mid"),
        Param("D_l", "log", (1e-2, 1e1)),
        Param("beta", "linear", (0.05, 1.5), *EXPONENT),
    ),
    value=rectified_value,
    gradient=rectified_gradient,
    scaling=(Scaling("B", "x", "beta", 1.0), Scaling("D_l", "x", "beta", 1.0)),
    contains=(Contains("power_plus", lambda p: {"E": p["E"], "B": p["b"], "D_l": 0.0, "beta": -p["c"]}),),
    domain="x > 0 (finetuning sizes)",
    source="Lin et al. 2402.02314",
)


def log_law_value(x: Columns, p: Values) -> np.ndarray:
    """(log(A·x^α))^β."""
    return np.exp(p["beta"] * np.log(np.log(p["A"]) + p["alpha"] * np.log(x["x"])))


LOG_LAW = Form(
    "log_law",
    "y = (log(A*D_p^alpha))^beta",
    (ANY,),
    (
        Param("A", "log", (1.5, 1e4)),
        Param("alpha", "linear", (0.01, 2.0), 0.0, 10.0),
        Param("beta", "linear", (0.1, 3.0), *EXPONENT),
    ),
    value=log_law_value,
    scaling=(Scaling("A", "x", "alpha", -1.0),),
    domain="A*x^alpha > 1; for downstream metrics such as BLEU, which rise",
    source="Isik et al. 2402.04177; Huber delta 0.1 there",
)
