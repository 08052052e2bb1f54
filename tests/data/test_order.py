"""The order is a pure function, a permutation every epoch, and the same however it is cut into ranks."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbscale.data import DataError
from dbscale.data.order import Stream, order, valid_world_sizes

SIZES = st.integers(1, 300)


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6), n=SIZES, block=st.none() | st.integers(1, 50))
def test_order_is_a_permutation(seed: int, epoch: int, n: int, block: int | None) -> None:
    assert sorted(order(seed, epoch, n, block).tolist()) == list(range(n))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first = order(1, 0, 500).copy()
    assert not np.array_equal(first, order(2, 0, 500))
    assert not np.array_equal(first, order(1, 1, 500))
    order.cache_clear()
    assert np.array_equal(first, order(1, 0, 500))


@pytest.mark.parametrize("wrong", ["num_samples", "global_batch", "repeats"])
def test_a_stream_of_nothing_is_refused(wrong: str) -> None:
    with pytest.raises(DataError, match=f"{wrong} 0.*must all be at least 1"):
        Stream(**{"num_samples": 9, "seed": 0, "global_batch": 3, "repeats": 1, wrong: 0})


def test_order_never_drifts() -> None:
    """Results of old runs stay comparable: these permutations may not change with any library's release."""
    digests = [hashlib.sha256(order(3, 5, 1000, block).tobytes()).hexdigest()[:12] for block in (None, 64)]
    assert digests == ["64a4df22f05e", "a2a8c42439b7"]


@given(n=st.integers(2, 300), block=st.integers(1, 60), epoch=st.integers(0, 20))
def test_block_shuffle_reads_runs_of_neighbours(n: int, block: int, epoch: int) -> None:
    """Cut where the run changes, every piece is a contiguous range no longer than the block."""
    positions = order(0, epoch, n, block)
    start = 0
    while start < n:
        length = next(
            size for size in range(min(block, n - start), 0, -1) if np.ptp(positions[start : start + size]) == size - 1
        )
        start += length
        assert length <= block
    # At most one short block at either end, so no more pieces than that.
    changes = np.abs(np.diff(positions)) >= block
    assert changes.sum() <= n // block + 1


def test_orders_are_spread_evenly() -> None:
    """Each sample is about equally often in each place (chi-square, 5 sigma)."""
    n, epochs = 12, 1200
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), order(9, epoch, n)] += 1
    expected = epochs / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


@given(n=SIZES, local=st.integers(1, 6), worlds=st.sampled_from([1, 2, 3, 4, 6]), number=st.integers(0, 100))
def test_ranks_share_a_batch_that_does_not_depend_on_them(n: int, local: int, worlds: int, number: int) -> None:
    stream = Stream(n, seed=5, global_batch=local * worlds)
    whole = stream.batch(number)
    parts = [stream.batch(number, rank, worlds) for rank in range(worlds)]
    for field in (0, 1):
        assert np.array_equal(whole[field], np.concatenate([part[field] for part in parts]))


@given(n=SIZES, batch=st.integers(1, 64))
def test_every_sample_once_per_epoch(n: int, batch: int) -> None:
    stream = Stream(n, seed=1, global_batch=batch)
    batches = [stream.batch(number) for number in range(-(-2 * n // batch))]
    positions = np.concatenate([positions for positions, _ in batches])[: 2 * n]
    epochs = np.concatenate([epochs for _, epochs in batches])[: 2 * n]
    assert epochs.tolist() == [0] * n + [1] * n
    for epoch in (0, 1):
        assert sorted(positions[epochs == epoch].tolist()) == list(range(n))


@given(n=SIZES, distinct=st.integers(2, 16), repeats=st.integers(1, 4))
def test_repeats_show_each_sample_in_one_batch_under_different_keys(n: int, distinct: int, repeats: int) -> None:
    stream = Stream(n, seed=1, global_batch=distinct * repeats, repeats=repeats)
    batches = [stream.batch(number) for number in range(-(-n // distinct))]
    keys = [pair for positions, epochs in batches for pair in zip(positions.tolist(), epochs.tolist(), strict=True)]
    assert len(set(keys)) == len(keys)
    for position in range(n):
        assert {epoch for where, epoch in keys if where == position and epoch < repeats} == set(range(repeats))


def test_repeats_need_not_divide_the_batch() -> None:
    """DeiT's three copies in batches of 1,024: only copies of the last samples of a batch are missing, no sample is."""
    stream = Stream(5000, seed=0, global_batch=1024, repeats=3)
    seen = []
    for number in range(4):
        positions, epochs = stream.batch(number)
        pairs = sorted(zip(positions.tolist(), epochs.tolist(), strict=True))
        assert len(set(pairs)) == 1024
        copies = np.unique(positions, return_counts=True)[1]
        assert len(copies) == 342 and sorted(copies.tolist())[:3] == [2, 2, 3]
        slices = [stream.batch(number, rank, 8) for rank in range(8)]
        assert np.array_equal(np.concatenate([each for each, _ in slices]), positions)
        seen.append(np.unique(positions))
    assert len(np.unique(np.concatenate(seen))) == 4 * 342


def test_more_repeats_than_samples_of_a_batch_are_refused() -> None:
    with pytest.raises(DataError, match="repeats 5 must be at most global_batch 4"):
        Stream(100, seed=0, global_batch=4, repeats=5)


def test_valid_world_sizes() -> None:
    assert valid_world_sizes(12) == [1, 2, 3, 4, 6, 12]
