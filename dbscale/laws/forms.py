"""The laws by name. To add one: write its `Form` here and list it in `FORMS`.

Gradients are by hand where a law is fitted thousands of times. Three families: sums of power laws (one maker gives eight
of them), curves of one variable that saturate, bend or break, and laws of training runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dbscale import plugins
from dbscale.errors import LawError, nearest
from dbscale.laws.form import Columns, Form, Param, Scaling, Values, Variable

UPSTREAM = Variable("upstream_samples", "D_p", aliases=("num_upstream_samples", "dp"))
SIZE = Variable("num_params", "M", aliases=("N", "params"))
DOWNSTREAM = Variable("downstream_samples", "D_f", aliases=("num_downstream_samples", "df"))
LM_SIZE = Variable("num_params", "N", aliases=("M", "params"))
SAMPLES = Variable("num_samples", "D", aliases=("num_tokens", "train_tokens", "tokens", "seen_examples"))
ANY = Variable("x", "x")
EXPONENT, EXPONENT_START = (-10.0, 10.0), (0.05, 1.2)
GRID = ((UPSTREAM, "A", "alpha"), (SIZE, "B", "beta"), (DOWNSTREAM, "C", "gamma"))
GRID_NAMES = tuple(v.name for v, _, _ in GRID)


class Term(NamedTuple):
    """amplitude · Π variable^(sign · exponent)."""

    amplitude: str
    factors: tuple[tuple[str, str, float], ...]
    """(variable, exponent, sign) each."""

    def scaling(self) -> tuple[Scaling, ...]:
        """How the amplitude moves with the units of its variables and of y."""
        return (
            *(Scaling(self.amplitude, v, e, -s) for v, e, s in self.factors),
            Scaling(self.amplitude, "y", None, 1.0),
        )

    def log_product(self, x: Columns, p: Values) -> np.ndarray:
        """Logarithm of the term over its amplitude."""
        return np.asarray(sum(s * p[e] * np.log(x[v]) for v, e, s in self.factors))


def falling(amplitude: str, *pairs: tuple[str, str]) -> Term:
    """amplitude · Π variable^-exponent, from (variable, exponent) each."""
    return Term(amplitude, tuple((v, e, -1.0) for v, e in pairs))


def power_sum_gradient(x: Columns, p: Values, offset: str | None, terms: tuple[Term, ...]) -> tuple[np.ndarray, Values]:
    """y and ∂y/∂parameter. An exponent that several terms share collects from each."""
    total: np.ndarray | float = p[offset] if offset else 0.0
    slopes: dict[str, np.ndarray] = {}
    for term in terms:
        slopes[term.amplitude] = np.exp(term.log_product(x, p))
        part = p[term.amplitude] * slopes[term.amplitude]
        total = total + part
        for v, e, s in term.factors:
            slopes[e] = slopes.get(e, np.zeros(())) + part * s * np.log(x[v])
    if offset:
        slopes[offset] = np.ones_like(total)
    return np.asarray(total), slopes


def offset_param(name: str) -> Param:
    """The irreducible level: not negative, below the lowest y."""
    return Param(name, "linear", (0.0, 0.98), 0.0, np.inf, unit="y_low")


def exponent_param(name: str, sign: float, *, signed: bool = False) -> Param:
    """An exponent in [0, 2], or in [-10, 10] when `signed`; guessed on the side on which y falls.

    Beyond 2 an exponent only says that its term vanished after the first level, and extrapolates by a cliff.
    """
    start = EXPONENT_START if sign < 0 else (-EXPONENT_START[1], -EXPONENT_START[0])
    return Param(name, "linear", start, *(EXPONENT if signed else (0.0, 2.0)))


def power_sum(
    name: str, equation: str, variables: tuple[Variable, ...], terms: tuple[Term, ...], source: str,
    *, offset: str | None = "E", signed: bool = False, domain: str = "all variables > 0", **about,
) -> Form:  # fmt: skip
    """A sum of power laws as a form; `about` are the rest of `Form`'s fields."""
    exponents = {e: s for t in terms for _, e, s in t.factors}
    params = [offset_param(offset)] if offset else []
    params += [Param(t.amplitude, "log", (0.02, 1.5), unit="y_mid") for t in terms]
    params += [exponent_param(e, s, signed=signed) for e, s in exponents.items()]
    scaling = tuple(rule for t in terms for rule in t.scaling())
    return Form(name, equation, variables, tuple(params), scaling, domain, source,
                gradient=lambda x, p: power_sum_gradient(x, p, offset, terms), **about)  # fmt: skip


def additive_form(names: tuple[str, ...] = GRID_NAMES) -> Form:
    """E = E∞ + A·D_p^-α + B·M^-β + C·D_f^-γ over those of the three variables that vary."""
    used = [row for row in GRID if row[0].name in names]
    equation = "E = E_inf + " + " + ".join(f"{a}*{v.symbol}^-{e}" for v, a, e in used)
    return power_sum("additive", equation, tuple(v for v, _, _ in used),
                     tuple(falling(a, (v.name, e)) for v, a, e in used),
                     "2504.13219, one reading of its Eq. 1", offset="E_inf", restrict=additive_form)  # fmt: skip


def product_term(names: tuple[str, ...]) -> tuple[str, tuple[Variable, ...], Term]:
    """K·D_p^-α·M^-β·D_f^-γ over those of the three variables that vary, as text, its variables, and as a term."""
    used = [row for row in GRID if row[0].name in names]
    text = "K" + "".join(f"*{v.symbol}^-{e}" for v, _, e in used)
    return text, tuple(v for v, _, _ in used), falling("K", *((v.name, e) for v, _, e in used))


def product_form(names: tuple[str, ...] = GRID_NAMES) -> Form:
    """E = E∞ + K·D_p^-α·M^-β·D_f^-γ over those of the three variables that vary."""
    text, variables, term = product_term(names)
    return power_sum("product", f"E = E_inf + {text}", variables, (term,), offset="E_inf", restrict=product_form,
                     source="2504.13219, the other reading: separable, additive in the log domain")  # fmt: skip


def transfer_gap_form(names: tuple[str, ...] = GRID_NAMES) -> Form:
    """E = (A·D_p^-α + G)·D_f^-β + E∞, times M^-δ where model sizes vary: a product law with a gap."""
    if not {"upstream_samples", "downstream_samples"} <= set(names):
        raise LawError(f"transfer_gap needs upstream_samples and downstream_samples to vary; only {names} do")
    size = (("num_params", "delta"),) if "num_params" in names else ()
    shared = (*size, ("downstream_samples", "beta"))
    return power_sum(
        "transfer_gap", f"E = (A*D_p^-alpha + G)*{'M^-delta*' if size else ''}D_f^-beta + E_inf",
        tuple(v for v, _, _ in GRID if v.name in names),
        (falling("A", ("upstream_samples", "alpha"), *shared), falling("G", *shared)), offset="E_inf",
        source="Barnett 2408.16947; without E_inf Mikami et al. 2108.11018; M^-delta as in the product law",
        contains={"product": product_as_gap}, restrict=transfer_gap_form,
    )  # fmt: skip


def product_as_gap(p: Mapping[str, float]) -> dict[str, float]:
    """A product law is a transfer-gap law without a gap."""
    size = {"delta": p["beta"]} if "beta" in p else {}
    return {"E_inf": p["E_inf"], "A": p["K"], "G": 0.0, "alpha": p["alpha"], "beta": p["gamma"], **size}


POWER_TERM = (Term("b", (("x", "c", 1.0),)),)
POWER = power_sum("power", "y = b*x^c", (ANY,), POWER_TERM, "M1 of 2209.06640", offset=None, signed=True)
POWER_PLUS = power_sum(
    "power_plus", "y = E + b*x^c", (ANY,), POWER_TERM, "M2 of 2209.06640", signed=True,
    contains={"power": lambda p: {"E": 0.0, **p}},
)  # fmt: skip
CHINCHILLA = power_sum(
    "chinchilla", "L = E + A/N^alpha + B/D^beta", (LM_SIZE, SAMPLES),
    (falling("A", ("num_params", "alpha")), falling("B", ("num_samples", "beta"))),
    source="Hoffmann et al. 2203.15556; data and fit of 2404.10102",
)  # fmt: skip
EFFECTIVE_DATA = power_sum(
    "effective_data", "D_T = k*D_f^alpha*M^beta", (DOWNSTREAM, SIZE),
    (Term("k", (("downstream_samples", "alpha", 1.0), ("num_params", "beta", 1.0))),),
    "Hernandez et al. 2102.01293", offset=None, signed=True,
    domain="low-data regime: D_f at most 10 % of the data that training from scratch would need",
)  # fmt: skip


# Laws of one variable that saturate, bend or break.


def saturating_gradient(x: Columns, p: Values) -> tuple[np.ndarray, Values]:
    """β·(1/x + γ)^c and its slopes."""
    inner = 1.0 / x["x"] + p["g"]
    log = np.log(inner)
    bare = np.exp(p["c"] * log)
    y = p["b"] * bare
    return y, {"b": bare, "c": y * log, "g": y * p["c"] / inner}


SATURATING = Form(
    "saturating", "y = b*(1/x + g)^c", (ANY,),
    (
        Param("b", "log", (0.02, 5.0), unit="y_mid"),
        Param("g", "log", (1e-3, 3.0)),
        Param("c", "linear", EXPONENT_START, *EXPONENT),
    ),
    (Scaling("b", "x", "c", 1.0), Scaling("g", "x", None, -1.0), Scaling("b", "y", None, 1.0)),
    "x > 0", "M3 of 2209.06640", gradient=saturating_gradient,
    contains={"power": lambda p: {"b": p["b"], "g": 0.0, "c": -p["c"]}},
)  # fmt: skip


def bnsl_gradient(x: Columns, p: Values) -> tuple[np.ndarray, Values]:
    """a + b·x^-c0·(1 + (x/d1)^(1/f1))^(-c1·f1) and its slopes."""
    log = np.log(x["x"])
    t = (log - np.log(p["d1"])) / p["f1"]
    bend = np.logaddexp(0.0, t)
    gate = np.exp(t - bend)
    bare = np.exp(-p["c0"] * log - p["c1"] * p["f1"] * bend)
    part = p["b"] * bare
    return p["a"] + part, {
        "a": np.ones_like(part), "b": bare, "c0": -part * log, "c1": -part * p["f1"] * bend,
        "d1": part * p["c1"] * gate / p["d1"], "f1": part * p["c1"] * (gate * t - bend),
    }  # fmt: skip


def rectified_as_bnsl(p: Mapping[str, float]) -> dict[str, float]:
    """B/(D_l + D^β) + E as a break of width 1/|β|: from a flat start where it falls, to a flat end where it rises."""
    size = max(abs(p["beta"]), 1e-2)
    place = float(np.exp(np.clip(np.log(max(p["D_l"], 1e-300)) / size, -700.0, 700.0)))
    if p["beta"] < 0:
        return {"a": p["E"], "b": p["B"], "c0": -size, "c1": size, "d1": 1 / place, "f1": 1 / size}
    return {"a": p["E"], "b": p["B"] / p["D_l"], "c0": 0.0, "c1": size, "d1": place, "f1": 1 / size}


BNSL = Form(
    "bnsl", "y = a + b*x^-c0*(1 + (x/d1)^(1/f1))^(-c1*f1)", (ANY,),
    (
        offset_param("a"),
        Param("b", "log", (0.02, 3.0), unit="y_mid"),
        Param("c0", "linear", (-0.1, 0.8), *EXPONENT),
        Param("c1", "linear", (-0.5, 1.0), *EXPONENT),
        Param("d1", "log", (0.03, 30.0)),
        Param("f1", "log", (0.05, 2.0), 1e-2, 1e2),
    ),
    (Scaling("b", "x", "c0", 1.0), Scaling("d1", "x", None, 1.0), Scaling("b", "y", None, 1.0)),
    "x > 0; one break", "Caballero et al. 2210.14891", gradient=bnsl_gradient,
    contains={
        "power_plus": lambda p: {"a": p["E"], "b": p["b"], "c0": -p["c"], "c1": 0.0},
        "saturating": lambda p: {"a": 0.0, "b": p["b"], "c0": p["c"], "c1": -p["c"], "d1": 1 / p["g"], "f1": 1.0},
        "rectified": rectified_as_bnsl,
    },
)  # fmt: skip


def rectified_gradient(x: Columns, p: Values) -> tuple[np.ndarray, Values]:
    """B/(D_l + D^β) + E and its slopes."""
    log = np.log(x["x"])
    power = np.exp(p["beta"] * log)
    bare = 1.0 / (p["D_l"] + power)
    part = p["B"] * bare
    return part + p["E"], {"B": bare, "D_l": -part * bare, "beta": -part * bare * power * log, "E": np.ones_like(part)}


RECTIFIED = Form(
    "rectified", "y = B/(D_l + D^beta) + E", (ANY,),
    (
        offset_param("E"),
        Param("B", "log", (0.05, 5.0), unit="y_mid"),
        Param("D_l", "log", (1e-2, 1e1)),
        Param("beta", "linear", (0.05, 1.5), *EXPONENT),
    ),
    (Scaling("B", "x", "beta", 1.0), Scaling("D_l", "x", "beta", 1.0), Scaling("B", "y", None, 1.0)),
    "x > 0 (finetuning sizes)", "Lin et al. 2402.02314", gradient=rectified_gradient,
    contains={"power_plus": lambda p: {"E": p["E"], "B": p["b"], "D_l": 0.0, "beta": -p["c"]}},
)  # fmt: skip

LOG_LAW = Form(
    "log_law", "y = (log(A*D_p^alpha))^beta", (ANY,),
    (
        Param("A", "log", (1.5, 1e4)),
        Param("alpha", "linear", (0.01, 2.0), 0.0, 10.0),
        Param("beta", "linear", (0.1, 3.0), *EXPONENT),
    ),
    (Scaling("A", "x", "alpha", -1.0),),  # a power of a logarithm: not the same law in another unit of y
    "A*x^alpha > 1; for downstream metrics such as BLEU, which rise", "Isik et al. 2402.04177; Huber delta 0.1 there",
    value=lambda x, p: np.exp(p["beta"] * np.log(np.log(p["A"]) + p["alpha"] * np.log(x["x"]))),
)  # fmt: skip


# M4 and its kin: (ε − E)/(E0 − ε)^a = right side, a power or a product of powers; solved for ε.

NEWTON_STEPS, CLOSE = 40, 3e-8
"""Convergence is quadratic: after a step this small the error is that of rounding."""


def m4_root(right: np.ndarray, level: np.ndarray, a: np.ndarray) -> np.ndarray:
    """z with ε = E + level·σ(z), level = E0 − E, from g(z) = log σ(z) − a·log σ(−z) = right − (1 − a)·log(level).

    `right` is the logarithm of the right side. g lies between its asymptotes z and a·z and bends one way, so Newton's
    method from the nearer asymptote converges without ever overshooting.
    """
    target = right - (1 - a) * np.log(np.maximum(level, 1e-300))
    far = target / np.maximum(a, 1e-6)
    z = np.where(a < 1, np.maximum(target, far), np.minimum(target, far))
    rest = 1 - a
    for _ in range(NEWTON_STEPS):
        small = np.exp(-np.abs(z))
        more = 1.0 + small
        soft = np.log(more) - np.minimum(z, 0.0)
        step = (a * z - rest * soft - target) / (a + rest * np.where(z > 0, small, 1.0) / more)
        z = z - step
        if not np.any(np.abs(step) > CLOSE * (1 + np.abs(z))):
            break
    return z


def m4_parts(right: np.ndarray, p: Values, offset: str) -> tuple[np.ndarray, np.ndarray]:
    """ε − E and E0 − ε, each without cancellation; nan where E0 ≤ E. At a = 0 the law is E + right side, whatever E0."""
    level, a = p["E0"] - p[offset], p["a"]
    z, plain = m4_root(right, level, a), np.exp(right)
    level = np.where(level > 0, level, np.nan)
    above, below = (np.maximum(level * np.exp(-np.logaddexp(0.0, -end)), 1e-300) for end in (z, -z))
    return np.where(a == 0, plain, above), np.where(a == 0, np.maximum(level - plain, 1e-12), below)


def m4_gradient(x: Columns, p: Values, offset: str, term: Term) -> tuple[np.ndarray, Values]:
    """y and its slopes from the implicit equation F = log(ε − E) − a·log(E0 − ε) − right = 0."""
    above, below = m4_parts(np.log(p[term.amplitude]) + term.log_product(x, p), p, offset)
    slope = 1.0 / (1.0 / above + p["a"] / below)  # 1 / (∂F/∂ε)
    return p[offset] + above, {
        offset: slope / above, "E0": slope * p["a"] / below, "a": slope * np.log(below),
        term.amplitude: slope / p[term.amplitude],
        **{e: s * slope * np.log(x[v]) for v, e, s in term.factors},
    }  # fmt: skip


def m4_form(
    name: str, equation: str, variables: tuple[Variable, ...], offset: str, term: Term, source: str, **about
) -> Form:  # fmt: skip
    """A law of this family; `about` are the rest of `Form`'s fields."""
    params = (
        offset_param(offset),
        Param("E0", "linear", (1.001, 1.6), 0.0, np.inf, unit="y_high", is_ceiling=True),
        Param("a", "linear", (0.0, 2.0), 0.0, 20.0),
        Param(term.amplitude, "log", (0.02, 5.0), unit="y_mid"),
        *(exponent_param(e, s, signed=s > 0) for _, e, s in term.factors),
    )
    return Form(
        name, equation, variables, params, (*term.scaling(), Scaling(term.amplitude, "y", "a", -1.0)),
        "all variables > 0, E < y < E0; for error rates E0 is at most 1", source,
        gradient=lambda x, p: m4_gradient(x, p, offset, term), **about,
    )  # fmt: skip


M4 = m4_form(
    "m4", "(y - E)/(E0 - y)^a = b*x^c", (ANY,), "E", *POWER_TERM, source="M4 of Alabdulmohsin et al. 2209.06640",
    contains={"power_plus": lambda p: {**p, "a": 0.0}},
)  # fmt: skip


def m4_product_form(names: tuple[str, ...] = GRID_NAMES) -> Form:
    """(E − E∞)/(E0 − E)^a = K·D_p^-α·M^-β·D_f^-γ over those of the three variables that vary.

    The product law with a ceiling: errors near chance hardly fall, then fall ever faster.
    """
    text, variables, term = product_term(names)
    return m4_form("m4_product", f"(E - E_inf)/(E0 - E)^a = {text}", variables, "E_inf", term,
                   "the product law of 2504.13219 inside M4 of 2209.06640", restrict=m4_product_form,
                   contains={"product": lambda p: {**p, "a": 0.0}})  # fmt: skip


# Laws of training runs: repeated data, and distillation with the teacher's loss.

FURTHEST = float(np.log(1e6))
"""How far (in log size) beyond the compute-optimal size excess parameters are counted; it keeps α or β of 0 finite."""
LM_PARAMS = (
    offset_param("E"),
    Param("A", "log", (0.02, 2.0), unit="y_mid"),
    Param("B", "log", (0.02, 2.0), unit="y_mid"),
    exponent_param("alpha", -1.0),
    exponent_param("beta", -1.0),
)
LM_SCALING = (Scaling("A", "num_params", "alpha", 1.0), Scaling("B", "num_samples", "beta", 1.0))


def data_constrained_value(x: Columns, p: Values) -> np.ndarray:
    """E + A/N′^α + B/D′^β with N′ = U + U·R*(1 − e^(−R/R*)), likewise D′: repeats beyond U count ever less.

    U_D are the unique samples; U_N is the size that is compute-optimal for U_D, or N if that is smaller, and never less
    than a millionth of N.
    """
    a, b = p["alpha"], p["beta"]
    gain = np.exp(np.log(a * p["A"] / (b * p["B"])) / (a + b))
    log_optimal = np.log(gain) + (np.log(x["unique_samples"]) + np.log(gain)) * b / a
    log_size = np.log(x["num_params"])
    log_base = np.clip(log_optimal, log_size - FURTHEST, log_size)
    size = log_effective(log_base, np.exp(log_size - log_base) - 1, p["R_N"])
    repeats = x["num_samples"] / x["unique_samples"] - 1
    samples = log_effective(np.log(x["unique_samples"]), np.maximum(repeats, 0), p["R_D"])
    return p["E"] + p["A"] * np.exp(-a * size) + p["B"] * np.exp(-b * samples)


def log_effective(log_base: np.ndarray, repeats: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """log(U·(1 + R*(1 − e^(−R/R*))))."""
    return log_base + np.log1p(-decay * np.expm1(-repeats / decay))


DATA_CONSTRAINED = Form(
    "data_constrained", "L = E + A/N'^alpha + B/D'^beta, X' = U + U*R*(1 - exp(-r/R)), r = X/U - 1",
    (LM_SIZE, SAMPLES, Variable("unique_samples", "U_D", aliases=("unique_tokens",), unit_of="num_samples")),
    (*LM_PARAMS, Param("R_D", "log", (1.0, 100.0), 1e-3), Param("R_N", "log", (1.0, 100.0), 1e-3)),
    (*LM_SCALING, Scaling("A", "y", None, 1.0), Scaling("B", "y", None, 1.0)),
    "num_samples >= unique_samples > 0", "Muennighoff et al. 2305.16264", value=data_constrained_value,
    contains={"chinchilla": lambda p: {**p, "R_D": 1e20, "R_N": 1e20}},
)  # fmt: skip


def log_apple_sum(x: Columns, p: Values) -> np.ndarray:
    """γ·log(A/N^α + B/D^β)."""
    size, samples = np.log(x["num_params"]), np.log(x["num_samples"])
    return p["gamma"] * np.log(p["A"] * np.exp(-p["alpha"] * size) + p["B"] * np.exp(-p["beta"] * samples))


def apple_distillation_value(x: Columns, p: Values) -> np.ndarray:
    """L_T + L_T^-c0·(1 + (L_T/(L̃_S·d1))^(1/f1))^(-c1·f1)·(A/N_S^α + B/D_S^β)^γ."""
    teacher = np.log(x["teacher_loss"])
    bend = np.logaddexp(0.0, (teacher - np.log(x["supervised_loss"]) - np.log(p["d1"])) / p["f1"])
    return x["teacher_loss"] + np.exp(-p["c0"] * teacher - p["c1"] * p["f1"] * bend + log_apple_sum(x, p))


GAMMA = Param("gamma", "linear", (0.2, 1.5), 1e-2, 10.0)
APPLE_SUPERVISED = Form(
    "apple_supervised", "L = E + (A/N^alpha + B/D^beta)^gamma", (LM_SIZE, SAMPLES), (*LM_PARAMS, GAMMA), LM_SCALING,
    "all variables > 0", "Busbridge et al. 2502.08606, the supervised law",
    value=lambda x, p: p["E"] + np.exp(log_apple_sum(x, p)),
    contains={"chinchilla": lambda p: {**p, "gamma": 1.0}},
)  # fmt: skip
APPLE_DISTILLATION = Form(
    "apple_distillation", "L_S = L_T + L_T^-c0*(1 + (L_T/(L~_S*d1))^(1/f1))^(-c1*f1)*(A/N_S^alpha + B/D_S^beta)^gamma",
    (LM_SIZE, SAMPLES, Variable("teacher_loss", "L_T", scaled=False),
     Variable("supervised_loss", "L~_S", aliases=("L_S",), scaled=False)),
    (*LM_PARAMS[1:], GAMMA, Param("c0", "linear", (0.0, 4.0), -20.0, 20.0), Param("c1", "linear", (0.0, 20.0), -10.0, 1e4),
     Param("d1", "log", (0.7, 2.0), 1e-2, 1e2), Param("f1", "log", (0.03, 1.0), 1e-3, 1e2)),
    LM_SCALING, "student loss above the teacher's; supervised_loss: what apple_supervised predicts for the same N and D",
    "Busbridge et al. 2502.08606; c1 is weakly identified", value=apple_distillation_value,
)  # fmt: skip

ONE_VARIABLE = ("power", "power_plus", "saturating", "rectified", "m4", "bnsl")
FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        *(additive_form(), product_form(), m4_product_form(), transfer_gap_form(), EFFECTIVE_DATA),
        *(POWER, POWER_PLUS, SATURATING, M4, BNSL, RECTIFIED, LOG_LAW),
        *(CHINCHILLA, DATA_CONSTRAINED, APPLE_SUPERVISED, APPLE_DISTILLATION),
    )
}


def find_form(form: str | Form, variables: tuple[str, ...] | None = None) -> Form:
    """A form by name (or as it is), over fewer variables where it allows that. Raises LawError with the nearest name."""
    if not isinstance(form, Form):
        known: dict[str, Form] = FORMS | plugins.LAWS
        if form not in known:
            raise LawError(f"unknown law {form!r}; {nearest(str(form), known)}")
        form = known[form]
    if variables is None or set(variables) == set(form.variable_names) or form.restrict is None:
        return form
    return form.restrict(tuple(n for n in form.variable_names if n in variables))
