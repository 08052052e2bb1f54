"""A cell is one training run; its id is a hash of what it does, of its parents and of the data it reads.

Leaves out everything about how and where it runs, so the same science keeps its name on any machine.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from dbscale.strict import Strict
from dbscale.study.recipe import RECIPE_VERSION, SEEDS, DeiT, Model, Recipe

Arm = Literal["plain", "distilled", "plain_matched", "self_distilled", "scratch"]
"""Which curve of a study a finetune belongs to; `study.grid` says what each trains upstream."""
Key = Annotated[str, Field(pattern=r"^\w[\w-]*$", max_length=200)]
"""Name of a cell's folder: it can lead nowhere else."""
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
MOST_TEXTS = 4096
_TEXTS: dict[int, tuple[Recipe, str]] = {}
"""Recipes with their canonical JSON, by `id`."""


@dataclass(frozen=True)
class Cell:
    """A recipe, the cells it builds on, and the fingerprint of its dataset (None while the data is absent)."""

    recipe: Recipe
    fingerprint: str | None
    teacher: Cell | None = None
    init: Cell | None = None

    @property
    def parents(self) -> tuple[Cell, ...]:
        return tuple(parent for parent in (self.teacher, self.init) if parent is not None)

    @property
    def lineage(self) -> tuple[Cell, ...]:
        """This cell after all it builds on."""
        return (*(each for parent in self.parents for each in parent.lineage), self)

    @cached_property
    def id(self) -> str:
        """12 hex digits of sha256 over canonical JSON; provisional while a fingerprint is missing."""
        return cell_id(self.recipe, [parent.id for parent in self.parents], self.fingerprint)

    @cached_property
    def key(self) -> str:
        """Folder name in the store: a slug for people, the id for us."""
        return f"{slug(self.recipe)}-{self.id}"

    @property
    def teacher_model(self) -> Model | None:
        """What guides a distill cell: the model of its teacher cell, or of the weights that its recipe names."""
        if self.teacher is not None:
            return self.teacher.recipe.model
        return self.recipe.teacher.model if self.recipe.teacher is not None else None

    def spec(self) -> CellSpec:
        return CellSpec(
            version=RECIPE_VERSION,
            key=self.key,
            recipe=self.recipe,
            fingerprint=self.fingerprint,
            teacher=self.teacher.key if self.teacher else None,
            init=self.init.key if self.init else None,
        )


class CellSpec(Strict):
    """`recipe.json`: all a job needs to run the cell, parents by their folder names."""

    version: int
    key: Key
    recipe: Recipe
    fingerprint: str | None
    teacher: Key | None = None
    init: Key | None = None

    @property
    def id(self) -> str:
        return self.key.rpartition("-")[2]

    @property
    def parents(self) -> tuple[str, ...]:
        return tuple(key for key in (self.teacher, self.init) if key is not None)


def cell_id(recipe: Recipe, parent_ids: list[str], fingerprint: str | None) -> str:
    """sha256 over {recipe version, recipe, sorted parent ids, dataset fingerprint}, first 12 hex digits."""
    start = canonical_json({"data": fingerprint, "parents": sorted(parent_ids)}).removesuffix("}")
    identity = f'{start},"recipe":{_recipe_text(recipe)},"version":{RECIPE_VERSION}}}'
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def _recipe_text(recipe: Recipe) -> str:
    """Canonical JSON of a recipe, kept: many cells of a grid share one, and writing it is most of what an id costs."""
    held = _TEXTS.get(id(recipe))  # while it is held, no other recipe can have its place in memory
    if held is None:
        if len(_TEXTS) >= MOST_TEXTS:
            _TEXTS.clear()
        held = _TEXTS[id(recipe)] = recipe, canonical_json(recipe.model_dump(mode="json", exclude_none=True))
    return held[1]


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, no NaN."""
    return _CANONICAL.encode(value)


def slug(recipe: Recipe) -> str:
    """Readable, filesystem-safe, and never parsed: stage, model, dataset, size, seed, finetune draw."""
    dataset = "".join(c if c.isalnum() else "_" for c in recipe.data.dataset)[:24]
    draw = f"d{recipe.draw}" if recipe.draw is not None else ""
    return (
        f"{recipe.stage}-{model_label(recipe.model)}-{dataset}-n{recipe.data.num_samples}-s{recipe.seed % SEEDS}{draw}"
    )


def model_label(model: Model) -> str:
    """Short name for tables: heads and width of a DeiT, otherwise timm's name."""
    if isinstance(model, DeiT):
        return f"deit_h{model.heads}w{model.head_width}d{model.depth}"
    return "".join(c if c.isalnum() or c == "_" else "_" for c in model.name)
