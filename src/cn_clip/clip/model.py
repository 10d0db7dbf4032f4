"""The official module path of the model, for scripts that import it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from cn_clip import weights
from cn_clip.clip import convert_state_dict, halved_parameters
from cn_clip.config import ModelConfig, TextConfig, VisionConfig
from cn_clip.errors import CheckpointError, UsageError
from cn_clip.model import clip
from cn_clip.model.layers import LayerNorm, QuickGELU
from cn_clip.model.resnet import ModifiedResNet
from cn_clip.model.vision import VisionTransformer
from cn_clip.translation import _

VisualTransformer = VisionTransformer  # the official name

__all__ = [
    "CLIP",
    "LayerNorm",
    "ModifiedResNet",
    "QuickGELU",
    "VisualTransformer",
    "convert_models_to_fp32",
    "convert_state_dict",
    "convert_weights",
    "resize_pos_embed",
    "restore_model",
]


class _AnyCLIP(type):
    """Makes models of ``create_model`` and ``load_from_name`` instances of the official class."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, clip.CLIP)


class CLIP(clip.CLIP, metaclass=_AnyCLIP):
    """The model, created from the official arguments, with random weights."""

    def __init__(
        self,
        embed_dim: int,
        image_resolution: int,
        vision_layers: tuple[int, ...] | list[int] | int,
        vision_width: int,
        vision_patch_size: int | None,
        vocab_size: int,
        text_attention_probs_dropout_prob: float,
        text_hidden_act: str,
        text_hidden_dropout_prob: float,
        text_hidden_size: int,
        text_initializer_range: float,
        text_intermediate_size: int,
        text_max_position_embeddings: int,
        text_num_attention_heads: int,
        text_num_hidden_layers: int,
        text_type_vocab_size: int,
        tokenizer: object = None,
        vision_head_width: int = 64,
        use_flash_attention: bool = False,
    ) -> None:
        """Create a model of these sizes.

        ``text_initializer_range``, ``tokenizer`` and ``use_flash_attention`` are accepted and
        ignored; the fastest attention is always used.

        Raises:
            UsageError: the text tower has another activation than GELU, or two dropout rates.
        """
        if text_hidden_act != "gelu" or (
            text_hidden_dropout_prob != text_attention_probs_dropout_prob
        ):
            raise UsageError(
                _(
                    "the text tower has the activation {activation} and the dropout rates "
                    "{hidden} and {attention}; only gelu and one rate are supported",
                    activation=text_hidden_act,
                    hidden=text_hidden_dropout_prob,
                    attention=text_attention_probs_dropout_prob,
                )
            )
        stages = not isinstance(vision_layers, int)
        vision = VisionConfig(
            "resnet" if stages else "vit",
            image_resolution,
            vision_width,
            tuple(vision_layers) if not isinstance(vision_layers, int) else (vision_layers,),
            vision_patch_size or VisionConfig("vit").patch_size,
            vision_head_width,
        )
        text = TextConfig(
            text_hidden_size,
            text_num_hidden_layers,
            text_num_attention_heads,
            text_intermediate_size,
            vocab_size,
            text_max_position_embeddings,
            text_type_vocab_size,
            text_hidden_dropout_prob,
        )
        super().__init__(ModelConfig("custom", embed_dim, vision, text))
        clip.initialize(self)


@torch.no_grad()
def convert_weights(model: nn.Module) -> None:
    """Convert the parameters that compute in half precision to float16, in place."""
    for parameter in halved_parameters(_plain(model)):
        parameter.data = parameter.data.half()


@torch.no_grad()
def convert_models_to_fp32(model: nn.Module) -> None:
    """Convert all parameters and their gradients to float32, in place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
        if parameter.grad is not None:
            parameter.grad.data = parameter.grad.data.float()


def restore_model(
    model: nn.Module,
    clip_state_dict: Mapping[str, Tensor] | None,
    bert_state_dict: Mapping[str, Tensor] | None,
    use_flash_attention: bool = False,
) -> nn.Module:
    """Load the image tower from one state dict and the text tower from another; return the model
    in eval mode, its weights in float16 as after ``convert_weights``.

    ``cn_clip.clip.load`` does the same with files, of more formats.

    Raises:
        CheckpointError: a tensor has another shape, or a state dict has none of a tower's.
    """
    plain = _plain(model)
    loaded: dict[str, Tensor] = {}
    for state, prefixes in (
        (clip_state_dict, ("visual.", "logit_scale")),
        (bert_state_dict, ("bert.",)),
    ):
        if state is None:
            continue
        tower = {
            name: tensor
            for name, tensor in convert_state_dict(state).items()
            if name.startswith(prefixes) and not name.startswith("bert.pooler")
        }
        if not tower:
            first = ", ".join(list(state)[:3])
            raise CheckpointError(
                _(
                    "the state dict has no {prefix}*; it starts with {first}",
                    prefix=prefixes[0],
                    first=first,
                )
            )
        loaded |= tower
    resize_pos_embed(loaded, plain)
    expected = plain.state_dict()
    weights.check_fit(
        {name: loaded[name] for name in loaded},
        {name: expected[name] for name in expected if name in loaded},
        _("the model"),
    )
    plain.load_state_dict(expected | loaded)
    convert_weights(plain)
    return model.eval()


def resize_pos_embed(
    state_dict: MutableMapping[str, Tensor],
    model: nn.Module,
    interpolation: str = "bicubic",
    seq_dim: int = 1,
    prefix: str = "",
) -> None:
    """Resize the position embeddings of a state dict to those of a model's ViT, in place.

    Raises:
        UsageError: the interpolation is not bicubic.
        CheckpointError: a grid is not square.
    """
    if interpolation != "bicubic":
        raise UsageError(
            _("the interpolation {name!r} is not supported; use bicubic", name=interpolation)
        )
    name, visual = f"{prefix}visual.positional_embedding", _plain(model).visual
    if name in state_dict and isinstance(visual, VisionTransformer):
        length = visual.positional_embedding.shape[0]
        state_dict[name] = weights.resize_positions(state_dict[name], length)


def _plain(model: nn.Module) -> clip.CLIP:
    """Return the model that DDP may have wrapped."""
    inner: Any = getattr(model, "module", model)
    assert isinstance(inner, clip.CLIP)
    return inner
