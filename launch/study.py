"""From command-line options to a plan: what every command that knows a grid starts with.

Declares the options that commands share; reads the grid, the cluster, the manifests and the store; writes nothing.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic_core import to_json

from dbscale.errors import ConfigError, FileError
from dbscale.launch.cluster import CONFIGS, Cluster, load_cluster
from dbscale.study import grid as grids
from dbscale.study.cell import Cell
from dbscale.study.cost import CostModel, read_calibration
from dbscale.study.grid import Grid, Point
from dbscale.study.hunt import is_hunted
from dbscale.study.plan import Plan, make_plan, read_plan
from dbscale.study.resources import Tracker
from dbscale.study.store import Row, Standing, Store
from dbscale.study.weights import imported_hash

if TYPE_CHECKING:
    from dbscale.data.manifest import Manifest

DEFAULT_GRID = CONFIGS / "grids" / "demo.yaml"
CLUSTER_PREFIX = "cluster."
MAX_CALIBRATION_ROWS = 200
AddCommand = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]
"""How a family adds a command: name, function, one line of help."""


def add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", type=Path, default=Path("out"), help="folder of all results (default: out)")


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of images and shards (default: data)")


def add_cluster(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--cluster", default=default, metavar="NAME|PATH",
                        help=f"local, slurm, inline, or the path of a cluster YAML (default: {default})")  # fmt: skip


def grid_path(name_or_path: str | Path) -> Path:
    """A grid's file: the path itself, or where there is none a shipped grid by its name, `demo` or `paper/boundary_38m`."""
    path, shipped = Path(name_or_path), CONFIGS / "grids" / f"{name_or_path}.yaml"
    return shipped if not path.exists() and shipped.is_file() else path


def add_grid(parser: argparse.ArgumentParser, *, bare: bool = True) -> None:
    """`--grid PATH`, and `bare`, where the command's own words leave room for it, just PATH."""
    if bare:
        parser.add_argument("grid", nargs="?", type=grid_path, default=DEFAULT_GRID, metavar="GRID", action=_BareGrid,
                            help="as --grid")  # fmt: skip
    parser.add_argument("--grid", type=grid_path, default=DEFAULT_GRID, metavar="NAME|PATH",
                        help="grid YAML, or a shipped one by name: paper/boundary_38m (default: demo)")  # fmt: skip
    add_set(parser)


class _BareGrid(argparse.Action):
    """A grid without `--grid`; left out, it must not undo one that was given with it."""

    def __call__(self, _parser: object, namespace: argparse.Namespace, values: Any, _option: object = None) -> None:
        if values is not self.default:
            setattr(namespace, self.dest, values)


def add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="overrides",
                        help="change a key of the grid, or with `cluster.` of the cluster; repeatable")  # fmt: skip


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print it for a program: one JSON value on stdout")


def print_json(value: object) -> None:
    """Dataclasses, configs and paths included; what is not a finite number becomes null."""
    print(to_json(value, indent=1).decode())


def add_tracker(parser: argparse.ArgumentParser) -> None:
    """`--tracker NAME`, short for a `--set`."""
    parser.add_argument("--tracker", metavar="NAME", type=f"{CLUSTER_PREFIX}resources.tracker={{}}".format,
                        action="append", dest="overrides", default=argparse.SUPPRESS,
                        help=f"also log to it, through Accelerate: {', '.join(get_args(Tracker))}; a resumed cell "
                        "continues its run there")  # fmt: skip


def add_run(parser: argparse.ArgumentParser, *, smoke: bool = True) -> None:
    """What every command takes that runs a study to its report; `smoke`, where it tries a step before."""
    add_study(parser)
    add_tracker(parser)
    parser.add_argument("--no-report", action="store_true", help="leave out reduce and report at the end")
    if smoke:
        parser.add_argument("--no-smoke", action="store_true",
                            help="leave out the trial of one step of each new kind of recipe")  # fmt: skip


def add_study(parser: argparse.ArgumentParser) -> None:
    """Everything `study_of` needs."""
    add_grid(parser)
    add_cluster(parser, "local")
    add_store(parser)
    add_data(parser)


def study_of(arguments: argparse.Namespace) -> Study:
    return load_study(
        grid=arguments.grid, cluster=getattr(arguments, "cluster", "local"), store=arguments.store,
        data=arguments.data, overrides=arguments.overrides,
    )  # fmt: skip


def store_of(arguments: argparse.Namespace) -> Store:
    return Store(arguments.store)


@dataclass(frozen=True)
class Study:
    """A grid, where it runs, where its results and its data are."""

    grid: Grid
    grid_path: Path
    cluster: Cluster
    store: Store
    data_dir: Path

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """The manifest of each dataset in use that is packed.

        Raises ConfigError for one without a test split, which no error can be measured on, and for one that lacks the
        masks or boxes that its task needs.
        """
        from dbscale.data.manifest import MANIFEST_NAME, load_manifest

        found = {}
        for name in self.used_datasets:
            if (self.dataset_dir(name) / MANIFEST_NAME).exists():
                manifest = load_manifest(self.dataset_dir(name))
                if "test" not in manifest.splits:
                    raise ConfigError(
                        f"dataset {name!r} has no test split, on which errors are measured; add one to its source, or "
                        f"`test: 0.2` to its entry in the grid, then remove {self.dataset_dir(name)} to pack it anew"
                    )
                problem = grids.misfit(self.grid, name, manifest.target)
                if problem is not None:
                    raise ConfigError(problem)
                found[name] = manifest
        return found

    @property
    def sizes(self) -> dict[str, int]:
        """Number of training samples of each packed dataset."""
        return {name: manifest.split("train").num_samples for name, manifest in self.manifests.items()}

    @property
    def fingerprints(self) -> dict[str, str]:
        return {name: manifest.fingerprint for name, manifest in self.manifests.items()}

    def dataset_dir(self, name: str) -> Path:
        return self.data_dir / "shards" / name

    @property
    def used_datasets(self) -> tuple[str, ...]:
        return grids.datasets_in_use(self.grid)

    @cached_property
    def weights(self) -> dict[str, str]:
        """Hash of each checkpoint in use that was imported into the store."""
        found = (
            (each.checkpoint, imported_hash(self.store, each.checkpoint)) for each in grids.weights_in_use(self.grid)
        )
        return {checkpoint: digest for checkpoint, digest in found if digest is not None}

    @property
    def missing_weights(self) -> tuple[str, ...]:
        return tuple(each.checkpoint for each in grids.weights_in_use(self.grid) if each.checkpoint not in self.weights)

    @property
    def missing_datasets(self) -> tuple[str, ...]:
        return tuple(name for name in self.used_datasets if name not in self.manifests)

    def require_datasets(self) -> None:
        """Raises ConfigError where a dataset is not packed: cells are named by what they read."""
        if self.missing_datasets:
            raise ConfigError(
                f"not packed yet: {', '.join(self.missing_datasets)}; `dbscale shards pack --grid {self.grid_path} "
                f"--data {self.data_dir}` packs them"
            )

    def points(self) -> tuple[Point, ...]:
        """Raises ConfigError when an axis asks for more than a packed dataset holds."""
        grids.check_sizes(self.grid, self.sizes)
        return grids.expand(self.grid, self.fingerprints, self.weights)


def load_study(*, grid: Path, cluster: str, store: Path, data: Path, overrides: Sequence[str] = ()) -> Study:
    """Overrides that begin with `cluster.` change the cluster, all others the grid. Raises ConfigError."""
    for_cluster = [each.removeprefix(CLUSTER_PREFIX) for each in overrides if each.startswith(CLUSTER_PREFIX)]
    for_grid = [each for each in overrides if not each.startswith(CLUSTER_PREFIX)]
    return Study(grids.load_grid(grid, for_grid), grid, load_cluster(cluster, for_cluster), Store(store), data)


def record_cell(study: Study, name: str) -> str:
    """Write the recipes of one cell of the grid and of its parents, as a submission would; returns the cell's key.

    Raises ConfigError when the grid has no cell of this key or id, or its data is not packed.
    """
    study.require_datasets()
    cells = {cell.key: cell for cell in grids.merged_cells(study.points())}
    key = match_key(name, sorted(cells), where=f"grid {study.grid.name}")
    for cell in cells[key].lineage:
        study.store.write_spec(cell.spec())
    return key


def find_cell(store: Store, name: str) -> str:
    """The key of the store's cell that `name` is, or whose id it is."""
    folder = store.root / "cells"
    keys = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return match_key(name, keys, where=str(store.root))


def match_key(name: str, keys: Sequence[str], *, where: str) -> str:
    """The one of `keys` that `name` is, or whose 12-digit id it is. Raises ConfigError naming the nearest."""
    found = [key for key in keys if name in (key, key.rpartition("-")[2])]
    if len(found) != 1:
        close = difflib.get_close_matches(name, keys, n=3, cutoff=0)  # of thousands: not all, as `nearest` would list
        hint = f"the nearest: {', '.join(close)}" if close else "it holds none"
        raise ConfigError(f"no cell {name!r} in {where}; {hint}")
    return found[0]


def refuse_hunted(study: Study, command: str) -> None:
    """Raises ConfigError where a hunt of the grid stands in the store: run whole, the grid would take the place of the
    hunt's plan, and with it of its report."""
    if is_hunted(study.store, study.grid):
        name = study.grid.name
        raise ConfigError(
            f"grid {name} is hunted in {study.store.root}, and `dbscale hunt` continues that; to run the grid whole beside "
            f"it, give it a name of its own: `dbscale {command} … --set name={name}_whole` (finished runs count for both)"
        )


def plan_study(study: Study, active: Collection[str] | None = None) -> tuple[Plan, CostModel]:
    """The plan as the store stands now, and the cost model it was made with, calibrated by finished rows.

    `active` are the cells that a scheduler has waiting or running; None where there is no scheduler to ask.
    """
    points = study.points()
    cells = grids.merged_cells(points)
    found = standings_of(study.store, [cell.key for cell in cells], active)
    notes = [standing.note for standing in found.values() if standing.note]
    earlier, cost = None, study.cluster.cost_model()
    try:
        cost = base_cost(study)
        if not is_hunted(study.store, study.grid):  # what a hunt asked for is not stale
            earlier = read_plan(study.store, study.grid.name)
    except FileError as error:
        notes.append(str(error))
    cost = cost.calibrated(finished_sample(cells, found))
    plan = make_plan(
        study.grid, points, states={key: standing.state for key, standing in found.items()}, cost=cost,
        target_s=study.cluster.target_min * 60, workers=study.cluster.num_workers(), earlier=earlier, notes=notes,
    )  # fmt: skip
    return plan, cost


def standings_of(store: Store, keys: Sequence[str], active: Collection[str] | None) -> Mapping[str, Standing]:
    """How cells stand in the store, corrected by the scheduler, which knows better than a heartbeat what still lives."""
    found = store.standings(keys)
    if active is None:
        return found
    return {key: corrected(standing, key in active) for key, standing in found.items()}


def corrected(standing: Standing, is_active: bool) -> Standing:
    """How a cell stands in the light of the scheduler's queue."""
    if standing.state == "done":
        return standing
    if is_active:
        return replace(standing, state="running")
    job = standing.attempt.job if standing.attempt is not None else None
    return replace(standing, state="interrupted") if standing.state == "running" and job is not None else standing


def base_cost(study: Study) -> CostModel:
    """The cost on the cluster's kind of device, or as `dbscale plan --calibrate` measured it."""
    cost, calibration = study.cluster.cost_model(), read_calibration(study.store)
    return cost.probed(calibration) if calibration is not None and calibration.fits(cost.device.name) else cost


def finished_sample(cells: Sequence[Cell], found: Mapping[str, Standing]) -> list[tuple[Cell, Row]]:
    """Finished cells with their rows, evenly spread, enough to calibrate by."""
    done = [(cell, row) for cell in cells if (row := found[cell.key].row) is not None]
    return done[:: max(1, len(done) // MAX_CALIBRATION_ROWS)][:MAX_CALIBRATION_ROWS]
