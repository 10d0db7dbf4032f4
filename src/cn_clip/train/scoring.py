"""Scores of a run as it goes: measured when due, the best weights kept, the end of a stage told."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cn_clip import distributed, weights
from cn_clip.eval.metrics.recall import Retrieval
from cn_clip.publish import atomic_file
from cn_clip.train.model.freeze import learns
from cn_clip.train.optim import warmup_of
from cn_clip.train.parallel import reshard, sharded, whole_state
from cn_clip.train.recipe.schema import Recipe
from cn_clip.train.run.checkpoint import Progress
from cn_clip.train.run.loss_watchdog import InterruptedRun
from cn_clip.train.stage import Run, Training
from cn_clip.train.validation import Vectors, embed, score


def measure(run: Run, training: Training, progress: Progress) -> None:
    """Evaluate if it is due, keep weights that are the best, and tell whether the stage is over.

    Raises:
        InterruptedRun: a signal came meanwhile; it is due still.
    """
    if not progress.due:
        return
    progress.due = False
    stage = training.stage
    if run.validation is not None:
        try:
            found = evaluate(run, training, progress)
        except InterruptedRun:
            progress.due = True
            raise
        # Within the warm-up a standstill says nothing.
        warm = progress.step > warmup_of(training.steps, stage.optimizer)
        plateau = stage.plateau if warm else None
        best = progress.course.add(found.mean_recall, progress.step, plateau, counts=warm)
        # Weights below the start's score may be above it when mixed with the start's.
        if progress.course.add_trained(found.mean_recall) if stage.interpolate == "auto" else best:
            _keep(run, training, progress)
    elif progress.step >= training.steps:  # nothing tells which weights are best: the last ones
        progress.course.best_step = progress.step
        _keep(run, training, progress)
    progress.finished = is_over(training, progress)


def is_over(training: Training, progress: Progress) -> bool:
    """Tell whether a stage has done all its steps, or its score has stopped to rise."""
    return progress.step >= training.steps or progress.course.ended(training.stage.plateau)


def evaluate(run: Run, training: Training, progress: Progress) -> Retrieval:
    """Measure and log the score of the current weights, averaged ones if there are."""
    assert run.validation is not None
    validation, model, average = run.validation, training.model, training.average
    if average is not None:
        average.swap(model)
    model.eval()
    try:
        images, texts = embed(
            model,
            validation,
            autocast=run.scored,
            images=training.images,
            divided=not sharded(model),
            tick=run.stop_between,
        )
    finally:  # who stops here still saves the state
        reshard(model)
        if average is not None:
            average.swap(model)
        training.set_modes()
    if not learns(model.visual):
        training.images = images
    found = distributed.on_main(lambda: score(images, texts, validation))
    if progress.total == 0 and distributed.is_main():
        keep_embeddings(run.folder, "before", images, texts)
    log_score(run, training.stage.name, progress, found)
    return found


def log_score(run: Run, stage: str, progress: Progress, found: Retrieval) -> None:
    values = {"mean_recall": found.mean_recall}
    for name, recall in (("t2i", found.text_to_image), ("i2t", found.image_to_text)):
        values |= {f"{name}_r1": recall.r1, f"{name}_r5": recall.r5, f"{name}_r10": recall.r10}
    # What it is to be held against.
    marks = {"before": progress.before, "best": progress.course.best}
    run.log.write("score", progress.total, stage=stage, step=progress.step, **marks, **values)


def keep_embeddings(folder: Path, when: str, images: Vectors, texts: Vectors) -> None:
    with atomic_file(folder / f"{when}.npz") as path, path.open("wb") as stream:
        np.savez(stream, images=images.astype(np.float16), texts=texts.astype(np.float16))


def _keep(run: Run, training: Training, progress: Progress) -> None:
    """Write the current weights, averaged ones if there are, as the best of the stage."""
    model, average = training.model, training.average
    if average is not None:
        average.swap(model)
    state = whole_state(model)  # on a CPU, the model's own memory: swapped back when written
    if distributed.is_main():
        weights.save_weights(model.config, state, run.folder / best_weights(progress, run.recipe))
    if average is not None:
        average.swap(model)
    distributed.barrier()


def best_weights(progress: Progress, recipe: Recipe) -> str:
    return f"stages/{progress.stage + 1}-{recipe.stages[progress.stage].name}"
