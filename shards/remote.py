"""Datasets behind a URL: the grid entry that names a packed one, and packing any folder to a URL.

Reading by byte ranges is `dbscale.data.remote`. A pack for a URL is made in a local folder first, because shards must be
whole before their checksums are known, and uploaded object by object, the manifest last.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from tqdm import tqdm

from dbscale.data.manifest import MANIFEST_NAME, load_manifest
from dbscale.data.remote import fetch_file, filesystem_of, is_url, mirror, origin, unreachable
from dbscale.errors import ConfigError, DataError
from dbscale.shards.imagefolder import IMAGE_SUFFIXES
from dbscale.strict import Strict, validate

KIND = "remote"
TEST_SHARE = 0.1
"""Split off where a folder has no test split of its own."""


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


def guess_entry(path: Path) -> dict[str, Any]:
    """A dataset entry for any folder of images, tars or tables, by what lies in it. Raises ConfigError."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; give the folder that holds the images, tars or tables")
    entry: dict[str, Any] = {"path": path.name}
    for kind, suffixes in (("parquet", (".parquet",)), ("webdataset", (".tar", ".tar.gz", ".tgz"))):
        files = [each.relative_to(path) for each in path.rglob("*") if each.name.endswith(suffixes)]
        if files:
            return entry | {"source": kind, **_patterns([str(each) for each in files], suffixes)}
    if not any(each.suffix.lower().lstrip(".") in IMAGE_SUFFIXES for each in path.rglob("*")):
        raise ConfigError(f"{path}: holds neither images nor tars nor parquet tables; --kind names the kind of source")
    entry["source"] = "imagefolder"
    tests = [name for name in ("test", "val", "valid", "validation") if (path / name).is_dir()]
    if not (path / "train").is_dir():
        return entry | {"test": TEST_SHARE}
    return entry | {"test": tests[0] if tests else TEST_SHARE}


def _patterns(files: list[str], suffixes: tuple[str, ...]) -> dict[str, Any]:
    """`train` and `test` by the files' names; without such names all train, and a share is split off."""
    known = {part: [f"**/*{part}*{suffix}" for suffix in suffixes if any(part in each and each.endswith(suffix)
             for each in files)] for part in ("train", "test", "val")}  # fmt: skip
    if not known["train"]:
        return {"train": [f"**/*{suffix}" for suffix in suffixes if any(each.endswith(suffix) for each in files)],
                "test": TEST_SHARE}  # fmt: skip
    return {"train": known["train"], "test": known["test"] or known["val"] or TEST_SHARE}


def pack_folder(
    source: Path,
    out: str,
    *,
    kind: str | None = None,
    options: Mapping[str, Any] | None = None,
    jobs: int | None = None,
) -> str:
    """Pack any folder to another folder, or to a URL; returns where it is. A pack that was cut off goes on.

    `kind` and `options` are those of a grid's dataset entry; what is left out is guessed from the folder. Raises
    ConfigError, or DataError as `pack` does.
    """
    from dbscale.shards.pack import pack
    from dbscale.shards.sources import source_of

    guessed = {"source": kind, "path": source.name} if kind else guess_entry(source)
    entry = {**guessed, **(options or {})}
    name = out.rstrip("/").rpartition("/")[2]
    made = source_of(name, entry, source.resolve().parent)
    if not is_url(out):
        pack(made, Path(out), jobs=jobs, entry=entry)
        return out
    work = Path(tempfile.gettempdir()) / f"dbscale-pack-{hashlib.sha256(out.encode()).hexdigest()[:12]}"
    pack(made, work, name=name, jobs=jobs, entry=entry)
    upload(work, out)
    shutil.rmtree(work)
    return out


def upload(folder: Path, url: str, *, progress: bool = True) -> None:
    """Copy a packed dataset to a URL, shards that are there in their size left out, the manifest last.

    Raises DataError where another dataset is packed there, or the store cannot be written.
    """
    manifest = load_manifest(folder)
    filesystem, root = filesystem_of(url.rstrip("/"))
    names = [shard.name for split in manifest.splits.values() for shard in split.shards]
    names += [split.index for split in manifest.splits.values()]
    try:
        if filesystem.exists(f"{root}/{MANIFEST_NAME}"):
            if fetch_file(url, MANIFEST_NAME) != (folder / MANIFEST_NAME).read_bytes():
                raise DataError(f"{url}: another dataset is packed there; choose another URL, or remove it first")
        else:
            names.append(MANIFEST_NAME)
        for name in tqdm(names, desc=f"upload {manifest.name}", unit="file", disable=not progress):
            size = (folder / name).stat().st_size
            if not filesystem.exists(f"{root}/{name}") or filesystem.size(f"{root}/{name}") != size:
                filesystem.put_file(str(folder / name), f"{root}/{name}")
    except DataError:
        raise
    except Exception as error:  # every store has exceptions of its own
        raise unreachable(url, error) from error
