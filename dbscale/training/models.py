"""Recipes' models as timm models: creation, the parent's weights, what trains.  Engines and optimizers are elsewhere.

The DeiT family is timm's own ViT class with other sizes, so a saved `model.safetensors` is plain timm.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from dbscale.errors import TrainingError
from dbscale.kernels.timm_attention import DistilledAttention
from dbscale.keyed import derive_seed
from dbscale.study.recipe import DeiT, Model


def timm_arguments(model: Model, *, num_classes: int, image_size: int) -> tuple[str, dict[str, Any]]:
    """Name and keyword arguments for `timm.create_model`."""
    if isinstance(model, DeiT):
        return "deit_tiny_patch16_224", {
            "num_classes": num_classes,
            "img_size": image_size,
            "patch_size": model.patch_size,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.heads,
            "mlp_ratio": model.mlp_ratio,
        }
    size = {"img_size": image_size} if _takes_image_size(model.name) else {}
    return model.name, {"num_classes": num_classes, **size, **model.kwargs}


def make_model(
    model: Model, *, num_classes: int, image_size: int, seed: int = 0, drop_path: float = 0.0, guided: bool = False
) -> nn.Module:
    """A freshly initialised model, equal for equal (model, seed) whatever the arm. Raises TrainingError.

    `guided` gives it attention layers that a teacher's maps can be compared in; same weights, same names.
    """
    # Paired arms and the finetunes of one size start from the same draws; at 38M parameters they take .3 s, a copy .03 s.
    return copy.deepcopy(_drawn(model.model_dump_json(), type(model), num_classes, image_size, seed, drop_path, guided))


@lru_cache(maxsize=2)
def _drawn(
    model_json: str, kind: type[Model], num_classes: int, image_size: int, seed: int, drop_path: float, guided: bool
) -> nn.Module:
    return _create(kind.model_validate_json(model_json), num_classes, image_size, seed, drop_path, guided)


def _create(
    model: Model, num_classes: int, image_size: int, seed: int = 0, drop_path: float = 0.0, guided: bool = False
) -> nn.Module:
    if isinstance(model, DeiT) and image_size % model.patch_size:
        raise TrainingError(
            f"image_size {image_size} is not a multiple of patch_size {model.patch_size}; choose sizes that divide"
        )
    name, arguments = timm_arguments(model, num_classes=num_classes, image_size=image_size)
    if not timm.is_model(name.partition(".")[0]):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3)) or "see timm.list_models()"
        raise TrainingError(f"timm knows no model {name!r}; near it: {close}")
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    if guided:
        arguments["attn_layer"] = DistilledAttention
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "init"))
        try:
            return timm.create_model(name, pretrained=False, **arguments)
        except (RuntimeError, TypeError, AssertionError) as error:
            hint = "; it has no stochastic depth: set drop_path to 0" if "drop_path_rate" in str(error) else ""
            raise TrainingError(f"timm cannot create {name!r} with {arguments}: {error}{hint}") from error


def load_backbone(model: nn.Module, weights: Path) -> None:
    """Everything but the head from a parent's `model.safetensors`; position embeddings are interpolated by timm.

    The head stays as initialised, also where the number of classes is the same. Raises TrainingError.
    """
    state = read_weights(weights)
    if isinstance(model, VisionTransformer):
        state = checkpoint_filter_fn(state, model)
    heads = head_names(model)
    backbone = {name: value for name, value in state.items() if not name.startswith(heads)}
    _refuse_misfit(
        weights, backbone, {name: each for name, each in model.state_dict().items() if not name.startswith(heads)}
    )
    model.load_state_dict(backbone, strict=False)


def restore_model(model: Model, weights: Path, *, num_classes: int, image_size: int) -> nn.Module:
    """The model that `weights` were saved from. Raises TrainingError when they do not fit."""
    state = read_weights(weights)
    # Initial values would be drawn only to be overwritten.
    network = copy.deepcopy(skeleton(model, num_classes=num_classes, image_size=image_size))
    if any(buffer.is_meta for name, buffer in network.named_buffers() if name not in state):
        network = make_model(model, num_classes=num_classes, image_size=image_size)
    _refuse_misfit(weights, state, network.state_dict())
    network.load_state_dict(state, assign=True)
    return network


def _refuse_misfit(weights: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise TrainingError unless `state` holds exactly the tensors that are wanted."""
    wrong = [
        f"{name} is {list(state[name].shape)} there, {list(each.shape)} here"
        for name, each in wanted.items()
        if name in state and each.shape != state[name].shape
    ]
    wrong += [f"{name} is missing" for name in wanted if name not in state]
    wrong += [f"{name} is not known here" for name in state if name not in wanted]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise TrainingError(
            f"{weights} does not fit this cell's model: {wrong[0]}{more}; both must name the same model"
        )


def skeleton(model: Model, *, num_classes: int, image_size: int) -> nn.Module:
    """The model without memory, made once per process: to be counted, or copied and given weights. Not to be changed."""
    return _skeleton(model.model_dump_json(), type(model), num_classes, image_size)


@cache
def _skeleton(model_json: str, kind: type[Model], num_classes: int, image_size: int) -> nn.Module:
    with torch.device("meta"):
        return _create(kind.model_validate_json(model_json), num_classes, image_size)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU. Raises TrainingError when it is missing or damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise TrainingError(f"cannot read the weights {path}: {error}; run the cell they come from again") from None


def freeze_backbone(model: nn.Module) -> None:
    """Linear probe: only the head learns."""
    heads = head_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(heads))


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the classifier's parameters."""
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier")
    if not classifier:
        raise TrainingError(f"timm does not say which layer of {type(model).__name__} is its classifier")
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return tuple(f"{name}." for name in names)


def _takes_image_size(name: str) -> bool:
    """Whether this timm model is built for one image size (ViTs) or takes any (ResNets)."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            timm.create_model(name, pretrained=False, img_size=64)
        except TypeError:
            return False
        except Exception:
            return True
    return True
