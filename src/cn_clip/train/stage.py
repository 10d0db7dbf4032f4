"""A stage at its first step: model, optimizer and loader."""

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
from cn_clip.train.batches.text_targets import TextTargets
from cn_clip.train.model.freeze import freeze, is_trainable, set_modes, statistics_frozen
from cn_clip.train.model.lora import add_lora
from cn_clip.train.optim import Average, make_optimizer, parameter_groups, peak_lr
from cn_clip.train.parallel import shard, wrap
from cn_clip.train.recipe.schema import Recipe, Stage
from cn_clip.train.run.checkpoint import Progress, tensors_of
from cn_clip.train.run.events import WarningEvent
from cn_clip.train.run.log import Log
from cn_clip.train.run.signals import InterruptedRun, StopRequest
from cn_clip.train.run.state_writer import StateWriter
from cn_clip.train.step import Heads, MixedPrecision, Towers
from cn_clip.train.validation import Vectors
from cn_clip.translation import _

_LISTED = 5  # lines shown in a warning


@dataclass(slots=True)
class Run:
    """A run: recipe, folder, data, and what else all stages have in common.

    ``score_dtype`` is the dtype of the towers in an evaluation, None for float32; ``kept`` are the
    pairs of ``data.keep_data``.
    """

    recipe: Recipe
    folder: Path
    device: torch.device
    precision: MixedPrecision
    score_dtype: torch.dtype | None
    log: Log
    stop: StopRequest
    states: StateWriter
    mix: list[WeightedSource]
    validation: EvalSet | None
    kept: EvalSet | None = None

    def stop_between(self, working: bool) -> bool:
        """Stop between two batches of an evaluation after a signal to any process.

        Returns:
            Whether any process is working.

        Raises:
            InterruptedRun: a signal was received; on all processes at the same call.
        """
        signal, any_working = self.stop.signal, int(working)
        if distributed.world_size() > 1:
            state = torch.tensor([signal, any_working], device=self.device)
            signal, any_working = distributed.all_reduce_max(state).tolist()
        if signal:
            raise InterruptedRun(
                _(
                    "stopped during an evaluation, which runs again after resume. Resume with: "
                    "--resume auto"
                ),
                128 + signal,
            )
        return bool(any_working)

    def warn(self, what: str, lines: list[str], file: str, total: int = 0) -> None:
        """Log a warning with the first of some lines, and write all lines to a file of the run."""
        if not lines or not distributed.is_main():
            return
        with atomic_file(self.folder / file) as path:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        more = _(" and {count:,} more", count=len(lines) - _LISTED) if len(lines) > _LISTED else ""
        text = _(
            "{count:,} {what}: {lines}{more}; see {file}",
            count=len(lines),
            what=what,
            lines="; ".join(lines[:_LISTED]),
            more=more,
            file=file,
        )
        self.log.record(WarningEvent(total, text))


@dataclass(slots=True)
class Training:
    """The state of a stage in training; ``images`` caches the embeddings of the validation images
    while the image tower is frozen."""

    stage: Stage
    towers: Towers
    wrapped: nn.Module
    optimizer: torch.optim.AdamW
    average: Average | None
    loader: Loader | CachedLoader
    teacher: Embedder | None
    text_targets: TextTargets | None
    steps: int
    peak_lr: float
    frozen_statistics: bool  # of BatchNorm
    images: Vectors | None = None

    @property
    def model(self) -> CLIP:
        return self.towers.model

    def set_modes(self) -> None:
        """Set the training mode of each module, at the start and after an evaluation."""
        set_modes(self.model, self.stage.dropout, frozen_statistics=self.frozen_statistics)

    def tensors(self) -> dict[str, Any]:
        """Return all tensors that the next step depends on; they share memory."""
        return tensors_of(self.model, self.towers.heads, self.optimizer, self.average)


def set_up(run: Run, progress: Progress) -> Training:
    """Build a stage's model, optimizer and loader, as at its first step."""
    recipe, stage = run.recipe, run.recipe.stages[progress.stage]
    model = weights.build(weights.read(run.folder / progress.weights))
    freeze(model, stage.freeze)
    if stage.lora is not None:
        add_lora(model, stage.lora, torch.Generator().manual_seed(recipe.seed + progress.stage))
    if stage.cached and is_trainable(model.visual):
        raise UsageError(
            _(
                "stages.{name}.lora.layers match the image tower, whose features are cached; give "
                "patterns of bert.*, or set cached to false",
                name=stage.name,
            )
        )
    if not is_trainable(model):
        raise UsageError(
            _(
                "stages.{name}.freeze matches every parameter, so nothing would be trained; give "
                "fewer patterns",
                name=stage.name,
            )
        )
    model.to(run.device)
    if model.config.vision.kind != "vit":
        model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.set_grad_checkpointing(recipe.machine.grad_checkpointing)
    teacher = _teacher(stage, run.device)
    text_targets = _text_targets(run, stage, model)
    loader = _loader(run, progress, model)
    torch.manual_seed(recipe.seed)  # initial weights of the heads
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
        stage=stage,
        towers=towers,
        wrapped=wrap(towers, run.device),
        optimizer=optimizer,
        average=Average(model, decay) if decay else None,
        loader=loader,
        teacher=teacher,
        text_targets=text_targets,
        steps=stage.steps or (stage.epochs or 1) * len(loader),
        peak_lr=peak_lr(stage.optimizer, stage.global_batch_size),
        frozen_statistics=statistics_frozen(stage, recipe.start),
    )
    training.set_modes()
    return training


def _teacher(stage: Stage, device: torch.device) -> Embedder | None:
    if stage.loss.teacher is None:
        return None
    return load(stage.loss.teacher, device=str(device))


def _text_targets(run: Run, stage: Stage, model: CLIP) -> TextTargets | None:
    if stage.loss.text_targets is None:
        return None
    return TextTargets(
        stage.loss.text_targets,
        stage.loss.text_targets_batch_size,
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
            max_skipped_fraction=data.max_skipped_fraction,
            pin_memory=run.device.type == "cuda",
        )
    else:
        folder = recipe.output.features
        cached = cache_image_features(
            run.mix,
            _feature_function(model, stage, run),
            {"tower": tower_fingerprint(model), "precision": recipe.machine.precision},
            preparation,
            run.folder / "features" / stage.name if folder is None else Path(folder).expanduser(),
            views=stage.views,
            workers=data.workers,
            precision=stage.features_stored_as,
            tick=lambda done, of: _report_features(run, done, of),
        )
        loader = CachedLoader(
            run.mix,
            cached,
            stage.global_batch_size,
            context_length=config.context_length,
            seed=recipe.seed,
            rank=rank,
            world_size=world,
            max_skipped_fraction=data.max_skipped_fraction,
        )
    if not len(loader):
        raise UsageError(
            _(
                "{pair_count:,} pairs are too few for a batch of {world} processes; start fewer",
                pair_count=len(loader.plan),
                world=world,
            )
        )
    return loader


def _report_features(run: Run, done: int, of: int) -> None:
    """Report the progress of the feature cache, and stop between two batches on a signal."""
    run.log.tick(_("computing image features"), done, of)
    if run.stop.signal:
        raise InterruptedRun(
            _(
                "stopped while computing features, {done:,} of {of:,}; finished shards are kept. "
                "Resume with: --resume auto",
                done=done,
                of=of,
            ),
            128 + run.stop.signal,
        )


def _feature_function(model: CLIP, stage: Stage, run: Run) -> Callable[[Tensor], Tensor]:
    """Return a function from pixels to features of the frozen tower, as in a training step."""
    towers = Towers(model, Heads(stage, model.config.embed_dim, None), stage).to(run.device)
    set_modes(model)

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        with run.precision.autocast():
            return towers.encode_pixels(pixels.to(run.device))

    return encode
