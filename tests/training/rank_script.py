"""One rank of a test with several: run the cells that a JSON file lists, in turn, and write down how each ended.

python rank_script.py JOB.json, with RANK, WORLD_SIZE and the rest of torch's rank variables in the environment.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402

from dbscale.study.resources import Resources, StopRequest  # noqa: E402
from dbscale.study.store import Store  # noqa: E402
from dbscale.training import checkpoint, loop, results, run  # noqa: E402
from tests.training.end_state import end_hash  # noqa: E402

torch.set_num_threads(1)

TRAPS = {
    "step": (loop, "_optimizer_step"),
    "micro-batch": (Accelerator, "backward"),
    "between the parts of a checkpoint": (checkpoint, "rank_file"),
    "checksum": (checkpoint, "_checksum"),
    "evaluation": (results, "_judge"),
}
"""Functions at whose n-th call a rank can be killed."""


@dataclass
class StopAt(StopRequest):
    """Asks to stop at the n-th look; only the last rank asks, so that the ranks have something to agree on."""

    at: int | None = None
    looks: int = 0

    @property
    def requested(self) -> bool:
        self.looks += 1
        is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        return self.at is not None and self.looks >= self.at and is_last


def note_end(noted: dict[str, Any]) -> None:
    """Hash optimizer state and EMA of this rank when training ends; in the store too, should it be killed later."""
    original = run.finish_training

    def noting(finished: loop.Run, spec: Any, store: Store) -> Any:
        noted["end"] = end_hash(finished)
        (store.root / f"end-{os.environ['RANK']}").write_text(noted["end"])
        return original(finished, spec, store)

    run.finish_training = noting


def trap(where: str, call: int, spring: Callable[[], None]) -> None:
    """`spring` at the n-th call."""
    owner, name = TRAPS[where]
    original, count = getattr(owner, name), iter(range(1, 1_000_000))

    def trapped(*arguments: Any, **keywords: Any) -> Any:
        if next(count) == call:
            spring()
        return original(*arguments, **keywords)

    setattr(owner, name, trapped)


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    rank, ended = os.environ["RANK"], []
    for each in job["runs"]:
        if each.get("kill_rank") == int(rank):
            trap(each["kill_where"], each["kill_call"], lambda: os.kill(os.getpid(), signal.SIGKILL))
        if each.get("fail_rank") == int(rank):
            trap(each["fail_where"], each["fail_call"], run_out_of_memory)
        result: dict[str, Any] = {}
        note_end(result)
        outcome = run.run_cell(
            Store(Path(each["store"])),
            each["key"],
            data_dir=Path(job["data_dir"]),
            resources=Resources(**each["resources"]),
            stop=StopAt(at=each.get("stop_at")),
        )
        ended.append({"status": outcome.status, "reason": outcome.reason, **result})
        if outcome.status == "failed":
            break  # and end, as a worker does: its peers may wait for it
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
