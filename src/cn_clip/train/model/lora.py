"""Low-rank updates of chosen matrices: LoRA (Hu et al., 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cn_clip.errors import UsageError
from cn_clip.model.clip import CLIP
from cn_clip.train.model.freeze import match_names
from cn_clip.train.recipe.schema import Lora
from cn_clip.translation import _


class LowRank(nn.Module):
    """W (out, in) to W + alpha / rank * B A; A is (rank, in), and B (out, rank) is initially 0."""

    def __init__(self, weight: Tensor, lora: Lora, generator: torch.Generator) -> None:
        super().__init__()
        out, inner = weight.shape
        self.scale = lora.alpha / lora.rank
        a = torch.empty(lora.rank, inner)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_a = nn.Parameter(a.to(weight))
        self.lora_b = nn.Parameter(torch.zeros(out, lora.rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.lora_b @ self.lora_a)


def add_lora(model: CLIP, lora: Lora, generator: torch.Generator) -> list[str]:
    """Add trainable updates to the matrices that ``lora.layers`` matches, and freeze all other
    parameters but the logit scale.

    Returns:
        The names of the matrices.

    Raises:
        UsageError: a pattern matches no parameter, or one that is not a matrix.
    """
    parameters = dict(model.named_parameters())
    names = sorted(match_names(lora.layers, parameters, "lora.layers"))
    for name, parameter in parameters.items():
        parameter.requires_grad_(parameter.requires_grad and name == "logit_scale")
    for name in names:
        weight = parameters[name]
        if weight.ndim != 2:
            raise UsageError(
                _(
                    "lora.layers: {name} has shape {shape}; match matrices only",
                    name=name,
                    shape=list(weight.shape),
                )
            )
        owner, _unused, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        parametrize.register_parametrization(module, attribute, LowRank(weight, lora, generator))
        module.parametrizations[attribute].original.requires_grad_(False)  # type: ignore[union-attr, index]
    return names


def plain_state(model: CLIP) -> dict[str, Tensor]:
    """Return the state dict under official names, with the updates merged into the weights."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".parametrizations." not in name and not name.startswith("parametrizations."):
            state[name] = tensor
        elif name.endswith(".original"):
            owner, _, rest = name.partition("parametrizations.")
            attribute = rest.removesuffix(".original")
            module = model.get_submodule(owner.rstrip("."))
            state[f"{owner}{attribute}"] = getattr(module, attribute).detach()
    return state
