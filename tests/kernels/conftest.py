"""The backends under test, and where each runs.

The same tests serve every backend. `triton` runs on a CUDA device, or on the CPU in a process of its own under
TRITON_INTERPRET=1, which `test_interpreter.py` starts.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dbscale.kernels.kd_loss import is_interpreted

BACKENDS = ["triton"] if is_interpreted() else ["eager", "triton"]


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and not is_interpreted() and not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible; test_interpreter.py runs this on the CPU")
    return request.param


@pytest.fixture(scope="session")
def device(backend: str) -> torch.device:
    """CUDA for every backend where there is one, so that a GPU host tests the torch operations there, too."""
    return torch.device("cuda" if torch.cuda.is_available() and not is_interpreted() else "cpu")


@pytest.fixture(scope="session")
def tolerance(backend: str) -> float:
    """The largest ‖out − ref‖ / ‖ref‖ in float32; the textbook form subtracts logarithms.

    A GPU's own exponential is wrong by two units in the last place: 2.4e-6 was seen on an H200, against a bound of 2e-6.
    """
    return 1e-5 if backend == "eager" else 1e-6 if is_interpreted() else 2e-6


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    """Kernels allocate what they fill; reading it before that would go unnoticed where memory happens to be zero."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
