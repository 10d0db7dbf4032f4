"""Parameter groups, the learning rate as a function of the step, averaged weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cn_clip.model.clip import CLIP, MAX_LOGIT_SCALE
from cn_clip.train.model.freeze import matched
from cn_clip.train.recipe.checks import rate_factor
from cn_clip.train.recipe.schema import Optimizer

# What the official training does not decay, as it finds it: by these letters in the name. A norm
# of BERT is called LayerNorm, so its weight is decayed, as it was when the weights were made.
_UNDECAYED = ("bn", "ln", "bias", "logit_scale")
# The number of a layer in a name, in each kind of tower.
_LAYER = re.compile(
    r"(visual)\.(?:transformer\.resblocks|backbone\.blocks)\.(\d+)\."
    r"|(visual)\.layer(\d+)\."
    r"|(bert)\.encoder\.layer\.(\d+)\."
)
_BELOW = re.compile(
    r"visual\.(conv\d|bn\d|class_embedding|positional_embedding|ln_pre|backbone\.stem)|bert\.embeddings"
)


def learning_rate(optimizer: Optimizer, global_batch_size: int) -> float:
    """Return the peak rate, scaled from the batch it is stated for to the actual one."""
    if optimizer.for_batch is None or optimizer.scaling == "none":
        return optimizer.learning_rate
    ratio = global_batch_size / optimizer.for_batch
    return optimizer.learning_rate * (ratio if optimizer.scaling == "linear" else math.sqrt(ratio))


def warmup_of(steps: int, optimizer: Optimizer) -> int:
    """Return the steps of the warm-up; one as long as the stage is cut to a tenth of it, since it
    would end before its peak."""
    return optimizer.warmup if optimizer.warmup < steps else steps // 10


def rate_at(step: int, steps: int, optimizer: Optimizer) -> float:
    """Return the share of the peak rate at a step (from 0) of a stage of so many steps.

    The warm-up and the cosine are those of the official training.
    """
    warmup = warmup_of(steps, optimizer)
    if step < warmup:
        return (step + 1) / warmup
    if optimizer.schedule == "constant":
        return 1.0
    if optimizer.schedule == "inverse_sqrt":
        return math.sqrt(max(1, warmup) / max(1, step))
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer
) -> list[dict[str, Any]]:
    """Return the groups of AdamW: with and without decay, and of each depth its own rate.

    ``scale`` in a group is the factor on the rate: ``layer_decay`` to the number of layers above,
    times what ``rates`` say.

    Raises:
        UsageError: a pattern of ``rates`` matches nothing.
    """
    named = list(named)
    factors = _factors([name for name, _ in named], optimizer.rates)
    depths = _depths([name for name, _ in named])  # frozen layers are layers, too
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        decayed = not any(each in name for each in _UNDECAYED)
        scale = optimizer.layer_decay ** depths[name] * factors.get(name, 1.0)
        group = groups.setdefault(
            # Whole weights and shares of them (FSDP2) do not go into one fused step.
            (decayed, scale, isinstance(parameter, DTensor)),
            {
                "params": [],
                "names": [],
                "weight_decay": optimizer.weight_decay if decayed else 0.0,
                "scale": scale,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _factors(names: list[str], rates: Sequence[str]) -> dict[str, float]:
    factors: dict[str, float] = {}
    for pattern, factor in map(rate_factor, rates):
        factors |= dict.fromkeys(matched([pattern], names, "stages.NAME.optimizer.rates"), factor)
    return factors


def _depths(names: list[str]) -> dict[str, int]:
    """Return how many layers of its tower stand above each parameter."""
    layers: dict[str, tuple[str, int]] = {}
    for name in names:
        match = _LAYER.match(name)
        if match is not None:
            tower, number = (each for each in match.groups() if each is not None)
            layers[name] = (tower, int(number))
    numbers = {tower: [n for t, n in layers.values() if t == tower] for tower, _ in layers.values()}
    depths = {}
    for name in names:
        tower = name.split(".")[0]
        if name in layers:
            depths[name] = max(numbers[tower]) + 1 - layers[name][1]
        elif _BELOW.match(name):  # a ViT counts its layers from 0, a ResNet from 1
            depths[name] = max(numbers[tower]) + 2 - min(numbers[tower])
        else:
            depths[name] = 0
    return depths


def make_optimizer(groups: list[dict[str, Any]], optimizer: Optimizer) -> torch.optim.AdamW:
    """Return AdamW over groups; fused where the device has it, which is everywhere but MPS."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(
        groups,
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        fused=devices <= {"cpu", "cuda"},
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group to ``rate`` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


@torch.no_grad()
def clamp_logit_scale(model: CLIP) -> None:
    """Keep the logit scale within [0, log 100], as after every step of the official training."""
    model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


class Average:
    """Exponential moving average of the weights that learn, in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {
            name: parameter.detach().clone().float()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take up the weights after a step (from 0); early ones count more, as the start is far."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(
            list(self.shadow.values()),
            [parameters[name].detach().float() for name in self.shadow],
            1 - decay,
        )

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights with the averaged ones; a second call undoes it."""
        parameters = dict(model.named_parameters())
        for name, average in self.shadow.items():
            current = parameters[name].detach().clone()
            parameters[name].copy_(average)
            average.copy_(current)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.shadow)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.shadow.items():
            tensor.copy_(state[name])
