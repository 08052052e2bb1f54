"""Operands of attention, what the two functions make of them, and eager float64 as their reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dbscale.kernels import attention_kl, sdpa_with_attention_kl

UPSTREAM = 2.5
NAMES = ("kl", "out", "grad_q", "grad_k", "grad_v")


def draw(
    device: torch.device, batch: int, heads: tuple[int, int], tokens: int, widths: tuple[int, int], scale: float = 1.0
) -> dict[str, Tensor]:
    """q, k, v of the student as views of one projection [B, N, 3·H·d], as a transformer makes them; q_t, k_t likewise."""
    result: dict[str, Tensor] = {}
    for names, num_heads, width in (("q k v", heads[0], widths[0]), ("q_t k_t v_t", heads[1], widths[1])):
        qkv = torch.randn(batch, tokens, 3, num_heads, width, device=device) * scale
        result |= dict(zip(names.split(), qkv.permute(2, 0, 3, 1, 4), strict=True))
    del result["v_t"]
    return result


def run(given_: dict[str, Tensor], *, wants: str = "both", **options: Any) -> dict[str, Tensor]:
    """What NAMES names, of upstream · KL + Σ w · out, or of one of the two."""
    q, k, v = (given_[name].detach().requires_grad_() for name in "qkv")
    out, kl = sdpa_with_attention_kl(q, k, v, given_["q_t"], given_["k_t"], **options)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)
    loss = torch.zeros((), dtype=kl.dtype, device=kl.device)
    if wants in ("both", "kl"):
        loss = loss + UPSTREAM * kl.sum()
    if wants in ("both", "out"):
        loss = loss + (out * weights).sum()
    grads = torch.autograd.grad(loss, (q, k, v), allow_unused=True, materialize_grads=True)
    return dict(zip(NAMES, (kl.detach(), out.detach(), *grads), strict=True))


def run_alone(given_: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    q, k = (given_[name].detach().requires_grad_() for name in "qk")
    kl = attention_kl(q, k, given_["q_t"], given_["k_t"], **options)
    grads = torch.autograd.grad(UPSTREAM * kl.sum(), (q, k))
    return {"kl": kl.detach(), "grad_q": grads[0], "grad_k": grads[1]}


def reference(given_: dict[str, Tensor], how: Any = run, **options: Any) -> dict[str, Tensor]:
    if isinstance(options.get("head_map"), Tensor):
        options["head_map"] = options["head_map"].double()
    return how({name: each.double() for name, each in given_.items()}, **(options | {"backend": "eager"}))


def error(value: Tensor, expected: Tensor) -> float:
    # What is zero in exact arithmetic, such as the gradient of a softmax over one key, counts by itself.
    norm = float(expected.norm())
    return float((value.double() - expected).norm()) / (norm if norm > 1e-10 else 1.0)


def check(result: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in result.items():
        assert value.shape == expected[name].shape
        assert error(value, expected[name]) <= tolerance, name
