"""Several processes under every engine: they agree, resume bitwise, go on with another number of processes, and end
together; what `accelerate launch` is told works or is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dbscale.errors import TrainingError
from dbscale.study.recipe import Distill
from dbscale.study.resources import Resources
from dbscale.training import run
from dbscale.training.engine import DEEPSPEED_CONFIGS, make_batching

ENGINES = {"ddp": None, "zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}


def resources(engine, **more):
    return {**{"num_processes": 2, "zero_stage": ENGINES[engine], "threads": 1}, **more}


def listed(bench, cell, how, **more):
    return {"store": str(bench.store.root), "key": cell.key, "resources": how, **more}


def test_two_ranks_stopped_and_resumed_under_each_engine(bench_of, ranks):
    """One start of two processes for all: each engine trains a cell whole, and the same cell stopped at step 5."""
    two_heads = {"ema_decay": 0.9, "distill": Distill(head="parallel")}

    def cell_of(bench, options):
        teacher = bench.cell(seed=1) if "distill" in options else None
        if teacher is not None:
            bench.run(teacher)
        return bench.cell("distill" if teacher else "pretrain", teacher=teacher, **options)

    kinds = {
        "ddp": (two_heads, {}),
        "zero0": ({"precision": "bf16"}, {}),
        "zero1": ({"precision": "bf16", "ema_decay": 0.9}, {"micro_batch": 4}),
        "zero2": ({}, {}),
        "zero3": (two_heads, {}),
    }
    runs, benches = [], {}
    for engine, (options, more) in kinds.items():
        whole, cut = benches[engine] = bench_of(f"{engine}-whole"), bench_of(f"{engine}-cut")
        cell = cell_of(whole, options)
        cell_of(cut, options)
        how = resources(engine, **more)
        runs += [listed(whole, cell, how), listed(cut, cell, how, stop_at=5), listed(cut, cell, how)]

    first, second = ranks.run(runs)

    assert [each["status"] for each in first] == ["done", "interrupted", "done"] * len(kinds)
    assert [each["status"] for each in second] == [each["status"] for each in first]
    for number, (engine, (whole, cut)) in enumerate(benches.items()):
        key = runs[3 * number]["key"]
        cell = cell_of(whole, kinds[engine][0])
        assert cut.fingerprint(cell) == whole.fingerprint(cell), engine
        assert cut.store.attempts(key)[-1].resumed_from_step == 5
        for results in (first, second):
            assert results[3 * number]["end"] == results[3 * number + 2]["end"], engine
    left = [path for port in ranks.ports for path in Path("/dev/shm").glob(f"*_{port}_*")]
    assert not left, "memory of the node that nobody gives back"


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[
        pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
    ])],
)  # fmt: skip
def test_ddp_of_one_rank_resumes_bitwise(device, bench_of, ranks):
    """As a launcher starts it on a node with one device: the weights lie in DDP's wrapper, and the step is not recorded."""
    whole, cut = bench_of("whole"), bench_of("cut")
    cell = whole.cell(precision="bf16", ema_decay=0.9)
    cut.cell(precision="bf16", ema_decay=0.9)
    how = resources("ddp", num_processes=1, device=device)
    runs = [listed(whole, cell, how), listed(cut, cell, how, stop_at=5), listed(cut, cell, how)]
    (found,) = ranks.run(runs, world_size=1)
    assert [each["status"] for each in found] == ["done", "interrupted", "done"], found
    assert cut.fingerprint(cell) == whole.fingerprint(cell) and found[2]["end"] == found[0]["end"]
    assert (whole.store.read_row(cell.key).timing.device == "cpu") == (device == "cpu")


def test_a_zero3_cell_leaves_linear_layers_as_they_were(bench, monkeypatch):
    """DeepSpeed replaces them for the rest of the process: evaluation after a restart would round otherwise."""
    before, seen = torch.nn.functional.linear, []
    for name in ("train", "evaluate_cell"):
        original = getattr(run, name)

        def noting(*arguments, name=name, original=original):
            seen.append((name, torch.nn.functional.linear is before))
            return original(*arguments)

        monkeypatch.setattr(run, name, noting)
    outcome = bench.run(bench.cell(precision="bf16"), Resources(zero_stage=3, threads=1))
    assert outcome.status == "done", outcome.reason
    assert seen == [("train", False), ("evaluate_cell", True)]


def test_engines_agree_with_one_process_within_rounding(bench_of, ranks):
    """Same batches, same loss: the engine is how, not what."""
    options = {"drop_path": 0.0}
    runs, benches = [], []
    for engine in ("ddp", "zero1", "zero3"):
        bench = bench_of(engine)
        benches.append(bench)
        teacher = bench.cell(seed=1, **options)
        cell = bench.cell("distill", teacher=teacher, distill=Distill(alpha=0.5), **options)
        runs += [listed(bench, each, resources(engine)) for each in (teacher, cell)]
    alone = bench_of("alone")
    cell = alone.cell("distill", teacher=alone.cell(seed=1, **options), distill=Distill(alpha=0.5), **options)
    alone.run(cell.teacher)
    expected = alone.run(cell).row

    ranks.run(runs)

    for bench in benches:
        row = bench.store.read_row(cell.key)
        assert row.train_loss == pytest.approx(expected.train_loss, rel=1e-4)
        assert row.num_test_samples == expected.num_test_samples
        assert row.timing.num_devices == 2


def test_elastic_resume_of_ddp(bench_of, ranks, stop_after):
    whole, cut = bench_of("whole"), bench_of("cut")
    options = {"drop_path": 0.0, "ema_decay": 0.9}
    cell = whole.cell(**options)
    cut.cell(**options)
    expected = whole.run(cell).row
    ranks.run([listed(cut, cell, resources("ddp"), stop_at=5)])
    row = cut.run(cell).row
    assert cut.store.attempts(cell.key)[-1].resumed_from_step == 5
    assert row.train_loss == pytest.approx(expected.train_loss, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_elastic_resume_of_zero(engine, before, after, bench_of, ranks):
    whole, cut = bench_of("whole"), bench_of("cut")
    options = {"drop_path": 0.0, "ema_decay": 0.9}
    cell = whole.cell(**options)
    cut.cell(**options)
    expected = whole.run(cell).row
    how = resources(engine)
    (first, *_) = ranks.run([listed(cut, cell, how, stop_at=5)], world_size=before)
    assert first[0]["status"] == "interrupted"
    (last, *_) = ranks.run([listed(cut, cell, how)], world_size=after)
    assert last[0]["status"] == "done", last[0]["reason"]
    row = cut.store.read_row(cell.key)
    assert cut.store.attempts(cell.key)[-1].resumed_from_step == 5
    assert row.train_loss == pytest.approx(expected.train_loss, rel=1e-3)


def kills(engine, precision):
    """Which rank dies where: at steps drawn anew for each engine, the 40 samples' epochs ending inside one in three."""
    draw = random.Random(f"{engine} {precision}")
    yield {"kill_rank": draw.randrange(2), "kill_where": "step", "kill_call": draw.randrange(1, 5)}
    yield {"kill_rank": 1, "kill_where": "between the parts of a checkpoint", "kill_call": draw.randrange(1, 4)}
    yield {"kill_rank": 0, "kill_where": "checksum", "kill_call": draw.randrange(12, 24)}
    # Two micro-batches a step: the second one's gradients are on their way.
    yield {"kill_rank": draw.randrange(2), "kill_where": "micro-batch", "kill_call": 2 * draw.randrange(1, 3)}
    yield {"kill_rank": draw.randrange(2), "kill_where": "evaluation", "kill_call": 1}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_killed_again_and_again(engine, bench_of, ranks):
    """kill -9 of either rank in every kind of work; the other one ends with an error, and both are started anew."""
    how = resources(engine, checkpoint_interval_s=1e-9, checkpoint_stall_share=1e9, micro_batch=4)
    finished: list[dict] = []
    pairs = []
    for precision in ("fp32", "bf16"):
        whole, cut = bench_of(f"{precision}-whole"), bench_of(f"{precision}-cut")
        cell = whole.cell(precision=precision, ema_decay=0.9)
        cut.cell(precision=precision, ema_decay=0.9)
        pairs.append((whole, cut, cell))
        finished.append(listed(whole, cell, how))  # at the head of the next start, which costs more than the cell
        for kill in kills(engine, precision):
            found = ranks.run([*finished, listed(cut, cell, how, **kill)])
            assert found[kill["kill_rank"]] == [], f"{kill} never came to pass"
            finished = []
        finished = [listed(cut, cell, how)]
    (last, _) = ranks.run(finished)
    assert last[0]["status"] == "done", last[0]["reason"]
    for whole, cut, cell in pairs:
        assert cut.fingerprint(cell) == whole.fingerprint(cell)
        assert len(cut.store.attempts(cell.key)) == 6
        for rank in range(2):
            assert (cut.store.root / f"end-{rank}").read_text() == (whole.store.root / f"end-{rank}").read_text()


def test_a_rank_that_fails_alone_is_named_and_nobody_waits(bench, ranks):
    """Its peer, in a collective, would know only that a connection was lost."""
    cell = bench.cell()
    how = listed(bench, cell, resources("ddp"), fail_rank=1, fail_where="step", fail_call=3)
    first, second = ranks.run([how], timeout_s=120)
    assert second[0]["status"] == "failed" and "out of memory" in second[0]["reason"]
    assert first[0]["reason"] == f"rank 1: {second[0]['reason']}"
    assert bench.store.last_attempt(cell.key).reason == first[0]["reason"]


def test_evaluation_is_exact_with_any_number_of_ranks(bench_of, ranks, kill_on_call):
    """The same weights judged by one process and by three: 50 test images divide by neither their batch nor by 3."""
    whole, cut = bench_of("whole"), bench_of("cut")
    cell = whole.cell(global_batch=12)
    cut.cell(global_batch=12)
    expected = whole.run(cell).row
    assert cut.run_killed(cell, kill_on_call(run, "evaluate_cell")) != 0
    (first, *_) = ranks.run([listed(cut, cell, resources("ddp", num_processes=3))], world_size=3)
    assert first[0]["status"] == "done", first[0]["reason"]
    found = cut.store.read_row(cell.key)
    assert found.weights_sha256 == expected.weights_sha256
    assert (found.error_rate, found.top5_error_rate) == (expected.error_rate, expected.top5_error_rate)
    assert found.num_test_samples == expected.num_test_samples == 50
    assert found.test_loss == pytest.approx(expected.test_loss, rel=1e-6)
    assert found.calibration_error == pytest.approx(expected.calibration_error, rel=1e-5)
    assert cut.fingerprint(cell)["correct"] == whole.fingerprint(cell)["correct"]


def test_launching_by_hand(bench, data_dir, tmp_path):
    """`accelerate launch` with a config of ours and one process; two processes are in the slow test below."""
    _launch(bench, data_dir, "single", 1)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "zero0", "zero1", "zero2", "zero3"])
def test_launching_two_processes_by_hand(config, bench, data_dir):
    _launch(bench, data_dir, config, 2)


def _launch(bench, data_dir, config, world_size):
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[2]
    cell = bench.cell()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", f"configs/accelerate/{config}.yaml", "-m", "dbscale.launch.cli", "run", cell.key]
    command += ["--store", str(bench.store.root), "--data", str(data_dir)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"{cell.key}: done" in done.stdout
    assert "leaked" not in done.stderr, "Triton's bindings count what is alive at the end"
    row = bench.store.read_row(cell.key)
    assert row.resources["engine"] == ("plain" if config in ("single", "ddp") else config)
    assert row.timing.num_devices == world_size


OPTIONS = {"families": 4, "num_train": 48, "num_test": 12, "image_size": 16}
LIMIT_S = 120


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset with one sample per shard, the 21st of each split missing."""
    from dbscale.shards.pack import pack
    from dbscale.shards.sources import source_of

    source = source_of("up", {"source": "fractals", **OPTIONS, "shard_samples": 1})
    pack(source, tmp_path / "shards" / "up", progress=False)
    (tmp_path / "shards" / "up" / "train-000020.tar").unlink()
    return tmp_path / "shards" / "up"


def read_in_lockstep(rank: int, port: int, folder: Path, pipe: Connection) -> None:
    """Send the number of batches this rank got, the kind of its error and what it says."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    import torch
    from accelerate import Accelerator

    from dbscale.data import make_eval_loader, make_loader, open_dataset
    from dbscale.training.engine import lockstep

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    test = make_eval_loader(open_dataset(folder, "test", tier="raw").subset(), batch_size=5, rank=rank, world_size=2)
    assert len(list(lockstep(iter(test), accelerator))) == len(test)
    subset = open_dataset(folder, tier="raw").subset()
    loader = make_loader(subset, global_batch=4, rank=rank, world_size=2, seed=0)
    try:
        for _ in lockstep(loader, accelerator):
            pass
    except ValueError as error:
        pipe.send((loader.consumed, type(error).__name__, str(error)))


def test_an_error_of_one_rank_is_raised_by_all(folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    processes = [
        context.Process(target=read_in_lockstep, args=(rank, port, folder, pipe[1])) for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        assert all(pipe[0].poll(LIMIT_S) for pipe in pipes), "a rank waits for ever"
        found = sorted([pipe[0].recv() for pipe in pipes], key=lambda each: each[1])
    finally:
        for process in processes:
            process.kill()
            process.join()
    (_, kind, own), (_, other_kind, other) = found
    assert (kind, other_kind) == ("DataError", "TrainingError")
    mend = f"run `dbscale shards pack up --data {folder.parent.parent}`"
    assert own.startswith(f"{folder / 'train-000020.tar'}: shard is missing; {mend}")
    assert other in {f"rank 0: {own}", f"rank 1: {own}"}


@given(a_rank=st.integers(1, 300), world=st.integers(1, 8), micro=st.one_of(st.none(), st.integers(1, 300)))
def test_micro_batches_are_equal_and_fit(a_rank, world, micro):
    batching = make_batching(a_rank * world, world, micro)
    assert batching.micro_batch * batching.accumulation == a_rank
    assert batching.micro_batch <= (micro or a_rank)


def test_a_world_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(TrainingError, match=r"5 processes do not divide the global batch 12; valid: 1, 2, 3, 4, 6, 12"):
        make_batching(12, 5, None)


LAUNCHED = {
    "mixed_precision": ("bf16", "this cell can have fp32 or no: it is part of the recipe"),
    "gradient_accumulation_steps": ("4", "it follows from the global batch and resources.micro_batch"),
    "gradient_clipping": ("0.5", "it is part of the recipe"),
    "deepspeed_offload_param_device": ("nvme", "configs/deepspeed/zero<N>.json"),
    "use_fsdp": ("true", "DDP and DeepSpeed ZeRO 0 to 3"),
    "use_megatron_lm": ("true", "DDP and DeepSpeed ZeRO 0 to 3"),
    "dynamo_backend": ("cudagraphs", "inductor or not at all"),
    "dynamo_mode": ("max-autotune", "resources.compile"),
}


@pytest.mark.parametrize("name", LAUNCHED)
def test_launch_options_that_cannot_be_honoured_are_refused_before_any_step(name, bench, monkeypatch):
    value, words = LAUNCHED[name]
    monkeypatch.setenv(f"ACCELERATE_{name.upper()}", value)
    cell = bench.cell()
    outcome = bench.run(cell)
    assert outcome.status == "failed" and f"accelerate launch sets {name} to {value!r}" in outcome.reason
    assert words in outcome.reason
    assert not (bench.store.cell_dir(cell.key) / "metrics.jsonl").exists()


def test_launch_options_that_say_what_the_cell_has_anyway_change_nothing(bench_of, monkeypatch):
    plain, told = bench_of("plain"), bench_of("told")
    cell, how = plain.cell(precision="bf16"), Resources(zero_stage=None, threads=1, micro_batch=8)
    told.cell(precision="bf16")
    expected = plain.run(cell, how).row
    options = {"mixed_precision": "bf16", "gradient_accumulation_steps": "2", "dynamo_backend": "NO", "use_cpu": "true"}
    for name, value in options.items():
        monkeypatch.setenv(f"ACCELERATE_{name.upper()}", value)
    row = told.run(cell, how).row
    assert row.weights_sha256 == expected.weights_sha256 and row.resources == expected.resources
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16", "what was there comes back"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the tracer's
def test_a_compiled_student_exports_weights_under_their_own_names(bench, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    cell = bench.cell()
    outcome = bench.run(cell)
    assert outcome.status == "done", outcome.reason
    assert outcome.row.resources["compile"] is True
    assert "cls_token" in bench.weights(cell) and not any("_orig_mod" in name for name in bench.weights(cell))


@pytest.mark.parametrize(
    ("change", "words"),
    [({}, None), ({"train_batch_size": 16, "bf16": {"enabled": "auto"}}, None),
     ({"bf16": {"enabled": True}}, "sets bf16.enabled to True"),
     ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer")],
)  # fmt: skip
def test_deepspeed_configs_that_ask_for_more_than_a_stage_are_refused(change, words, bench, monkeypatch, tmp_path):
    config = json.loads((DEEPSPEED_CONFIGS / "zero1.json").read_text()) | change
    (tmp_path / "own.json").write_text(json.dumps(config))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "own.json"))
    outcome = bench.run(bench.cell(), Resources(zero_stage=1, threads=1))
    assert outcome.status == ("done" if words is None else "failed"), outcome.reason
    assert words is None or words in outcome.reason


def test_a_machine_whose_gpus_torch_cannot_use_does_not_fall_back_in_silence(bench, monkeypatch):
    """On one with GPUs the CPU has to be asked for."""
    from dbscale.study import resources as machine

    cell = bench.cell()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_count_gpus", lambda: 2)
    for name in machine.CHOSEN_BY:
        monkeypatch.delenv(name, raising=False)
    plain = Resources(zero_stage=None, threads=1)
    refused = bench.run(cell, plain)
    assert refused.status == "failed"
    assert "this machine has 2 GPUs (0, 1), but this torch" in refused.reason
    assert "set resources.device to cpu to train on the CPU" in refused.reason
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-4a1c1e9c,GPU-7b7b7b7b,MIG-1")
    assert "has 3 GPUs (GPU-4a1c1e9c, GPU-7b7b7b7b, MIG-1)" in bench.run(cell, plain).reason
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert bench.run(cell, plain).status == "done", "hiding them all asks for the CPU"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert bench.run(bench.cell(seed=1), plain.model_copy(update={"device": "cpu"})).status == "done"
