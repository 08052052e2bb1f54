"""Sources `digits` and `fractals`: labelled images that need no files, the same on every machine.

`digits` are scikit-learn's 1,797 real handwritten digits (8 × 8), enlarged. `fractals` are any number of images from
formulas, after FractalDB (Kataoka et al. 2020): a family (class) is a random iterated function system; its samples are
the attractors of jittered copies, mirrored, turned and tinted. Everything is keyed by (seed, family, sample) and uses
only operations that IEEE 754 rounds exactly, so a sample is the same in any batch, however the work is split.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator

from dbscale.data.manifest import Encoding
from dbscale.keyed import keyed_uniform
from dbscale.shards.source import Listing, Size, Source, stratified_order

NUM_MAPS = 4
"""Affine maps per system; FractalDB draws 2 to 8."""
_CHAINS, _BURN_IN, _STEPS = 64, 12, 56
_MIN_FILL, _MAX_FILL = 0.15, 0.7
_MAX_STRETCH = 0.95
_CANDIDATES = 8
_RENDER_BATCH = 256
FIRST_TEST_SAMPLE = 1 << 31
"""Numbers of test samples start here, so that the test split does not depend on the size of the training split."""


class Digits(Source):
    """A stratified split of the digits: the first `num_test` of the stratified order are the test split."""

    image_size: Size = 32
    """Side in px."""
    num_test: Annotated[int, Field(ge=10, le=1787)] = 597
    seed: int = 0
    """Seed of the split."""
    default_encoding: ClassVar[Encoding] = "raw"

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple("0123456789")

    @cached_property
    def _data(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        from sklearn.datasets import load_digits  # takes a second to import, and only this source needs it

        loaded: Any = load_digits(return_X_y=True)
        pixels, labels = loaded
        return pixels.reshape(-1, 8, 8), labels.astype(np.int64)

    @cached_property
    def _parts(self) -> dict[str, NDArray[np.int64]]:
        stored = stratified_order(self._data[1], self.seed, "digits")
        return {"train": stored[self.num_test :], "test": stored[: self.num_test]}

    def listings(self) -> dict[str, Listing]:
        labels = self._data[1]
        return {
            split: Listing(labels[part], [f"digit-{number:04d}" for number in part.tolist()])
            for split, part in self._parts.items()
        }

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[NDArray[np.uint8]]:
        for image in self._data[0][self._parts[split][numbers]]:
            grey = Image.fromarray((image * (255 / 16)).astype(np.uint8))
            pixels = np.asarray(grey.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC))
            yield np.repeat(pixels[..., None], 3, axis=2)


class Families(Source):
    """Families of fractals; sources that share `seed` and whose family ranges do not overlap are disjoint."""

    families: int
    seed: int = 0
    first_family: Annotated[int, Field(ge=0)] = 0
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Relative change of each coefficient from one fractal to the next, at most."""
    default_encoding: ClassVar[Encoding] = "raw"

    @property
    def family_names(self) -> tuple[str, ...]:
        return tuple(f"family-{self.first_family + k:05d}" for k in range(self.families))

    @cached_property
    def systems(self) -> NDArray[np.float32]:
        """[families, NUM_MAPS, 7]: a, b, c, d, e, f and cumulative probability of each map."""
        return np.stack([find_system(self.seed, self.first_family + k) for k in range(self.families)])

    def jittered(self, family_B: NDArray[np.int64], draws: NDArray[np.float64]) -> NDArray[np.float32]:
        """[b, NUM_MAPS, 7]: systems of these families, changed by the first draws of each row."""
        systems = self.systems[family_B].copy()
        factors = 1 + self.jitter * (2 * draws[:, : 6 * NUM_MAPS] - 1)
        systems[:, :, :6] *= factors.reshape(-1, NUM_MAPS, 6).astype(np.float32)
        limit_stretch(systems)
        return systems


class Fractals(Families):
    """`families` classes."""

    families: Annotated[int, Field(ge=2)] = 64
    num_train: Size = 16384
    num_test: Size = 1024
    image_size: Annotated[int, Field(ge=8)] = 32
    """Side in px."""
    turned: bool = True
    """Mirror and turn samples by quarters."""
    tinted: bool = True
    """Draw a colour and a dark ground for each sample; False draws white on black."""

    @model_validator(mode="after")
    def _every_family_has_a_sample(self) -> Self:
        for name in ("num_train", "num_test"):
            if getattr(self, name) < self.families:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least {self.families}, one a family")
        return self

    @property
    def classes(self) -> tuple[str, ...]:
        return self.family_names

    def listings(self) -> dict[str, Listing]:
        return {"train": self._listing(self.num_train), "test": self._listing(self.num_test)}

    def _listing(self, num_samples: int) -> Listing:
        labels = np.arange(num_samples, dtype=np.int64) % self.families
        ranks = np.arange(num_samples) // self.families
        names = [f"f{self.first_family + f:05d}-{r:06d}" for f, r in zip(labels.tolist(), ranks.tolist(), strict=True)]
        return Listing(labels, names)

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[NDArray[np.uint8]]:
        shift = FIRST_TEST_SAMPLE if split == "test" else 0
        for start in range(0, len(numbers), _RENDER_BATCH):
            part = numbers[start : start + _RENDER_BATCH]
            yield from self._render(part % self.families, part // self.families + shift)

    def _render(self, family_B: NDArray[np.int64], sample_B: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images of these samples of their families, uint8 [b, S, S, 3]."""
        draws = keyed_uniform(
            self.seed, "fractal sample", family_B + self.first_family, sample_B, num_draws=6 * NUM_MAPS + 7
        )
        tone = density(self.jittered(family_B, draws), self.image_size)
        turn = (draws[:, -7] * (8 if self.turned else 1)).astype(np.int64)
        for slot, kind in enumerate(turn.tolist()):
            turned = np.rot90(tone[slot], kind % 4)
            tone[slot] = turned[:, ::-1] if kind >= 4 else turned
        return tint(tone, draws[:, -6:]) if self.tinted else tint(tone, np.tile([0, 0, 0, 1, 1, 1], (len(tone), 1)))


def find_system(seed: int, family: int) -> NDArray[np.float32]:
    """[NUM_MAPS, 7], the first candidate of the family whose attractor neither collapses nor fills the square."""
    for attempt in range(0, 4096, _CANDIDATES):
        draws = keyed_uniform(
            seed, "fractal family", family, np.arange(attempt, attempt + _CANDIDATES), num_draws=6 * NUM_MAPS
        )
        systems = np.zeros((_CANDIDATES, NUM_MAPS, 7), np.float32)
        systems[:, :, :6] = (2 * draws - 1).reshape(_CANDIDATES, NUM_MAPS, 6)
        limit_stretch(systems)
        determinant = np.abs(systems[..., 0] * systems[..., 3] - systems[..., 1] * systems[..., 2]) + np.float32(0.01)
        systems[..., 6] = np.cumsum(determinant, axis=1) / determinant.sum(axis=1, keepdims=True)
        fill = (density(systems, 32) > 0).mean(axis=(1, 2))
        good = np.flatnonzero((fill >= _MIN_FILL) & (fill <= _MAX_FILL))
        if len(good):
            return systems[good[0]]
    raise AssertionError(f"no usable system for family {family}")  # one in three candidates is usable


def limit_stretch(systems: NDArray[np.float32]) -> None:
    """Shrink maps that stretch by more than 0.95, in place, so that every system has an attractor."""
    a, b, c, d = (systems[..., k] for k in range(4))
    half_square = (a * a + b * b + c * c + d * d) / 2
    determinant = a * d - b * c
    # Largest singular value of a 2 × 2 matrix in closed form.
    stretch = np.sqrt(half_square + np.sqrt(np.maximum(half_square * half_square - determinant * determinant, 0)))
    systems[..., :4] *= np.minimum(np.float32(_MAX_STRETCH) / np.maximum(stretch, np.float32(1e-6)), 1)[..., None]


def density(systems_BM7: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """[b, size, size] in 0…1: root of the share of chaos-game points in each pixel, the fullest pixel being 1."""
    b = len(systems_BM7)
    # All systems share one sequence of draws: the game only has to visit the attractor evenly.
    uniform = keyed_uniform(0, "chaos game", num_draws=_CHAINS * (_BURN_IN + _STEPS))[0].astype(np.float32)
    rows = np.arange(b)[:, None] * NUM_MAPS
    thresholds = [systems_BM7[:, k, 6, None] for k in range(NUM_MAPS - 1)]
    maps = systems_BM7.reshape(-1, 7)
    x = np.zeros((b, _CHAINS), np.float32)
    y = np.zeros((b, _CHAINS), np.float32)
    points = np.empty((2, _STEPS, b, _CHAINS), np.float32)
    for step in range(_BURN_IN + _STEPS):
        drawn = uniform[step * _CHAINS : (step + 1) * _CHAINS]
        chosen = sum((drawn >= threshold for threshold in thresholds), start=rows)
        taken = maps.take(chosen, axis=0)
        x, y = (
            taken[..., 0] * x + taken[..., 1] * y + taken[..., 4],
            taken[..., 2] * x + taken[..., 3] * y + taken[..., 5],
        )
        if step >= _BURN_IN:
            points[:, step - _BURN_IN] = x, y
    return _histogram(points, size)


def _histogram(points_2TBC: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    b = points_2TBC.shape[2]
    low = points_2TBC.min(axis=(1, 3), keepdims=True)
    span = np.maximum(points_2TBC.max(axis=(1, 3), keepdims=True) - low, np.float32(1e-6))
    cells = ((points_2TBC - low) * (np.float32(size - 0.01) / span)).astype(np.int64)
    flat = cells[1] * size + cells[0] + np.arange(b)[None, :, None] * (size * size)
    counts = np.bincount(flat.ravel(), minlength=b * size * size).reshape(b, size, size)
    return np.sqrt((counts / counts.max(axis=(1, 2), keepdims=True)).astype(np.float32))


def tint(tone_BSS: NDArray[np.float32], uniform_B6: NDArray[np.float64]) -> NDArray[np.uint8]:
    """uint8 [b, S, S, 3]: a bright colour on a dark ground, both drawn per image."""
    ground = (uniform_B6[:, :3] * 64).astype(np.float32)
    color = (128 + uniform_B6[:, 3:] * 127).astype(np.float32)
    image = np.empty((*tone_BSS.shape, 3), np.uint8)
    for channel in range(3):
        low, high = ground[:, channel, None, None], color[:, channel, None, None]
        image[..., channel] = low + (high - low) * tone_BSS
    return image
