"""YAML without its surprises: duplicate keys are errors, `1e-3` is a number, `4:00:00` and `no` stay text.

Only plain data comes out; what it means is `strict.validate`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dbscale.study.strict import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2's core schema, underscores in numbers allowed."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Mark] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
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


def parse_yaml(text: str, *, where: str) -> Any:
    """Plain data from YAML text; errors begin with `where`."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain data only
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


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
