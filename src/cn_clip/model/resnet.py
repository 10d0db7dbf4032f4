"""The image tower of RN50: CLIP's ModifiedResNet, under OpenAI's parameter names.

Radford et al., arXiv:2103.00020, section 2.4: a three-convolution stem, average pooling before
every strided convolution (He et al., arXiv:1812.01187; Zhang, arXiv:1904.11486), and attention
pooling at the end.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cn_clip.config import VisionConfig
from cn_clip.model.layers import attention, run_blocks

_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with stride 1; average pooling downsamples."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        out = planes * _EXPANSION
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", nn.Conv2d(channels, out, 1, bias=False)),
                        ("1", nn.BatchNorm2d(out)),
                    ]
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + self.downsample(x))


class AttentionPool2d(nn.Module):
    """Attention pooling with the mean over the grid as query: (B, C, H, W) to (B, D)."""

    def __init__(self, grid: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)  # (B, HW, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # (B, 1 + HW, C)
        x = x + self.positional_embedding.to(x.dtype)
        pooled = attention(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x), heads=self.heads)
        return self.c_proj(pooled[:, 0])  # type: ignore[no-any-return]


class ModifiedResNet(nn.Module):
    """Images (B, 3, S, S) to features (B, ``embed_dim``)."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        width = config.width
        self.input_resolution = config.resolution
        self.output_dim = embed_dim
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        channels = width
        for stage, blocks in enumerate(config.layers):
            planes, stride = width * 2**stage, 1 if stage == 0 else 2
            layer = [Bottleneck(channels, planes, stride)]
            channels = planes * _EXPANSION
            layer += [Bottleneck(channels, planes, 1) for _ in range(1, blocks)]
            self.add_module(f"layer{stage + 1}", nn.ModuleList(layer))
        self.stages = len(config.layers)
        self.attnpool = AttentionPool2d(
            config.resolution // 32, channels, channels // config.head_width, embed_dim
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, to save memory.

        Batch norm would count a recomputed batch twice in its running statistics, so it has an
        effect only while the tower's statistics are frozen.
        """
        self.grad_checkpointing = enable

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(bn(conv(x)))
        x = self.avgpool(x)
        recompute = self.grad_checkpointing and torch.is_grad_enabled() and not self.bn1.training
        for stage in range(self.stages):
            blocks = self.get_submodule(f"layer{stage + 1}")
            assert isinstance(blocks, nn.ModuleList)
            x = run_blocks(blocks, x, recompute=recompute)
        return self.attnpool(x)  # type: ignore[no-any-return]
