"""What the heads of dense tasks share: any timm backbone's feature maps, and a pyramid of four scales made of them.

Weights are named `backbone.<timm's name>` and by the head; the heads are `segmentation` and `detection`. A plain ViT has
maps of one stride only, which are scaled as in BEiT and ViTDet (Li et al., 2203.16527); a hierarchical backbone brings
its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from dbscale.errors import TrainingError

NUM_LEVELS = 4


class DenseModel(nn.Module):
    """A backbone without its classifier; a subclass adds the head."""

    def __init__(self, backbone: nn.Module, *, levels: int) -> None:
        """Keep the last feature map (`levels` = 1), or four. Raises TrainingError for models that show none."""
        super().__init__()
        if not hasattr(backbone, "forward_intermediates"):
            raise TrainingError(
                f"timm's {type(backbone).__name__} shows no feature maps (no forward_intermediates); dense tasks need a "
                "model that does, such as a ViT, a ResNet or a ConvNeXt"
            )
        infos = _feature_infos(backbone)
        self.indices = _spread(infos, levels)
        # Without what the maps do not pass through: a parameter without a gradient would stop DDP.
        backbone.prune_intermediate_layers(sorted(set(self.indices)), prune_norm=False, prune_head=True)  # type: ignore[operator]
        self.channels = [int(infos[index]["num_chs"]) for index in self.indices]
        self.strides = [int(infos[index]["reduction"]) for index in self.indices]
        self.backbone = backbone

    def feature_maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """One map [B, D, h, w] for each of `channels`, `strides`; finest first where the backbone has several."""
        wanted = sorted(set(self.indices))
        maps = self.backbone.forward_intermediates(images_BCHW, wanted, norm=True, intermediates_only=True)  # type: ignore[operator]
        return [maps[wanted.index(index)] for index in self.indices]

    def no_weight_decay(self) -> set[str]:
        """As timm's models say for themselves."""
        own = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in own}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of layers, for layer-wise decay; the head, in no group, counts as the last layer."""

        def below(pattern: Any) -> Any:
            if isinstance(pattern, str):
                return rf"^backbone\.(?:{pattern.replace('^', '')})"
            return [(below(each), order) for each, order in pattern]

        matcher = self.backbone.group_matcher(coarse=coarse)  # type: ignore[operator]
        return {name: below(pattern) for name, pattern in matcher.items()}


def _feature_infos(backbone: Any) -> list[dict[str, Any]]:
    return list(getattr(backbone.feature_info, "info", backbone.feature_info))


def _spread(infos: Sequence[dict[str, Any]], levels: int) -> list[int]:
    """Which layers' maps are taken: the last; or the last four of falling resolution, or four spread over equal layers."""
    depth = len(infos)
    if levels == 1:
        return [depth - 1]
    if len({info["reduction"] for info in infos}) >= levels:
        return list(range(depth - levels, depth))
    return [max(-(-depth * (level + 1) // levels) - 1, 0) for level in range(levels)]


class Pyramid(nn.Module):
    """Four maps of `width` channels, each of twice the stride of the one before, joined top-down (Lin et al. 2017)."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int, *, finest: float) -> None:
        """A ViT's maps, all of one stride, are scaled by `finest`, finest / 2, …; falling ones are left as they are."""
        super().__init__()
        falls = strides[0] < strides[-1]
        scales = [1.0 if falls else finest / 2**level for level in range(len(strides))]
        made = [_rescale(depth, scale, width) for depth, scale in zip(channels, scales, strict=True)]
        self.rescale = nn.ModuleList(module for module, _ in made)
        self.join = FeaturePyramidNetwork([depth for _, depth in made], width)
        self.strides = [stride / scale for stride, scale in zip(strides, scales, strict=True)]
        """Pixels of the image to one of the maps that come out."""

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, width, h, w], finest first."""
        scaled = [rescale(each) for rescale, each in zip(self.rescale, maps, strict=True)]
        return list(self.join(OrderedDict((str(level), each) for level, each in enumerate(scaled))).values())


def _rescale(channels: int, scale: float, width: int) -> tuple[nn.Module, int]:
    """A module that changes a map's resolution by this factor, and the channels it gives."""
    if scale == 4:
        first, second = (nn.ConvTranspose2d(depth, width, 2, stride=2) for depth in (channels, width))
        return nn.Sequential(first, LayerNorm2d(width), nn.GELU(), second), width
    if scale == 2:
        return nn.ConvTranspose2d(channels, width, 2, stride=2), width
    if scale == 1:
        return nn.Identity(), channels
    return nn.MaxPool2d(round(1 / scale), ceil_mode=True), channels


def drawn(seed: int, make: Any) -> Any:
    """What `make()` gives, its random numbers a function of the seed; the caller's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()
