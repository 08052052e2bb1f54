"""What `import dbscale` offers beyond single rooms: a study as values, and any table compared and judged.

Each function is one command of the command line without its printing. Tables come as a path, a mapping of columns, or a
data frame of pandas, Polars or Arrow. Laws, datasets, loaders and losses are the rooms' own and need nothing from here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbscale.launch.cluster import load_cluster
from dbscale.launch.study import Study, grid_path, plan_study
from dbscale.study import grid as grids
from dbscale.study.grid import Grid
from dbscale.study.plan import Plan
from dbscale.study.store import Store

if TYPE_CHECKING:
    import pyarrow

    from dbscale.laws import Verdict
    from dbscale.report.law_findings import Options
    from dbscale.report.schema import BoundaryFile, ContrastRecord
    from dbscale.report.sheet import Sheet
    from dbscale.study.hunt import WaveRecord

Table = str | Path | Mapping[str, Sequence[Any]] | Any
"""A path, a mapping of columns, or a data frame."""
log = logging.getLogger("dbscale")


def load_grid(grid: str | Path, overrides: Sequence[str] = ()) -> Grid:
    """The grid in a YAML file, or a shipped one by its name below `configs/grids`: `demo`, `paper/boundary_38m`.

    `overrides` are `path.to.key=value` as `--set` takes them. Raises ConfigError naming file, key, value and remedy.

    >>> import dbscale
    >>> grid = dbscale.load_grid("demo", ["seeds=[0, 1]"])
    >>> grid.name, grid.seeds
    ('demo', (0, 1))
    """
    return grids.load_grid(grid_path(grid), overrides)


def plan(
    grid: str | Path | Grid,
    *,
    store: str | Path = "out",
    data: str | Path = "data",
    cluster: str = "local",
    overrides: Sequence[str] = (),
) -> Plan:
    """What a grid needs, what of it stands in `store`, and the bundles that do the rest; writes nothing.

    `plan.cells` are all training runs, parents first; `plan.states` maps their keys to states; `plan.predicted_s` are
    device-seconds left; `plan.waves` hold the bundles. Ids are provisional while a dataset is not packed below `data`.
    Raises ConfigError.

    >>> import dbscale
    >>> found = dbscale.plan("demo", store="nowhere", data="nowhere", overrides=["seeds=[0]"])
    >>> found.count()["new"] == len(found.cells)
    True
    """
    return plan_study(_study(grid, store, data, cluster, overrides))[0]


def _study(
    grid: str | Path | Grid, store: str | Path, data: str | Path, cluster: str, overrides: Sequence[str]
) -> Study:
    value = grid if isinstance(grid, Grid) else load_grid(grid, overrides)
    path = Path(value.name if isinstance(grid, Grid) else grid)
    return Study(value, path, load_cluster(cluster), Store(Path(store)), Path(data))


def hunt_next(
    grid: str | Path | Grid,
    *,
    store: str | Path = "out",
    data: str | Path = "data",
    cluster: str = "local",
    overrides: Sequence[str] = (),
) -> WaveRecord:
    """What a hunt would run next, by the grid and the rows in `store` alone; writes nothing, starts nothing.

    `bought` are the choices: how many pairs at which x, expected gain in octaves of wrong advice, price in device-seconds
    and reason; `findings` say what is known of each target; `stopped` why the hunt is over, None while it is not. Method:
    docs/hunt.md. Raises ConfigError for a grid without `hunt:`.

    >>> import dbscale
    >>> wave = dbscale.hunt_next("demo_hunt", store="nowhere", data="nowhere")
    >>> wave.stopped is None, {choice.reason for choice in wave.bought}
    (True, {'start'})
    """
    from dbscale.launch.hunt import next_wave, wave_record

    return wave_record(next_wave(_study(grid, store, data, cluster, overrides)))


def hunt_verdicts(
    grid: str | Path | Grid,
    *,
    store: str | Path = "out",
    data: str | Path = "data",
    cluster: str = "local",
    overrides: Sequence[str] = (),
) -> dict[str, Verdict]:
    """What a hunt has established so far: the verdict of each target by its name; writes nothing.

    They are made anew from the rows in `store`, at the level at which the hunt judges (`verdict.level`), with the means by
    seed (`verdict.points`) and the curve with its band. A target of which nothing can be judged yet is left out. How the
    hunt came there is in `grids/<name>/hunt.json` (docs/schemas.md). Raises ConfigError for a grid without `hunt:`.

    >>> import dbscale
    >>> found = dbscale.hunt_verdicts("demo_hunt", store="nowhere", data="nowhere")
    >>> {target: verdict.kind for target, verdict in found.items()}  # nothing was run there yet
    {}
    """
    from dbscale.launch.hunt import survey, verdicts

    return verdicts(survey(_study(grid, store, data, cluster, overrides)))


def read_rows(source: str | Path, *, grid: str | None = None) -> pyarrow.Table:
    """A table of runs as Arrow (`.to_pandas()` makes it a data frame): one row per finished finetune.

    `source` is a file (CSV, JSON lines, Parquet or Arrow), or a store, whose grid `grid` names. Columns that hold
    numbers in every row become numbers, all others text; what is missing is null. The columns of a store's rows and
    their units are in docs/schemas.md. Raises TableError for what is no table, or a grid that was never planned.

    >>> import dbscale, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "runs.csv")
    >>> _ = path.write_text("model,error_rate\\nsmall,12.5%\\nlarge,9%\\n")
    >>> dbscale.read_rows(path).to_pydict()
    {'model': ['small', 'large'], 'error_rate': [0.125, 0.09]}
    """
    import pyarrow

    if grid is not None:
        from dbscale.report.reduce import arrow_table, collect, load_plan

        store = Store(Path(source))
        return arrow_table(collect(store, load_plan(store, grid)))
    sheet = sheet_of(source)
    return pyarrow.table({name: sheet.labels(name) for name in sheet.columns})


def sheet_of(table: Table) -> Sheet:
    """The table as the report's readers take it. Raises TableError."""
    from dbscale.report.reader import read_sheet
    from dbscale.report.sheet import Sheet

    if isinstance(table, str | Path):
        return read_sheet(Path(table))
    given: Any = table
    if not isinstance(table, Mapping):
        import narwhals

        given = narwhals.from_native(given, eager_only=True).to_dict(as_series=False)
    columns = {str(name): list(cells) for name, cells in given.items()}
    longest = max(map(len, columns.values()), default=0)
    return Sheet("the table", columns, range(1, longest + 1), unit="row")


def compare(
    table: Table,
    *,
    a: Mapping[str, object],
    b: Mapping[str, object],
    along: str,
    metric: str,
    pair: Sequence[str] = ("seed",),
    level: float = 0.9,
    min_effect: float = 0.005,
    seed: int = 0,
) -> ContrastRecord:
    """Which of two procedures is better, where along an axis, and how sure that is.

    `a` and `b` are conditions on rows, column → value; `along` is the axis, `metric` what is compared (lower is better),
    in its own unit like `min_effect`; rows pair where they agree in `along` and in the columns `pair`, of which the
    first names the repetition. The record holds a `verdict` (crossing, one_sign, excluded or undecided) with
    simultaneous intervals at `level`, or the `reason` why there is none; what was left out is logged. Method:
    docs/calibration.md. Raises TableError for columns and values that are not there.

    >>> import dbscale
    >>> runs = {"model": ["x"] * 12 + ["y"] * 12, "flops": [1e9, 1e10, 1e11, 1e12] * 6, "seed": [0] * 4 + [1] * 4 +
    ...         [2] * 4 + [0] * 4 + [1] * 4 + [2] * 4, "loss": [3.01, 2.5, 2.21, 2.0, 3.0, 2.52, 2.2, 2.01, 2.99, 2.51,
    ...         2.2, 2.0, 2.8, 2.31, 2.0, 1.81, 2.81, 2.3, 2.01, 1.8, 2.8, 2.3, 1.99, 1.8]}
    >>> found = dbscale.compare(runs, a={"model": "x"}, b={"model": "y"}, along="flops", metric="loss")
    >>> found.verdict.kind, found.verdict.better
    ('one_sign', 'b')
    """
    from dbscale.report.findings import Options

    options = Options(level=level, min_effect=min_effect, seed=seed)
    record, notes = compared(sheet_of(table), words(a), words(b), along, metric, pair, options)
    for note in notes:
        log.warning(note)
    return record


def words(conditions: Mapping[str, object]) -> dict[str, str]:
    """Conditions as tables spell them."""
    return {column: str(value) for column, value in conditions.items()}


def compared(
    sheet: Sheet, a: Mapping[str, str], b: Mapping[str, str], along: str, metric: str, pair: Sequence[str],
    options: Options, dataset: str = "table",
) -> tuple[ContrastRecord, tuple[str, ...]]:  # fmt: skip
    """The record of `compare`, and what a reader must know of the pairs."""
    from dbscale.report.findings import contrast
    from dbscale.report.pairing import pair_rows

    pairs, notes = pair_rows(sheet, a=a, b=b, along=along, metric=metric, pair=pair)
    sides = {"column": ", ".join(a), "a": ", ".join(a.values()), "b": ", ".join(b.values())}
    return contrast(pairs, {**sides, "along": along, "dataset": dataset}, metric, options), notes


def find_boundary(
    table: Table,
    *,
    columns: Mapping[str, str] | None = None,
    level: float = 0.9,
    min_effect: float = 0.005,
    seed: int = 0,
) -> BoundaryFile:
    """Where distilling stops paying: every verdict of a table of runs, the main one first, as boundary.json holds them.

    The table has the columns of a grid's rows (at least arm, num_params, upstream_samples, dataset, downstream_samples,
    seed, error_rate); `columns` says where a name of ours stands under another. `min_effect` is in shares of errors.
    `answers` are sentences; `contrasts[0].verdict` has kind, root (in upstream samples) and interval. A table of some
    hundred rows takes seconds, because the laws of both arms are fitted too. Raises TableError.

    >>> import dbscale
    >>> grow = [(size, seed) for size in (1000, 4000, 16000, 64000) for seed in (0, 1, 2)]
    >>> error = {"plain": (0.40, 0.30, 0.20, 0.10), "distilled": (0.30, 0.25, 0.22, 0.15)}
    >>> runs = [{"arm": arm, "num_params": 10**6, "upstream_samples": size, "dataset": "birds", "seed": seed,
    ...          "downstream_samples": 100, "error_rate": error[arm][i // 3] + 0.004 * (seed - 1) * (arm == "plain")}
    ...         for arm in error for i, (size, seed) in enumerate(grow)]
    >>> found = dbscale.find_boundary({name: [run[name] for run in runs] for name in runs[0]})
    >>> verdict = found.contrasts[0].verdict
    >>> verdict.kind, 4000 < verdict.root < 16000
    ('crossing', True)
    """
    from dbscale.report.findings import Options, find
    from dbscale.report.table import runs_of

    options = Options(level=level, min_effect=min_effect, seed=seed)
    return find(runs_of(sheet_of(table), columns), options=options).boundary
