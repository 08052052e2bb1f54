"""Import weights from a file or from the hub into the store, and make networks of them; `dbscale.study.weights` names them.

timm reads the file (no pickle that runs code), huggingface_hub fetches what is on the hub, from its cache when offline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from timm.models import load_model_config_from_hf, load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from dbscale.data import IMAGENET_MEAN, IMAGENET_STD
from dbscale.errors import TrainingError
from dbscale.files import make_folder, write_model
from dbscale.study.recipe import Pretrained
from dbscale.study.store import Store
from dbscale.study.weights import HUB, Named, Origin, Weights, imported_hash, name_path, read_origin, weights_dir
from dbscale.training.models import (
    head_names,
    make_model,
    read_weights,
    refuse_misfit,
    sha256_of,
    stored_weights,
    write_weights,
)

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_ERRORS = (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError, ValueError)


def import_weights(store: Store, weights: Weights, data_dir: Path) -> str:
    """Copy the weights into the store unless that is done; returns the hash of their file.

    A file is looked at again each time, so that another file under an old name makes new cells; the hub is asked once.
    Raises TrainingError where they cannot be read, or do not belong to the model.
    """
    known = imported_hash(store, weights.checkpoint)
    if known is not None and weights.checkpoint.startswith(HUB):
        return known
    path, licence = _fetched(weights) if weights.checkpoint.startswith(HUB) else (data_dir / weights.checkpoint, "")
    if not path.is_file():
        raise TrainingError(
            f"checkpoint {weights.checkpoint!r}: no file {path}; its path is relative to the data folder"
        )
    digest, folder = sha256_of(path), Path(weights_dir(store))
    if digest == known and (folder / f"{digest}.json").exists():
        return digest
    make_folder(folder / "names")
    stored = write_weights(folder / f"{digest}.safetensors", _tensors(path))
    origin = Origin(
        checkpoint=weights.checkpoint, sha256=digest, stored_sha256=stored, licence=weights.licence or licence
    )
    write_model(folder / f"{digest}.json", origin)
    write_model(Path(name_path(store, weights.checkpoint)), Named(checkpoint=weights.checkpoint, sha256=digest))
    return digest


def _fetched(weights: Weights) -> tuple[Path, str]:
    """The file of a model on the hub, and its licence. Raises TrainingError."""
    name = weights.checkpoint.removeprefix(HUB)
    repository, _, revision = name.partition("@")
    try:
        config, architecture, *_ = load_model_config_from_hf(name)
        path = next(filter(None, (_hub_file(repository, file, revision or None) for file in HUB_FILES)))
    except StopIteration:
        raise TrainingError(f"checkpoint {weights.checkpoint!r}: the repository has none of {', '.join(HUB_FILES)}"
                            ) from None  # fmt: skip
    except HUB_ERRORS as error:
        why = f"{type(error).__name__}: {error}"
        raise TrainingError(f"checkpoint {weights.checkpoint!r} cannot be fetched ({why}); look at its name and at the "
                            "network, or import it on a machine that has one") from error  # fmt: skip
    _check_config(weights, str(architecture), config)
    return path, _licence(repository)


def _hub_file(repository: str, file: str, revision: str | None) -> Path | None:
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except EntryNotFoundError:
        return None


def _licence(repository: str) -> str:
    try:
        card: Any = ModelCard.load(hf_hub_download(repository, "README.md"))
        return str(card.data.license or "")
    except HUB_ERRORS:
        return ""


def _check_config(weights: Weights, architecture: str, config: Any) -> None:
    """Raise TrainingError where the grid's entry does not say what the hub's configuration does."""
    network = weights.network
    if network.kind == "timm" and network.name.partition(".")[0] != architecture:
        raise TrainingError(f"checkpoint {weights.checkpoint!r} is a {architecture}, the grid says {network.name}; set its "
                            f"model: {{kind: timm, name: {architecture}}}")  # fmt: skip
    ours = (weights.mean or IMAGENET_MEAN, weights.std or IMAGENET_STD)
    theirs = tuple(tuple(config.get(key) or default) for key, default in zip(("mean", "std"), ours, strict=True))
    if theirs != tuple(map(tuple, ours)):
        raise TrainingError(f"checkpoint {weights.checkpoint!r} wants images normalised with mean {list(theirs[0])} and std "
                            f"{list(theirs[1])}; set these as `mean:` and `std:` of its entry")  # fmt: skip


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        state = load_state_dict(str(path), use_ema=True, weights_only=True)
    except Exception as error:  # pickle, zip and safetensors raise kinds of their own
        raise TrainingError(f"{path}: not a checkpoint of plain tensors ({type(error).__name__}: {str(error)[:200]}); save "
                            "its state dict with safetensors") from error  # fmt: skip
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise TrainingError(f"{path}: holds no state dict of tensors; save the model's state_dict() with safetensors")
    return state


def make_teacher(store: Store, pretrained: Pretrained, *, num_classes: int, image_size: int) -> nn.Module:
    """The network of imported weights, for images that are normalised as dbscale does it.

    Position embeddings are interpolated by timm. Raises TrainingError for other classes, or weights of another model.
    """
    path = stored_weights(store, pretrained)
    network = make_model(pretrained.model, num_classes=num_classes, image_size=image_size)
    state = read_weights(path)
    prefix = head_names(network)[0]
    head = state.get(f"{prefix}weight")
    if head is not None and len(head) != num_classes:
        origin = read_origin(store, str(pretrained.sha256))
        raise TrainingError(f"the teacher {origin.checkpoint} knows {len(head)} classes, this cell's dataset has "
                            f"{num_classes}; distill on the teacher's own dataset")  # fmt: skip
    state = checkpoint_filter_fn(state, network) if isinstance(network, VisionTransformer) else state
    refuse_misfit(path, state, network.state_dict())
    network.load_state_dict(state)
    if pretrained.mean is not None and pretrained.std is not None:
        _renormalise(network, pretrained.mean, pretrained.std)
    return network


def _renormalise(network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Let the network take images normalised with ImageNet's values: x·σ/σ' + (μ − μ')/σ'."""
    ours, theirs = (torch.tensor(each).view(2, -1, 1, 1) for each in ((IMAGENET_MEAN, IMAGENET_STD), (mean, std)))
    factor, shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]

    def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        images = inputs[0]
        return (images * factor.to(images) + shift.to(images), *inputs[1:])

    network.register_forward_pre_hook(before)
