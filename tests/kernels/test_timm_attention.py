"""The drop-in attention in real timm models: same weights, same output, the KL of its maps; refusals by name."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from dbscale.kernels import attention_kl
from dbscale.kernels.timm_attention import (
    AttentionTap,
    DistilledAttention,
    UnsupportedAttentionError,
    plain_attention,
    split_heads,
)

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 5}


def make(name: str = "deit_tiny_patch16_224", num_heads: int = 4, distilled: bool = False, **options: Any):
    extra = {"attn_layer": DistilledAttention} if distilled else {}
    return timm.create_model(name, num_heads=num_heads, **(SMALL | options), **extra)  # pyright: ignore


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"qkv_bias": False}], ids=str)
def test_it_is_timms_attention_with_a_kl(options) -> None:
    plain, student = make(**options), make(distilled=True, **options)
    teacher = make(num_heads=2, embed_dim=24).eval()  # heads of another width, and so another scale
    assert list(plain.state_dict()) == list(student.state_dict())
    student.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(student(images), plain(images))
    tap = AttentionTap(student, teacher, layers=[(0, 0), (-1, -1)])
    with torch.no_grad():
        expected_teacher = teacher(images)
    assert torch.equal(tap.teacher_logits(images), expected_teacher)
    logits = student(images)
    torch.testing.assert_close(logits, plain(images))
    kl = tap.take_kl()
    torch.testing.assert_close(kl, expected_kl(plain, teacher, images), rtol=1e-4, atol=1e-7)
    kl.backward()
    grads = {name: each.grad for name, each in student.named_parameters()}
    assert grads["blocks.1.attn.qkv.weight"].abs().sum() > 0
    assert grads["head.weight"] is None, "the KL alone does not reach the head"
    student(images)  # as in evaluation: nothing arms it
    with pytest.raises(RuntimeError, match="no KL to take"):
        tap.take_kl()


def expected_kl(student, teacher, images) -> torch.Tensor:
    """The eager KL of the maps of both blocks, from what goes into them."""
    kept: dict[tuple[int, int], torch.Tensor] = {}
    hooks = [
        model.blocks[index].attn.qkv.register_forward_hook(
            lambda _m, _i, out, key=(which, index): kept.__setitem__(key, out)
        )
        for which, model in enumerate((student, teacher))
        for index in (0, 1)
    ]
    with torch.no_grad():
        student(images), teacher(images)
    for hook in hooks:
        hook.remove()
    parts = []
    for index in (0, 1):
        q, k, _ = split_heads(student.blocks[index].attn, kept[0, index])
        q_t, k_t, _ = split_heads(teacher.blocks[index].attn, kept[1, index])
        parts.append(attention_kl(q, k, q_t, k_t, backend="eager"))
    return torch.stack(parts).mean()


def test_a_distillation_token_is_left_out_by_slices() -> None:
    student, teacher = make("deit_tiny_distilled_patch16_224", distilled=True), make(num_heads=2)
    images = torch.randn(2, 3, 32, 32)
    tap = AttentionTap(student, teacher, layers=[(0, 0)], token_slice=(slice(2, None), slice(1, None)))
    tap.teacher_logits(images)
    student(images)
    assert tap.take_kl() > 0
    tap = AttentionTap(student, teacher, layers=[(0, 0)])
    tap.teacher_logits(images)
    with pytest.raises(ValueError, match="18 student and 17 teacher tokens"):
        student(images)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("eva02_tiny_patch14_224", {"img_size": 28}, "Eva, block 0: .*RoPE"),
        ("beit_base_patch16_224", {"depth": 1}, "Beit, block 0: .*relative position bias"),
        ("cait_xxs24_224", {"depth": 1, "img_size": 32}, "Cait, block 0: .*CaiT"),
        ("swin_tiny_patch4_window7_224", {}, "SwinTransformer has no list of transformer `blocks`"),
        ("resnet18", {}, "ResNet has no list of transformer `blocks`"),
    ],
)
def test_models_it_cannot_serve_are_refused_by_name(name, options, words) -> None:
    with pytest.raises(UnsupportedAttentionError, match=words):
        plain_attention(timm.create_model(name, **options), 0, "teacher")


def test_what_does_not_fit_is_said() -> None:
    plain, student = make(), make(distilled=True)
    with pytest.raises(ValueError, match="attn_layer=DistilledAttention"):
        AttentionTap(plain, plain, layers=[(0, 0)])
    with pytest.raises(ValueError, match="has 2 blocks; there is no block 2"):
        AttentionTap(student, plain, layers=[(2, 0)])
    with pytest.raises(ValueError, match="layers is empty"):
        AttentionTap(student, plain, layers=[])
    dropping = make(distilled=True, attn_drop_rate=0.1)
    tap = AttentionTap(dropping, plain, layers=[(0, 0)])
    plain.eval()
    tap.teacher_logits(torch.randn(1, 3, 32, 32))
    with pytest.raises(UnsupportedAttentionError, match=r"attention dropout 0\.1"):
        dropping(torch.randn(1, 3, 32, 32))
