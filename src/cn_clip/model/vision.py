"""The image tower: CLIP's Vision Transformer, under OpenAI's parameter names.

Radford et al., arXiv:2103.00020, section 2.4; patch masking is FLIP's (Li et al.,
arXiv:2212.00794).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cn_clip.config import VisionConfig
from cn_clip.model.layers import LayerNorm, QuickGELU, attention, run_blocks


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameter names of ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(attention(q, k, v, heads=self.heads))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """The stack of blocks."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))


class VisionTransformer(nn.Module):
    """Images (B, 3, S, S) to features (B, ``embed_dim``)."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        self.input_resolution = config.resolution
        self.output_dim = embed_dim
        self.grid_size = (config.resolution // patch, config.resolution // patch)
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(
            torch.empty(self.grid_size[0] * self.grid_size[1] + 1, width)
        )
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, config.layers[0], width // config.head_width)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, to save memory."""
        self.grad_checkpointing = enable

    def forward(self, images: Tensor, mask_ratio: float = 0.0) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)  # (B, 1 + N, D)
        if mask_ratio:
            x = keep_random_patches(x, mask_ratio)  # (B, 1 + kept, D)
        recompute = self.grad_checkpointing and self.training
        x = run_blocks(self.transformer.resblocks, self.ln_pre(x), recompute=recompute)
        return self.ln_post(x[:, 0]) @ self.proj  # type: ignore[no-any-return]


def keep_random_patches(x: Tensor, mask_ratio: float) -> Tensor:
    """Keep the class token and a random ``1 - mask_ratio`` of the patches (FLIP, section 3).

    (B, 1 + N, D) to (B, 1 + int(N * (1 - mask_ratio)), D). Each image drops its own patches.
    """
    batch, length, width = x.shape
    kept = int((length - 1) * (1 - mask_ratio))
    noise = torch.rand(batch, length - 1, device=x.device)
    index = noise.argsort(dim=1)[:, :kept, None] + 1  # past the class token
    return torch.cat([x[:, :1], x.gather(1, index.expand(-1, -1, width))], dim=1)
