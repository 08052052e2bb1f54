"""Every backend that runs on this device against textbook formulas in float64, written here and nowhere else; refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dbscale.kernels import attention_kl, kd_loss, sdpa_with_attention_kl

ON_CPU = pytest.mark.parametrize("backend", ["auto", "eager", "chunked", "sdpa"])


def reference_kd(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float, temperature: float, smoothing: float
) -> Tensor:
    student, teacher = student.double(), teacher.double()
    log_p = torch.log_softmax(student, 1)
    ce = -(1 - smoothing) * log_p.gather(1, target[:, None])[:, 0] - smoothing * log_p.mean(1)
    p_t = torch.softmax(teacher / temperature, 1)
    kl = (p_t * (torch.log_softmax(teacher / temperature, 1) - torch.log_softmax(student / temperature, 1))).sum(1)
    return ((1 - alpha) * ce + alpha * temperature**2 * kl).mean()


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm().clamp_min(1e-30))


@ON_CPU
@given(
    rows=st.integers(1, 9), classes=st.sampled_from([2, 10, 257, 1003]), alpha=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([1.0, 4.0]), smoothing=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_kd_loss_and_its_gradient(
    backend: str, rows: int, classes: int, alpha: float, temperature: float, smoothing: float, seed: int
) -> None:
    torch.manual_seed(seed)
    student, teacher = torch.randn(rows, classes) * 3, torch.randn(rows, classes) * 3
    target = torch.randint(classes, (rows,))
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    result = kd_loss(
        ours, teacher, target, alpha=alpha, temperature=temperature, label_smoothing=smoothing, backend=backend
    )
    reference = reference_kd(theirs, teacher, target, alpha, temperature, smoothing)
    (2.5 * result.loss).backward()
    (2.5 * reference).backward()
    assert ours.grad is not None and theirs.grad is not None
    assert relative(result.loss.detach(), reference.detach()) < 1e-5
    assert relative(ours.grad, theirs.grad) < 1e-5
    assert not result.ce.requires_grad and not result.kl.requires_grad


@ON_CPU
def test_equal_logits_give_exactly_nothing(backend: str) -> None:
    logits = torch.randn(5, 100)
    student = logits.clone().requires_grad_()
    result = kd_loss(student, logits, torch.zeros(5, dtype=torch.long), alpha=1.0, temperature=2.0, backend=backend)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.0, abs=1e-6)
    assert student.grad is not None and student.grad.abs().max() < 1e-6


def reference_maps(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    """KL(teacher ‖ student) of [B, H, N, N] maps, teacher heads repeated, mean over batch, heads and queries."""
    scores_s = (q_s @ k_s.transpose(-1, -2)).double() * q_s.shape[-1] ** -0.5
    scores_t = (q_t.double() @ k_t.double().transpose(-1, -2)) * q_t.shape[-1] ** -0.5
    scores_t = scores_t.repeat_interleave(q_s.shape[1] // q_t.shape[1], dim=1)
    p_t = torch.softmax(scores_t, -1)
    return (p_t * (torch.log_softmax(scores_t, -1) - torch.log_softmax(scores_s, -1))).sum(-1).mean()


@ON_CPU
@pytest.mark.parametrize(("tokens", "heads_s", "heads_t"), [(1, 2, 2), (17, 4, 1), (65, 2, 2), (198, 8, 2)])
def test_attention_kl_and_its_gradients(backend: str, tokens: int, heads_s: int, heads_t: int) -> None:
    torch.manual_seed(tokens)
    q, k = torch.randn(2, heads_s, tokens, 16), torch.randn(2, heads_s, tokens, 16)
    v = torch.randn(2, heads_s, tokens, 16)
    q_t, k_t = torch.randn(2, heads_t, tokens, 32), torch.randn(2, heads_t, tokens, 32)
    ours = [each.clone().requires_grad_() for each in (q, k, v)]
    theirs = [each.double().requires_grad_() for each in (q, k, v)]
    alone = attention_kl(q, k, q_t, k_t, backend=backend)
    together = sdpa_with_attention_kl(ours[0], ours[1], ours[2], q_t, k_t, backend=backend)
    reference = reference_maps(theirs[0], theirs[1], q_t, k_t)
    expected = pytest.approx(float(reference.detach()), rel=1e-4, abs=1e-6)  # the identity subtracts logsumexps
    out = torch.nn.functional.scaled_dot_product_attention(*theirs)
    (together.out.square().sum() + 3 * together.kl).backward()
    (out.square().sum() + 3 * reference).backward()
    assert float(alone) == expected
    assert float(together.kl.detach()) == expected
    assert relative(together.out.detach(), out.detach()) < 1e-5
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None and other.grad is not None
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("field", "value"), [("backend", "cuda"), ("alpha", 1.5), ("temperature", 0.0), ("reduction", "max")]
)
def test_numbers_and_names_that_do_not_fit(field: str, value: object) -> None:
    options: dict = {"alpha": 0.5, "temperature": 1.0} | {field: value}
    with pytest.raises(ValueError, match=field):
        kd_loss(torch.randn(2, 3), torch.randn(2, 3), torch.zeros(2, dtype=torch.long), **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": torch.tensor([0, 9])}, "0…9, but the logits have 4 classes"),
        ({"target": torch.tensor([0.5, 1.0])}, r"soft target has shape \[2\]"),
        ({"target": torch.tensor([0, 1, 2])}, r"expected integers of shape \[2\]"),
        ({"target": (torch.tensor([0, 1]), torch.tensor([0, 1]))}, "a mixup target is"),
        ({"teacher": torch.zeros(2, 5)}, r"\[2, 4\], teacher logits \[2, 5\]"),
        ({"student": torch.zeros(2, 4, dtype=torch.long)}, "expected floating"),
        ({"backend": "triton"}, "needs CUDA tensors"),
    ],
)
def test_refusals_say_what_and_which(change, words, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    given_: dict[str, Any] = {
        "student": torch.zeros(2, 4),
        "teacher": torch.zeros(2, 4),
        "target": torch.tensor([0, 1]),
    }
    given_ |= {"backend": "auto"} | change
    with pytest.raises(ValueError, match=words):
        kd_loss(
            given_["student"],
            given_["teacher"],
            given_["target"],
            alpha=0.5,
            temperature=1.0,
            backend=given_["backend"],
        )
