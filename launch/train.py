"""Run one cell by hand, with any number of processes.

    accelerate launch --config_file configs/accelerate/zero1.yaml launch/train.py \\
        --cell KEY --grid configs/grids/demo.yaml --store out --data data

`dbscale plan --cells` lists a grid's keys. --grid may be left out for a cell that was submitted before.
The engine is the one of the Accelerate config; everything else of `resources` comes from --resources (a cluster YAML)
or its defaults. Which cells to run is the business of `dbscale submit`; this is the smallest way into one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dbscale.errors import ConfigError
from dbscale.strict import load_yaml, override, validate
from dbscale.study.resources import Resources, StopRequest
from dbscale.study.store import Store
from launch.options import add_set, add_tracker
from launch.signals import install_handlers
from launch.study import RESOURCES_PREFIX, load_study, record_cell

EXIT_CODES = {"done": 0, "failed": 1, "blocked": 3, "busy": 4, "interrupted": 75}


def main() -> int:
    arguments = _parse()
    stop = StopRequest()
    install_handlers(stop)
    resources = _resources(arguments.resources, arguments.overrides)
    from dbscale.training.run import run_cell

    install_handlers(stop)  # again: the heavy imports may have put handlers of their own in place
    store, key = Store(arguments.store), arguments.cell
    if arguments.grid is not None:
        study = load_study(grid=arguments.grid, cluster="inline", store=arguments.store, data=arguments.data,
                           overrides=arguments.overrides)  # fmt: skip
        key = record_cell(study, key)
    outcome = run_cell(store, key, data_dir=arguments.data, resources=resources, stop=stop)
    if os.environ.get("RANK", "0") == "0":
        error = "" if outcome.row is None else f", error {outcome.row.error_rate:.4f}"
        print(f"{key}: {outcome.status}{error}{f' ({outcome.reason})' if outcome.reason else ''}")
    return EXIT_CODES[outcome.status]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", required=True, help="key of the cell, which is its folder's name in the store")
    parser.add_argument("--grid", type=Path, help="the grid of a cell that was never submitted")
    add_set(parser)
    add_tracker(parser)
    parser.add_argument("--store", type=Path, default=Path("out"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument(
        "--resources", type=Path, help="YAML with a `resources:` section, e.g. configs/clusters/local.yaml"
    )
    return parser.parse_args()


def _resources(path: Path | None, overrides: Sequence[str]) -> Resources:
    """From the YAML and `--set cluster.resources.…`, with engine and number of processes as `accelerate launch` has."""
    values: dict[str, Any] = dict(load_yaml(path).get("resources", {})) if path else {}
    own = [each.removeprefix(RESOURCES_PREFIX) for each in overrides if each.startswith(RESOURCES_PREFIX)]
    values = override(values, own)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        values["zero_stage"] = _launched_zero_stage()
    values["num_processes"] = int(os.environ.get("WORLD_SIZE", "1"))
    return validate(Resources, values, where=str(path or "resources"))


def _launched_zero_stage() -> int | None:
    """The ZeRO stage of the Accelerate config, None for plain and DDP configs."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    config = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if config:
        return int(json.loads(Path(config).read_text())["zero_optimization"]["stage"])
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(f"error: {error}")
