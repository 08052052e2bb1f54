"""The fitted law as a value: parameters with their errors, predictions with intervals, a report, and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dbscale.errors import LawError
from dbscale.laws.form import LOG_FLOOR, Form
from dbscale.laws.forms import find_form
from dbscale.laws.losses import Loss
from dbscale.laws.prediction import calibration_of, mean_interval, prediction_interval
from dbscale.laws.quantiles import student_quantile

SCHEMA = "dbscale.laws/law_fit/1"


@dataclass(frozen=True, eq=False)
class LawFit:
    """One law fitted to one table. Made by `fit_law`; holds its table, so that it can be resampled and calibrated."""

    form: Form
    theta: np.ndarray
    """Coordinates [p] of the optimum, over scaled variables."""
    theta_covariance: np.ndarray
    """[p, p]; zero for fixed parameters and those at a bound."""
    units: dict[str, float]
    """What each variable was divided by."""
    objective: float
    """The minimised sum of weight times loss."""
    loss: Loss
    x: dict[str, np.ndarray]
    y: np.ndarray
    weights: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    """The box [p], in scaled coordinates."""
    num_starts: int
    num_starts_reached: int
    """How many starts ended within a millionth of the best objective."""
    fixed: tuple[str, ...] = ()
    at_bound: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seed: int = 0

    @property
    def name(self) -> str:
        return self.form.name

    @property
    def num_points(self) -> int:
        return len(self.y)

    @property
    def num_free(self) -> int:
        return len(self.form.params) - len(self.fixed)

    @property
    def params(self) -> dict[str, float]:
        """Parameters in the table's own units."""
        return self.to_params(self.theta)

    def to_params(self, theta: np.ndarray) -> dict[str, float]:
        """Scaled coordinates [p] to parameters in the table's own units."""
        return {n: float(v) for n, v in zip(self.form.param_names, self.to_param_rows(theta[None])[0], strict=True)}

    def to_param_rows(self, theta: np.ndarray) -> np.ndarray:
        """Scaled coordinates [S, p] to parameters [S, p] in the table's own units; amplitudes at the floor are 0."""
        matrix = self.form.unscaling(self.units)
        plain = theta @ matrix[:, :-1].T + matrix[:, -1]
        with np.errstate(over="ignore"):
            values = np.where(self.form.is_log, np.exp(plain), plain)
        return np.where(self.form.is_log & (theta <= np.log(LOG_FLOOR) + 1.0), 0.0, values)

    @property
    def covariance(self) -> np.ndarray:
        """[p, p] in the table's own units, by the delta method, in the order of `form.param_names`."""
        matrix = self.form.unscaling(self.units)[:, :-1]
        slope = np.where(self.form.is_log, np.array(list(self.params.values())), 1.0)
        jacobian = matrix * slope[:, None]
        return jacobian @ self.theta_covariance @ jacobian.T

    @property
    def stderr(self) -> dict[str, float]:
        """Standard errors; nan for parameters that are fixed or at a bound."""
        sizes = np.sqrt(np.maximum(np.diag(self.covariance), 0.0))
        silent = {*self.fixed, *self.at_bound}
        return {n: math.nan if n in silent else float(s) for n, s in zip(self.form.param_names, sizes, strict=True)}

    def scaled(self, x: Mapping[str, object] | object) -> dict[str, np.ndarray]:
        """Columns of a table, checked for names and divided by their units."""
        return {name: column / self.units[name] for name, column in self.form.columns(x).items()}

    def predict(self, x: Mapping[str, object] | object) -> np.ndarray:
        """y at the columns `x` (a mapping, or one array for laws of one variable); any shape."""
        return np.real(self.form.evaluate(self.scaled(x), self.theta))

    def predict_draws(self, x: Mapping[str, object] | object, theta: np.ndarray) -> np.ndarray:
        """y [S, n] at flat columns `x` for each row of coordinates `theta` [S, p]."""
        return np.real(self.form.evaluate(self.scaled(x), theta))

    def draws(self, count: int, seed: int = 0) -> np.ndarray:
        """Coordinates [count, p] from the normal approximation, kept inside the box."""
        values, vectors = np.linalg.eigh(self.theta_covariance)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        noise = np.random.default_rng(seed).standard_normal((count, len(self.theta)))
        return np.clip(self.theta + noise @ root.T, self.lower, self.upper)

    @property
    def residuals(self) -> np.ndarray:
        """log ŷ − log y, or ŷ − y for linear losses; [n]."""
        y = self.predict(self.x)
        return np.log(y) - np.log(self.y) if self.loss.is_log else y - self.y

    def interval(
        self, x: Mapping[str, object] | object, level: float = 0.9, *, kind: str = "prediction"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound of y at `x`: `prediction` for a new measurement, `mean` for the law's curve itself."""
        if not 0 < level < 1:
            raise LawError(f"level must lie between 0 and 1, got {level}")
        if kind not in ("prediction", "mean"):
            raise LawError(f"kind {kind!r}: use 'prediction' or 'mean'")
        return (prediction_interval if kind == "prediction" else mean_interval)(self, x, level)

    def parameter_interval(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """Student-t interval of each parameter, symmetric in the coordinates (so amplitudes stay positive).

        Fixed parameters and those at a bound have an interval of no width; see `profile_interval` for a check that does
        not rely on the curvature at the optimum.
        """
        reach = student_quantile(level, self.num_points - self.num_free)
        matrix = self.form.unscaling(self.units)
        middle = self.theta @ matrix[:, :-1].T + matrix[:, -1]
        half = reach * np.sqrt(np.maximum(np.diag(matrix[:, :-1] @ self.theta_covariance @ matrix[:, :-1].T), 0.0))
        with np.errstate(over="ignore"):
            ends = [np.where(self.form.is_log, np.exp(middle + s * half), middle + s * half) for s in (-1, 1)]
        return {n: (float(a), float(b)) for n, a, b in zip(self.form.param_names, *ends, strict=True)}

    def report(self) -> str:
        """A page of text: the equation, parameters with errors, quality, and every warning."""
        rms = float(np.sqrt(np.average(self.residuals**2, weights=self.weights)))
        lines = [f"{self.name}: {self.form.equation}   ({self.form.source})"]
        for name, value in self.params.items():
            note = (
                "fixed"
                if name in self.fixed
                else "at its bound"
                if name in self.at_bound
                else f"± {self.stderr[name]:.3g}"
            )
            lines.append(f"  {name:10s} {value:12.6g}  {note}")
        lines += [
            f"  {self.num_points} points, objective {self.objective:.8g} ({self.loss.kind}, {self.loss.space}), "
            f"rms residual {rms:.4g}; {self.num_starts_reached} of {self.num_starts} starts reached it"
        ]
        return "\n".join(lines + [f"  warning: {w}" for w in self.warnings])

    def to_dict(self, *, calibrate: bool = False) -> dict:
        """JSON-ready; nan becomes null. `calibrate` adds how prediction intervals were calibrated and what they
        covered.
        """
        return {
            "schema": SCHEMA,
            "form": self.name,
            "equation": self.form.equation,
            "variables": list(self.form.variable_names),
            "params": {k: _finite(v) for k, v in self.params.items()},
            "stderr": {k: _finite(v) for k, v in self.stderr.items()},
            "covariance": [[_finite(v) for v in row] for row in self.covariance],
            "objective": self.objective,
            "loss": {"kind": self.loss.kind, "space": self.loss.space, "delta": self.loss.delta},
            "num_points": self.num_points,
            "starts": {"tried": self.num_starts, "reached": self.num_starts_reached},
            "fixed": list(self.fixed),
            "at_bound": list(self.at_bound),
            "warnings": list(self.warnings),
            "seed": self.seed,
            "range": {k: [float(v.min()), float(v.max())] for k, v in self.x.items()},
            "scaled": {
                "units": self.units,
                "theta": self.theta.tolist(),
                "theta_covariance": self.theta_covariance.tolist(),
                "lower": [_finite(v) for v in self.lower],
                "upper": [_finite(v) for v in self.upper],
            },
            "table": {
                "x": {k: v.tolist() for k, v in self.x.items()},
                "y": self.y.tolist(),
                "weights": self.weights.tolist(),
            },
            "calibration": calibration_of(self).to_dict() if calibrate else None,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping) -> LawFit:
        """The fit back from `to_dict`; refuses other schemas and unknown forms."""
        if data.get("schema") != SCHEMA:
            raise LawError(f"not a law fit: schema {data.get('schema')!r}, expected {SCHEMA!r}")
        scaled, table, starts = data["scaled"], data["table"], data["starts"]
        return cls(
            form=find_form(data["form"], tuple(data["variables"])),
            theta=np.array(scaled["theta"], dtype=float),
            theta_covariance=np.array(scaled["theta_covariance"], dtype=float),
            units={k: float(v) for k, v in scaled["units"].items()},
            objective=float(data["objective"]),
            loss=Loss(**data["loss"]),
            x={k: np.array(v, dtype=float) for k, v in table["x"].items()},
            y=np.array(table["y"], dtype=float),
            weights=np.array(table["weights"], dtype=float),
            lower=np.array([-np.inf if v is None else v for v in scaled["lower"]]),
            upper=np.array([np.inf if v is None else v for v in scaled["upper"]]),
            num_starts=starts["tried"],
            num_starts_reached=starts["reached"],
            fixed=tuple(data["fixed"]),
            at_bound=tuple(data["at_bound"]),
            warnings=tuple(data["warnings"]),
            seed=data["seed"],
        )

    @classmethod
    def from_json(cls, text: str) -> LawFit:
        return cls.from_dict(json.loads(text))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
