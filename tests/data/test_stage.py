"""Staging copies what is needed once, survives races and kills, and cleans up after itself."""

import errno
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dbscale.data import DataError, open_dataset, stage
from dbscale.data.read import checksum
from dbscale.data.stage import needed_shards, release, remove_unused, stage_subset
from dbscale.errors import FileError


def images(subset) -> np.ndarray:
    return np.asarray(subset.dataset.reader.fetch(subset.indices)[0])


def test_only_the_needed_shards_are_copied(folder: Path, tmp_path: Path) -> None:
    subset = open_dataset(folder, tier="raw").subset(15)
    staged = stage_subset(subset, tmp_path)
    assert needed_shards(subset) == [0, 1, 2]
    assert sorted(path.name for path in staged.dataset.folder.glob("*.tar")) == [f"train-{n:06d}.tar" for n in range(3)]
    assert staged.dataset.folder.parent == tmp_path
    assert staged.fingerprint == subset.fingerprint
    assert np.array_equal(images(staged), images(subset))
    release(staged.dataset.folder)


def test_the_same_samples_in_other_shards_are_staged_anew(make_folder_of, tmp_path: Path) -> None:
    one, other = (open_dataset(make_folder_of((9, 9), shard_samples=n), tier="raw").subset() for n in (4, 7))
    assert one.fingerprint == other.fingerprint
    release(stage_subset(one, tmp_path).dataset.folder)
    staged = stage_subset(other, tmp_path)
    assert np.array_equal(images(staged), images(other))
    release(staged.dataset.folder)


def test_the_resident_tier_is_staged_whole(folder: Path, tmp_path: Path) -> None:
    subset = open_dataset(folder).subset(3)
    staged = stage_subset(subset, tmp_path)
    assert np.array_equal(images(staged), images(subset))
    release(staged.dataset.folder)


def test_a_cut_off_copy_goes_on(folder: Path, tmp_path: Path) -> None:
    subset = open_dataset(folder, tier="raw").subset(15)
    staged = stage_subset(subset, tmp_path)
    whole, cut, missing = sorted(staged.dataset.folder.glob("*.tar"))
    os.truncate(cut, 100)
    missing.unlink()
    stamp = whole.stat().st_mtime_ns
    again = stage_subset(subset, tmp_path)
    assert np.array_equal(images(again), images(subset))
    assert whole.stat().st_mtime_ns == stamp
    release(again.dataset.folder)


def staged_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "swap"])
def test_copies_that_differ_from_what_was_packed_are_made_again(folder: Path, tmp_path: Path, damage: str) -> None:
    subset = open_dataset(folder, tier="raw").subset(15)
    staged = stage_subset(subset, tmp_path)
    names = [path.name for path in staged_files(staged.dataset.folder)]
    assert names == ["manifest.json", "train-000000.tar", "train-000001.tar", "train-000002.tar", "train.index.npy"]
    for name in names:
        path = staged.dataset.folder / name
        content = bytearray(path.read_bytes())
        content[512 + 60 if name.endswith(".tar") else len(content) // 3] ^= 4  # in a sample of the tars
        other = staged.dataset.folder / names[names.index(name) - 1]
        path.write_bytes({"bit": bytes(content), "cut": content[:-9], "empty": b"", "swap": other.read_bytes()}[damage])
        again = stage_subset(subset, tmp_path)
        assert path.read_bytes() == (folder / name).read_bytes()
        assert np.array_equal(images(again), images(subset))


def test_copies_are_read_back_once_and_that_is_recorded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(stage, "checksum", lambda data: calls.append(len(data)) or checksum(data))
    subset = open_dataset(folder, tier="raw").subset(15)
    staged = stage_subset(subset, tmp_path)
    assert len(calls) == 21  # every sample of the three shards
    stage_subset(subset, tmp_path)
    assert len(calls) == 21
    os.utime(staged.dataset.folder / "train-000001.tar")
    stage_subset(subset, tmp_path)
    assert len(calls) == 28
    release(staged.dataset.folder)


def test_a_sample_that_is_bad_at_its_source_is_staged_as_it_is(own_folder: Path, tmp_path: Path) -> None:
    """The loader replaces and counts it, staged or not."""
    dataset = open_dataset(own_folder, tier="raw")
    record = dataset.index[6]
    path = own_folder / dataset.split.shards[int(record["shard"])].name
    content = bytearray(path.read_bytes())
    content[int(record["offset"]) + 40] ^= 1
    path.write_bytes(content)
    staged = stage_subset(open_dataset(own_folder, tier="raw").subset(15), tmp_path)
    assert staged.dataset.reader.fetch(np.arange(15))[1] == [6]
    release(staged.dataset.folder)


def test_a_disk_that_returns_other_bytes_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lying(reader, writer, length) -> None:
        data = bytearray(reader.read())
        data[len(data) // 2] ^= 1
        writer.write(data)

    monkeypatch.setattr(shutil, "copyfileobj", lying)
    with pytest.raises(DataError, match=r"manifest.json: the copy is not what was packed; look at this node's disk"):
        stage_subset(open_dataset(folder, tier="raw").subset(5), tmp_path)


def test_a_name_cannot_lead_out_of_the_staging_folder(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(folder, tier="raw")
    hostile = replace(dataset, manifest=dataset.manifest.model_copy(update={"name": "../../x"}))
    with pytest.raises(DataError, match="the copy is not what was packed"):  # nor is it the manifest of the folder
        stage_subset(hostile.subset(5), tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_folders_in_use_are_kept_and_others_removed(folder: Path, tmp_path: Path) -> None:
    staged = stage_subset(open_dataset(folder, tier="raw").subset(5), tmp_path)
    assert remove_unused(tmp_path) == []
    release(staged.dataset.folder)
    assert remove_unused(tmp_path) == [staged.dataset.folder]
    assert not staged.dataset.folder.exists()
    assert remove_unused(tmp_path) == []


def test_a_folder_that_comes_while_the_old_one_goes_is_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subset = open_dataset(folder, tier="raw").subset(15)
    release(stage_subset(subset, tmp_path).dataset.folder)
    remove = shutil.rmtree

    def remove_while_another_job_starts(path: Path, **options: bool) -> None:
        staged = stage_subset(subset, tmp_path)
        remove(path, **options)
        assert np.array_equal(images(staged), images(subset))
        release(staged.dataset.folder)

    monkeypatch.setattr(shutil, "rmtree", remove_while_another_job_starts)
    remove_unused(tmp_path)
    monkeypatch.undo()
    # What a remover that was killed left behind goes with the next.
    (tmp_path / ".arrays-0123.removed").mkdir()
    assert len(remove_unused(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


def _stage(folder: Path, staging: Path) -> int:
    return int(images(stage_subset(open_dataset(folder, tier="raw").subset(40), staging)).sum())


def test_jobs_may_race(folder: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        sums = pool.starmap(_stage, [(folder, tmp_path)] * 4)
    assert set(sums) == {int(images(open_dataset(folder, tier="raw").subset(40)).sum())}
    # The processes have ended, so nobody holds the folder any more.
    assert len(remove_unused(tmp_path)) == 1


def test_a_full_disk_frees_unused_folders_first(
    folder: Path, make_folder_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = stage_subset(open_dataset(make_folder_of((3, 3)), tier="raw").subset(), tmp_path)
    release(old.dataset.folder)
    copy = shutil.copyfileobj

    def copy_while_there_is_room(reader, writer, length) -> None:
        if old.dataset.folder.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(reader, writer, length)

    monkeypatch.setattr(shutil, "copyfileobj", copy_while_there_is_room)
    staged = stage_subset(open_dataset(folder, tier="raw").subset(5), tmp_path)
    assert len(images(staged)) == 5
    release(staged.dataset.folder)


def test_a_full_disk_is_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(FileError, match="the disk is full"):
        stage_subset(open_dataset(folder, tier="raw").subset(5), tmp_path)


def test_a_damaged_shard_is_not_staged(own_folder: Path, tmp_path: Path) -> None:
    os.truncate(own_folder / "train-000000.tar", 1024)
    with pytest.raises(DataError, match=r"train-000000.tar: shard has 1,024 bytes, expected"):
        stage_subset(open_dataset(own_folder, tier="raw").subset(5), tmp_path)
