"""Subsets are balanced, nested windows; the decoded cache is shared, rebuilt when damaged, never in the way."""

import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbscale.data import DataError, load_manifest, open_dataset
from dbscale.data.dataset import _opened, window_start
from dbscale.data.manifest import SplitInfo, save_manifest
from dbscale.shards.source import stratified_order


@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=7), seed=st.integers(0, 5), data=st.data())
def test_every_prefix_is_balanced_while_classes_last(counts: list[int], seed: int, data: st.DataObject) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    stored = stratified_order(labels, seed, "train")
    assert sorted(stored.tolist()) == list(range(len(labels)))
    limit = min(counts) * len(counts)
    size = data.draw(st.integers(1, limit))
    held = np.bincount(labels[stored[:size]], minlength=len(counts))
    assert held.max() - held.min() <= 1


def test_balance_is_told_and_true(folder: Path) -> None:
    dataset = open_dataset(folder)
    assert dataset.split.balanced_up_to == 40
    assert dataset.split.class_counts == (20, 11, 12, 10)
    assert np.bincount(dataset.subset(40).labels).tolist() == [10, 10, 10, 10]


@pytest.mark.parametrize("subset_seed", [0, 1, 2, 7])
def test_subsets_nest_and_windows_stay_balanced(folder: Path, subset_seed: int) -> None:
    dataset = open_dataset(folder)
    previous: set[int] = set()
    for size in range(1, 54):
        subset = dataset.subset(size, subset_seed)
        samples = set(subset.indices.tolist())
        assert len(samples) == size == len(subset)
        assert previous <= samples
        previous = samples
        if size <= 40:
            held = np.bincount(subset.labels, minlength=4)
            assert held.max() - held.min() <= 1


def test_subset_seeds_take_different_windows(folder: Path) -> None:
    dataset = open_dataset(folder)
    windows = {tuple(dataset.subset(8, seed).indices.tolist()) for seed in range(12)}
    assert tuple(range(8)) in windows
    assert len(windows) > 4


def test_two_rounds_are_two_windows() -> None:
    split = SplitInfo(num_samples=9, class_counts=(3, 2, 4), balanced_up_to=6, fingerprint="", index="i", index_checksum="",
                      shards=())  # fmt: skip
    assert {window_start(split, seed) for seed in range(1, 20)} == {0, 3} and window_start(split, 0) == 0
    assert {window_start(split.model_copy(update={"balanced_up_to": 5}), seed) for seed in range(20)} == {0}


def test_fingerprints_name_the_exact_samples(folder: Path) -> None:
    dataset = open_dataset(folder)
    assert dataset.subset(53).fingerprint == dataset.subset().fingerprint == dataset.subset(None, 3).fingerprint
    prints = {dataset.subset(size, seed).fingerprint for size in (8, 12) for seed in (0, 1, 2)}
    assert len(prints) == len({(len(s), s.start) for s in (dataset.subset(n, k) for n in (8, 12) for k in (0, 1, 2))})
    assert dataset.subset(8).fingerprint != open_dataset(folder, "test").subset(8).fingerprint


@pytest.mark.parametrize("size", [0, -1, 54, 10**6])
def test_a_size_that_does_not_fit_names_the_largest(folder: Path, size: int) -> None:
    with pytest.raises(DataError, match=r"the split holds 53 \(the largest that fits\), class-balanced up to 40"):
        open_dataset(folder).subset(size)


def test_squares_of_several_sizes_have_no_size_of_their_own(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "mixed")
    manifest = load_manifest(folder)
    image = manifest.image.model_copy(update={"square": True, "min_side": 8, "max_side": 32})
    save_manifest(tmp_path / "mixed", manifest.model_copy(update={"image": image}))
    with pytest.raises(DataError, match="images of 8 to 32 px; the resident tier needs one size"):
        open_dataset(tmp_path / "mixed", tier="resident")


def test_what_goes_to_another_process_is_small_and_maps_the_index_again(folder: Path) -> None:
    subset = open_dataset(folder, tier="raw").subset(20, 1)
    expected = subset.labels, subset.dataset.reader.fetch(subset.indices)[0]
    assert len(pickle.dumps(subset)) < 4000  # neither index, labels nor pixels
    copy = pickle.loads(pickle.dumps(subset))
    assert isinstance(copy.dataset.index, np.memmap)
    assert copy.fingerprint == subset.fingerprint
    assert np.array_equal(copy.labels, expected[0])
    assert np.array_equal(copy.dataset.reader.fetch(copy.indices)[0], expected[1])


def test_errors_name_what_there_is(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no split 'val'; it has: train, test"):
        open_dataset(folder, "val")
    with pytest.raises(DataError, match="decode tier 'gpu' is unknown; known: resident, raw"):
        open_dataset(folder, tier="gpu")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="encoding 'raw', which the decode tier 'jpeg256' cannot read"):
        open_dataset(folder, tier="jpeg256")
    with pytest.raises(DataError, match="the folder does not exist"):
        load_manifest(tmp_path / "absent")


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


@pytest.mark.parametrize("damage", ["cut", "flip", "no note", "bad note", "a list", "foreign", "bad positions"])
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
    elif damage == "foreign":  # another split's, whole in itself
        open_dataset(folder, "test", cache_dir=tmp_path / "other").reader.fetch(np.arange(3))
        for file in (tmp_path / "other").iterdir():
            shutil.copy(file, array.with_suffix(file.suffix))
    elif damage == "bad positions":
        note.write_text(json.dumps({**json.loads(note.read_text()), "bad": [53]}))
    else:
        note.write_text("[]" if damage == "a list" else "{}")
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
