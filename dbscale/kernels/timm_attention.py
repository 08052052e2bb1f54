"""Attention KL for timm's vision transformers: a drop-in student attention, and a tap on a frozen teacher.

`AttentionTap.teacher_logits` runs the teacher, catches exact queries and keys of the chosen blocks and hands them to
the student's blocks; the student's next forward computes output and KL together; `take_kl` collects. Only blocks whose
attention is timm's plain `Attention` can be served: others put something into the map that q and k do not show
(rotary positions, biases, mixing of heads) and are refused by name. Leaves losses and weights to the caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from dbscale.kernels.attention_kl import sdpa_with_attention_kl
from dbscale.kernels.attention_kl_eager import HeadMap, TokenSlice

REASONS = {
    "EvaAttention": "it rotates q and k (RoPE: Eva, DINOv3, PE)",
    "AttentionRope": "it rotates q and k (RoPE)",
    "Attention": "it is another class of that name, with a relative position bias (BEiT, SAM) or another layout",
    "RelPosAttention": "it adds a relative position bias",
    "WindowAttention": "it attends within windows and adds a relative position bias (Swin, DaViT)",
    "WindowMultiHeadAttention": "it attends within windows and adds a relative position bias (Swin v2)",
    "TalkingHeadAttn": "it mixes heads before and after the softmax (CaiT)",
    "ClassAttn": "only its class token attends (CaiT)",
    "DiffAttention": "its map is a difference of two softmaxes",
}
"""Why a map of that class is not softmax(scale · q kᵀ)."""


class UnsupportedAttentionError(ValueError):
    """A model whose attention maps q and k alone do not determine, named with the reason."""


@dataclass(frozen=True, eq=False)
class Guide:
    """What a student's block needs to know of its teacher block for one forward pass."""

    q_t: Tensor
    k_t: Tensor
    scale_t: float
    head_map: HeadMap
    token_slice: TokenSlice
    backend: str


class DistilledAttention(Attention):
    """timm's `Attention`, same weights and state-dict keys, that also computes its KL when it has a `guide`.

    `timm.create_model(name, attn_layer=DistilledAttention)`. Without a guide it is timm's own forward.
    """

    guide: Guide | None = None
    kl: Tensor | None = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, C] → [B, N, C_out]; leaves the KL in `self.kl` and drops the guide."""
        if self.guide is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        _refuse_masks(self, attn_mask, is_causal)
        guide, self.guide = self.guide, None
        batch, num_tokens, _ = x.shape
        gate = None if self.gate is None else self.gate(x).sigmoid()
        q, k, v = split_heads(self, self.qkv(x))
        out, self.kl = sdpa_with_attention_kl(
            q, k, v, guide.q_t, guide.k_t, scale_s=self.scale, scale_t=guide.scale_t, head_map=guide.head_map,
            token_slice=guide.token_slice, backend=guide.backend,
        )  # fmt: skip
        x = self.norm(out.transpose(1, 2).reshape(batch, num_tokens, self.attn_dim))
        return self.proj_drop(self.proj(x if gate is None else x * gate))


class AttentionTap:
    """Joins chosen blocks of a student to blocks of a frozen teacher.

    `layers` are (student block, teacher block) pairs, negative indices count from the end. `head_map`, `token_slice`
    and `backend` are those of `attention_kl`. Raises UnsupportedAttentionError for models it cannot serve and
    ValueError for a student built without `attn_layer=DistilledAttention` or block indices that do not exist.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, layers: Sequence[tuple[int, int]],
        head_map: HeadMap = "repeat", token_slice: TokenSlice = None, backend: str = "auto",
    ) -> None:  # fmt: skip
        if not layers:
            raise ValueError("AttentionTap: layers is empty; give (student block, teacher block) pairs")
        self._teacher = teacher
        self._students = [_student_attention(student, index) for index, _ in layers]
        self._make_guide = partial(Guide, head_map=head_map, token_slice=token_slice, backend=backend)
        taught = [plain_attention(teacher, index, "teacher") for _, index in layers]
        self._taught = taught
        self._qkv: dict[Attention, Tensor] = {}
        for each in dict.fromkeys(taught):
            each.qkv.register_forward_hook(partial(self._catch, each))
            each.register_forward_pre_hook(_check_masks, with_kwargs=True)

    @torch.no_grad()
    def teacher_logits(self, images: Tensor) -> Tensor:
        """Run the teacher on `images`; its logits, without gradient. Arms the student's next forward."""
        self._qkv.clear()
        logits = self._teacher(images)
        for student, taught in zip(self._students, self._taught, strict=True):
            q_t, k_t, _ = split_heads(taught, self._qkv[taught])
            student.guide = self._make_guide(q_t, k_t, taught.scale)
            student.kl = None
        self._qkv.clear()
        return logits

    def take_kl(self) -> Tensor:
        """The KL of the student's last forward, mean over the chosen blocks; a second call has nothing to give.

        Raises RuntimeError where a block was not armed by `teacher_logits` or has not run since.
        """
        kls = [student.kl for student in self._students]
        for student in self._students:
            student.kl = None
        if any(each is None for each in kls):
            raise RuntimeError("AttentionTap: no KL to take; call teacher_logits(images), then the student, then this")
        return torch.stack([each for each in kls if each is not None]).mean()

    def _catch(self, attention: Attention, _module: nn.Module, _inputs: tuple, qkv: Tensor) -> None:
        self._qkv[attention] = qkv


def split_heads(attention: Attention, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, N, d] as views of the projection [B, N, 3·H·d], with the layer's own norms on q and k."""
    batch, num_tokens, _ = qkv.shape
    parts = qkv.reshape(batch, num_tokens, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = parts.unbind(0)
    return attention.q_norm(q), attention.k_norm(k), v


def plain_attention(model: nn.Module, index: int, role: str) -> Attention:
    """The timm `Attention` of block `index`, or UnsupportedAttentionError naming model, block, class and reason."""
    name = type(model).__name__
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise UnsupportedAttentionError(f"{role} {name} has no list of transformer `blocks`, so it has no maps to join")
    if not -len(blocks) <= index < len(blocks):
        raise ValueError(f"{role} {name} has {len(blocks)} blocks; there is no block {index}")
    attention = getattr(blocks[index], "attn", None)
    if type(attention) not in (Attention, DistilledAttention):
        kind = type(attention).__name__
        reason = "it has no `attn`" if attention is None else REASONS.get(kind, "it is not timm.layers.Attention")
        raise UnsupportedAttentionError(
            f"{role} {name}, block {index}: attention maps of {kind} cannot be had from q and k alone: {reason}; "
            "use a model with timm's plain Attention (ViT, DeiT) or set the attention weight to 0"
        )
    return attention  # pyright: ignore[reportReturnType]


def _student_attention(model: nn.Module, index: int) -> DistilledAttention:
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # pyright: ignore[reportAssignmentType]
    attention = plain_attention(model, index, "student")
    if not isinstance(attention, DistilledAttention):
        raise ValueError(
            f"student {type(model).__name__}, block {index} has timm's own Attention; build it with "
            "timm.create_model(…, attn_layer=DistilledAttention)"
        )
    return attention


def _refuse_masks(attention: Attention, attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise UnsupportedAttentionError("attention KL: masked or causal attention is not served")
    if attention.training and attention.attn_drop.p > 0:
        raise UnsupportedAttentionError(
            f"attention KL: attention dropout {attention.attn_drop.p} is not served; set attn_drop_rate to 0"
        )


def _check_masks(attention: nn.Module, inputs: tuple, kwargs: dict) -> None:
    assert isinstance(attention, Attention)
    named = dict(zip(("x", "attn_mask", "is_causal"), inputs, strict=False)) | kwargs
    _refuse_masks(attention, named.get("attn_mask"), bool(named.get("is_causal", False)))
