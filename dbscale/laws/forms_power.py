"""Laws that are sums of power laws: one maker, with its gradient by hand, gives eight of the forms.

y = offset + Σ amplitude · Π variable^(± exponent). Other shapes are in `forms_curves` and `forms_scaling`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dbscale.laws.form import Columns, Contains, Form, Param, Scaling, Values, Variable

UPSTREAM = Variable("upstream_samples", "D_p", aliases=("num_upstream_samples", "dp"))
SIZE = Variable("num_params", "M", aliases=("N", "params"))
DOWNSTREAM = Variable("downstream_samples", "D_f", aliases=("num_downstream_samples", "df"))
SAMPLES = Variable("num_samples", "D", aliases=("num_tokens", "train_tokens", "tokens", "seen_examples"))
ANY = Variable("x", "x")
EXPONENT_START = (0.05, 1.2)


@dataclass(frozen=True)
class Term:
    """amplitude · Π variable^(sign · exponent)."""

    amplitude: str
    factors: tuple[tuple[str, str, float], ...]
    """(variable, exponent, sign) each."""


def power_sum_value(x: Columns, p: Values, offset: str | None, terms: tuple[Term, ...]) -> np.ndarray:
    """Σ of the terms and the offset; complex-safe."""
    total = p[offset] if offset else 0.0
    for term in terms:
        total = total + p[term.amplitude] * np.exp(sum(s * p[e] * np.log(x[v]) for v, e, s in term.factors))
    return np.asarray(total)


def power_sum_gradient(x: Columns, p: Values, offset: str | None, terms: tuple[Term, ...]) -> tuple[np.ndarray, Values]:
    """y and ∂y/∂parameter. An exponent that several terms share collects from each."""
    total: np.ndarray | float = 0.0
    slopes: dict[str, np.ndarray] = {}
    for term in terms:
        logs = {e: s * np.log(x[v]) for v, e, s in term.factors}
        slopes[term.amplitude] = np.exp(sum(p[e] * log for e, log in logs.items()))
        part = p[term.amplitude] * slopes[term.amplitude]
        total = total + part
        for e, log in logs.items():
            slopes[e] = slopes[e] + part * log if e in slopes else part * log
    if offset:
        total = total + p[offset]
        slopes[offset] = np.ones_like(total)
    return np.asarray(total), slopes


def power_sum(
    name: str,
    equation: str,
    variables: tuple[Variable, ...],
    terms: tuple[Term, ...],
    *,
    source: str,
    offset: str | None = "E",
    signed: bool = False,
    contains: tuple[Contains, ...] = (),
    restrict=None,
    domain: str = "all variables > 0",
) -> Form:
    """A sum of power laws as a form. Exponents lie in [0, 10], or in [-10, 10] when `signed`."""
    exponents = {e: s for t in terms for _, e, s in t.factors}
    params = [Param(t.amplitude, "log", (0.02, 1.5), unit="y_mid") for t in terms]
    params += [
        Param(e, "linear", EXPONENT_START if s < 0 else (-1.2, -0.05), -10.0 if signed else 0.0, 10.0)
        for e, s in exponents.items()
    ]
    if offset:
        params.insert(0, Param(offset, "linear", (0.0, 0.98), 0.0, np.inf, unit="y_low"))
    return Form(
        name,
        equation,
        variables,
        tuple(params),
        value=lambda x, p: power_sum_value(x, p, offset, terms),
        gradient=lambda x, p: power_sum_gradient(x, p, offset, terms),
        scaling=tuple(Scaling(t.amplitude, v, e, -s) for t in terms for v, e, s in t.factors),
        source=source,
        domain=domain,
        contains=contains,
        restrict=restrict,
    )


GRID = ((UPSTREAM, "A", "alpha"), (SIZE, "B", "beta"), (DOWNSTREAM, "C", "gamma"))


def additive_form(names: tuple[str, ...] = ("upstream_samples", "num_params", "downstream_samples")) -> Form:
    """E = E∞ + A·D_p^-α + B·M^-β + C·D_f^-γ over those of the three variables that vary."""
    used = [row for row in GRID if row[0].name in names]
    return power_sum(
        "additive",
        "E = E_inf + " + " + ".join(f"{a}*{v.symbol}^-{e}" for v, a, e in used),
        tuple(v for v, _, _ in used),
        tuple(Term(a, ((v.name, e, -1.0),)) for v, a, e in used),
        offset="E_inf",
        source="2504.13219, one reading of its Eq. 1",
        restrict=additive_form,
    )


def product_form(names: tuple[str, ...] = ("upstream_samples", "num_params", "downstream_samples")) -> Form:
    """E = E∞ + K·D_p^-α·M^-β·D_f^-γ over those of the three variables that vary."""
    used = [row for row in GRID if row[0].name in names]
    return power_sum(
        "product",
        "E = E_inf + K" + "".join(f"*{v.symbol}^-{e}" for v, _, e in used),
        tuple(v for v, _, _ in used),
        (Term("K", tuple((v.name, e, -1.0) for v, _, e in used)),),
        offset="E_inf",
        source="2504.13219, the other reading: separable, additive in the log domain",
        restrict=product_form,
    )


TRANSFER_GAP = power_sum(
    "transfer_gap",
    "E = (A*D_p^-alpha + G)*D_f^-beta + E_inf",
    (UPSTREAM, DOWNSTREAM),
    (
        Term("A", (("upstream_samples", "alpha", -1.0), ("downstream_samples", "beta", -1.0))),
        Term("G", (("downstream_samples", "beta", -1.0),)),
    ),
    offset="E_inf",
    source="Barnett 2408.16947; without E_inf Mikami et al. 2108.11018",
    contains=(
        Contains(
            "product", lambda p: {"E_inf": p["E_inf"], "A": p["K"], "G": 0.0, "alpha": p["alpha"], "beta": p["gamma"]}
        ),
    ),
)

POWER = power_sum(
    "power", "y = b*x^c", (ANY,), (Term("b", (("x", "c", 1.0),)),), offset=None, signed=True, source="M1 of 2209.06640"
)

POWER_PLUS = power_sum(
    "power_plus",
    "y = E + b*x^c",
    (ANY,),
    (Term("b", (("x", "c", 1.0),)),),
    signed=True,
    source="M2 of 2209.06640",
    contains=(Contains("power", lambda p: {"E": 0.0, **p}),),
)

CHINCHILLA = power_sum(
    "chinchilla",
    "L = E + A/N^alpha + B/D^beta",
    (Variable("num_params", "N", aliases=("M", "params")), SAMPLES),
    (Term("A", (("num_params", "alpha", -1.0),)), Term("B", (("num_samples", "beta", -1.0),))),
    source="Hoffmann et al. 2203.15556; data and fit of 2404.10102",
)

EFFECTIVE_DATA = power_sum(
    "effective_data",
    "D_T = k*D_f^alpha*M^beta",
    (DOWNSTREAM, SIZE),
    (Term("k", (("downstream_samples", "alpha", 1.0), ("num_params", "beta", 1.0))),),
    offset=None,
    signed=True,
    source="Hernandez et al. 2102.01293",
    domain="low-data regime: D_f at most 10 % of the data that training from scratch would need",
)
