"""Which GPUs a process may use, by any name, as the environment and the drivers of NVIDIA and AMD say."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbscale.study import resources
from dbscale.study.resources import visible_gpus

UUIDS = ("GPU-4a1c1e9c-1f0c-8f1e-0d5c-2b1f9d8f0a11", "MIG-GPU-4a1c1e9c/1/0", "MIG-9f0c1f0c-0d5c")


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*resources.CHOSEN_BY, "SLURM_JOB_ID", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(resources, "NVIDIA", tmp_path / "nvidia")
    monkeypatch.setattr(resources, "ROCM", tmp_path / "rocm")


def nvidia(folder: Path, count: int) -> None:
    for number in range(count):
        (folder / "nvidia" / f"0000:0{number}:00.0").mkdir(parents=True)


def rocm(folder: Path, *ids: str) -> None:
    for number, gpu_id in enumerate(ids):
        (folder / "rocm" / str(number)).mkdir(parents=True)
        (folder / "rocm" / str(number) / "gpu_id").write_text(f"{gpu_id}\n")


def test_none_where_no_driver_lists_any() -> None:
    assert visible_gpus() == ()


def test_all_that_nvidias_driver_lists(tmp_path: Path) -> None:
    nvidia(tmp_path, 3)
    assert visible_gpus() == ("0", "1", "2")


def test_all_that_amds_driver_lists_but_cpus(tmp_path: Path) -> None:
    rocm(tmp_path, "0", "51437", "0", "2233")
    assert visible_gpus() == ("0", "1")


@pytest.mark.parametrize("name", resources.CHOSEN_BY)
@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ("2,0", ("2", "0")),
        (" 1 , 3 ", ("1", "3")),
        (",".join(UUIDS), UUIDS),
        ("", ()),
        ("-1", ()),
        ("0,-1,1", ("0",)),
        ("NoDevFiles", ()),
        ("0,0,1", ("0", "1")),
    ],
)
def test_the_environment_chooses_by_index_uuid_or_mig_id(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, listed: str, found: tuple[str, ...]
) -> None:
    nvidia(tmp_path, 4)
    monkeypatch.setenv(name, listed)
    assert visible_gpus() == found


def test_a_job_that_was_given_no_gpu_sees_none_of_its_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvidia(tmp_path, 2)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert visible_gpus() == ()
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    assert visible_gpus() == ("0", "1")
