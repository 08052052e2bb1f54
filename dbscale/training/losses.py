"""What a stage minimises: cross-entropy, or cross-entropy with a teacher's logits and attention maps.

The formulas are the kernels'; here they are chosen by the recipe and fed, one call per micro-batch, no state. Also which
layers, heads and tokens of student and teacher are compared, and the teacher's logits kept on disk for those who ask again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dbscale import plugins
from dbscale.data import MixTarget
from dbscale.errors import FileError, TrainingError
from dbscale.files import atomic_open, read_bytes
from dbscale.kernels import kd_loss
from dbscale.kernels.timm_attention import AttentionTap
from dbscale.study.cell import CellSpec, canonical_json
from dbscale.study.recipe import Attention, Distill, Recipe
from dbscale.study.resources import Resources
from dbscale.study.store import Store

Target = Tensor | MixTarget | list[dict[str, Tensor]]
"""Labels [b], mixed labels, masks [b, S, S], or boxes and their labels image by image."""
TERMS = ("loss", "ce", "kl", "hard", "attention_kl")
CACHE_FOLDER = "teacher_logits"


class Losses(NamedTuple):
    """Scalars of one micro-batch, float32; from `kl` on, None where the recipe has no such term."""

    loss: Tensor
    """What is minimised."""
    ce: Tensor
    kl: Tensor | None = None
    hard: Tensor | None = None
    """Cross-entropy to the teacher's decision."""
    attention_kl: Tensor | None = None


Objective = Callable[[nn.Module, Tensor, Target], Losses]
"""(student, images [b, 3, S, S], target) -> Losses."""


def make_objective(
    recipe: Recipe,
    resources: Resources,
    teacher: nn.Module | None,
    student: nn.Module,
    answer: Callable[[Tensor], Tensor] | None = None,
) -> Objective:
    """The objective of a recipe. Terms of weight zero are not computed, so a distill cell with alpha = beta = 0 is
    bitwise the pretrain cell. `student` is the bare timm model, whose attention the teacher guides; `answer` gives the
    teacher's logits where its maps are not asked for (default: the teacher itself). Terms of plugins are added."""
    base = _make_base(recipe, resources, teacher, student, answer)
    wanted = {name: weight for name, weight in (recipe.training.loss_terms or {}).items() if weight}
    if not wanted:
        return base
    terms = [(weight, plugins.part_of(plugins.LOSSES, "loss term", name)) for name, weight in wanted.items()]
    return partial(_with_terms, base, terms)


def _with_terms(
    base: Objective,
    terms: Sequence[tuple[float, Callable[..., Tensor]]],
    model: nn.Module,
    images: Tensor,
    target: Target,
) -> Losses:
    """The base loss, and weight x term(logits, target, images) of each, on the same forward pass."""
    outputs: list[Any] = []

    def forward(inputs: Tensor) -> Any:
        outputs.append(model(inputs))
        return outputs[-1]

    losses = base(forward, images, target)  # type: ignore[arg-type]
    logits_BC = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
    extra = [weight * term(logits_BC, target, images) for weight, term in terms]
    return losses._replace(loss=losses.loss + torch.stack(extra).sum())


def _make_base(
    recipe: Recipe,
    resources: Resources,
    teacher: nn.Module | None,
    student: nn.Module,
    answer: Callable[[Tensor], Tensor] | None,
) -> Objective:
    smoothing, settings = recipe.training.label_smoothing, recipe.distill
    maps = wants_maps(settings)
    if settings is None or teacher is None or not wants_teacher(settings):
        return lambda model, images, target: _plain(model(images), target, smoothing)
    tap = make_tap(student, teacher, settings.attention, resources.kd_backend) if maps and settings.attention else None
    return _DistillObjective(settings, smoothing, answer or teacher, tap, resources.kd_backend)


def wants_teacher(settings: Distill | None) -> bool:
    """Whether any term of the loss asks a teacher."""
    return settings is not None and (settings.alpha > 0 or wants_maps(settings))


def wants_maps(settings: Distill | None) -> bool:
    """Whether attention maps are distilled at all."""
    return settings is not None and settings.attention is not None and settings.attention.beta > 0


class _DistillObjective:
    """Teacher on the same augmented view, student, loss."""

    def __init__(
        self,
        settings: Distill,
        smoothing: float,
        teacher: Callable[[Tensor], Tensor],
        tap: AttentionTap | None,
        backend: str,
    ) -> None:
        self.settings, self.smoothing, self.teacher, self.tap, self.backend = settings, smoothing, teacher, tap, backend

    def __call__(self, model: nn.Module, images: Tensor, target: Target) -> Losses:
        if self.tap is None or self.settings.attention is None:
            with torch.no_grad():
                teacher_logits_BC = self.teacher(images)
            return self._on_heads(model(images), teacher_logits_BC, target)
        teacher_logits_BC = self.tap.teacher_logits(images)
        losses = self._on_heads(model(images), teacher_logits_BC, target)
        maps = self.tap.take_kl()
        return losses._replace(loss=losses.loss + self.settings.attention.beta * maps, attention_kl=maps.detach())

    def _on_heads(self, output: Tensor | tuple[Tensor, Tensor], teacher_logits_BC: Tensor, target: Target) -> Losses:
        """`output` is the logits [b, C], or those of the head that learns labels and of the one that is guided."""
        alpha = self.settings.alpha
        if isinstance(output, Tensor):
            if self.settings.head == "parallel":
                raise TrainingError("distill.head parallel: timm joins both heads of a frozen model; set scope: full")
            return self._on_logits(output, teacher_logits_BC, target, alpha)
        class_BC, guided_BC = output
        labels = _plain(class_BC, target, self.smoothing)
        guided = self._on_logits(guided_BC, teacher_logits_BC, target, 1.0)
        return guided._replace(loss=(1 - alpha) * labels.loss + alpha * guided.loss, ce=labels.ce)

    def _on_logits(self, logits_BC: Tensor, teacher_logits_BC: Tensor, target: Target, alpha: float) -> Losses:
        """(1 - alpha)·CE + alpha·guidance of one head."""
        if alpha == 0:
            return _plain(logits_BC, target, self.smoothing)
        if self.settings.target == "soft":
            return self._soft(logits_BC, teacher_logits_BC, target, alpha)
        # The teacher's decision is a label, and unlike true labels it is not smoothed.
        hard = cross_entropy(logits_BC.float(), teacher_logits_BC.argmax(1))
        if self.settings.target == "hard":
            other, kept, share = _plain(logits_BC, target, self.smoothing), 1 - alpha, alpha
        else:
            kept, share = 1 - alpha / 2, alpha / 2
            other = self._soft(logits_BC, teacher_logits_BC, target, share / kept)
        return other._replace(loss=kept * other.loss + share * hard, hard=hard.detach())

    def _soft(self, logits_BC: Tensor, teacher_logits_BC: Tensor, target: Target, alpha: float) -> Losses:
        """(1 - alpha)·CE + alpha·T²·KL"""
        result = kd_loss(
            logits_BC,
            teacher_logits_BC,
            (target.y_a, target.y_b, target.lam) if isinstance(target, MixTarget) else target,  # type: ignore[arg-type]
            alpha=alpha,
            temperature=self.settings.temperature,
            label_smoothing=self.smoothing,
            backend=self.backend,
        )
        return Losses(result.loss, result.ce, result.kl)


def _plain(logits_BC: Tensor, target: Target, smoothing: float) -> Losses:
    loss = _cross_entropy(logits_BC, target, smoothing)
    return Losses(loss, loss.detach())


def _cross_entropy(logits_BC: Tensor, target: Target, smoothing: float) -> Tensor:
    """Mean cross-entropy in float32; of a mixed batch, the mixture of both labels' (Zhang et al., 1710.09412)."""
    logits_BC = logits_BC.float()
    if not isinstance(target, MixTarget):
        assert isinstance(target, Tensor), "boxes have losses of their own"
        return cross_entropy(logits_BC, target, label_smoothing=smoothing)
    first = cross_entropy(logits_BC, target.y_a, label_smoothing=smoothing)
    if isinstance(target.lam, float) and target.lam == 1.0:
        return first
    share, rest = target.lam, 1 - target.lam
    if isinstance(share, Tensor) and isinstance(rest, Tensor):  # float64, rounded once, as a number would be
        share, rest = share.float(), rest.float()
    return share * first + rest * cross_entropy(logits_BC, target.y_b, label_smoothing=smoothing)


def make_tap(student: nn.Module, teacher: nn.Module, settings: Attention, backend: str) -> AttentionTap:
    """Join the chosen student layers to the teacher layers at the same relative depth.

    Raises TrainingError for layers that do not exist, and ValueError for models without plain attention.
    """
    depth_s, depth_t = _depth(student), _depth(teacher)
    layers = [(layer, _twin(layer, depth_s, depth_t)) for layer in chosen_layers(settings, depth_s)]
    return AttentionTap(
        student,
        teacher,
        layers=layers,
        head_map=_head_map(settings, student, teacher),
        token_slice=_common_tokens(student, teacher),
        backend=backend,
    )


def chosen_layers(settings: Attention, depth: int) -> tuple[int, ...]:
    """Student layers 0 … depth-1 that are compared."""
    if settings.layers == "all":
        return tuple(range(depth))
    if settings.layers == "last":
        return (depth - 1,)
    wrong = [layer for layer in settings.layers if not -depth <= layer < depth]
    if wrong or not settings.layers:
        raise TrainingError(f"attention.layers {list(settings.layers)}: the student has layers 0 to {depth - 1}")
    return tuple(layer % depth for layer in settings.layers)


def spread_heads(num_heads_s: int, num_heads_t: int) -> Tensor:
    """Mixing matrix [H_s, H_t]: a head listens to the teacher heads that cover its share of the width."""
    edges_s, edges_t = torch.linspace(0, 1, num_heads_s + 1), torch.linspace(0, 1, num_heads_t + 1)
    low = torch.maximum(edges_s[:-1, None], edges_t[None, :-1])
    high = torch.minimum(edges_s[1:, None], edges_t[None, 1:])
    return (high - low).clamp_min(0) * num_heads_s


def _twin(layer: int, depth_s: int, depth_t: int) -> int:
    return max(round((layer + 1) * depth_t / depth_s) - 1, 0)


def _depth(model: nn.Module) -> int:
    return len(getattr(model, "blocks", [])) or 1  # the tap refuses models without blocks, by name


def _head_map(settings: Attention, student: nn.Module, teacher: nn.Module) -> str | Tensor:
    if settings.head_map != "matrix":
        return settings.head_map
    return spread_heads(student.blocks[0].attn.num_heads, teacher.blocks[0].attn.num_heads)  # type: ignore[index, union-attr]


def _common_tokens(student: nn.Module, teacher: nn.Module) -> tuple[slice, slice] | None:
    """The patches of both, where one has a distillation token and the other has none; None: all tokens."""
    prefix_s, prefix_t = (int(getattr(model, "num_prefix_tokens", 0)) for model in (student, teacher))
    return None if prefix_s == prefix_t else (slice(prefix_s, None), slice(prefix_t, None))


class CachedTeacher:
    """Answers as `teacher` does, from `folder` where it can.

    The key is a hash of the augmented, mixed images as the teacher gets them, so an answer can never be stale: another
    augmentation, seed, order or batch is another key. Results are the same bitwise; attention maps are not kept.
    """

    def __init__(self, teacher: nn.Module, folder: Path) -> None:
        self.teacher, self.folder = teacher, folder

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [b, C] of images [b, 3, S, S]. Raises FileError when an answer cannot be kept."""
        path = self.folder / f"{_digest_of(images)}.safetensors"
        known = _read_logits(path)
        if known is not None:
            return known.to(images.device)
        logits_BC = self.teacher(images)
        content = safetensors.torch.save({"logits": logits_BC.detach().cpu().contiguous()})
        with atomic_open(path, "wb", durable=False) as file:
            file.write(_seal_of(path, content) + content)
        return logits_BC


def open_cache(store: Store, spec: CellSpec, teacher: nn.Module, device: str) -> CachedTeacher:
    """The cache of a distill cell's teacher; one for each set of weights, way of computing and kind of `device`."""
    foreign, row = spec.recipe.teacher, store.read_row(spec.teacher) if spec.teacher else None
    if row is None and foreign is None:
        raise FileError(f"the teacher {spec.teacher} of {spec.key} has no row; train it first")
    identity = {
        "weights": row.weights_sha256 if row is not None else foreign and foreign.model_dump_json(),
        "precision": spec.recipe.training.precision,
        "device": device,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    name = hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]
    return CachedTeacher(teacher, store.root / CACHE_FOLDER / name)


def _digest_of(images: Tensor) -> str:
    """Checksum of the images' values, shape and type."""
    pixels = images.detach().cpu().contiguous()
    digest = xxhash.xxh3_128(f"{tuple(pixels.shape)} {pixels.dtype}".encode())
    digest.update(pixels.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _seal_of(path: Path, content: bytes) -> bytes:
    """Checksum of an answer and its place: neither a changed byte nor another batch's answer is taken for it."""
    return xxhash.xxh3_128(path.name.encode() + content).digest()


def _read_logits(path: Path) -> Tensor | None:
    """None where there is no answer yet, or only a damaged one."""
    try:
        data = read_bytes(path)
        seal, content = data[:16], data[16:]
        return safetensors.torch.load(content)["logits"] if seal == _seal_of(path, content) else None
    except (OSError, SafetensorError, KeyError):
        return None
