"""Stands in for training, packing and reporting, so that launching is tested without torch and in seconds.

On PYTHONPATH of the tests' subprocesses only: Python imports a module of this name at start-up. The fake cell keeps
`run_cell`'s contract: rows last, attempts opened and closed, a lock per cell, resume from a checkpoint, bitwise rows.
`<store>/fake.json` says how it should misbehave: {"steps": 5, "step_s": 0.01, "fail": [...], "die": [...]} where the
lists hold parts of keys; {"locks": false} is a file system without locks; {"boundary": {"root": 64, "slope": 0.1, "noise":
0.01}} gives finetunes errors whose ΔE falls by `slope` an octave through 0 at `root` upstream images; with "temperature"
the sides are not the arms but distilling at this temperature and at others, with "along": "D_f" the root is in labels.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import signal
import socket
import sys
import time
import types
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Outcome:
    status: str
    reason: str | None
    row: object | None
    failure: str | None = None


def behaviour(store) -> dict:
    path = store.root / "fake.json"
    return {
        "steps": 3,
        "checkpoint": 0,
        "step_s": 0.01,
        "fail": [],
        "die": [],
        "locks": True,
        **(json.loads(path.read_text()) if path.exists() else {}),
    }


def run_cell(store, key, *, data_dir, resources, stop, job=None, log=None):
    from dbscale.files import ProcessMark
    from dbscale.study.store import Attempt, Failure

    (store.cell_dir(key)).mkdir(parents=True, exist_ok=True)
    with (store.cell_dir(key) / ".lock").open("w") as lock:
        try:
            if behaviour(store)["locks"]:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Outcome("busy", "another process runs this cell", None)
        row = store.read_row(key)
        if row is not None:
            return Outcome("done", None, row)
        number = len(store.attempts(key)) + 1
        attempt = Attempt(
            number=number,
            status="running",
            **asdict(ProcessMark.of()),
            started=time.time(),
            job=job,
            log=log,
        )
        store.write_attempt(key, attempt)
        status, reason = train(store, key, stop)
        failure = Failure.CELL if status == "failed" else None
        closed = {"status": status, "reason": reason, "failure": failure, "ended": time.time()}
        store.write_attempt(key, attempt.model_copy(update=closed))
        return Outcome(status, reason, store.read_row(key), failure)


def train(store, key, stop):
    from dbscale.study.store import Progress

    spec, wanted = store.read_spec(key), behaviour(store)
    missing = [parent for parent in spec.parents if store.read_row(parent) is None]
    if missing:
        return "blocked", f"parent {missing[0]} has no row"
    if any(part in key for part in wanted["fail"]):
        print("Traceback: as the test asked", file=sys.stderr)
        return "failed", "loss is not finite at step 2"
    checkpoint = store.cell_dir(key) / "checkpoint.json"
    text = checkpoint.read_text() if checkpoint.exists() else ""
    done = json.loads(text)["step"] if text else 0
    for step in range(done, wanted["steps"]):
        if wanted["checkpoint"] and step % wanted["checkpoint"] == 0:
            checkpoint.write_text(json.dumps({"step": step}))
        if stop.requested:
            checkpoint.write_text(json.dumps({"step": step}))
            return "interrupted", stop.reason
        time.sleep(behaviour(store)["step_s"])
        if any(part in key for part in wanted["die"]):
            os.kill(os.getpid(), signal.SIGKILL)
        with (store.cell_dir(key) / "steps.txt").open("a") as file:
            print(step, file=file)
        progress = Progress(step=step + 1, num_steps=wanted["steps"], loss=1.0, images_per_s=10.0, updated=time.time())
        store.write_progress(key, progress)
    store.write_row(make_row(store, spec))
    return "done", None


def make_row(store, spec):
    from dbscale.study.store import Row, Timing

    recipe = spec.recipe
    stages = {"distill": "distilled", "pretrain": "plain"}
    arm = stages.get(recipe.stage) or (store.read_row(spec.init).arm if spec.init else "scratch")
    digest = hashlib.sha256(spec.key.encode()).hexdigest()
    error = int(digest[:4], 16) / 65536
    boundary = behaviour(store).get("boundary")
    if boundary and spec.init:
        along_labels, warm = boundary.get("along") == "D_f", boundary.get("temperature")
        size = recipe.data.num_samples if along_labels else store.read_row(spec.init).num_samples
        distill = store.read_spec(spec.init).recipe.distill
        helped = arm == "distilled" if warm is None else distill is not None and distill.temperature == warm
        error = (
            0.5 - helped * boundary["slope"] * math.log2(boundary["root"] / size) + boundary["noise"] * (error - 0.5)
        )
    timing = Timing(
        train_time_s=1.0, eval_time_s=0.1, step_time_s=0.1, images_per_s=10.0, data_wait_share=0.0, device_time_s=2.0,
        peak_memory_bytes=1, device="cpu", host=socket.gethostname(),
    )  # fmt: skip
    return Row(
        key=spec.key, id=spec.id, stage=recipe.stage, arm=arm, model="m", dataset=recipe.data.dataset,
        num_samples=recipe.data.num_samples, seed=recipe.seed, num_params=1000, num_classes=10,
        num_steps=recipe.num_steps, samples_seen=100, train_flops=1e9, error_rate=error,
        test_loss=1.0, num_test_samples=100, train_loss=1.0, weights_sha256=digest, timing=timing,
    )  # fmt: skip


def ensure_packed(name: str, spec: dict, data_dir: Path) -> Path:
    from dbscale.data.manifest import ImageInfo, Manifest, SplitInfo, save_manifest

    folder = data_dir / "shards" / name
    if (folder / "manifest.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    count = spec.get("num_train", 1000)
    split = SplitInfo(
        num_samples=count, class_counts=(count // 2, count - count // 2), balanced_up_to=count, fingerprint="f" * 32,
        index="train.index", index_checksum="0", shards=(),
    )  # fmt: skip
    image = ImageInfo(encoding="raw", min_side=32, max_side=32, square=True)
    save_manifest(
        folder,
        Manifest(
            name=name,
            classes=("a", "b"),
            image=image,
            seed=0,
            source=spec,
            splits={"train": split, "test": split},
            fingerprint=name,
        ),
    )
    return folder


def refresh(store, grid_name: str) -> tuple[types.SimpleNamespace, types.SimpleNamespace]:
    return types.SimpleNamespace(missing=()), types.SimpleNamespace(
        boundary=types.SimpleNamespace(answers=("It pays.",))
    )


def write_report(store, grid_name: str) -> Path:
    page = store.grid_dir(grid_name) / "report.html"
    page.write_text("<html>")
    return page


def modules() -> dict[str, types.ModuleType]:
    """The stand-ins by the name of the module whose place they take."""
    made = {}
    for name, functions in {
        "dbscale.training.run": {"run_cell": run_cell, "Outcome": Outcome},
        "dbscale.shards.pack": {"ensure_packed": ensure_packed},
        "dbscale.report.findings": {"refresh": refresh},
        "dbscale.launch.smoke": {"smoke": lambda study, plan: 0},
        "dbscale.report.page": {"write_report": write_report},
    }.items():
        made[name] = types.ModuleType(name)
        made[name].__dict__.update(functions)
    return made


if __name__ == "sitecustomize":
    sys.modules.update(modules())
