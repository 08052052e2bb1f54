"""The attention map loss together with the output, beside plain attention, the textbook form and torch.compile of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dbscale.kernels import sdpa_with_attention_kl
from kernel_bench.measure import Step

BACKENDS = ("eager", "auto", "compile", "output alone")
"""`output alone` is torch's scaled_dot_product_attention without a KL: what the KL is added to."""


@dataclass(frozen=True)
class AttentionCase:
    batch: int
    heads: int
    heads_t: int
    tokens: int
    width: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"B={self.batch} H={self.heads}/{self.heads_t} N={self.tokens} d={self.width} {dtype}"

    @property
    def floor_bytes(self) -> int:
        """Forward reads q, k, v and writes the output; backward reads those and its gradient and writes three more.

        Both read the teacher's q and k.
        """
        per_head = self.batch * self.tokens * self.width * self.dtype.itemsize
        return per_head * (self.heads * (4 + 8) + self.heads_t * (2 + 2))


CASES = {
    "cpu": (
        AttentionCase(128, 4, 1, 17, 16, torch.float32),
        AttentionCase(32, 3, 1, 65, 64, torch.float32),
        AttentionCase(8, 8, 2, 197, 64, torch.float32),
        AttentionCase(2, 8, 2, 577, 64, torch.float32),
        AttentionCase(1, 4, 1, 2048, 64, torch.float32),
        AttentionCase(8, 8, 2, 197, 64, torch.bfloat16),
    ),
    "cuda": (
        AttentionCase(256, 8, 2, 197, 64, torch.bfloat16),
        AttentionCase(256, 8, 8, 197, 64, torch.bfloat16),
        AttentionCase(512, 3, 1, 65, 64, torch.bfloat16),
        AttentionCase(64, 8, 2, 577, 64, torch.bfloat16),
        AttentionCase(4, 8, 2, 4096, 64, torch.bfloat16),
    ),
}


def makers(case: AttentionCase, device: torch.device) -> dict[str, Callable[[], Step]]:
    """Backends and plain attention by name; q, k, v are views of one projection, as a transformer makes them."""

    def projected(parts: int, heads: int) -> tuple[Tensor, ...]:
        qkv = torch.randn(case.batch, case.tokens, parts, heads, case.width, device=device).to(case.dtype)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    q, k, v = (each.detach().requires_grad_() for each in projected(3, case.heads))
    q_t, k_t = projected(2, case.heads_t)
    grad_out = torch.randn_like(q)
    operands = (q, k, v, q_t, k_t, grad_out)

    def joint(backend: str) -> Callable[[], tuple[Tensor, Tensor | None]]:
        return lambda: sdpa_with_attention_kl(q, k, v, q_t, k_t, backend=backend)

    def plain() -> tuple[Tensor, None]:
        return scaled_dot_product_attention(q, k, v), None

    def make(name: str) -> Step:
        return _step(plain if name == "output alone" else joint(name), operands)

    return {name: lambda name=name: make(name) for name in BACKENDS}


def _step(attend: Callable[[], tuple[Tensor, Tensor | None]], operands: tuple[Tensor, ...]) -> Step:
    *_, grad_out = operands

    def run() -> object:
        out, kl = attend()
        if kl is None:
            return torch.autograd.grad(out, operands[:3], grad_out)
        return torch.autograd.grad((out, kl), operands[:3], (grad_out, None))

    return Step(run, attend, operands)
