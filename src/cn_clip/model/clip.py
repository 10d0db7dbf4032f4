"""The model: an image tower and a text tower that project to one space.

Yang et al., "Chinese CLIP", arXiv:2211.01335.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cn_clip.config import ModelConfig
from cn_clip.model.efficientnet import EfficientNetLite
from cn_clip.model.resnet import ModifiedResNet
from cn_clip.model.text import Bert
from cn_clip.model.vision import SelfAttention, VisionTransformer
from cn_clip.tokenizer import Tokenizer, default_tokenizer

MAX_LOGIT_SCALE = 4.6052  # log 100, the clamp used after each optimizer step in training

_PADDING_ID = 0
_TOWERS: dict[str, Callable[..., nn.Module]] = {
    "vit": VisionTransformer,
    "resnet": ModifiedResNet,
    "efficientnet_lite": EfficientNetLite,
}


class CLIP(nn.Module):
    """Image and text towers with the official state-dict names, shapes and methods."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = _TOWERS[config.vision.kind](config.vision, config.embed_dim)
        self.bert = Bert(config.text)
        self.text_projection = nn.Parameter(torch.empty(config.text.hidden_size, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the towers."""
        return self.text_projection.dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that all models share, under the official attribute name."""
        return default_tokenizer()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of both towers in the backward pass, to save memory."""
        for tower in (self.visual, self.bert):
            cast(Callable[[bool], None], tower.set_grad_checkpointing)(enable)

    def encode_image(self, image: Tensor, mask_ratio: float = 0) -> Tensor:
        """Return features (B, D), not normalised, of prepared images (B, 3, S, S).

        ``mask_ratio`` is the fraction of patches dropped at random (FLIP). Towers other than ViT
        ignore it, as in the official package.
        """
        image = image.to(self.dtype)
        if isinstance(self.visual, VisionTransformer):
            return cast(Tensor, self.visual(image, mask_ratio))
        return cast(Tensor, self.visual(image))

    def encode_text(self, text: Tensor) -> Tensor:
        """Return features (B, D), not normalised, of token ids (B, L), 0 for padding.

        The feature is the last layer's [CLS] times ``text_projection``. Columns that have only
        padding are removed first. This saves time and changes no feature: positions are absolute
        and padding is masked.
        """
        text, mask = _trim(text)
        hidden, _ = cast(tuple[Tensor, None], self.bert(text, attention_mask=mask))
        return hidden[:, 0].to(self.dtype) @ self.text_projection

    def forward(
        self, image: Tensor | None, text: Tensor | None, mask_ratio: float = 0
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return ``(image embeddings, text embeddings, logit scale)``, or one tower's features.

        With both inputs, the embeddings have unit length and the scale is the factor on cosines.
        If one input is None, the result is the other tower's features, as in the official package.
        """
        if image is None:
            if text is None:
                raise ValueError("image and text are both None; give at least one")
            return self.encode_text(text)
        if text is None:
            return self.encode_image(image)
        return (
            F.normalize(self.encode_image(image, mask_ratio), dim=-1),
            F.normalize(self.encode_text(text), dim=-1),
            self.logit_scale.exp(),
        )

    def get_similarity(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return scaled cosines ``(logits_per_image (N, M), logits_per_text (M, N))``."""
        image_embeddings = F.normalize(self.encode_image(image), dim=-1)
        text_embeddings = F.normalize(self.encode_text(text), dim=-1)
        logits_per_image = self.logit_scale.exp() * image_embeddings @ text_embeddings.t()
        return logits_per_image, logits_per_image.t()


def _trim(ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Remove columns of padding; return ids (B, L') and a mask (B, L'), None without padding."""
    mask = ids != _PADDING_ID
    if _is_traced(ids):  # the length would become a constant of the graph, or break it
        return ids, mask
    columns = mask.any(dim=0).nonzero()
    longest = int(columns[-1]) + 1 if len(columns) else 1
    ids, mask = ids[:, :longest], mask[:, :longest]
    return ids, None if bool(mask.all()) else mask


def _is_traced(tensor: Tensor) -> bool:
    """Whether the computation is being traced, exported or compiled."""
    return (
        torch.compiler.is_compiling()  # torch.compile, torch.export
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch.onnx.is_in_onnx_export()
        or isinstance(tensor, torch.fx.Proxy)
    )


def initialize(model: CLIP, generator: torch.Generator | None = None) -> None:
    """Initialize all weights at random, in place.

    ViT and projections are initialized as in CLIP, BERT as in its paper.
    """

    def normal(tensor: Tensor, std: float) -> None:
        nn.init.normal_(tensor, std=std, generator=generator)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            in_bert = name.startswith("bert.")
            normal(module.weight, 0.02 if in_bert else module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            normal(module.weight, 0.02)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, SelfAttention):
            normal(module.in_proj_weight, module.in_proj_weight.shape[1] ** -0.5)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, VisionTransformer):
            scale = module.proj.shape[0] ** -0.5
            for parameter in (module.class_embedding, module.positional_embedding, module.proj):
                normal(parameter, scale)
        elif isinstance(module, EfficientNetLite):
            nn.init.ones_(module.sharpness)
            normal(module.prototypes, module.prototypes.shape[1] ** -0.5)
        elif name.endswith("attnpool"):
            embedding = cast(Tensor, module.positional_embedding)
            normal(embedding, embedding.shape[1] ** -0.5)
    normal(model.text_projection, model.text_projection.shape[0] ** -0.5)
    nn.init.constant_(model.logit_scale, math.log(1 / 0.07))
