"""Laws of training runs that need more than sums: repeated data, and distillation with the teacher's loss."""

from __future__ import annotations

import numpy as np

from dbscale.laws.form import Columns, Contains, Form, Param, Scaling, Values, Variable
from dbscale.laws.forms_power import EXPONENT_START, SAMPLES

FURTHEST = float(np.log(1e6))
"""How far (in log size) beyond the compute-optimal size excess parameters are counted; it keeps α or β of 0 finite."""
SIZE = Variable("num_params", "N", aliases=("M", "params"))


def data_constrained_value(x: Columns, p: Values) -> np.ndarray:
    """E + A/N′^α + B/D′^β with N′ = U + U·R*(1 − e^(−R/R*)), likewise D′: repeats beyond U count ever less.

    U_D are the unique samples; U_N is the size that is compute-optimal for U_D, or N if that is smaller, and never less
    than a millionth of N.
    """
    a, b = p["alpha"], p["beta"]
    gain = np.exp(np.log(a * p["A"] / (b * p["B"])) / (a + b))
    log_optimal = np.log(gain) + (np.log(x["unique_samples"]) + np.log(gain)) * b / a
    log_size = np.log(x["num_params"])
    least = log_size - FURTHEST
    log_base = np.where(np.real(log_optimal) > least, log_optimal, least)
    log_base = np.where(np.real(log_optimal) < log_size, log_base, log_size)
    size = _effective(log_base, np.exp(log_size - log_base) - 1, p["R_N"])
    repeats = x["num_samples"] / x["unique_samples"] - 1
    samples = _effective(np.log(x["unique_samples"]), np.maximum(repeats, 0), p["R_D"])
    return p["E"] + p["A"] * np.exp(-a * size) + p["B"] * np.exp(-b * samples)


def _effective(log_base: np.ndarray, repeats: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """log(U·(1 + R*(1 − e^(−R/R*))))."""
    return log_base + np.log1p(-decay * np.expm1(-repeats / decay))


DATA_CONSTRAINED = Form(
    "data_constrained",
    "L = E + A/N'^alpha + B/D'^beta, X' = U + U*R*(1 - exp(-r/R)), r = X/U - 1",
    (SIZE, SAMPLES, Variable("unique_samples", "U_D", aliases=("unique_tokens",), unit_of="num_samples")),
    (
        Param("E", "linear", (0.0, 0.98), 0.0, np.inf, unit="y_low"),
        Param("A", "log", (0.02, 1.5), unit="y_mid"),
        Param("B", "log", (0.02, 1.5), unit="y_mid"),
        Param("alpha", "linear", EXPONENT_START, 0.0, 10.0),
        Param("beta", "linear", EXPONENT_START, 0.0, 10.0),
        Param("R_D", "log", (1.0, 100.0), 1e-3),
        Param("R_N", "log", (1.0, 100.0), 1e-3),
    ),
    value=data_constrained_value,
    scaling=(Scaling("A", "num_params", "alpha", 1.0), Scaling("B", "num_samples", "beta", 1.0)),
    contains=(Contains("chinchilla", lambda p: {**p, "R_D": 1e20, "R_N": 1e20}),),
    domain="num_samples >= unique_samples > 0",
    source="Muennighoff et al. 2305.16264",
)


def apple_supervised_value(x: Columns, p: Values) -> np.ndarray:
    """E + (A/N^α + B/D^β)^γ."""
    inner = p["A"] * np.exp(-p["alpha"] * np.log(x["num_params"])) + p["B"] * np.exp(
        -p["beta"] * np.log(x["num_samples"])
    )
    return p["E"] + np.exp(p["gamma"] * np.log(inner))


APPLE_SUPERVISED = Form(
    "apple_supervised",
    "L = E + (A/N^alpha + B/D^beta)^gamma",
    (SIZE, SAMPLES),
    (
        Param("E", "linear", (0.0, 0.98), 0.0, np.inf, unit="y_low"),
        Param("A", "log", (0.02, 2.0), unit="y_mid"),
        Param("B", "log", (0.02, 2.0), unit="y_mid"),
        Param("alpha", "linear", EXPONENT_START, 0.0, 10.0),
        Param("beta", "linear", EXPONENT_START, 0.0, 10.0),
        Param("gamma", "linear", (0.2, 1.5), 1e-2, 10.0),
    ),
    value=apple_supervised_value,
    scaling=(Scaling("A", "num_params", "alpha", 1.0), Scaling("B", "num_samples", "beta", 1.0)),
    contains=(Contains("chinchilla", lambda p: {**p, "gamma": 1.0}),),
    domain="all variables > 0",
    source="Busbridge et al. 2502.08606, the supervised law",
)


def apple_distillation_value(x: Columns, p: Values) -> np.ndarray:
    """L_T + L_T^-c0·(1 + (L_T/(L̃_S·d1))^(1/f1))^(-c1·f1)·(A/N_S^α + B/D_S^β)^γ."""
    teacher = np.log(x["teacher_loss"])
    t = (teacher - np.log(x["supervised_loss"]) - np.log(p["d1"])) / p["f1"]
    above = np.real(t) > 0
    bend = np.where(above, t, 0) + np.log1p(np.exp(np.where(above, -t, t)))
    inner = p["A"] * np.exp(-p["alpha"] * np.log(x["num_params"])) + p["B"] * np.exp(
        -p["beta"] * np.log(x["num_samples"])
    )
    return x["teacher_loss"] + np.exp(-p["c0"] * teacher - p["c1"] * p["f1"] * bend + p["gamma"] * np.log(inner))


APPLE_DISTILLATION = Form(
    "apple_distillation",
    "L_S = L_T + L_T^-c0*(1 + (L_T/(L~_S*d1))^(1/f1))^(-c1*f1)*(A/N_S^alpha + B/D_S^beta)^gamma",
    (
        SIZE,
        SAMPLES,
        Variable("teacher_loss", "L_T", scaled=False),
        Variable("supervised_loss", "L~_S", aliases=("L_S",), scaled=False),
    ),
    (
        Param("A", "log", (0.02, 2.0), unit="y_mid"),
        Param("B", "log", (0.02, 2.0), unit="y_mid"),
        Param("alpha", "linear", EXPONENT_START, 0.0, 10.0),
        Param("beta", "linear", EXPONENT_START, 0.0, 10.0),
        Param("gamma", "linear", (0.2, 1.5), 1e-2, 10.0),
        Param("c0", "linear", (0.0, 4.0), -20.0, 20.0),
        Param("c1", "linear", (0.0, 20.0), -10.0, 1e4),
        Param("d1", "log", (0.7, 2.0), 1e-2, 1e2),
        Param("f1", "log", (0.03, 1.0), 1e-3, 1e2),
    ),
    value=apple_distillation_value,
    scaling=(Scaling("A", "num_params", "alpha", 1.0), Scaling("B", "num_samples", "beta", 1.0)),
    domain="student loss above the teacher's; supervised_loss: what apple_supervised predicts for the same N and D",
    source="Busbridge et al. 2502.08606; c1 is weakly identified",
)
