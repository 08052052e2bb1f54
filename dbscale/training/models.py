"""Recipes' models as timm models: creation, weights on disk, a parent's weights, the frozen teacher, what trains.

The DeiT family is timm's own ViT class with other sizes, so a saved `model.safetensors` is plain timm. A child reads only
weights whose hash its parent's row names. Engines and optimizers are elsewhere.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import warnings
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from accelerate import Accelerator
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from dbscale.errors import TrainingError
from dbscale.files import atomic_open, regular
from dbscale.kernels.timm_attention import DistilledAttention
from dbscale.keyed import derive_seed
from dbscale.study.cell import CellSpec
from dbscale.study.recipe import DeiT, Model, Pretrained
from dbscale.study.store import Row, Store
from dbscale.study.weights import read_origin, weights_dir
from dbscale.training.losses import wants_maps, wants_teacher
from dbscale.training.optimizer import EMA

WEIGHTS_NAME = "model.safetensors"


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

    The head stays as initialised, also where the number of classes is the same; a model whose head was cut off takes no
    part of one. Raises TrainingError.
    """
    state = read_weights(weights)
    if isinstance(model, VisionTransformer):
        state = checkpoint_filter_fn(state, model)
    heads = head_names(model)
    if getattr(model, "num_classes", None) == 0:
        heads = (*heads, "fc_norm.")  # after pooling: timm's prune_intermediate_layers drops it with the classifier
    backbone = {name: value for name, value in state.items() if not name.startswith(heads)}
    refuse_misfit(
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
    fill(network, weights, state)
    return network


def fill(network: nn.Module, weights: Path, state: dict[str, Tensor] | None = None) -> None:
    """Give a network the weights of a file, which are read unless `state` holds them. Raises TrainingError for a misfit."""
    state = read_weights(weights) if state is None else state
    refuse_misfit(weights, state, network.state_dict())
    network.load_state_dict(state, assign=True)


def refuse_misfit(weights: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
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


class ParallelHead(nn.Linear):
    """A classifier with a second one beside it, for training: the first learns labels, the second a teacher's answers."""

    parallel: nn.Linear

    def __init__(self, head: nn.Linear, seed: int) -> None:
        super().__init__(head.in_features, head.out_features, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self.parallel = nn.Linear(head.in_features, head.out_features, device="meta").to_empty(device="cpu")
        # DeiT's initialisation of both of its heads; a stream of its own leaves the first as in the plain arm.
        draws = torch.Generator().manual_seed(derive_seed(seed, "parallel head"))
        nn.init.trunc_normal_(self.parallel.weight, std=0.02, generator=draws)
        nn.init.zeros_(self.parallel.bias)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Features [b, D] -> both heads' logits [b, C], in training and evaluation alike."""
        return super().forward(input), self.parallel(input)


def add_parallel_head(model: nn.Module, seed: int) -> None:
    """Let a timm model's forward give two heads' logits while it trains; its first head and all else stay as they are.

    A model with a distillation token has its second head already. Raises TrainingError where the classifier is not one
    linear layer with a bias.
    """
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)  # type: ignore[operator]
        return
    prefix, *others = head_names(model)
    head = model.get_submodule(prefix.removesuffix("."))
    if others or type(head) is not nn.Linear or head.bias is None:
        raise TrainingError(
            f"distill.head parallel: the classifier of {type(model).__name__} is a {type(head).__name__}, not one linear "
            "layer with a bias, so that two of them would not average to one; set distill.head: class"
        )
    model.set_submodule(prefix.removesuffix("."), ParallelHead(head, seed))


def merge_parallel_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain timm weights: the average of two linear heads, (W₁x + b₁ + W₂x + b₂)/2, is one linear head."""
    seconds = {name: name.replace(".parallel.", ".") for name in state if ".parallel." in name}
    means = {first: (state[first].float() + state[second].float()) / 2 for second, first in seconds.items()}
    return {name: value for name, value in state.items() if name not in seconds} | means


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


def make_student(spec: CellSpec, store: Store, num_classes: int) -> nn.Module:
    """Initial weights: 1. drawn from (seed, "init"); 2. for a finetune, all but the head from its parent; 3. for an
    upstream run that starts from weights of elsewhere, all but the head from them."""
    recipe = spec.recipe
    student = make_model(
        recipe.model,
        num_classes=num_classes,
        image_size=recipe.data.image_size,
        seed=recipe.seed,
        drop_path=recipe.training.drop_path,
        guided=wants_maps(recipe.distill),
    )
    load_parent(student, spec, store)
    if recipe.start is not None:
        load_backbone(student, stored_weights(store, recipe.start))
    if recipe.distill is not None and recipe.distill.head == "parallel":
        add_parallel_head(student, recipe.seed)
    if recipe.training.scope == "linear_probe":
        freeze_backbone(student)
    return student


def load_parent(model: nn.Module, spec: CellSpec, store: Store) -> None:
    """Give a finetune's timm model the backbone of the run it starts from, if any. Raises TrainingError."""
    if spec.init is not None:
        row = store.read_row(spec.init)
        if row is None:
            raise TrainingError(f"the parent {spec.init} has no row; train it first")
        load_backbone(model, verified_weights(store, row))


def load_teacher(store: Store, spec: CellSpec, *, num_classes: int, device: torch.device) -> nn.Module | None:
    """The teacher of a distill cell, ready to guide; None if none is needed. Raises TrainingError for a misfit."""
    if spec.teacher is None or not wants_teacher(spec.recipe.distill):
        return None
    parent = store.read_spec(spec.teacher)
    row = store.read_row(spec.teacher)
    if row is None:
        raise TrainingError(f"the teacher {spec.teacher} has no row; train it first")
    if row.num_classes != num_classes:
        raise TrainingError(
            f"the teacher {spec.teacher} knows {row.num_classes} classes ({row.dataset}), this cell's dataset "
            f"{spec.recipe.data.dataset} has {num_classes}; distill on the teacher's own dataset"
        )
    size, wanted = parent.recipe.data.image_size, spec.recipe.data.image_size
    if size != wanted:
        raise TrainingError(f"the teacher {spec.teacher} sees {size} px, this cell {wanted} px; they must be equal")
    weights = verified_weights(store, row)
    teacher = restore_model(parent.recipe.model, weights, num_classes=num_classes, image_size=size)
    return teacher.to(device).eval().requires_grad_(False)


def export_weights(path: Path, accelerator: Accelerator, model: nn.Module, ema: EMA | None) -> str | None:
    """Gather the trained weights (their average, if one is kept) and write them as plain float32 timm weights, two
    parallel heads as one.

    Returns the file's SHA-256 on the main rank, None on others.
    """
    digest = None
    with ema.swapped_in() if ema is not None else contextlib.nullcontext():
        state: Any = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            digest = write_weights(path, merge_parallel_head(state))  # inside: the state is views of what is swapped
    accelerator.wait_for_everyone()
    return digest


def write_weights(path: Path, state: dict[str, Tensor]) -> str:
    """Atomic safetensors file, names as timm's; its SHA-256. Raises FileError when it cannot be written."""
    plain = {name: _plain(value) for name, value in state.items()}
    with atomic_open(path, "wb") as file:
        try:
            safetensors.torch.save_file(plain, file.name, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error
        return sha256_of(Path(file.name))


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor


def sha256_of(path: Path) -> str:
    with open(path, "rb", opener=regular) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_weights(store: Store, pretrained: Pretrained) -> Path:
    """The file of imported weights. Raises TrainingError where it is damaged, FileError where it was not imported."""
    if pretrained.sha256 is None:
        raise TrainingError(
            "the cell was planned before its weights were imported; `dbscale submit` of the grid plans it anew"
        )
    origin = read_origin(store, pretrained.sha256)
    path = Path(weights_dir(store)) / f"{pretrained.sha256}.safetensors"
    if not path.is_file() or sha256_of(path) != origin.stored_sha256:
        raise TrainingError(f"{path} is missing or damaged; remove {path.with_suffix('.json')}, and `dbscale submit` "
                            f"imports {origin.checkpoint} again")  # fmt: skip
    return path


def verified_weights(store: Store, row: Row) -> Path:
    """Path of a finished cell's weights. Raises TrainingError when they are not the ones its row names."""
    path = store.cell_dir(row.key) / WEIGHTS_NAME
    if not path.is_file():
        raise TrainingError(f"{path} is missing, though the cell is done; remove {path.parent} to run it again")
    if sha256_of(path) != row.weights_sha256:
        raise TrainingError(f"{path} is not what its row.json describes; remove {path.parent} to run it again")
    return path
