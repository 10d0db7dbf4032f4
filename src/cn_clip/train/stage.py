"""A stage as it is at its first step: its model, optimizer and loader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cn_clip import distributed, weights
from cn_clip.data.loading.loader import Loader, Preparation
from cn_clip.data.sources.open import WeightedSource
from cn_clip.embedder import Embedder, load
from cn_clip.errors import UsageError
from cn_clip.eval.dataset import EvalSet
from cn_clip.model.clip import CLIP
from cn_clip.publish import atomic_file
from cn_clip.train.batches.batch import CachedLoader
from cn_clip.train.batches.feature_cache import cache_image_features, tower_fingerprint
from cn_clip.train.batches.text_targets import SentenceBatches
from cn_clip.train.model.freeze import freeze, learns, set_modes, statistics_frozen
from cn_clip.train.model.lora import add_lora
from cn_clip.train.optim import Average, learning_rate, make_optimizer, parameter_groups
from cn_clip.train.parallel import shard, wrap
from cn_clip.train.recipe.schema import Recipe, Stage
from cn_clip.train.run.checkpoint import Progress, tensors_of
from cn_clip.train.run.log import Log
from cn_clip.train.run.loss_watchdog import InterruptedRun, Stop
from cn_clip.train.step import Heads, Numbers, Towers
from cn_clip.train.validation import Vectors

_LISTED = 5  # lines of a warning that are shown


@dataclass(slots=True)
class Run:
    """What all stages share; ``scored`` is the dtype of the towers while a score is measured, None
    for float32."""

    recipe: Recipe
    folder: Path
    device: torch.device
    numbers: Numbers
    scored: torch.dtype | None
    log: Log
    stop: Stop
    mix: list[WeightedSource]
    validation: EvalSet | None
    kept: EvalSet | None = None  # pairs whose score should not suffer

    def stop_between(self) -> None:
        """Stop between two pictures of a score, if asked to; of several processes, none does alone.

        Raises:
            InterruptedRun: a signal came.
        """
        if self.stop.signal and distributed.world_size() == 1:
            raise InterruptedRun(
                "stopped while a score was measured, which is done again when the run goes on. Go "
                "on with: --resume auto",
                128 + self.stop.signal,
            )

    def warn(self, what: str, lines: list[str], file: str, total: int = 0) -> None:
        """Name the first of some lines in the log, and write all of them to a file of the run's."""
        if not lines or not distributed.is_main():
            return
        with atomic_file(self.folder / file) as path:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        more = f" and {len(lines) - _LISTED:,} more" if len(lines) > _LISTED else ""
        text = f"{len(lines):,} {what}: {'; '.join(lines[:_LISTED])}{more}; see {file}"
        self.log.write("warning", total, text=text)


@dataclass(slots=True)
class Training:
    """A stage under way."""

    stage: Stage
    towers: Towers
    wrapped: nn.Module
    optimizer: torch.optim.AdamW
    average: Average | None
    loader: Loader | CachedLoader
    teacher: Embedder | None
    sentences: SentenceBatches | None
    steps: int
    rate: float
    frozen_statistics: bool  # of BatchNorm
    images: Vectors | None = None  # of the validation pictures, while the image tower is locked

    @property
    def model(self) -> CLIP:
        return self.towers.model

    def set_modes(self) -> None:
        """Put the model in the stage's training mode, at its start and after an evaluation."""
        set_modes(self.model, self.stage.dropout, frozen_statistics=self.frozen_statistics)

    def tensors(self) -> dict[str, Any]:
        """Return all tensors that the next step depends on, sharing memory with them."""
        return tensors_of(self.model, self.towers.heads, self.optimizer, self.average)


def set_up(run: Run, progress: Progress) -> Training:
    """Build a stage's model, optimizer and loader, as at its first step."""
    recipe, stage = run.recipe, run.recipe.stages[progress.stage]
    model = weights.build(weights.read(run.folder / progress.weights))
    freeze(model, stage.freeze)
    if stage.lora is not None:
        add_lora(model, stage.lora, torch.Generator().manual_seed(recipe.seed + progress.stage))
    if stage.cached and learns(model.visual):
        raise UsageError(
            f"stages.{stage.name}.lora.layers match the image tower, whose features are cached; "
            "give patterns of bert.*, or set cached to false"
        )
    if not learns(model):
        raise UsageError(f"stages.{stage.name}.freeze holds every parameter; nothing would learn")
    model.to(run.device)
    if model.config.vision.kind != "vit":
        model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.set_grad_checkpointing(recipe.machine.grad_checkpointing)
    teacher = _teacher(stage, run.device)
    sentences = _sentences(run, stage, model)
    loader = _loader(run, progress, model)
    torch.manual_seed(recipe.seed)  # the heads' weights
    heads = Heads(stage, model.config.embed_dim, None if teacher is None else teacher.dim)
    if recipe.machine.parallel == "fsdp":
        shard(model)
    towers = Towers(model, heads, stage).to(run.device)
    if recipe.machine.compile:
        model.visual.compile()
        model.bert.compile(dynamic=True)
    names = [*model.named_parameters(), *((f"heads.{n}", p) for n, p in heads.named_parameters())]
    groups = parameter_groups(names, stage.optimizer)
    optimizer = make_optimizer(groups, stage.optimizer)
    decay = stage.optimizer.ema
    training = Training(
        stage,
        towers,
        wrap(towers, run.device),
        optimizer,
        Average(model, decay) if decay else None,
        loader,
        teacher,
        sentences,
        stage.steps or (stage.epochs or 1) * len(loader),
        learning_rate(stage.optimizer, stage.global_batch_size),
        statistics_frozen(stage, recipe.start),
    )
    training.set_modes()
    return training


def _teacher(stage: Stage, device: torch.device) -> Embedder | None:
    if stage.loss.teacher is None:
        return None
    return load(stage.loss.teacher, device=str(device))


def _sentences(run: Run, stage: Stage, model: CLIP) -> SentenceBatches | None:
    if stage.loss.sentences is None:
        return None
    return SentenceBatches(
        stage.loss.sentences,
        stage.loss.sentences_batch_size,
        dim=model.config.embed_dim,
        context_length=model.config.context_length,
        stage=stage.name,
        seed=run.recipe.seed,
    )


def _loader(run: Run, progress: Progress, model: CLIP) -> Loader | CachedLoader:
    recipe, stage = run.recipe, run.recipe.stages[progress.stage]
    data, config = recipe.data, model.config
    preparation = Preparation(
        resolution=config.vision.resolution,
        context_length=config.context_length,
        augmented=stage.augment,
        flip=stage.flip,
        fast_decode=data.fast_decode,
        background=config.background,
        seed=recipe.seed,
    )
    rank, world = distributed.rank(), distributed.world_size()
    if not stage.cached:
        loader: Loader | CachedLoader = Loader(
            run.mix,
            preparation,
            stage.global_batch_size,
            seed=recipe.seed,
            rank=rank,
            world_size=world,
            workers=data.workers,
            prefetch_bytes=data.prefetch_mb << 20,
            max_skipped_fraction=data.most_skipped,
            pin_memory=run.device.type == "cuda",
        )
    else:
        folder = recipe.output.features
        cached = cache_image_features(
            run.mix,
            _runner(model, stage, run),
            {"tower": tower_fingerprint(model), "precision": recipe.machine.precision},
            preparation,
            run.folder / "features" / stage.name if folder is None else Path(folder).expanduser(),
            views=stage.views,
            workers=data.workers,
            tick=lambda done, of: _tick(run, done, of),
        )
        loader = CachedLoader(
            run.mix,
            cached,
            stage.global_batch_size,
            context_length=config.context_length,
            seed=recipe.seed,
            rank=rank,
            world_size=world,
            most_skipped=data.most_skipped,
        )
    if not len(loader):
        raise UsageError(
            f"an epoch of {len(loader.plan):,} pairs gives {world} processes no batch; start fewer"
        )
    return loader


def _tick(run: Run, done: int, of: int) -> None:
    """Tell how many pictures have features, and stop between two batches if asked to."""
    run.log.tick("computing features of pictures", done, of)
    if run.stop.signal:
        raise InterruptedRun(
            f"stopped while features were computed, {done:,} of {of:,}; finished shards are kept. "
            "Go on with: --resume auto",
            128 + run.stop.signal,
        )


def _runner(model: CLIP, stage: Stage, run: Run) -> Callable[[Tensor], Tensor]:
    """Return what computes features of pixels with the locked tower, as a step would."""
    towers = Towers(model, Heads(stage, model.config.embed_dim, None), stage).to(run.device)
    set_modes(model)

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        with run.numbers.towers():
            return towers.encode_pixels(pixels.to(run.device))

    return encode
