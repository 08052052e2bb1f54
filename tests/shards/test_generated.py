"""The sources that need no files: scikit-learn's digits and fractals."""

import numpy as np

from dbscale.shards.generated import Fractals
from tests.shards.conftest import make_source


def test_digits() -> None:
    source = make_source("digits", image_size=16)
    listings = source.listings()
    assert [len(part.labels) for part in listings.values()] == [1200, 597]
    assert not set(listings["train"].names) & set(listings["test"].names)
    counts = np.bincount(listings["test"].labels)
    assert counts.max() - counts.min() <= 1
    (image,) = source.read("train", np.array([0]), [""])
    assert isinstance(image, np.ndarray) and image.shape == (16, 16, 3) and image.max() > 200


def test_fractals_never_drift() -> None:
    """Cell ids hold the fingerprint of these pixels: the same on every machine, however they are batched."""
    import hashlib

    source = Fractals(families=3, num_train=30, num_test=6)
    images = list(source.read("train", np.arange(30), []))
    assert hashlib.sha256(np.stack(images).tobytes()).hexdigest()[:12] == "5d914576f153"
    shuffled = np.random.default_rng(0).permutation(30)
    for number, image in zip(shuffled.tolist(), source.read("train", shuffled, []), strict=True):
        assert np.array_equal(image, images[number])


def test_fractal_families_do_not_depend_on_their_neighbours() -> None:
    many, few = (
        Fractals(families=5, num_train=50, num_test=5),
        Fractals(families=2, first_family=3, num_train=20, num_test=2),
    )
    assert few.classes == many.classes[3:]
    assert np.array_equal(many.systems[3:], few.systems)
    longer = Fractals(families=5, num_train=500, num_test=5)
    for split in ("train", "test"):
        a, b = (next(iter(source.read(split, np.array([3]), []))) for source in (many, longer))
        assert np.array_equal(a, b)
    train, test = (next(iter(many.read(split, np.array([3]), []))) for split in ("train", "test"))
    assert not np.array_equal(train, test)


def test_fractal_options() -> None:
    grey = next(iter(Fractals(families=2, num_train=4, num_test=2, tinted=False).read("train", np.array([0]), [])))
    assert (grey[..., 0] == grey[..., 1]).all() and grey.min() == 0 and grey.max() == 255
