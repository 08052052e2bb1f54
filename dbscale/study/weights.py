"""Weights that no cell trained: a checkpoint file or a model of the Hugging Face hub, as teacher or as a beginning.

A grid names where they are; what reaches a cell's identity is the hash of the file, wherever it lies. They are imported
into the store once (`dbscale.training.pretrained`), so that every job finds the very same bytes; until then ids are
provisional.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import Field, model_validator

from dbscale.errors import FileError
from dbscale.files import read_model
from dbscale.strict import Strict
from dbscale.study.recipe import Channels, Model, Pretrained, TimmModel
from dbscale.study.store import Store

HUB = "hf-hub:"


class Weights(Strict):
    """`{checkpoint: deit.safetensors, model: …}` or `{checkpoint: hf-hub:timm/deit_tiny_patch16_224.fb_in1k}`."""

    checkpoint: Annotated[str, Field(min_length=1)]
    """A file (safetensors, or a torch checkpoint of plain tensors), relative to the data folder; or hf-hub:owner/name,
    with @revision where one is meant."""
    model: Model | None = None
    """What the weights belong to; of the hub, by default the timm model of the repository's name."""
    mean: Channels | None = None
    std: Channels | None = None
    """How images were normalised for these weights; None: as dbscale does it, with ImageNet's values."""
    licence: str = ""
    """Noted in rows; of the hub, what its card says unless it is given."""

    @model_validator(mode="after")
    def _model_is_known(self) -> Weights:
        if self.model is None and not self.checkpoint.startswith(HUB):
            raise ValueError(
                f"checkpoint {self.checkpoint!r} needs its `model:`, such as {{kind: timm, name: resnet18}}"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together; give both or none")
        return self

    @property
    def network(self) -> Model:
        """The model that the weights belong to."""
        name = self.checkpoint.partition("@")[0].rpartition("/")[2].partition(".")[0]
        return self.model or TimmModel(kind="timm", name=name)

    def identified(self, sha256: str | None) -> Pretrained:
        """These weights as a recipe names them."""
        return Pretrained(sha256=sha256, model=self.network, mean=self.mean, std=self.std)


class Origin(Strict):
    """`<store>/weights/<sha256>.json`: where imported weights came from."""

    checkpoint: str
    sha256: str
    """Hash of the file as it came."""
    stored_sha256: str
    """Hash of `<sha256>.safetensors` beside this record."""
    licence: str


class Named(Strict):
    """`<store>/weights/names/<hash of the name>.json`: which file a grid's checkpoint was when it was imported."""

    checkpoint: str
    sha256: str


def weights_dir(store: Store) -> str:
    return f"{store.root}/weights"


def name_path(store: Store, checkpoint: str) -> str:
    return f"{weights_dir(store)}/names/{hashlib.sha256(checkpoint.encode()).hexdigest()[:16]}.json"


def imported_hash(store: Store, checkpoint: str) -> str | None:
    """Hash of the file that this checkpoint was when it was imported; None before. Raises FileError where the record is
    damaged."""
    try:
        return read_model(Named, name_path(store, checkpoint)).sha256
    except FileNotFoundError:
        return None


def read_origin(store: Store, sha256: str) -> Origin:
    """Where imported weights came from. Raises FileError where they were not imported here."""
    try:
        return read_model(Origin, f"{weights_dir(store)}/{sha256}.json")
    except FileNotFoundError:
        raise FileError(f"the weights {sha256} are not in {weights_dir(store)}; `dbscale submit` of the grid imports them"
                        ) from None  # fmt: skip
