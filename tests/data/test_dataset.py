"""Subsets are balanced, nested windows; sizes that do not fit are refused with the one that does."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbscale.data import DataError, load_manifest, open_dataset
from shards.source import stratified_order


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


def test_a_damaged_manifest_is_named(own_folder: Path) -> None:
    path = own_folder / "manifest.json"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(DataError, match="damaged or foreign manifest"):
        open_dataset(own_folder)
    path.write_text('{"name": "x"}')
    with pytest.raises(DataError, match="damaged or foreign manifest"):
        open_dataset(own_folder)
