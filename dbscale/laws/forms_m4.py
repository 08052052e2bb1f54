"""M4 and its kin: laws that saturate at both ends, in one variable or in a product of several.

(ε − E)/(E0 − ε)^a = right side, a power of x or a product of powers; solved for ε. Gradients by hand.
"""

from __future__ import annotations

import numpy as np

from dbscale.laws.form import Columns, Contains, Form, Param, Scaling, Values, Variable
from dbscale.laws.forms_power import ANY, GRID, Term

NEWTON_STEPS, CLOSE = 40, 3e-8
"""Convergence is quadratic: after a step this small the error is that of rounding."""


def log_term(x: Columns, p: Values, term: Term) -> np.ndarray:
    """log(amplitude · Π variable^(sign · exponent))."""
    return np.log(p[term.amplitude]) + sum(s * p[e] * np.log(x[v]) for v, e, s in term.factors)


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


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1/(1 + e^-z) without overflow."""
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, small) / (1.0 + small)


def m4_parts(right: np.ndarray, p: Values, offset: str) -> tuple[np.ndarray, np.ndarray]:
    """ε − E and E0 − ε, each without cancellation; nan where E0 ≤ E. Real parts only."""
    right, level, a = np.real(right), np.real(p["E0"] - p[offset]), np.real(p["a"])
    z = m4_root(right, level, a)
    plain = np.exp(right)
    level = np.where(level > 0, level, np.nan)
    above = np.where(a == 0, plain, level * sigmoid(z))
    return above, np.where(a == 0, np.maximum(level - plain, 1e-12), np.maximum(level * sigmoid(-z), 1e-300))


def m4_value(x: Columns, p: Values, offset: str, term: Term) -> np.ndarray:
    """ε. At a = 0 this is E + right side, whatever E0. Complex parts are carried by the implicit function's slope."""
    right = log_term(x, p, term)
    above, below = m4_parts(right, p, offset)
    if not any(np.iscomplexobj(v) for v in p.values()):
        return p[offset] + above
    a, shift = np.real(p["a"]), {name: np.imag(p[name]) for name in (offset, "E0", "a")}
    moved = shift[offset] / above + a * shift["E0"] / below + shift["a"] * np.log(below) + np.imag(right)
    return np.real(p[offset]) + above + 1j * moved / (1.0 / above + a / below)


def m4_gradient(x: Columns, p: Values, offset: str, term: Term) -> tuple[np.ndarray, Values]:
    """y and its slopes from the implicit equation F = log(ε − E) − a·log(E0 − ε) − right = 0."""
    above, below = m4_parts(log_term(x, p, term), p, offset)
    slope = 1.0 / (1.0 / above + p["a"] / below)  # 1 / (∂F/∂ε)
    return p[offset] + above, {
        offset: slope / above,
        "E0": slope * p["a"] / below,
        "a": slope * np.log(below),
        term.amplitude: slope / p[term.amplitude],
        **{e: s * slope * np.log(x[v]) for v, e, s in term.factors},
    }


def m4_form(name: str, equation: str, variables: tuple[Variable, ...], offset: str, term: Term, **about) -> Form:
    """A law of this family; `about` are the rest of `Form`'s fields."""
    start = {-1.0: ((0.05, 1.2), (0.0, 10.0)), 1.0: ((-1.2, -0.05), (-10.0, 10.0))}
    return Form(
        name,
        equation,
        variables,
        (
            Param(offset, "linear", (0.0, 0.98), 0.0, np.inf, unit="y_low"),
            Param("E0", "linear", (1.001, 1.6), 0.0, np.inf, unit="y_high", rate_ceiling=True),
            Param("a", "linear", (0.0, 2.0), 0.0, 20.0),
            Param(term.amplitude, "log", (0.02, 5.0), unit="y_mid"),
            *(Param(e, "linear", start[s][0], *start[s][1]) for _, e, s in term.factors),
        ),
        value=lambda x, p: m4_value(x, p, offset, term),
        gradient=lambda x, p: m4_gradient(x, p, offset, term),
        scaling=tuple(Scaling(term.amplitude, v, e, -s) for v, e, s in term.factors),
        domain="all variables > 0, E < y < E0; E0 is at most 1 for error rates and free for losses",
        **about,
    )


M4 = m4_form(
    "m4",
    "(y - E)/(E0 - y)^a = b*x^c",
    (ANY,),
    "E",
    Term("b", (("x", "c", 1.0),)),
    contains=(Contains("power_plus", lambda p: {**p, "E0": 1.0, "a": 0.0}),),
    source="M4 of Alabdulmohsin et al. 2209.06640",
)


def m4_product_form(names: tuple[str, ...] = ("upstream_samples", "num_params", "downstream_samples")) -> Form:
    """(E − E∞)/(E0 − E)^a = K·D_p^-α·M^-β·D_f^-γ over those of the three variables that vary.

    The product law with a ceiling: errors near chance hardly fall, then fall ever faster.
    """
    used = [row for row in GRID if row[0].name in names]
    return m4_form(
        "m4_product",
        "(E - E_inf)/(E0 - E)^a = K" + "".join(f"*{v.symbol}^-{e}" for v, _, e in used),
        tuple(v for v, _, _ in used),
        "E_inf",
        Term("K", tuple((v.name, e, -1.0) for v, _, e in used)),
        contains=(Contains("product", lambda p: {**p, "E0": 1.0, "a": 0.0}),),
        restrict=m4_product_form,
        source="the product law of 2504.13219 inside M4 of 2209.06640",
    )
