"""`dbscale shards pack|verify|info`: the datasets on disk.  The work is `shards`'; this is its face."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbscale.errors import ConfigError, nearest
from dbscale.launch.study import DEFAULT_GRID, AddCommand, add_data, add_grid
from dbscale.strict import override
from dbscale.study.grid import Grid, datasets_in_use


def add_commands(add: AddCommand) -> None:
    parser = add("shards", lambda arguments: arguments.shards(arguments), "pack, verify and describe datasets")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, summary in (
        ("pack", pack, "pack a grid's datasets into tar shards, or any folder: pack ./photos s3://bucket/photos"),
        ("verify", verify, "check every sample of packed datasets against its checksum"),
        ("info", info, "describe packed datasets: sizes, balance, fingerprint, samples of each class"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        words = "names (default: all), or a folder and where to pack it, written with a /" if name == "pack" else \
            "names or folders (default: all)"  # fmt: skip
        command.add_argument("datasets", nargs="*", metavar="DATASET", help=words)
        command.set_defaults(shards=run)
        add_data(command)
        if name == "pack":
            add_grid(command, bare=False)
            command.add_argument(
                "--kind", help="of a folder: imagefolder, webdataset, parquet, … (default: by its files)"
            )
            command.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of a folder: an "
                                 "option of its kind, such as test=0.2 or encoding=raw; repeatable")  # fmt: skip
        if name != "info":
            command.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per core)")


def pack(arguments: argparse.Namespace) -> int:
    if any("/" in word for word in arguments.datasets):
        return pack_any_folder(arguments)
    return pack_of_grid(arguments)


def pack_any_folder(arguments: argparse.Namespace) -> int:
    """`dbscale shards pack ./photos s3://bucket/photos`; no grid, no data folder."""
    from dbscale.shards.publish import pack_folder

    if len(arguments.datasets) != 2:
        raise ConfigError(f"{' '.join(arguments.datasets)}: write the folder to pack and where to pack it, "
                          "such as `dbscale shards pack ./photos ./packed/photos`")  # fmt: skip
    source, out = arguments.datasets
    options = override({}, arguments.option)
    place = pack_folder(Path(source), out, kind=arguments.kind, options=options, jobs=arguments.jobs)
    print(f"packed {source} as {place}")
    return 0


def pack_of_grid(arguments: argparse.Namespace) -> int:
    from dbscale.data.manifest import MANIFEST_NAME, load_manifest
    from dbscale.shards.pack import ensure_packed
    from dbscale.shards.verify import describe_unused, exact_source_change
    from dbscale.study.grid import load_grid

    grid = load_grid(arguments.grid, arguments.overrides)
    for name in arguments.datasets or datasets_in_use(grid):
        was_packed = (arguments.data / "shards" / name / MANIFEST_NAME).exists()
        folder = ensure_packed(name, _entry(name, grid, arguments), arguments.data, jobs=arguments.jobs)
        print("\n".join([f"{name}: {folder}", *describe_unused(load_manifest(folder))]), flush=True)
        change = exact_source_change(folder, arguments.data) if was_packed else None
        if change is not None:
            print(f"{name}: {change}", file=sys.stderr, flush=True)
    return 0


def _entry(name: str, grid: Grid, arguments: argparse.Namespace) -> Mapping[str, Any]:
    """What to pack a dataset from: the grid's entry. Where no grid was named, the name of a packed one suffices to
    mend it."""
    from dbscale.data.manifest import MANIFEST_NAME, load_manifest
    from dbscale.data.remote import origin

    packed = arguments.data / "shards" / name
    if name in arguments.datasets and arguments.grid is DEFAULT_GRID and (packed / MANIFEST_NAME).exists():
        url = origin(packed)
        return load_manifest(packed).source if url is None else {"source": "remote", "url": url}
    if name not in grid.datasets:
        raise ConfigError(f"grid {grid.name}: no dataset {name!r}; {nearest(name, list(grid.datasets))}")
    return grid.datasets[name]


def verify(arguments: argparse.Namespace) -> int:
    from dbscale.shards.verify import verify as verify_dataset

    found = 0
    for folder in _folders(arguments):
        problems = verify_dataset(folder, jobs=arguments.jobs, progress=True)
        found += len(problems)
        print(f"{folder.name}: {'all samples good' if not problems else f'{len(problems)} problems'}")
        for problem in problems:
            print(f"  {problem}")
    return 1 if found else 0


def info(arguments: argparse.Namespace) -> int:
    from dbscale.shards.verify import describe

    folders = _folders(arguments)
    for folder in folders:
        print(describe(folder, classes=True))
    if not folders:
        print(f"no packed dataset in {arguments.data / 'shards'}; `dbscale shards pack` packs those of a grid")
    return 0


def _folders(arguments: argparse.Namespace) -> list[Path]:
    """Folders of the named datasets, or of all that are packed."""
    root = arguments.data / "shards"
    packed = sorted(path.parent.name for path in root.glob("*/manifest.json"))
    folders = [root / name if name in packed else Path(name) for name in arguments.datasets or packed]
    for folder in folders:
        if not (folder / "manifest.json").exists():
            known = nearest(folder.name, packed) if packed else "none yet"
            raise ConfigError(f"no packed dataset {str(folder)!r} in {root}, nor such a folder; {known}")
    return folders
