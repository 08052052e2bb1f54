"""The grid entry that names a dataset which is packed already, behind a URL.

Reading by byte ranges is `dbscale.data.remote`, packing to a URL `dbscale.shards.publish`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dbscale.data.manifest import MANIFEST_NAME
from dbscale.data.remote import mirror, origin
from dbscale.errors import DataError
from dbscale.strict import Strict, validate

KIND = "remote"


class Remote(Strict):
    """`{source: remote, url: s3://bucket/birds}`: a dataset that is packed already, behind a URL."""

    url: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.]*://[^\s\x00-\x1f]+$")]
    keep: bool = False
    """Keep on disk what was read of the tars."""


def remote_of(name: str, entry: Mapping[str, Any]) -> Remote | None:
    """The remote dataset that an entry names; None for an entry that is packed from a source. Raises ConfigError."""
    if entry.get("source") != KIND:
        return None
    options = {key: value for key, value in entry.items() if key != "source"}
    return validate(Remote, options, where=f"dataset {name!r} (source {KIND})")


def ensure_mirrored(name: str, remote: Remote, folder: Path) -> Path:
    """Manifest and index of a remote dataset in `folder`, fetched unless they are there.

    Raises DataError where the folder holds another dataset, or the URL cannot be read.
    """
    if not (folder / MANIFEST_NAME).exists():
        return mirror(remote.url, folder, keep=remote.keep)
    found = origin(folder)
    if found != remote.url.rstrip("/"):
        what = f"comes from {found}" if found else "was packed here"
        raise DataError(f"{folder}: dataset {name!r} {what}, now asked for {remote.url}; take another dataset name, or "
                        "remove this folder first")  # fmt: skip
    return folder
