"""Batches are bitwise the same for all workers, ranks and resumes; evaluation counts each sample once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbscale.data import Batch, DataError, Subset, make_eval_loader, make_loader, make_transform, open_dataset

AUGMENT = {"crop_padding": 1, "hflip": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5}


@pytest.fixture(scope="session")
def subset(folder: Path) -> Subset:
    return open_dataset(folder).subset(41)


@pytest.fixture(scope="session")
def transform():
    return make_transform(image_size=8, train=True, augment=AUGMENT, seed=3)


def global_batches(subset: Subset, transform, count: int, consumed: int = 0, **options) -> list[list[torch.Tensor]]:
    """Batches first…count of the stream, the ranks' slices put together."""
    world_size = options.pop("world_size", 1)
    loaders = [
        make_loader(
            subset,
            global_batch=12,
            rank=rank,
            world_size=world_size,
            seed=5,
            consumed=consumed,
            transform=transform,
            **options,
        )
        for rank in range(world_size)
    ]
    batches = [[next(loader) for loader in loaders] for _ in range(count)]
    assert {loader.consumed for loader in loaders} == {consumed + 12 * count}
    for loader in loaders:
        loader.close()
    return [[torch.cat(parts) for parts in zip(*(rank[:5] for rank in ranks), strict=True)] for ranks in batches]


def assert_equal(left: list[list[torch.Tensor]], right: list[list[torch.Tensor]]) -> None:
    assert len(left) == len(right)
    for ours, theirs in zip(left, right, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="session")
def reference(subset: Subset, transform) -> list[list[torch.Tensor]]:
    """Nine batches of 12 out of 41 samples: the stream crosses two epoch ends inside a batch."""
    return global_batches(subset, transform, 9)


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_change_nothing(subset: Subset, transform, reference, num_workers: int) -> None:
    assert_equal(global_batches(subset, transform, 9, num_workers=num_workers), reference)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_world_size_changes_nothing(subset: Subset, transform, reference, world_size: int) -> None:
    assert_equal(global_batches(subset, transform, 9, world_size=world_size), reference)


def test_workers_and_ranks_together_change_nothing(subset: Subset, transform, reference) -> None:
    assert_equal(global_batches(subset, transform, 9, world_size=2, num_workers=2), reference)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 6, 12])), min_size=1, max_size=5),
)
def test_any_number_of_resumes_at_any_world_size(subset: Subset, transform, parts: list[tuple[int, int]]) -> None:
    resumed: list[list[torch.Tensor]] = []
    for count, world_size in parts:
        resumed += global_batches(subset, transform, count, 12 * len(resumed), world_size=world_size)
    assert_equal(resumed, global_batches(subset, transform, len(resumed)))


def test_a_resume_far_into_the_stream(subset: Subset, transform) -> None:
    late = global_batches(subset, transform, 1, consumed=12 * 10**6)
    assert_equal(late, global_batches(subset, transform, 1, consumed=12 * 10**6, world_size=3))


@pytest.mark.parametrize("options", [{"block_size": 5}, {"repeats": 3}])
def test_block_shuffle_and_repeats_are_elastic_too(subset: Subset, transform, options: dict[str, int]) -> None:
    whole = global_batches(subset, transform, 8, **options)
    assert_equal(global_batches(subset, transform, 8, world_size=4, **options), whole)
    assert_equal(global_batches(subset, transform, 3, consumed=60, **options), whole[5:])


def test_repeats_are_augmented_each_on_its_own(subset: Subset, transform) -> None:
    images, _, ids, epochs, _ = global_batches(subset, transform, 1, repeats=3)[0]
    assert len(set(zip(ids.tolist(), epochs.tolist(), strict=True))) == 12
    assert len(set(ids.tolist())) == 4
    same = [torch.equal(images[i], images[j]) for i in range(12) for j in range(i) if ids[i] == ids[j]]
    assert sum(same) < len(same) / 2


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 53), batch=st.integers(1, 30))
def test_an_epoch_shows_every_sample_once(folder: Path, n: int, batch: int) -> None:
    subset = open_dataset(folder).subset(n)
    loader = make_loader(subset, global_batch=batch, seed=0)
    ids = torch.cat([next(loader).sample_ids for _ in range(-(-n // batch))])[:n]
    assert sorted(ids.tolist()) == sorted(subset.indices.tolist())


def test_labels_and_pixels_belong_to_the_sample(subset: Subset) -> None:
    batch = next(make_loader(subset, global_batch=12, seed=5))
    dataset = subset.dataset
    assert torch.equal(batch.labels, torch.from_numpy(dataset.labels_of(batch.sample_ids.numpy())))
    for image, number in zip(batch.images, batch.sample_ids.tolist(), strict=True):
        key = bytes(dataset.index["key"][number]).decode()
        original = int(key.rsplit("_", 1)[-1].rsplit("-", 1)[-1])
        pixels = np.random.default_rng([original, False]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        assert np.array_equal(np.asarray(image).transpose(1, 2, 0), pixels)


def test_transforming_on_the_device_is_the_same(subset: Subset, transform, reference) -> None:
    batch = next(make_loader(subset, global_batch=12, seed=5))
    images = transform(batch.images, epoch=batch.epoch, sample_ids=batch.sample_ids)
    assert torch.equal(images, reference[0][0])


def test_the_callers_random_state_is_left_alone(subset: Subset, transform) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    loader = make_loader(subset, global_batch=12, seed=5, transform=transform, num_workers=2)
    next(loader)
    loader.close()
    assert torch.equal(torch.rand(1), expected[0])
    assert np.random.rand() == expected[1]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 53), batch_size=st.integers(1, 20), world_size=st.integers(1, 5))
def test_evaluation_counts_every_sample_once(folder: Path, n: int, batch_size: int, world_size: int) -> None:
    subset = open_dataset(folder, "test").subset(n)
    loaders = [
        make_eval_loader(subset, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    batches: list[list[Batch]] = [list(loader) for loader in loaders]
    assert {len(part) for part in batches} == {len(loaders[0])}
    seen = np.zeros(n)
    for batch in (batch for part in batches for batch in part):
        assert len(batch.labels) == batch_size
        np.add.at(seen, batch.sample_ids.numpy(), batch.weights.numpy())
        assert np.array_equal(batch.labels.numpy(), subset.labels[batch.sample_ids.numpy()])
    assert (seen == 1).all()


def test_evaluation_with_workers_is_the_same(folder: Path) -> None:
    subset = open_dataset(folder, "test").subset()
    plain, workers = (list(make_eval_loader(subset, batch_size=9, num_workers=n)) for n in (0, 2))
    for ours, theirs in zip(plain, workers, strict=True):
        assert ours.targets is None and theirs.targets is None
        assert all(torch.equal(a, b) for a, b in zip(ours[:-1], theirs[:-1], strict=True))  # type: ignore[arg-type]


def test_requests_that_cannot_be_honoured(subset: Subset) -> None:
    with pytest.raises(DataError, match="world size 5 does not divide the global batch 12; valid: 1, 2, 3, 4, 6, 12"):
        make_loader(subset, global_batch=12, seed=0, world_size=5)
    with pytest.raises(DataError, match="rank 2 is not in 0…1"):
        make_loader(subset, global_batch=12, seed=0, rank=2, world_size=2)
    with pytest.raises(DataError, match="consumed 18 is not a multiple of the global batch 12"):
        make_loader(subset, global_batch=12, seed=0, consumed=18)


def test_batches_smaller_than_the_subset_and_larger(make_folder_of: Callable[..., Path]) -> None:
    """A global batch larger than the subset holds several epochs."""
    subset = open_dataset(make_folder_of((2, 2))).subset(3)
    batch = next(make_loader(subset, global_batch=8, seed=1))
    assert batch.epoch.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "has seed 5, this run has 6"),
        ({"global_batch": 24}, "has global batch 12, this run has 24"),
        ({"repeats": 2}, "has repeats 1, this run has 2"),
    ],
)
def test_a_foreign_state_is_refused_with_both_values(subset: Subset, change: dict[str, int], message: str) -> None:
    saved = make_loader(subset, global_batch=12, seed=5).identity
    options: dict[str, Any] = {"global_batch": 12, "seed": 5, **change}
    with pytest.raises(DataError, match=message):
        make_loader(subset, **options).refuse_foreign(saved)
    make_loader(subset, global_batch=12, seed=5, world_size=4, num_workers=0, consumed=24).refuse_foreign(saved)


def test_another_subset_is_refused(subset: Subset) -> None:
    saved = make_loader(subset, global_batch=12, seed=5).identity
    with pytest.raises(DataError, match="the saved state has subset fingerprint"):
        make_loader(subset.dataset.subset(40), global_batch=12, seed=5).refuse_foreign(saved)
