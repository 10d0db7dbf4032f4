"""Evaluations of a run: the score of the current weights, and the best weights of a stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cn_clip import distributed, weights
from cn_clip.eval.metrics.recall import Retrieval
from cn_clip.publish import atomic_file
from cn_clip.train.model.freeze import is_trainable
from cn_clip.train.optim import warmup_steps
from cn_clip.train.parallel import full_state, is_sharded, reshard
from cn_clip.train.recipe.schema import Recipe
from cn_clip.train.run.checkpoint import Progress
from cn_clip.train.run.events import ScoreEvent
from cn_clip.train.stage import Run, Training
from cn_clip.train.validation import Vectors, embed, score


def evaluate_and_keep_best(run: Run, training: Training, progress: Progress) -> None:
    """Evaluate the current weights, and save them if they are the best of the stage."""
    stage, stopping = training.stage, progress.early_stopping
    if run.validation is not None:
        recall = evaluate(run, training, progress).mean_recall
        # A score that does not improve within the warm-up does not use up the patience.
        warm = progress.step > warmup_steps(training.steps, stage.optimizer)
        options = stage.early_stopping if warm else None
        best = stopping.add(recall, progress.step, options, counts=warm)
        # Weights that score below the initial ones may score above them when interpolated.
        if stopping.add_trained(recall) if stage.interpolate == "auto" else best:
            _save_best(run, training, progress)
    elif progress.step >= training.steps:  # without a score, the last weights are kept
        stopping.best_step = progress.step
        _save_best(run, training, progress)


def stage_finished(training: Training, progress: Progress) -> bool:
    """Return whether a stage has done all its steps, or its score has stopped improving."""
    return progress.step >= training.steps or progress.early_stopping.ended(
        training.stage.early_stopping
    )


def evaluate(run: Run, training: Training, progress: Progress) -> Retrieval:
    """Measure and log the score of the current weights, or of their moving average."""
    assert run.validation is not None
    validation, model, average = run.validation, training.model, training.average
    if average is not None:
        average.swap(model)
    model.eval()
    try:
        images, texts = embed(
            model,
            validation,
            autocast=run.score_dtype,
            images=training.images,
            divided=not is_sharded(model),
            between=run.stop_between,
        )
    finally:  # a run that stops here still saves its state
        reshard(model)
        if average is not None:
            average.swap(model)
        training.set_modes()
    if not is_trainable(model.visual):
        training.images = images
    recall = distributed.on_main(lambda: score(images, texts, validation))
    if progress.total == 0 and distributed.is_main():
        keep_embeddings(run.folder, "before", images, texts)
    log_score(run, training.stage.name, progress, recall)
    return recall


def log_score(run: Run, stage: str, progress: Progress, recall: Retrieval) -> None:
    """Log a score; for ``stage`` see ``ScoreEvent``."""
    t2i, i2t = recall.text_to_image, recall.image_to_text
    run.log.record(
        ScoreEvent(
            progress.total,
            stage=stage,
            step=progress.step,
            before=progress.before,
            best=progress.early_stopping.best,
            mean_recall=recall.mean_recall,
            t2i_r1=t2i.r1,
            t2i_r5=t2i.r5,
            t2i_r10=t2i.r10,
            i2t_r1=i2t.r1,
            i2t_r5=i2t.r5,
            i2t_r10=i2t.r10,
        )
    )


def keep_embeddings(folder: Path, name: str, images: Vectors, texts: Vectors) -> None:
    """Save the embeddings of the validation pairs for the report, in float16."""
    with atomic_file(folder / f"{name}.npz") as path, path.open("wb") as stream:
        np.savez(stream, images=images.astype(np.float16), texts=texts.astype(np.float16))


def _save_best(run: Run, training: Training, progress: Progress) -> None:
    """Save the current weights, or their moving average, as the best of the stage."""
    model, average = training.model, training.average
    if average is not None:
        average.swap(model)
    state = full_state(
        model
    )  # on a CPU it shares memory with the model, so swap back after writing
    if distributed.is_main():
        weights.save_weights(model.config, state, run.folder / best_weights(progress, run.recipe))
    if average is not None:
        average.swap(model)
    distributed.barrier()


def best_weights(progress: Progress, recipe: Recipe) -> str:
    """Return the folder of the stage's best weights, within the run's folder."""
    return f"stages/{progress.stage + 1}-{recipe.stages[progress.stage].name}"
