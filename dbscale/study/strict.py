"""The base of every config, and how a mapping from YAML becomes one.  Errors name the path, the value and the fix.

Configs are strict and frozen: a typo is an error with the nearest known name, never a silently ignored key.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails


class ConfigError(ValueError):
    """What the user wrote cannot be used: the message says where, which value, and what is allowed."""


class Strict(BaseModel):
    """A frozen config: no coercion, no unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


Config = TypeVar("Config", bound=Strict)


def validate(model: type[Config], data: Mapping[str, Any], *, where: str) -> Config:
    """`data` (as read from YAML or JSON) as a `model`; raises ConfigError naming `where`, path, value and remedy."""
    # Through JSON, because strict mode then still takes a list for a tuple, as YAML has no tuples.
    try:
        return model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        # What was written wrongly comes before what is missing: often the first explains the second.
        details = sorted(error.errors(), key=lambda detail: detail["type"] == "missing")
        lines = [_explain(model, detail, data) for detail in details]
        raise ConfigError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def nearest(name: str, known: list[str]) -> str:
    """A "did you mean" clause and the list of what is known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(sorted(known))}"


def _explain(model: type[BaseModel], detail: ErrorDetails, data: Mapping[str, Any]) -> str:
    path = ".".join(_written_path(detail["loc"], data))
    if detail["type"] == "extra_forbidden":
        known = _fields_at(model, detail["loc"][:-1])
        return f"unknown key {path!r}; {nearest(str(detail['loc'][-1]), known)}"
    if detail["type"] == "missing":
        return f"missing key {path!r}"
    if detail["type"] == "value_error":
        return f"{path or 'here'}: {detail['msg'].removeprefix('Value error, ')}"
    return f"{path}: {detail['msg'].lower()}, found {detail['input']!r}"


def _written_path(loc: tuple[int | str, ...], data: Any) -> list[str]:
    """The path as the user wrote it: without the union tags that pydantic puts between the keys."""
    path: list[str] = []
    for position, part in enumerate(loc):
        try:
            data = data[part]
        except (LookupError, TypeError):
            if position < len(loc) - 1:
                continue
        path.append(str(part))
    return path


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the config that `loc` leads to, through containers and unions; all seen when it is a union."""
    models = [model]
    for part in loc:
        models = [found for each in models for found in _step(each, part)] or models
    return sorted({name for each in models for name in each.model_fields})


def _step(model: type[BaseModel], part: int | str) -> list[type[BaseModel]]:
    """The configs one step of a pydantic path leads to; indices, dict keys and union tags stay where they are."""
    field = model.model_fields.get(str(part))
    return [] if field is None else _models_in(field.annotation)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for each in getattr(annotation, "__args__", ()) for found in _models_in(each)]
