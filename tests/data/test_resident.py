"""The decoded cache: shared, rebuilt when damaged, never in the way."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from dbscale.data import open_dataset
from dbscale.data.dataset import _opened


def pixels(folder: Path, cache_dir: Path | None = None) -> np.ndarray:
    dataset = open_dataset(folder, cache_dir=cache_dir)
    return np.asarray(dataset.reader.fetch(np.arange(53))[0])


@pytest.fixture
def expected(folder: Path) -> np.ndarray:
    return np.asarray(open_dataset(folder, tier="raw").reader.fetch(np.arange(53))[0])


def test_the_cache_is_kept_and_read_again(folder: Path, tmp_path: Path, expected: np.ndarray) -> None:
    assert np.array_equal(pixels(folder, tmp_path), expected)
    (array,) = tmp_path.glob("*.npy")
    stamp = array.stat().st_mtime_ns
    _opened.cache_clear()
    assert np.array_equal(pixels(folder, tmp_path), expected)
    assert array.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("damage", ["cut", "flip", "no note", "bad note"])
def test_a_damaged_cache_is_rebuilt(folder: Path, tmp_path: Path, expected: np.ndarray, damage: str) -> None:
    pixels(folder, tmp_path)
    (array,) = tmp_path.glob("*.npy")
    note = array.with_suffix(".json")
    if damage == "cut":
        os.truncate(array, array.stat().st_size // 2)
    elif damage == "flip":
        content = bytearray(array.read_bytes())
        content[-5] ^= 1
        array.write_bytes(content)
    elif damage == "no note":
        note.unlink()
    else:
        note.write_text("{}")
    _opened.cache_clear()
    assert np.array_equal(pixels(folder, tmp_path), expected)
    _opened.cache_clear()
    assert np.array_equal(np.load(array), expected)


def test_a_cache_of_damaged_shards_is_rebuilt_when_they_are_mended(own_folder: Path) -> None:
    dataset = open_dataset(own_folder)
    tar = own_folder / dataset.split.shards[0].name
    whole = tar.read_bytes()
    middle = int(dataset.index["offset"][2]) + 40
    tar.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert dataset.reader.fetch(np.arange(7))[1] == [2]
    _opened.cache_clear()
    assert open_dataset(own_folder).reader.fetch(np.arange(7))[1] == [2]
    tar.write_bytes(whole)
    images, bad = open_dataset(own_folder).reader.fetch(np.arange(7))
    assert bad == []
    assert np.array_equal(images, open_dataset(own_folder, tier="raw").reader.fetch(np.arange(7))[0])


def test_without_a_place_to_write_the_array_stays_in_memory(folder: Path, tmp_path: Path, expected: np.ndarray) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert np.array_equal(pixels(folder, blocked), expected)


def _sum_of(folder: Path, cache_dir: Path) -> int:
    return int(pixels(folder, cache_dir).sum())


def test_processes_may_race(folder: Path, tmp_path: Path, expected: np.ndarray) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        sums = pool.starmap(_sum_of, [(folder, tmp_path)] * 4)
    assert sums == [int(expected.sum())] * 4
    assert len(list(tmp_path.iterdir())) == 2
