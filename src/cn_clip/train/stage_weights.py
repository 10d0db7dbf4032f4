"""The weights between stages: those a run starts from, those a stage hands on, the final ones."""

from __future__ import annotations

from cn_clip import distributed, weights
from cn_clip.train.early_stopping import EarlyStopping
from cn_clip.train.interpolation import mix_stage
from cn_clip.train.model.init import initial_model
from cn_clip.train.run.checkpoint import Progress
from cn_clip.train.run.events import FINAL, EndEvent, StartEvent
from cn_clip.train.run.log import read_events
from cn_clip.train.run.report import mixtures, write_report
from cn_clip.train.run.run_dir import Outcome, write_outcome
from cn_clip.train.scoring import best_weights, keep_embeddings, log_score
from cn_clip.train.stage import Run
from cn_clip.train.validation import embed, score, shared_pairs
from cn_clip.translation import _


def save_start(run: Run) -> None:
    """Build the initial model and save it in the run's folder."""
    recipe = run.recipe
    model, origins = initial_model(recipe.start, recipe.seed)
    run.log.record(
        StartEvent(
            0,
            recipe=recipe.name,
            model=model.config.name,
            parameters=sum(p.numel() for p in model.parameters()),
            device=str(run.device),
            processes=distributed.world_size(),
            pairs=sum(len(part.source) for part in run.mix),
            origins=[str(origin) for origin in origins],
        )
    )
    if run.validation is not None and distributed.is_main():
        shared = shared_pairs(run.validation, run.mix)
        run.warn(
            _("validation pairs are in the training data, so scores will be too high"),
            shared,
            "shared.txt",
        )
    if distributed.is_main():
        weights.save_weights(model.config, model.state_dict(), run.folder / "start")
    distributed.barrier()


def next_stage(run: Run, progress: Progress) -> Progress:
    """Return the start of the next stage: the best weights so far, and their score."""
    initial, best = progress.weights, progress.early_stopping.best
    interpolate, stopping = run.recipe.stages[progress.stage].interpolate, progress.early_stopping
    if stopping.best_step > 0 or (interpolate == "auto" and stopping.trained is not None):
        progress.weights = best_weights(progress, run.recipe)
        if interpolate is not None:
            best = mix_stage(run, progress, initial)
    return Progress(
        stage=progress.stage + 1,
        total=progress.total,
        scaler=progress.scaler,
        before=progress.before,
        weights=progress.weights,
        early_stopping=EarlyStopping(best=best, mark=best),
    )


def finish(run: Run, progress: Progress, seconds: float) -> Outcome:
    """Save and evaluate the final weights, and write the report."""
    recipe, final = run.recipe, run.folder / "final"
    model = weights.build(weights.read(run.folder / progress.weights))
    if distributed.is_main():
        weights.save_weights(model.config, model.state_dict(), final)
    if run.validation is not None:
        images, texts = embed(
            model.to(run.device), run.validation, autocast=run.score_dtype, between=run.stop_between
        )
        log_score(run, FINAL, progress, score(images, texts, run.validation))
        if distributed.is_main():
            keep_embeddings(run.folder, "after", images, texts)
    run.log.record(EndEvent(progress.total, round(seconds, 1), str(final)))
    outcome = None
    if distributed.is_main():
        scores = write_report(run.folder, recipe, run.validation)
        outcome = Outcome(
            str(run.folder),
            str(final),
            progress.total,
            round(seconds, 1),
            scores,
            [event.values() for event in mixtures(read_events(run.folder))],
        )
        write_outcome(run.folder, outcome)
    outcome = distributed.broadcast_object(outcome)
    assert outcome is not None
    return outcome
