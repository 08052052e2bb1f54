"""From command-line options to a plan: what every command that knows a grid starts with.

Reads the grid, the cluster, the manifests and the store; writes nothing.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dbscale.errors import ConfigError
from dbscale.study.cell import Cell
from dbscale.study.cost import CostModel, read_calibration
from dbscale.study.grid import Grid, Point, check_sizes, datasets_in_use, expand, load_grid, merged_cells
from dbscale.study.plan import Plan, make_plan, read_plan
from dbscale.study.store import CellState, Row, Store
from launch.cluster import CONFIGS, Cluster, load_cluster

DEFAULT_GRID = CONFIGS / "grids" / "demo.yaml"
CLUSTER_PREFIX = "cluster."
RESOURCES_PREFIX = f"{CLUSTER_PREFIX}resources."
MAX_CALIBRATION_ROWS = 200


@dataclass(frozen=True)
class Study:
    """A grid, where it runs, where its results and its data are."""

    grid: Grid
    grid_path: Path
    cluster: Cluster
    store: Store
    data_dir: Path

    @cached_property
    def manifests(self) -> dict[str, tuple[str, int]]:
        """Fingerprint and number of training samples of each dataset in use that is packed."""
        from dbscale.data.manifest import MANIFEST_NAME, load_manifest

        found = {}
        for name in self.used_datasets:
            if (self.dataset_dir(name) / MANIFEST_NAME).exists():
                manifest = load_manifest(self.dataset_dir(name))
                found[name] = (manifest.fingerprint, manifest.split("train").num_samples)
        return found

    def dataset_dir(self, name: str) -> Path:
        return self.data_dir / "shards" / name

    @property
    def used_datasets(self) -> tuple[str, ...]:
        return datasets_in_use(self.grid)

    @property
    def missing_datasets(self) -> tuple[str, ...]:
        return tuple(name for name in self.used_datasets if name not in self.manifests)

    def points(self) -> tuple[Point, ...]:
        """Raises ConfigError when an axis asks for more than a packed dataset holds."""
        check_sizes(self.grid, {name: size for name, (_, size) in self.manifests.items()})
        return expand(self.grid, {name: fingerprint for name, (fingerprint, _) in self.manifests.items()})


def load_study(*, grid: Path, cluster: str, store: Path, data: Path, overrides: Sequence[str] = ()) -> Study:
    """Read grid and cluster; `cluster.key=value` among the overrides goes to the cluster, all others to the grid."""
    to_cluster = [each.removeprefix(CLUSTER_PREFIX) for each in overrides if each.startswith(CLUSTER_PREFIX)]
    to_grid = [each for each in overrides if not each.startswith(CLUSTER_PREFIX)]
    return Study(
        grid=load_grid(grid, to_grid),
        grid_path=grid,
        cluster=load_cluster(cluster, to_cluster),
        store=Store(store),
        data_dir=data,
    )


def record_cell(study: Study, name: str) -> str:
    """Write the recipes of one cell of the grid and of its parents, as a submission would; returns the cell's key.

    Raises ConfigError when the grid has no cell of this key or id, or its data is not packed, which ids depend on.
    """
    if study.missing_datasets:
        raise ConfigError(
            f"not packed yet: {', '.join(study.missing_datasets)}; `dbscale shards pack --grid {study.grid_path} "
            f"--data {study.data_dir}` packs them"
        )
    cells = {cell.key: cell for cell in merged_cells(study.points())}
    key = match_key(name, sorted(cells), where=f"grid {study.grid.name}")
    for cell in cells[key].lineage:
        study.store.write_spec(cell.spec())
    return key


def match_key(name: str, keys: Sequence[str], *, where: str) -> str:
    """The one of `keys` that `name` is, or whose 12-digit id it is. Raises ConfigError naming the nearest."""
    found = [key for key in keys if name in (key, key.rpartition("-")[2])]
    if len(found) != 1:
        close = difflib.get_close_matches(name, keys, n=3, cutoff=0)
        hint = f"the nearest: {', '.join(close)}" if close else "it holds none"
        raise ConfigError(f"no cell {name!r} in {where}; {hint}")
    return found[0]


def plan_study(study: Study, active: Collection[str] | None = None) -> tuple[Plan, CostModel]:
    """The plan as the store stands now, and the cost model it was made with, calibrated by finished rows.

    `active` are the cells that a scheduler has waiting or running; None where there is no scheduler to ask.
    """
    points = study.points()
    cells = merged_cells(points)
    states = states_of(study.store, [cell.key for cell in cells], active)
    cost = calibrated(base_cost(study), study.store, [cell for cell in cells if states[cell.key] == "done"])
    plan = make_plan(
        study.grid, points, states=states, cost=cost, target_s=study.cluster.target_min * 60,
        workers=study.cluster.num_workers(), earlier=read_plan(study.store, study.grid.name),
    )  # fmt: skip
    return plan, cost


def states_of(store: Store, keys: Sequence[str], active: Collection[str] | None) -> dict[str, CellState]:
    """As the store says; but whether a scheduler's job still lives, the scheduler knows better than a heartbeat."""
    states = store.states(keys)
    if active is None:
        return states
    return {key: corrected(store, key, state, key in active) for key, state in states.items()}


def corrected(store: Store, key: str, state: CellState, is_active: bool) -> CellState:
    """A cell's state in the light of the scheduler's queue."""
    if state == "done":
        return state
    if is_active:
        return "running"
    if state == "running":
        attempt = store.last_attempt(key)
        return "interrupted" if attempt is not None and attempt.job is not None else state
    return state


def base_cost(study: Study) -> CostModel:
    """Of the cluster's kind of device, or as `dbscale plan --calibrate` measured it."""
    cost, calibration = study.cluster.cost_model(), read_calibration(study.store)
    return cost.probed(calibration) if calibration is not None and calibration.fits(cost.device.name) else cost


def calibrated(cost: CostModel, store: Store, done: Sequence[Cell]) -> CostModel:
    """`cost` scaled by what finished cells took; a spread sample is enough."""
    step = max(1, len(done) // MAX_CALIBRATION_ROWS)
    measured: list[tuple[Cell, Row]] = []
    for cell in itertools.islice(done, 0, None, step):
        row = store.read_row(cell.key)
        if row is not None:
            measured.append((cell, row))
    return cost.calibrated(measured)
