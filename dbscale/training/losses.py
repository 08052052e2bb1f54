"""What a stage minimises: cross-entropy, or cross-entropy with a teacher's logits and attention maps.

The formulas are the kernels'; here they are chosen by the recipe and fed. One call per micro-batch, no state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dbscale.data import MixTarget
from dbscale.kernels import kd_loss
from dbscale.kernels.timm_attention import AttentionTap
from dbscale.study.recipe import Distill, Recipe
from dbscale.study.resources import Resources
from dbscale.training.attention import make_tap

Target = Tensor | MixTarget
TERMS = ("loss", "ce", "kl", "hard", "attention_kl")


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
    teacher's logits where its maps are not asked for (default: the teacher itself)."""
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
            return self._on_logits(model(images), teacher_logits_BC, target)
        teacher_logits_BC = self.tap.teacher_logits(images)
        losses = self._on_logits(model(images), teacher_logits_BC, target)
        maps = self.tap.take_kl()
        return losses._replace(loss=losses.loss + self.settings.attention.beta * maps, attention_kl=maps.detach())

    def _on_logits(self, logits_BC: Tensor, teacher_logits_BC: Tensor, target: Target) -> Losses:
        alpha = self.settings.alpha
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
            (target.y_a, target.y_b, target.lam) if isinstance(target, MixTarget) else target,
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
        return cross_entropy(logits_BC, target, label_smoothing=smoothing)
    first = cross_entropy(logits_BC, target.y_a, label_smoothing=smoothing)
    if target.lam == 1.0:
        return first
    return target.lam * first + (1 - target.lam) * cross_entropy(logits_BC, target.y_b, label_smoothing=smoothing)
