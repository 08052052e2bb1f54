"""Parts that others write: sources, loss terms, metrics, laws, and whatever registers itself with timm.

A plugin is an importable module, or a file beside the grid that names it under `plugins:`. It is imported once per
process and registers its parts with the decorators below; its source is hashed into the identity of the grid's cells.
Nothing in a store makes a process import anything: a job imports what the command that started it had imported, which
it finds in an environment variable, and a cell whose plugins are missing or changed is refused.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from dbscale.errors import ConfigError, nearest

ENVIRONMENT = "DBSCALE_PLUGINS"
"""Where a job finds the names and paths of the plugins to import."""
SOURCES: dict[str, Any] = {}
"""Subclasses of `dbscale.shards.source.Source` by kind."""
LOSSES: dict[str, Callable[..., Any]] = {}
METRICS: dict[str, Callable[..., Any]] = {}
LAWS: dict[str, Any] = {}
"""`dbscale.laws.Form`s by name."""
loaded: dict[str, str] = {}
"""Hash of each plugin of this process, by module."""
Part = TypeVar("Part")
log = logging.getLogger(__name__)


def register_source(kind: str) -> Callable[[Part], Part]:
    """Let a grid's datasets say `source: <kind>`: a subclass of `dbscale.shards.source.Source`, options as its fields."""
    return _registers(SOURCES, "source", kind)


def register_loss(name: str) -> Callable[[Part], Part]:
    """Let a stage's training say `loss_terms: {<name>: weight}`.

    A function (student_logits [b, C], target, images [b, 3, S, S]) -> scalar tensor; `target` are class indices [b], or
    a mixup triple with y_a, y_b [b] and lam.
    """
    return _registers(LOSSES, "loss term", name)


def register_metric(name: str) -> Callable[[Part], Part]:
    """Let a grid say `metrics: [<name>]`: a value of each test sample, whose mean every row then has.

    A function (logits [b, C], labels [b]) -> [b]. The mean is over all ranks and exact.
    """
    return _registers(METRICS, "metric", name)


def register_law(form: Any) -> Any:
    """Let `--law <name>`, `fit_law` and `select_law` take a `dbscale.laws.Form`; returns it."""
    _registers(LAWS, "law", form.name)(form)
    return form


def _registers(registry: dict[str, Any], what: str, name: str) -> Callable[[Part], Part]:
    def register(part: Part) -> Part:
        if name in registry:
            raise ConfigError(f"two plugins register the {what} {name!r}; rename one of them")
        registry[name] = part
        return part

    return register


def part_of(registry: dict[str, Any], what: str, name: str) -> Any:
    """The part of this name. Raises ConfigError naming the nearest."""
    if name not in registry:
        raise ConfigError(f"unknown {what} {name!r}; {nearest(name, registry)}; plugins register them, see `plugins:`")
    return registry[name]


def load(places: Iterable[str], folder: Path = Path()) -> dict[str, str]:
    """Import plugins; returns module -> hash. A place that ends in .py is a file below `folder`, else a module's name.

    Child processes import them too. Raises ConfigError where one is missing or fails.
    """
    return {name: loaded[name] for name in [_load(place, folder) for place in places]}


def _load(place: str, folder: Path) -> str:
    path = (folder / place).resolve() if place.endswith(".py") else None
    name = path.stem if path is not None else place
    if name in loaded:
        return name
    if path is not None:
        _check_file(path, place)
        sys.path.append(str(path.parent))  # spawned processes inherit it
    try:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"no module named {name!r}")
        importlib.import_module(name)
    except ConfigError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"plugin {place!r} cannot be imported here ({why}); install it on every machine that runs cells, "
                          "or give a file beside the grid: `plugins: [parts.py]`") from error  # fmt: skip
    loaded[name] = source_hash(Path(spec.origin))
    log.info("imported the plugin %s from %s", name, spec.origin)
    known = filter(None, os.environ.get(ENVIRONMENT, "").split(os.pathsep))
    os.environ[ENVIRONMENT] = os.pathsep.join([*known, str(path) if path is not None else place])
    return name


def _check_file(path: Path, place: str) -> None:
    if not path.is_file():
        raise ConfigError(f"plugin {place!r}: no file {path}; its path is relative to the grid that names it")
    there = importlib.util.find_spec(path.stem) if path.stem.isidentifier() else None
    if not path.stem.isidentifier() or (there is not None and Path(there.origin or "").resolve() != path):
        taken = f"{path.stem!r} is a module already ({there.origin})" if there else f"{path.stem!r} is no module's name"
        raise ConfigError(f"plugin {place!r}: {taken}; rename the file")


def source_hash(origin: Path) -> str:
    """sha256 of a module's file, or of all .py files of a package, names included."""
    if origin.name != "__init__.py":
        return hashlib.sha256(origin.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for path in sorted(origin.parent.rglob("*.py")):
        digest.update(f"{path.relative_to(origin.parent)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def require(wanted: dict[str, str]) -> None:
    """Import what the process that started this one had imported; raise ConfigError unless these plugins, module -> hash,
    are among it as they were planned."""
    load(filter(None, os.environ.get(ENVIRONMENT, "").split(os.pathsep)))
    for name, digest in wanted.items():
        found = loaded.get(name)
        if found is None:
            raise ConfigError(f"the cell needs the plugin {name!r}, which this process was not given; name its grid with "
                              f"--grid, or the plugin with `dbscale --plugin PATH …`")  # fmt: skip
        if found != digest:
            raise ConfigError(f"the plugin {name!r} has changed since the cell was planned (sha256 {found[:12]}, planned "
                              f"{digest[:12]}); plan the grid again, or bring the old file back")  # fmt: skip
