"""Layers that the towers share: attention, LayerNorm in float32, QuickGELU, checkpointing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention: (B, Lq, D), (B, L, D), (B, L, D) to (B, Lq, D).

    ``mask`` is boolean, of shape (B, 1, 1, L): True where a key may be attended to.
    """
    # The head width is explicit: reshape cannot infer -1 for an empty batch.
    q, k, v = (
        x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)
        for x in (query, key, value)
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)  # (B, H, Lq, D/H) -> (B, Lq, D)


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 for any input dtype, as in the official training."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, OpenAI CLIP's activation (Radford et al., arXiv:2103.00020)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return x * torch.sigmoid(1.702 * x)
        return (1.702 * x).sigmoid_().mul_(x)  # the same bits with one array less


def run_blocks(
    blocks: nn.ModuleList, x: Tensor, *extra: Tensor | None, recompute: bool = False
) -> Tensor:
    """Run ``blocks`` in order; ``recompute`` recomputes activations in the backward pass."""
    for module in blocks:
        block: Callable[..., Tensor] = module
        x = checkpoint(block, x, *extra, use_reentrant=False) if recompute else block(x, *extra)
    return x
