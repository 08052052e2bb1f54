"""Runs every test of the backend `triton` on the CPU, in a process whose Triton interprets its kernels.

The variable must be set before triton is imported, hence a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def run_interpreted(marks: str, timeout_s: float) -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        "triton",
        "-m",
        marks,
    ]
    variables = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE)], env=variables, cwd=HERE.parents[1], capture_output=True, text=True, timeout=timeout_s,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device runs the kernels themselves")
@pytest.mark.parametrize("marks", ["not slow and not gpu", pytest.param("slow and not gpu", marks=pytest.mark.slow)])
def test_kernels_pass_their_tests_under_the_interpreter(marks: str) -> None:
    assert " passed" in run_interpreted(marks, timeout_s=1800)
