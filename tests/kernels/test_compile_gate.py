"""Every kernel, as it is launched, compiled for sm_90 without a GPU: nothing spills, and it fits an SM.

The launches are caught where Triton would look for a device, so that tiles, warps and types are those of real calls.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dbscale.kernels.kd_loss import is_interpreted

triton = pytest.importorskip("triton", reason="the gate compiles Triton's kernels; triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime import jit  # noqa: E402

pytestmark = [
    pytest.mark.skipif(is_interpreted(), reason="the interpreter compiles nothing"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]
TARGET = GPUTarget("cuda", 90, 32)
MAX_SHARED = 227 * 1024
"""Bytes of shared memory that one program may have on an H100."""
REGISTERS = 65536
"""Of one SM."""


@dataclass(frozen=True)
class Compiled:
    name: str
    registers: int
    spilled: int
    """Bytes of spill stores and loads."""
    shared: int
    num_warps: int


def assemble(ptx: str, folder: Path) -> tuple[int, int]:
    """(registers, spilled bytes) as the assembler reports them."""
    tool = triton.knobs.nvidia.ptxas_blackwell.path
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [tool, "-v", "-arch=sm_90a", str(source), "-o", str(folder / "kernel.cubin")]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", log)
    return int(registers), sum(int(each) for each in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Compiled]:
    """What is launched from now on is compiled, measured and listed, and not run."""
    found: list[Compiled] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        backend = make_backend(TARGET)
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, _ = bind(*args, **keywords)
        options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, None)
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=TARGET, options=options.__dict__)
        registers, spilled = assemble(compiled.asm["ptx"], tmp_path)
        found.append(Compiled(kernel.__name__, registers, spilled, compiled.metadata.shared, options.num_warps))

    monkeypatch.setattr(jit.JITFunction, "run", run)
    return found


def check(launches: list[Compiled], names: set[str], spilled: int = 0) -> None:
    assert {each.name for each in launches} == names
    for each in launches:
        assert each.spilled <= spilled, each
        assert each.shared <= MAX_SHARED, each
        assert each.registers * each.num_warps * 32 <= REGISTERS, each


def launch_attention(
    dtype: torch.dtype, batch: int, tokens: int, widths: tuple[int, int], with_out: bool,
    heads: tuple[int, int] = (8, 2), joined: tuple[int, int, int] = (1, 1, 4),
) -> None:  # the operators themselves: CPU tensors are as good as any where nothing runs  # fmt: skip
    """`joined`: student and teacher heads of a group, repeats."""
    from dbscale.kernels.attention_kl_triton import _forward, _gradients

    q = torch.zeros(batch, heads[0], tokens, widths[0], dtype=dtype)
    q_t = torch.zeros(batch, heads[1], tokens, widths[1], dtype=dtype)
    v = torch.zeros_like(q) if with_out else None
    settings = (0.125, 0.125, list(joined))
    out, rows, *numbers = _forward(q, torch.zeros_like(q), v, q_t, torch.zeros_like(q_t), *settings)
    _gradients(out if with_out else None, rows, q, q, v, q_t, q_t, out, *numbers, *settings)


DEFAULT = [(torch.bfloat16, (64, 64), True), (torch.float32, (64, 64), True)]
MORE = [
    (dtype, widths, with_out)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for widths in ((64, 64), (32, 64), (64, 32), (32, 32), (16, 16), (128, 128), (64, 128))
    for with_out in (True, False)
    # Full-precision products of wider heads have no tensor cores, and do spill a little.
    if (dtype, widths, with_out) not in DEFAULT and not (dtype == torch.float32 and max(widths) > 64)
]
SHAPES = pytest.mark.parametrize(
    ("batch", "tokens"), [(96, 197), pytest.param(1, 2048, marks=pytest.mark.slow)], ids=["many heads", "long sequence"]
)  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "widths", "with_out"), DEFAULT + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]
)
@SHAPES
def test_attention_kernels(launches, dtype, widths, with_out, batch, tokens) -> None:
    launch_attention(dtype, batch, tokens, widths, with_out)
    names = {"forward_kernel", "keys_kernel", "queries_kernel"} | ({"row_dot_kernel"} if with_out else set())
    check(launches, names)


@pytest.mark.parametrize(
    ("dtype", "widths", "with_out"),
    DEFAULT[:1] + [pytest.param(*each, marks=pytest.mark.slow) for each in (DEFAULT + MORE)[1:]],
)
@pytest.mark.parametrize(
    ("heads", "group"),
    [((8, 2), (4, 1)), *(pytest.param(each, each, marks=pytest.mark.slow) for each in ((3, 8), (8, 1)))],
    ids=["8/2", "3/8", "8/1"],
)  # fmt: skip
@SHAPES
def test_kernels_of_averaged_heads(launches, dtype, widths, with_out, heads, group, batch, tokens) -> None:
    launch_attention(dtype, batch, tokens, widths, with_out, heads, (*group, 1))
    names = {"forward_kernel", "grouped_kernel", "keys_kernel", "queries_kernel"}
    names |= {"row_dot_kernel"} if with_out else set()
    # The maps of a group stand beside a head's own: what has no tensor cores or is wide spills a little.
    is_usual = dtype != torch.float32 and max(widths) <= 64
    check(launches, names, spilled=0 if is_usual else 128)


@pytest.mark.parametrize("classes", [10, 1000, 21841])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["hard", pytest.param("soft", marks=pytest.mark.slow)])
def test_logit_kernels(launches, classes, dtype, kind) -> None:
    from dbscale.kernels.kd_loss_eager import KDTarget, KDWeights
    from dbscale.kernels.kd_loss_triton import kd_triton

    student = torch.zeros(4, classes, dtype=dtype, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.int64)
    target = KDTarget(labels) if kind == "hard" else KDTarget(soft_BC=torch.zeros(4, classes))
    loss, _, _ = kd_triton(student, student.detach(), target, KDWeights(4.0, 0.1, 0.5, 8.0, 0.25, 1.0), True)
    loss.backward()
    check(launches, {"kd_kernel", "reduce_kernel", "scale_kernel"})
    assert max(each.registers for each in launches) <= 128, "two programs of 8 warps per SM and more"
