"""What is said of installing: a constraints file for each torch, extras, make's variable, the container's recipe."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILDS = ["cpu", "cuda12", "cuda13"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str) -> dict[str, str]:
    """Exact versions of one file by package; every line is one of these, an option or a comment."""
    lines = (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
    split = [line.split("==") for line in lines if not line.startswith(("#", "-"))]
    return {normal(package): version for package, version in split}


@pytest.mark.parametrize("build", BUILDS)
def test_every_package_asked_for_has_one_version(build: str) -> None:
    assert "-c shared.txt" in (ROOT / "constraints" / f"{build}.txt").read_text().splitlines()
    shared, own = pins("shared"), pins(build)
    assert not shared.keys() & own.keys()
    asked = {
        normal(re.split(r"[\[<>=]", each)[0]) for extra in PROJECT["optional-dependencies"].values() for each in extra
    }
    asked |= {normal(re.split(r"[\[<>=]", each)[0]) for each in PROJECT["dependencies"]}
    assert asked - {"dbscale"} <= shared.keys() | own.keys()
    assert {"torch", "torchvision"} <= own.keys()


def test_the_builds_differ_in_torch_alone() -> None:
    assert pins("cuda13")["torch"].split("+")[0] == pins("cpu")["torch"].removesuffix("+cpu")
    assert pins("cuda12").keys() & pins("cuda13").keys() == {"torch", "torchvision", "triton", "cuda-bindings"}
    assert all(name.endswith("-cu12") for name in pins("cuda12") if name.startswith("nvidia-"))


def test_clients_of_object_stores_come_together() -> None:
    assert {"s3fs", "gcsfs", "aiohttp", "huggingface_hub"} <= set(PROJECT["optional-dependencies"]["remote"])


def test_make_says_what_it_downloads_and_knows_the_builds() -> None:
    def make(build: str) -> subprocess.CompletedProcess[str]:
        words = ["make", "--silent", "--dry-run", "--always-make", "setup", f"TORCH={build}"]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)

    assert "Downloading the versions of constraints/cuda12.txt" in make("cuda12").stdout
    words = ["make", "--silent", "setup", "TORCH=rocm"]
    refused = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "TORCH=rocm: there is no constraints/rocm.txt; known: cpu, cuda12, cuda13" in refused.stderr


def test_what_the_container_copies_builds_the_same_wheel(tmp_path: Path) -> None:
    text = (ROOT / "apptainer.def").read_text()
    copied = re.search(r"%files\n(.*?)\n\n", text, re.DOTALL)
    assert copied
    place = tmp_path / "opt" / "dbscale"
    place.mkdir(parents=True)
    for source, target in (line.split() for line in copied[1].splitlines()):
        # As Apptainer does: links are followed.
        subprocess.run(["cp", "-fLr", str(ROOT / source), str(tmp_path / target.removeprefix("/"))], check=True)

    def names(folder: Path, out: Path) -> list[str]:
        words = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(folder)]
        subprocess.run([sys.executable, *words], check=True)
        (wheel,) = out.glob("*.whl")
        return sorted(name for name in zipfile.ZipFile(wheel).namelist() if "__pycache__" not in name)

    assert names(place, tmp_path / "copy") == names(ROOT, tmp_path / "whole")
    assert "{{ TORCH }}.txt" in text and (place / "constraints" / "cuda13.txt").exists()
