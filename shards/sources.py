"""Pick a source by kind and check its options: `make_source("fractals", families=64)`."""

import inspect
from pathlib import Path
from typing import Any

from dbscale.errors import DataError
from shards.cifar import Cifar
from shards.digits import Digits
from shards.fractals import Fractals
from shards.imagefolder import ImageFolder
from shards.parquet import Parquet
from shards.source import Source, refuse_remote
from shards.tinyimagenet import TinyImageNet
from shards.webdataset import WebDatasetTars

KINDS: dict[str, Any] = {
    "imagefolder": ImageFolder,
    "cifar": Cifar,
    "tinyimagenet": TinyImageNet,
    "parquet": Parquet,
    "webdataset": WebDatasetTars,
    "digits": Digits,
    "fractals": Fractals,
}


def make_source(kind: str, *, data_dir: str | Path = ".", **options: Any) -> Source:
    """A source of one kind.

    Args:
        kind: one of `KINDS`.
        data_dir: what a relative `path` is relative to.
        options: fields of the kind's class.

    Raises:
        DataError: unknown kind or option, or an option that is missing or impossible.
    """
    if kind not in KINDS:
        raise DataError(f"source kind {kind!r} is unknown; known: {', '.join(KINDS)}")
    allowed = inspect.signature(KINDS[kind]).parameters
    unknown = options.keys() - allowed.keys()
    if unknown:
        raise DataError(f"source {kind!r} has no option {sorted(unknown)[0]!r}; it has: {', '.join(allowed)}")
    missing = [name for name, field in allowed.items() if field.default is field.empty and name not in options]
    if missing:
        raise DataError(f"source {kind!r} needs the option {missing[0]!r}")
    return KINDS[kind](**{name: _convert(name, value, Path(data_dir)) for name, value in options.items()})


def _convert(name: str, value: Any, data_dir: Path) -> Any:
    if name == "path":
        refuse_remote(str(value))
        return data_dir / value
    if name == "class_list":
        return _class_list(value, data_dir)
    return frozenset(value) if name == "exclude" else value


def _class_list(value: Any, data_dir: Path) -> tuple[str, ...] | None:
    """A list of names, or a text file with one name (say, a WordNet id) at the start of each line."""
    if value is None or not isinstance(value, str):
        return None if value is None else tuple(value)
    path = data_dir / value
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise DataError(f"{path}: class list cannot be read ({error.strerror})") from error
    names = tuple(line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#"))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise DataError(f"{path}: class list is empty or names a class twice: {', '.join(twice[:5])}")
    return names
