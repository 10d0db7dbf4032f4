"""Learning rate schedule, parameter groups of AdamW, and the moving average of the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cn_clip.model.clip import CLIP, MAX_LOGIT_SCALE
from cn_clip.train.model.freeze import match_names
from cn_clip.train.recipe.consistency import parse_lr_multiplier
from cn_clip.train.recipe.schema import Optimizer

# Weight decay skips parameters with these substrings in their names, as in the official training.
# BERT's norms are called LayerNorm, so their weights are decayed, as when the weights were trained.
_NO_DECAY = ("bn", "ln", "bias", "logit_scale")
# The layer number in a parameter name, for each kind of tower.
_LAYER = re.compile(
    r"(visual)\.(?:transformer\.resblocks|backbone\.blocks)\.(\d+)\."
    r"|(visual)\.layer(\d+)\."
    r"|(bert)\.encoder\.layer\.(\d+)\."
)
_BELOW_LAYERS = re.compile(
    r"visual\.(conv\d|bn\d|class_embedding|positional_embedding|ln_pre|backbone\.stem)|bert\.embeddings"
)


def peak_lr(optimizer: Optimizer, global_batch_size: int) -> float:
    """Return the peak learning rate, scaled from the reference batch size to the actual one."""
    if optimizer.reference_batch_size is None or optimizer.scaling == "none":
        return optimizer.learning_rate
    ratio = global_batch_size / optimizer.reference_batch_size
    return optimizer.learning_rate * (ratio if optimizer.scaling == "linear" else math.sqrt(ratio))


def warmup_steps(steps: int, optimizer: Optimizer) -> int:
    """Return the warm-up steps: 10 % of the stage if it is not longer than ``optimizer.warmup``."""
    return optimizer.warmup if optimizer.warmup < steps else steps // 10


def lr_at(step: int, steps: int, optimizer: Optimizer) -> float:
    """Return the learning rate of a step (from 0) of a stage of ``steps`` steps, as a fraction of
    the peak.

    Warm-up and cosine are those of the official training.
    """
    warmup = warmup_steps(steps, optimizer)
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
    """Return the parameter groups of AdamW, by weight decay and learning rate.

    ``scale`` in a group is the factor on the learning rate: ``layer_decay`` to the power of the
    number of layers above, times the factor of ``lr_multipliers``.

    Raises:
        UsageError: a pattern of ``lr_multipliers`` matches no parameter.
    """
    named = list(named)
    factors = _factors([name for name, _ in named], optimizer.lr_multipliers)
    depths = _depths([name for name, _ in named])  # frozen layers count
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        decayed = not any(part in name for part in _NO_DECAY)
        scale = optimizer.layer_decay ** depths[name] * factors.get(name, 1.0)
        group = groups.setdefault(
            # A fused step does not take tensors and DTensors (FSDP2) together.
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


def _factors(names: list[str], multipliers: Sequence[str]) -> dict[str, float]:
    factors: dict[str, float] = {}
    for pattern, factor in map(parse_lr_multiplier, multipliers):
        matches = match_names([pattern], names, "lr_multipliers")
        factors |= dict.fromkeys(matches, factor)
    return factors


def _depths(names: list[str]) -> dict[str, int]:
    """Return the number of layers above each parameter in its tower."""
    layers: dict[str, tuple[str, int]] = {}
    for name in names:
        match = _LAYER.match(name)
        if match is not None:
            tower, number = (group for group in match.groups() if group is not None)
            layers[name] = (tower, int(number))
    numbers = {tower: [n for t, n in layers.values() if t == tower] for tower, _ in layers.values()}
    depths = {}
    for name in names:
        tower = name.split(".")[0]
        if name in layers:
            depths[name] = max(numbers[tower]) + 1 - layers[name][1]
        elif _BELOW_LAYERS.match(name):  # a ViT counts its layers from 0, a ResNet from 1
            depths[name] = max(numbers[tower]) + 2 - min(numbers[tower])
        else:
            depths[name] = 0
    return depths


def make_optimizer(groups: list[dict[str, Any]], optimizer: Optimizer) -> torch.optim.AdamW:
    """Return AdamW over the groups; fused, except on MPS."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(
        groups,
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        fused=devices <= {"cpu", "cuda"},
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to ``lr`` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


@torch.no_grad()
def clamp_logit_scale(model: CLIP) -> None:
    """Keep the logit scale within [0, log 100], as after every step of the official training."""
    model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


class Average:
    """Exponential moving average of the trainable weights, in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {
            name: parameter.detach().clone().float()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the weights after a step (from 0); the decay is lower in the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(
            list(self.shadow.values()),
            [parameters[name].detach().float() for name in self.shadow],
            1 - decay,
        )

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Swap the model's weights with the averaged ones; a second call undoes it."""
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
