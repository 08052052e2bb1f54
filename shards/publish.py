"""Pack any folder of images, tars or tables without a grid, to another folder or to a URL.

A pack for a URL is made in a local folder first, because shards must be whole before their checksums are known, and
uploaded object by object, the manifest last.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dbscale.data.manifest import MANIFEST_NAME, load_manifest
from dbscale.data.remote import fetch_file, filesystem_of, is_url, unreachable
from dbscale.errors import ConfigError, DataError
from dbscale.shards.imagefolder import IMAGE_SUFFIXES
from dbscale.shards.pack import pack
from dbscale.shards.sources import source_of

TEST_SHARE = 0.1
"""Split off where a folder has no test split of its own."""


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
        fault = unreachable(url, error)
        raise fault from fault.__cause__
