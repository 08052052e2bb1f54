"""The base of every config: strict YAML, how a mapping becomes a config, and errors that name path, value and remedy.

Configs are strict and frozen: a typo is an error with the nearest known name, never a silently ignored key. YAML comes
without its surprises: duplicate keys are errors, `1e-3` is a number, `4:00:00` and `no` stay text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from dbscale.errors import ConfigError, nearest


class Strict(BaseModel):
    """A frozen config: no coercion, no unknown keys."""

    # Validators are built on first use: a command needs few of the hundred configs that it imports.
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", defer_build=True)


Config = TypeVar("Config", bound=Strict)
MOST_VALUES, DEEPEST = 100_000, 60
"""The most values, and levels of nesting, of one YAML file."""
LONGEST = 300
"""Characters of a found value that a message repeats."""


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


def _explain(model: type[BaseModel], detail: ErrorDetails, data: Mapping[str, Any]) -> str:
    path = ".".join(_written_path(detail["loc"], data, absent=detail["type"] == "missing"))
    if detail["type"] == "extra_forbidden":
        known = _fields_at(model, detail["loc"][:-1])
        return f"unknown key {path!r}; {nearest(str(detail['loc'][-1]), known)}"
    if detail["type"] == "missing":
        return f"missing key {path!r}"
    if detail["type"] == "value_error":
        return ": ".join(filter(None, (path, detail["msg"].removeprefix("Value error, "))))
    said = detail["msg"][:1].lower() + detail["msg"][1:]  # what follows may be a pattern, where case counts
    return f"{path}: {said}, found {_shortened(repr(detail['input']))}"


def _written_path(loc: tuple[int | str, ...], data: Any, *, absent: bool) -> list[str]:
    """The path as the user wrote it: without the union tags that pydantic puts between and behind the keys. `absent`: the
    last part is a key that was not written, and is named all the same."""
    path: list[str] = []
    for position, part in enumerate(loc):
        try:
            data = data[part]
        except (LookupError, TypeError):
            if position < len(loc) - 1 or not absent:
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


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2's core schema, underscores in numbers allowed."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Mark] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConfigError(
                    f"line {key_node.start_mark.line + 1}: a list or mapping cannot be a key; write a name"
                )
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice, first on line "
                                  f"{seen[key].line + 1}; remove one")  # fmt: skip
            seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep)


_SCALARS = [
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
]
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value.replace("_", "")))


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in `path`; raises ConfigError for a missing file, bad YAML, duplicate keys or another shape."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    value = parse_yaml(text, where=str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected keys and values at the top level, found {type(value).__name__}")
    return value


def load_extended(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """As `load_yaml`; `extends: other.yaml` (relative to this file) fills in what the file leaves out, mapping by mapping.

    The other file may itself extend one; `below` holds the files on the way here.
    """
    data = load_yaml(path)
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ConfigError(f"{path}: `extends` takes the path of one YAML file, found {base!r}")
    base_path, below = (path.parent / base).resolve(), (*below, path.resolve())
    if base_path in below:
        raise ConfigError(f"{path}: a grid cannot extend itself, and {base} comes back to {base_path.name}")
    return _merge(load_extended(path.parent / base, below), data)


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merge(base[key], own[key])
        for key in base.keys() & own.keys()
        if isinstance(base[key], dict) and isinstance(own[key], dict)
    }
    return {**base, **own, **both}


def parse_yaml(text: str, *, where: str) -> Any:
    """Plain data from YAML text; errors begin with `where`."""
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader: plain data only
        _refuse_bomb(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, LookupError, AttributeError) as error:
        raise ConfigError(f"{where}: not valid YAML: {_shortened(' '.join(str(error).split()))}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: brackets or levels nested more than {DEEPEST} deep") from None
    return value


def _refuse_bomb(value: Any) -> None:
    """A few lines of aliases can stand for more values than fit in memory, or for themselves."""
    todo, count = [(value, 1)], 0
    while todo:
        each, depth = todo.pop()
        count += 1
        if depth > DEEPEST or count > MOST_VALUES:
            raise ConfigError(f"it stands for more than {MOST_VALUES:,} values, or {DEEPEST} levels; a config needs far "
                              "fewer: look at its aliases (*name)")  # fmt: skip
        below = each.values() if isinstance(each, dict) else each if isinstance(each, list | tuple | set) else ()
        todo += [(part, depth + 1) for part in below]


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with each `path.to.key=value` applied; values are YAML, missing levels are made."""
    result = data
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {assignment!r}: write path.to.key=value")
        result = set_path(result, path, parse_yaml(value, where=f"--set {path}"))
    return result


def set_path(data: Any, path: str, value: Any) -> dict[str, Any]:
    """A copy of `data` with `path` (dots between keys) set to `value`."""
    head, _, rest = path.partition(".")
    if isinstance(data, list):
        if not head.isdigit() or int(head) >= len(data):
            raise ConfigError(
                f"{path!r}: a list of {len(data)} takes an index from 0 to {len(data) - 1}, found {head!r}"
            )
        copy: Any = list(data)
        copy[int(head)] = set_path(data[int(head)], rest, value) if rest else value
        return copy
    level = dict(data) if isinstance(data, dict) else {}
    level[head] = set_path(level.get(head), rest, value) if rest else value
    return level
