"""From a source's annotation to the target that is packed beside an image: one numbering, one size, checked.

Masks come as PNGs of many kinds, boxes as numbers; whatever does not fit its image or its classes is refused here, so that
training meets only sound ones. Bytes in the shards are `data.target`'s.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BeforeValidator

from dbscale.data.decode import MAX_PIXELS, DecodeError, image_shape, image_suffix, orientation
from dbscale.data.manifest import Encoding
from dbscale.data.target import (
    IGNORE,
    Boxes,
    Mask,
    Target,
    clip_boxes,
    encode_boxes,
    encode_mask,
    resize_target,
    square_target,
)
from dbscale.shards.source import Content, class_names

MAX_CLASSES = IGNORE
_LYING = (5, 6, 7, 8)
"""EXIF orientations that turn an image by a quarter."""
_TOLERANCE_PX = 1.0
"""By how much a box may reach over the border: annotations are rounded."""


def mask_classes(value: Any) -> tuple[str, ...]:
    """Checks the classes of masks: their names, or how many there are."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = [f"class {number}" for number in range(value)]
    names = class_names(value)
    if len(names) > MAX_CLASSES:
        raise ValueError(f"{len(names)} classes; a mask has at most {MAX_CLASSES}")
    return names


MaskClasses = Annotated[tuple[str, ...], BeforeValidator(mask_classes)]
"""Class names by label, or their number."""


def read_mask(data: bytes, *, num_classes: int, first_label: int = 0, ignore_labels: Sequence[int] = (IGNORE,)) -> Mask:
    """uint8 [H, W] with labels 0…num_classes-1 and IGNORE, of a PNG whose labels begin at `first_label`.

    What lies below `first_label` is ignored, as are the `ignore_labels` (in the file's numbers). Raises DecodeError.
    """
    labels = _labels_in(data)
    ignored = (labels < first_label) | np.isin(labels, ignore_labels)
    wrong = labels[~ignored & (labels >= first_label + num_classes)]
    if len(wrong):
        last = first_label + num_classes - 1
        raise DecodeError(
            f"its mask holds the label {wrong.max()}, out of range {first_label}…{last}; mend it, extend the class names "
            "or list the label under `ignore_labels`"
        )
    return np.where(ignored, IGNORE, labels - first_label).astype(np.uint8)


def renumbered(mask_HW: Mask, names: Sequence[str], classes: Sequence[str]) -> Mask:
    """A mask whose labels are places in `names`, with the places of the same names in `classes`."""
    places = np.full(256, IGNORE, np.uint8)
    places[: len(names)] = [classes.index(name) for name in names]
    return places[mask_HW]


def classes_seen(target: Target, num_classes: int) -> NDArray[np.bool_]:
    """bool [num_classes]: which occur, as pixels or as boxes."""
    labels = target.labels_N if isinstance(target, Boxes) else target.ravel()
    return np.bincount(labels, minlength=256)[:num_classes] > 0


def _labels_in(data: bytes) -> np.ndarray:
    """Integers [H, W]: grey levels, or the places in a palette, whatever colours stand there."""
    try:
        kind = image_suffix(data)
    except DecodeError as error:
        raise DecodeError(f"its mask is no PNG that can be read: {error}") from error
    if kind != "png":
        raise DecodeError(f"its mask is no PNG ({kind}), and other formats blur or recolour labels; save masks as PNG")
    height, width = image_shape(data)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            mode, values = image.mode, np.asarray(image)
    except Exception as error:
        raise DecodeError(f"its mask is no PNG that can be read: {error}") from error
    assert height * width <= MAX_PIXELS
    if mode not in ("L", "P", "1") and not mode.startswith("I"):
        raise DecodeError(
            f"its mask is a colour image ({mode}), and colours are no labels; save masks as 8-bit grey or with a palette, "
            "one number a class"
        )
    return values.astype(np.int64)


def pack_target(target: Target, content: Content, encoding: Encoding, size: tuple[int, int], num_classes: int) -> bytes:
    """The target's bytes, at the `size` (height, width) that its image was packed at. Raises DecodeError."""
    original = image_shape(content) if isinstance(content, bytes) else (content.shape[0], content.shape[1])
    _check_size(target, original, content)
    if isinstance(target, Boxes):
        target = _checked_boxes(target, original, num_classes)
    elif (target == IGNORE).all():
        raise DecodeError("its mask is empty: every pixel has a label that is ignored")
    if size != original:
        target = square_target(target, size[0]) if encoding == "raw" else resize_target(target, size)
    return encode_boxes(target) if isinstance(target, Boxes) else encode_mask(target)


def _check_size(target: Target, image: tuple[int, int], content: Content) -> None:
    """Raise DecodeError where a target was made for an image of another size."""
    size = target.size if isinstance(target, Boxes) else target.shape
    if size == image:
        return
    if size == image[::-1] and isinstance(content, bytes) and orientation(content) in _LYING:
        raise DecodeError(
            f"its EXIF tag shows it turned, as {image[0]}×{image[1]} px, and so it was annotated, but its pixels are taken "
            f"as they are stored, {image[1]}×{image[0]}; save the image turned and without the tag"
        )
    if isinstance(target, Boxes):
        raise DecodeError(
            f"its annotation says {size[1]}×{size[0]} px, the image has {image[1]}×{image[0]} px; annotate the image as "
            "it is"
        )
    raise DecodeError(
        f"its mask has {size[1]}×{size[0]} px, the image {image[1]}×{image[0]} px; both must be of one size"
    )


def _checked_boxes(target: Boxes, image: tuple[int, int], num_classes: int) -> Boxes:
    limit = np.array([image[1], image[0]] * 2)
    over = ((target.boxes_N4 < -_TOLERANCE_PX) | (target.boxes_N4 > limit + _TOLERANCE_PX)).any(axis=1)
    if over.any():
        left, top, right, bottom = target.boxes_N4[over][0].tolist()
        raise DecodeError(
            f"a box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) reaches over the border of its "
            f"{image[1]}×{image[0]} px image; mend or remove it"
        )
    wrong = target.labels_N[(target.labels_N < 0) | (target.labels_N >= num_classes)]
    if len(wrong):
        raise DecodeError(
            f"a box has the label {wrong[0]}, out of range 0…{num_classes - 1}; mend it or name its class"
        )
    return clip_boxes(target)
