"""The text tower: BERT without a pooler, under its Hugging Face parameter names.

Devlin et al., arXiv:1810.04805; the Chinese weights are RoBERTa-wwm-ext's (Cui et al.,
arXiv:1906.08101).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cn_clip.config import TextConfig
from cn_clip.model.layers import LayerNorm, attention, run_blocks

_EPS = 1e-12


class Embeddings(nn.Module):
    """Sum of word, position and token-type embeddings, normalised."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = _embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = _embedding(config.max_positions, config.hidden_size)
        self.token_type_embeddings = _embedding(config.token_types, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        position = self.position_embeddings.weight[: ids.shape[1]]
        x = self.word_embeddings(ids) + position + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x))  # type: ignore[no-any-return]


def _embedding(rows: int, width: int) -> nn.Embedding:
    # Uninitialized: normal_() on the meta device makes torch import its compiler, which takes
    # longer than reading the weights.
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


class _Projections(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)


class _Output(nn.Module):
    """Linear, dropout, residual and LayerNorm, after the attention and after the MLP."""

    def __init__(self, inner: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = LayerNorm(width, eps=_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Multi-head self-attention with separate query, key and value projections."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.self = _Projections(config.hidden_size)
        self.output = _Output(config.hidden_size, config.hidden_size, config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        project = self.self
        dropout = self.dropout if self.training else 0.0
        mixed = attention(
            project.query(x),
            project.key(x),
            project.value(x),
            heads=self.heads,
            mask=mask,
            dropout=dropout,
        )
        return self.output(mixed, x)  # type: ignore[no-any-return]


class _Intermediate(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """One post-norm transformer layer."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.intermediate = _Intermediate(config)
        self.output = _Output(config.intermediate_size, config.hidden_size, config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.layers))


class Bert(nn.Module):
    """Token ids (B, L) to hidden states (B, L, D).

    The signature is the official one: ``attention_mask`` (B, L) is 0 or False for padding, and
    the result is ``(hidden states, None)``, with None for the missing pooler output.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, to save memory."""
        self.grad_checkpointing = enable

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        recompute = self.grad_checkpointing and self.training
        x = self.embeddings(input_ids)
        return run_blocks(self.encoder.layer, x, mask, recompute=recompute), None
