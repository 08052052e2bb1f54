"""Sources `fractal_masks` and `fractal_boxes`: generated scenes of fractals for segmentation and detection; no files.

A scene holds one to four fractals of random families, each in a quarter of the image of its own, shifted, tinted, on a dark
ground with noise. A family is a class; pixels of the ground are class 0 of the masks. Everything is keyed by (seed, split,
scene), as in `generated`, whose fractals these are: the same families upstream and downstream are one option away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dbscale.data.manifest import TargetKind
from dbscale.data.target import Boxes, Mask
from dbscale.keyed import keyed_uniform
from dbscale.shards.generated import FIRST_TEST_SAMPLE, NUM_MAPS, Families, density
from dbscale.shards.source import Listing, Size, WithTarget

_QUARTERS = 4
_DRAWS = 6 * NUM_MAPS + 8
_RENDER_BATCH = 64
_FILLED_FROM = 3
"""A pixel belongs to a fractal when so many of the nine pixels around it were visited: the dust becomes a surface."""
_MIN_SEEN = 0.25
"""A fractal of which others cover more than the rest has no box."""


class _Object(NamedTuple):
    """One fractal in its scene."""

    family: int
    top: int
    left: int
    surface: NDArray[np.bool_]
    """[side, side]."""
    pixels: NDArray[np.uint8]
    """[side, side, 3]."""


class FractalScenes(Families):
    """What both kinds share; the scenes of equal options are equal."""

    families: Annotated[int, Field(ge=1, le=254)] = 8
    num_train: Size = 4096
    num_test: Size = 512
    image_size: Annotated[int, Field(ge=16, multiple_of=8)] = 32
    """Side in px; a fractal has half of it."""

    def listings(self) -> dict[str, Listing]:
        return {
            split: Listing(np.zeros(size, np.int64), [f"scene-{number:06d}" for number in range(size)])
            for split, size in (("train", self.num_train), ("test", self.num_test))
        }

    def read(self, split: str, numbers: NDArray[np.int64], names: Sequence[str]) -> Iterator[WithTarget]:
        shift = FIRST_TEST_SAMPLE if split == "test" else 0
        for start in range(0, len(numbers), _RENDER_BATCH):
            for scene, objects in self._scenes(numbers[start : start + _RENDER_BATCH] + shift):
                yield WithTarget(self._paint(scene, objects), self._target(objects))

    def _target(self, objects: Sequence[_Object]) -> Mask | Boxes:
        raise NotImplementedError

    def _scenes(self, scene_B: NDArray[np.int64]) -> Iterator[tuple[int, list[_Object]]]:
        """Each scene's number and objects, those painted last at the end."""
        layout = keyed_uniform(self.seed, "scene", scene_B, num_draws=1 + _QUARTERS)
        counts = 1 + (layout[:, 0] * _QUARTERS).astype(np.int64)
        quarters = np.argsort(layout[:, 1:], axis=1, kind="stable")
        wanted = np.repeat(np.arange(len(scene_B)), counts)
        ranks = np.concatenate([np.arange(count) for count in counts])
        objects = self._objects(scene_B[wanted], ranks, quarters[wanted, ranks])
        for place, scene in enumerate(scene_B.tolist()):
            yield scene, [found for found, owner in zip(objects, wanted.tolist(), strict=True) if owner == place]

    def _objects(
        self, scene_O: NDArray[np.int64], rank_O: NDArray[np.int64], quarter_O: NDArray[np.int64]
    ) -> list[_Object]:
        draws = keyed_uniform(self.seed, "scene object", scene_O, rank_O, num_draws=_DRAWS)
        family = (draws[:, -1] * self.families).astype(np.int64)
        side = self.image_size // 2
        tone = density(self.jittered(family, draws), side)
        surface = filled(tone > 0)
        # From its quarter's corner by at most an eighth of the image, inwards at the border.
        drift = ((2 * draws[:, -3:-1] - 1) * (self.image_size // 8 + 1)).astype(np.int64)
        corner = np.stack([quarter_O // 2, quarter_O % 2], axis=1) * side + drift
        corner = corner.clip(0, self.image_size - side)
        color = (128 + draws[:, -7:-4] * 127).astype(np.float32)
        shade = (np.float32(0.5) + np.float32(0.5) * tone)[..., None] * color[:, None, None, :]
        return [
            _Object(int(family[k]), int(corner[k, 0]), int(corner[k, 1]), surface[k], shade[k].astype(np.uint8))
            for k in range(len(scene_O))
        ]

    def _paint(self, scene: int, objects: Sequence[_Object]) -> NDArray[np.uint8]:
        """The scene's image, uint8 [S, S, 3]."""
        size = self.image_size
        noise = keyed_uniform(self.seed, "scene ground", scene, num_draws=size * size + 3)[0]
        ground = (noise[-3:] * 64)[None, None] + (noise[:-3] * 32).reshape(size, size, 1)
        image = ground.astype(np.uint8)
        for each in objects:
            _window(image, each)[each.surface] = each.pixels[each.surface]
        return image


class FractalMasks(FractalScenes):
    """Segmentation: the ground is class 0, the families follow."""

    target: ClassVar[TargetKind | None] = "mask"

    @property
    def classes(self) -> tuple[str, ...]:
        return ("ground", *self.family_names)

    def _target(self, objects: Sequence[_Object]) -> Mask:
        mask = np.zeros((self.image_size, self.image_size), np.uint8)
        for each in objects:
            _window(mask, each)[each.surface] = each.family + 1
        return mask


class FractalBoxes(FractalScenes):
    """Detection: a box around the surface of each fractal that is still to be seen."""

    target: ClassVar[TargetKind | None] = "boxes"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.family_names

    def _target(self, objects: Sequence[_Object]) -> Boxes:
        owner = np.full((self.image_size, self.image_size), -1)
        for number, each in enumerate(objects):
            _window(owner, each)[each.surface] = number
        seen = [(owner == number).sum() >= _MIN_SEEN * each.surface.sum() for number, each in enumerate(objects)]
        kept = [each for each, is_seen in zip(objects, seen, strict=True) if is_seen]
        boxes = np.array([_box(each) for each in kept], np.float32).reshape(-1, 4)
        labels = np.array([each.family for each in kept], np.int64)
        return Boxes((self.image_size, self.image_size), boxes, labels, np.zeros(len(kept), bool))


def filled(visited_OSS: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels with at least three visited ones among the nine around them; never nothing."""
    padded = np.pad(visited_OSS, ((0, 0), (1, 1), (1, 1))).astype(np.int64)
    size = visited_OSS.shape[1]
    around = np.sum([padded[:, y : y + size, x : x + size] for y in range(3) for x in range(3)], axis=0)
    surface = around >= _FILLED_FROM
    none = ~surface.any(axis=(1, 2))
    surface[none] = visited_OSS[none]
    return surface


def _window(values: NDArray[np.generic], each: _Object) -> NDArray[np.generic]:
    side = len(each.surface)
    return values[each.top : each.top + side, each.left : each.left + side]


def _box(each: _Object) -> tuple[int, int, int, int]:
    """left, top, right, bottom in px of the scene."""
    rows, columns = np.flatnonzero(each.surface.any(axis=1)), np.flatnonzero(each.surface.any(axis=0))
    top, left = each.top, each.left
    return int(left + columns[0]), int(top + rows[0]), int(left + columns[-1] + 1), int(top + rows[-1] + 1)
