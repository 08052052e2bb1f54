"""The losses as torch operators: opcheck, full graphs, what is kept for backward, CUDA graphs, no waiting."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dbscale.kernels import attention_kl, kd_loss, sdpa_with_attention_kl
from dbscale.kernels.kd_loss import is_interpreted, resolve_backend

pytestmark = [  # numpy's, where the interpreter computes what a `where` then drops
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
    # torch's own, while it traces
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def logits_loss(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        target = torch.arange(len(student), device=student.device) % 3
        return kd_loss(student, teacher, target, alpha=0.4, temperature=2.0, label_smoothing=0.1, backend=backend).loss

    return loss


def maps_loss(backend: str, reduction: str = "batchmean") -> Callable[..., Tensor]:
    def loss(q: Tensor, k: Tensor, v: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
        out, kl = sdpa_with_attention_kl(q, k, v, q_t, k_t, reduction=reduction, backend=backend)
        alone = attention_kl(q, k, q_t, k_t, reduction=reduction, backend=backend)
        return out.sin().sum() + 2 * kl.sum() + alone.sum()

    return loss


def maps(device: torch.device, *shape: int) -> list[Tensor]:
    return [torch.randn(shape, device=device, requires_grad=index < 3) for index in range(5)]


def test_operators_pass_opcheck(backend, device) -> None:
    if backend != "triton":
        pytest.skip("has no operators of its own")
    from dbscale.kernels.attention_kl_triton import _forward
    from dbscale.kernels.kd_loss_triton import _kd_triton

    student = torch.randn(3, 9, device=device, requires_grad=True)
    teacher, labels = torch.randn(3, 9, device=device), torch.tensor([0, 1, 8], device=device)
    q, k, v, q_t, k_t = maps(device, 1, 2, 5, 4)
    numbers = [2.0, 0.1, 0.4, 0.6, 1.0, 1.0]
    cases: list[tuple[Any, tuple]] = [
        *(
            (_kd_triton, (student, teacher, labels, None, None, None, numbers, reduced, True))
            for reduced in (True, False)
        ),
        (_forward, (q, k, v, q_t, k_t, 0.5, 0.5, [1, 1, 1])),
        (_forward, (q, k, v, q_t[:, :1], k_t[:, :1], 0.5, 0.5, [2, 1, 1])),
    ]
    # What has no gradient is compared too; a second backward is refused by the kernel on logits, which reuses memory.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, arguments in cases:
        torch.library.opcheck(operator, arguments, test_utils=tests)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_one_graph_without_breaks_gives_the_same(backend, device, reduction) -> None:
    # aot_eager traces, functionalises and partitions as inductor does, without its code generation.
    torch._dynamo.reset()
    student, teacher = torch.randn(2, 4, 11, device=device)
    loss = logits_loss(backend)
    for function, operands in (
        (loss, [student.requires_grad_(), teacher]),
        (maps_loss(backend, reduction), maps(device, 1, 2, 6, 4)),
    ):
        expected = torch.autograd.grad(function(*operands), [each for each in operands if each.requires_grad])
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*operands), [each for each in operands if each.requires_grad])
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_inductor_takes_them_and_is_a_backend() -> None:
    if is_interpreted():
        pytest.skip("inductor needs a compiled Triton, or none")
    torch._dynamo.reset()
    for kind, operands in (
        (logits_loss, list(torch.randn(2, 4, 50))),
        (maps_loss, maps(torch.device("cpu"), 1, 2, 9, 8)),
    ):
        operands[0].requires_grad_()
        wanted = [each for each in operands if each.requires_grad]
        expected = torch.autograd.grad(kind("eager")(*operands), wanted)
        for function in (torch.compile(kind("auto"), fullgraph=True), kind("compile")):
            for mine, other in zip(torch.autograd.grad(function(*operands), wanted), expected, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def kept_bytes(function: Callable[[], Tensor], *free: Tensor) -> int:
    """Bytes that autograd keeps for the backward of `function`, each storage once, those of `free` not counted."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()
    del result
    return sum(
        size for pointer, size in storages.items() if pointer not in {x.untyped_storage().data_ptr() for x in free}
    )


def test_only_the_gradient_is_kept_of_logits(backend, device) -> None:
    if backend != "triton":
        pytest.skip("keeps what autograd wants")
    rows, classes = 8, 1000
    student, teacher = torch.randn(2, rows, classes, device=device)
    student = student.clone().requires_grad_()
    assert kept_bytes(lambda: logits_loss(backend)(student, teacher), student, teacher) == rows * classes * 4
    eager = kept_bytes(lambda: logits_loss("eager")(student, teacher), student, teacher)
    assert eager >= 3 * rows * classes * 4


def test_what_is_kept_of_attention(backend, device) -> None:
    if backend != "triton":
        pytest.skip("keeps what autograd wants")
    batch, heads, tokens, width = 1, 2, 48, 16
    q, k, v, q_t, k_t = operands = maps(device, batch, heads, tokens, width)

    def joint(how: str, head_map: str = "repeat") -> Tensor:
        taught = (q_t, k_t) if head_map == "repeat" else (q_t[:, :1], k_t[:, :1])
        out, kl = sdpa_with_attention_kl(q, k, v, *taught, head_map=head_map, backend=how)
        return out.sum() + kl

    row, one = batch * heads * tokens * 4, batch * heads * tokens * width * 4
    # Output and four numbers per row; of averaged heads three, and one number per entry of the one map of both heads.
    assert kept_bytes(lambda: joint(backend), *operands) <= one + 4 * row
    assert kept_bytes(lambda: joint(backend, "mean"), *operands) <= one + 3 * row + batch * tokens**2 * 4
    assert kept_bytes(lambda: joint("eager"), *operands) >= 3 * batch * heads * tokens**2 * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible")
def test_capture_in_a_cuda_graph_and_no_wait_for_the_device() -> None:
    student, teacher = torch.randn(2, 64, 1003, device="cuda")
    student.requires_grad_()
    operands = maps(torch.device("cuda"), 2, 4, 65, 32)
    wanted = [student, *operands[:3]]

    def gradients() -> tuple[Tensor, ...]:
        loss = logits_loss("triton")(student, teacher) + maps_loss("triton")(*operands)
        return torch.autograd.grad(loss, wanted)

    expected = gradients()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    graph.replay()
    assert all(torch.equal(mine, other) for mine, other in zip(captured, expected, strict=True))


def test_everything_but_triton_works_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import torch\n"
        "from dbscale.kernels import attention_kl, kd_loss, sdpa_with_attention_kl\n"
        "x = torch.randn(2, 2, 5, 4, requires_grad=True)\n"
        "for backend in ('auto', 'eager'):\n"
        "    kd_loss(x[0, 0], x[1, 1], torch.zeros(5).long(), alpha=.5, temperature=2., backend=backend).loss.backward()\n"
        "    attention_kl(x, x, x, x, backend=backend).backward()\n"
        "    sdpa_with_attention_kl(x, x, x, x, x, backend=backend).kl.backward()\n"
        "try: attention_kl(x, x, x, x, backend='triton')\n"
        "except ValueError as reason: print(reason)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed; use backend='auto'" in done.stdout


def test_what_auto_means(monkeypatch) -> None:
    for function in ("kd_loss", "attention_kl", "sdpa_with_attention_kl"):
        devices = ("cpu", "mps", "cuda")
        assert [resolve_backend("auto", function, each) for each in devices] == ["eager", "eager", "triton"]
