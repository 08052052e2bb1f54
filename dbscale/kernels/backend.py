"""Which implementation runs: names, what `auto` means on each device, and refusals with their reason.

Knows of Triton only whether it can run, so that a machine without it imports and uses everything else.
"""

import importlib.util
import os
from functools import cache

BACKENDS = ("auto", "triton", "sdpa", "chunked", "eager", "compile")
"""What `backend=` takes.

`triton`: the fused kernels (CUDA, or the CPU under TRITON_INTERPRET=1). `chunked`: closed forms in plain torch
operations, one cache-sized block of rows at a time, on any device. `sdpa`: attention through
scaled_dot_product_attention alone (the independent oracle); logits have no attention, there it means `chunked`.
`eager`: the textbook form. `compile`: torch.compile of the textbook form. `auto`: see `resolve_backend`.
"""

AUTO_ON_CPU = {"kd_loss": "chunked", "attention_kl": "chunked", "sdpa_with_attention_kl": "chunked"}
"""The fastest measured one on CPU; docs/benchmarks/kernels.md holds the measurement."""


def resolve_backend(backend: str, function: str, device_type: str) -> str:
    """The backend that a call of `function` with tensors on `device_type` runs; for the record of a run.

    `auto` is `triton` on CUDA where Triton is installed, `chunked` on CUDA without it and on other accelerators, and
    the fastest measured one on CPU. Raises ValueError for an unknown name, or for `triton` where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{function}: unknown backend {backend!r}; use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = _auto(function, device_type)
    if backend == "sdpa" and function == "kd_loss":
        return "chunked"
    if backend == "triton":
        _require_triton(function, device_type)
    return backend


def is_interpreted() -> bool:
    """True where Triton's interpreter runs kernels on CPU (the variable must be set before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _auto(function: str, device_type: str) -> str:
    if device_type == "cuda" and _has_triton():
        return "triton"
    return AUTO_ON_CPU[function] if device_type == "cpu" else "chunked"


def _require_triton(function: str, device_type: str) -> None:
    if not _has_triton():
        raise ValueError(f"{function}: backend='triton', but triton is not installed; use backend='auto'")
    if device_type != "cuda" and not is_interpreted():
        raise ValueError(
            f"{function}: backend='triton' needs CUDA tensors, got {device_type}; use backend='auto' "
            "(TRITON_INTERPRET=1 runs the kernels on CPU, slowly, for tests)"
        )


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
