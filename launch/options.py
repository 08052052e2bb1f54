"""Options that several commands share: `--grid --cluster --store --data --set`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from dbscale.study.resources import Tracker
from dbscale.study.store import Store
from launch.study import DEFAULT_GRID, RESOURCES_PREFIX, Study, load_study

TRACKERS = get_args(Tracker)
AddCommand = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]
"""How a family adds a command: name, function, one line of help."""


def add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", type=Path, default=Path("out"), help="folder of all results (default: out)")


def add_grid(parser: argparse.ArgumentParser, *, bare: bool = True) -> None:
    """`--grid PATH`, and `bare`, where the command's own words leave room for it, just PATH."""
    if bare:
        parser.add_argument("grid", nargs="?", type=Path, default=DEFAULT_GRID, metavar="GRID", action=_BareGrid,
                            help="as --grid")  # fmt: skip
    parser.add_argument("--grid", type=Path, default=DEFAULT_GRID, metavar="PATH",
                        help="grid YAML (default: the demo grid that comes with dbscale)")  # fmt: skip
    add_set(parser)


class _BareGrid(argparse.Action):
    """A grid without `--grid`; left out, it must not undo one that was given with it."""

    def __call__(self, _parser: object, namespace: argparse.Namespace, values: Any, _option: object = None) -> None:
        if values is not self.default:
            setattr(namespace, self.dest, values)


def add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="overrides",
                        help="change a key of the grid, or with `cluster.` of the cluster; repeatable")  # fmt: skip


def add_tracker(parser: argparse.ArgumentParser) -> None:
    """`--tracker NAME`, short for a `--set`."""
    parser.add_argument("--tracker", choices=TRACKERS, action=_Tracker, dest="overrides", default=argparse.SUPPRESS,
                        help="also log to it, through Accelerate; a resumed cell continues its run there")  # fmt: skip


class _Tracker(argparse.Action):
    """Joins the overrides."""

    def __call__(self, _parser: object, namespace: argparse.Namespace, values: Any, _option: object = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), f"{RESOURCES_PREFIX}tracker={values}"])


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of images and shards (default: data)")


def add_study(parser: argparse.ArgumentParser) -> None:
    """Everything `study_of` needs."""
    add_grid(parser)
    parser.add_argument("--cluster", default="local", metavar="NAME|PATH",
                        help="local, slurm, inline, or the path of a cluster YAML (default: local)")  # fmt: skip
    add_store(parser)
    add_data(parser)


def study_of(arguments: argparse.Namespace) -> Study:
    return load_study(
        grid=arguments.grid, cluster=arguments.cluster, store=arguments.store, data=arguments.data,
        overrides=arguments.overrides,
    )  # fmt: skip


def store_of(arguments: argparse.Namespace) -> Store:
    return Store(arguments.store)
