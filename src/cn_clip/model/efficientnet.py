"""EfficientNet-Lite0 with a bank of text-space prototypes: the image tower of `mini`.

The backbone is EfficientNet-Lite0 (Tan & Le, 2019, arXiv:1905.11946): no squeeze-and-excitation,
ReLU6 instead of swish, a stem and a head that do not scale. A classifier over the 1,000 ImageNet
classes maps its pooled features to probabilities. The feature is the average of one text-space
vector per class, weighted by these probabilities (ConSE, Norouzi et al., 2013, arXiv:1312.5650),
plus a linear residual from the pooled features for content that no class describes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cn_clip.config import VisionConfig
from cn_clip.model.layers import run_blocks

BATCH_NORM_EPS = 1e-3  # TensorFlow's default, used in the training of these weights
STEM_CHANNELS = 32
FEATURES = 1280
CONCEPTS = 1000


@dataclass(frozen=True)
class StageShape:
    """One row of table 1 of the EfficientNet paper."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    StageShape(1, 3, 1, 1, 16),
    StageShape(2, 3, 2, 6, 24),
    StageShape(2, 5, 2, 6, 40),
    StageShape(3, 3, 2, 6, 80),
    StageShape(3, 5, 1, 6, 112),
    StageShape(4, 5, 2, 6, 192),
    StageShape(1, 3, 1, 6, 320),
)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm: (B, C, H, W) -> (B, C', H / stride, W / stride)."""

    def __init__(
        self, channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        # TensorFlow's "SAME" padding: an even input at stride 2 is padded by one more pixel on
        # the right and bottom. Conv2d's padding is symmetric.
        total = kernel - stride
        self.padding = (total // 2, total - total // 2) * 2 if stride > 1 else (0, 0, 0, 0)
        self.conv = nn.Conv2d(
            channels,
            out_channels,
            kernel,
            stride,
            padding=0 if stride > 1 else kernel // 2,
            groups=groups,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, self.padding)
        normed: Tensor = self.norm(self.conv(x))
        return normed


class InvertedResidual(nn.Module):
    """MBConv without squeeze-and-excitation: expand, depthwise filter, project, add the input."""

    def __init__(self, channels: int, stage: StageShape, *, stride: int) -> None:
        super().__init__()
        expanded = channels * stage.expansion
        self.expand = ConvNorm(channels, expanded, 1) if stage.expansion > 1 else None
        self.depthwise = ConvNorm(expanded, expanded, stage.kernel, stride=stride, groups=expanded)
        self.project = ConvNorm(expanded, stage.channels, 1)
        self.adds_input = stride == 1 and channels == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        expanded = x if self.expand is None else F.relu6(self.expand(x))
        projected: Tensor = self.project(F.relu6(self.depthwise(expanded)))
        return x + projected if self.adds_input else projected


class Backbone(nn.Module):
    """EfficientNet-Lite0 up to pooled features: (B, 3, S, S) to (B, 1280); S divides by 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM_CHANNELS, 3, stride=2)
        blocks: list[InvertedResidual] = []
        channels = STEM_CHANNELS
        for stage in STAGES:
            for i in range(stage.blocks):
                stride = stage.stride if i == 0 else 1
                blocks.append(InvertedResidual(channels, stage, stride=stride))
                channels = stage.channels
        self.blocks = nn.ModuleList(blocks)
        self.head = ConvNorm(channels, FEATURES, 1)
        self.grad_checkpointing = False

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self.stem(images))
        recompute = self.grad_checkpointing and torch.is_grad_enabled() and not self.training
        x = run_blocks(self.blocks, x, recompute=recompute)
        return F.relu6(self.head(x)).mean((2, 3))


class EfficientNetLite(nn.Module):
    """Image tower of `mini`: (B, 3, S, S) normalised pixels -> (B, embed_dim) features.

    ``features = softmax(sharpness * classifier(p)) @ prototypes + residual(p)`` with ``p`` the
    pooled features (B, 1280) of the backbone; ``prototypes`` has one text-space vector per class.

    Raises:
        ValueError: S is not a multiple of 32.
    """

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        if config.resolution % 32:
            raise ValueError(
                f"EfficientNet-Lite needs a resolution that is a multiple of 32, not "
                f"{config.resolution}"
            )
        self.input_resolution = config.resolution
        self.output_dim = embed_dim
        self.backbone = Backbone()
        self.classifier = nn.Linear(FEATURES, CONCEPTS)
        self.sharpness = nn.Parameter(torch.ones(()))
        self.prototypes = nn.Parameter(torch.empty(CONCEPTS, embed_dim))
        self.residual = nn.Linear(FEATURES, embed_dim)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, to save memory.

        Batch norm would count a recomputed batch twice in its running statistics, so it has an
        effect only in eval mode.
        """
        self.backbone.grad_checkpointing = enable

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.backbone(images)
        classes = (self.sharpness * self.classifier(pooled)).softmax(-1)  # (B, 1000)
        features: Tensor = classes @ self.prototypes + self.residual(pooled)
        return features
