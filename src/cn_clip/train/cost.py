"""What a run costs: steps, operations, bytes and time, before its first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from cn_clip.config import ModelConfig
from cn_clip.data.sources.open import WeightedSource, parts_of
from cn_clip.data.sources.tar import Tar
from cn_clip.model.clip import CLIP
from cn_clip.train.model.freeze import freeze, is_trainable
from cn_clip.train.model.init import initial_config
from cn_clip.train.recipe.schema import Recipe, Stage

_FLOAT = 4  # bytes
_ADAM = 2  # moments of each trainable parameter
_MEASURED = 64  # shards whose texts are measured


@dataclass(frozen=True, slots=True)
class DataSize:
    """What a data set holds.

    Attributes:
        pairs: in an epoch.
        images: distinct images at most.
        image_bytes: encoded, of an epoch; None if they are in files of their own.
        characters: mean length of the texts; None if unknown.
    """

    pairs: int
    images: int
    image_bytes: int | None = None
    characters: float | None = None


@dataclass(frozen=True, slots=True)
class StageCost:
    """The cost of one stage.

    Attributes:
        steps, batch: number of steps, and pairs in each.
        flops: operations of all steps (a multiplication and an addition are two).
        feature_flops: operations that fill the feature cache.
        image_bytes: encoded images that are read; None if unknown.
        cache_bytes: size of the feature cache.
        memory_bytes: weights, gradients and optimizer in the memory of one process, in float32.
        state_bytes: one saved state.
    """

    name: str
    steps: int
    batch: int
    flops: float
    feature_flops: float
    image_bytes: int | None
    cache_bytes: int
    memory_bytes: int
    state_bytes: int

    def seconds(self, flops_per_second: float) -> float:
        """Return the time at so many operations per second."""
        return (self.flops + self.feature_flops) / flops_per_second


@dataclass(frozen=True, slots=True)
class RunCost:
    """The cost of a run.

    Attributes:
        model: its name.
        parameters: their number.
        image_flops, text_flops: operations of each tower, forwards, for one image and one text.
        tokens: length of a text in ``text_flops``.
        data: what it is trained on.
        stages: their costs.
    """

    model: str
    parameters: int
    image_flops: float
    text_flops: float
    tokens: int
    data: DataSize
    stages: list[StageCost]


def data_size(mix: Sequence[WeightedSource]) -> DataSize:
    """Measure a mix by its indexes; no image is opened."""
    pairs, images, size, known = 0, 0, 0.0, True
    lengths: list[float] = []
    for part in mix:
        count = round(part.weight * len(part.source))
        pairs += count
        for shard in parts_of(part.source):
            if not isinstance(shard, Tar):
                known = False
                images += len(shard)
                continue
            stored, stored_bytes = shard.stored_images()
            images += stored
            size += part.weight * stored_bytes * len(shard) / max(1, stored)
            if len(lengths) < _MEASURED:
                lengths.append(float(np.mean(np.maximum(shard.lengths().astype(np.int64) - 1, 0))))
    characters = float(np.mean(lengths)) if lengths else None
    return DataSize(pairs, images, round(size) if known else None, characters)


def run_cost(recipe: Recipe, data: DataSize, *, world_size: int = 1) -> RunCost:
    """Return what a recipe costs.

    Operations are counted by torch, on tensors without values, for the towers alone: the loss and
    the optimizer take a few percent more. A tower that is trained runs three times (once forwards,
    and twice that backwards), and once more with gradient caching, and with checkpointing.

    Raises:
        UsageError, UnknownModelError, MissingWeightsError: the recipe's model is unknown.
    """
    config = initial_config(recipe.start)
    length = config.context_length
    # A Chinese character is a token; so are the two ends.
    tokens = length if data.characters is None else min(length, round(data.characters) + 2)
    model, image, text = tower_operations(config, tokens)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stages = [
        _stage_cost(recipe, stage, model, data, image, text, world_size) for stage in recipe.stages
    ]
    return RunCost(config.name, parameters, image, text, tokens, data, stages)


def tower_operations(config: ModelConfig, tokens: int) -> tuple[CLIP, float, float]:
    """Return a model without weights, and the operations of its towers for one image and for one
    text of so many tokens, forwards: a multiplication and an addition are two."""
    with torch.device("meta"):
        model = CLIP(config).eval()
        side = config.vision.resolution
        image = _operations(lambda: model.encode_image(torch.zeros(1, 3, side, side)))
        # Not encode_text: what it cuts depends on values, which there are none of here.
        text = _operations(lambda: model.bert(torch.ones(1, tokens, dtype=torch.long)))
    return model, image, text


def _stage_cost(
    recipe: Recipe,
    stage: Stage,
    model: CLIP,
    data: DataSize,
    image: float,
    text: float,
    world_size: int,
) -> StageCost:
    freeze(model, stage.freeze)
    sizes = {p: p.numel() for p in model.parameters()}
    trainable = sum(size for p, size in sizes.items() if p.requires_grad)
    local = -(-stage.global_batch_size // world_size)
    recomputed = int((stage.micro_batch_size or local) < local)  # gradient caching
    full, rest = divmod(data.pairs, stage.global_batch_size)
    steps = stage.steps or (stage.epochs or 1) * (full + (rest >= world_size))
    seen = steps * stage.global_batch_size
    if not stage.steps:
        seen = min(seen, (stage.epochs or 1) * data.pairs)

    def passes(tower: torch.nn.Module) -> int:
        if not is_trainable(tower):
            return 1 + recomputed
        return 3 + recomputed + int(recipe.machine.grad_checkpointing)

    flops = seen * passes(model.bert) * text
    feature_flops, cache, epochs_read = 0.0, 0, seen / max(1, data.pairs)
    if stage.cached:
        feature_flops = data.images * stage.views * image
        width = model.config.embed_dim
        item = 2 if stage.features_stored_as == "fp16" else _FLOAT
        cache, epochs_read = data.images * stage.views * width * item, stage.views
    else:
        flops += seen * passes(model.visual) * image * (1 - stage.mask_ratio)
    weights = sum(sizes.values())
    average = weights if stage.optimizer.ema else 0
    divided = world_size if recipe.machine.parallel == "fsdp" else 1
    return StageCost(
        stage.name,
        steps,
        stage.global_batch_size,
        flops,
        feature_flops,
        None if data.image_bytes is None else round(epochs_read * data.image_bytes),
        cache,
        (weights + trainable * (1 + _ADAM) + average) * _FLOAT // divided,
        (weights + trainable * _ADAM + average) * _FLOAT,
    )


def _operations(run: Callable[[], object]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())
