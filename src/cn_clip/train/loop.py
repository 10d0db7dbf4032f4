"""The run: stage by stage, step by step; it can stop anywhere and go on as if it had not."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cn_clip import distributed, weights
from cn_clip.data.loading.loader import map_worker_errors
from cn_clip.data.sources.open import open_mix
from cn_clip.errors import UsageError
from cn_clip.eval.dataset import eval_set_of
from cn_clip.train.batches.batch import Share, shares
from cn_clip.train.interpolation import mix_stage
from cn_clip.train.model.freeze import Course, batch_norm_mode
from cn_clip.train.model.init import initial_model
from cn_clip.train.optim import clamp_logit_scale, rate_at, set_rate, warmup_of
from cn_clip.train.parallel import (
    average_statistics,
    average_unshared,
    clip_gradients,
    pick,
)
from cn_clip.train.recipe.schema import Recipe
from cn_clip.train.run.checkpoint import Progress, load_tensors, read_progress, save_state, states
from cn_clip.train.run.log import Event, Log, read_log
from cn_clip.train.run.loss_watchdog import Guard, InterruptedRun, signals
from cn_clip.train.run.report import mixtures, write_report
from cn_clip.train.run.run_dir import (
    Outcome,
    claim_folders,
    full_disk_named,
    locked,
    prepared,
    write_outcome,
)
from cn_clip.train.scoring import (
    best_weights,
    evaluate,
    is_over,
    keep_embeddings,
    log_score,
    measure,
)
from cn_clip.train.stage import Run, Training, set_up
from cn_clip.train.step import Numbers, backward
from cn_clip.train.validation import embed, score, shared_pairs

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    inputs: Sequence[str | Path] = (),
    tell: Callable[[Event], None] = lambda event: None,
) -> Outcome:
    """Carry out a recipe, or go on with the run in its folder.

    The folder holds everything: the recipe, the log, the states, the best weights of each stage,
    the final weights in ``final``, and ``report.html``. A run that is taken up again gives the same
    losses, bit for bit on a CPU, as one that was never stopped. Under torchrun, each process calls
    this.

    Args:
        recipe: what to do.
        resume: go on with the run in the folder, if there is one.
        allow_changes: go on even though the recipe has changed since.
        inputs: files that are read besides those of the recipe, which is one of them.
        tell: is given every event of the log as it happens.

    Raises:
        UsageError: the recipe cannot be carried out here, or the folder holds another run.
        DataError: the data cannot be read.
        CheckpointError: weights or a state cannot be read or written.
        TrainingError: the loss is no number, or nothing is learned.
        InterruptedRun: a signal asked it to stop; the state is saved.
    """
    if not recipe.data.train:
        raise UsageError(
            "the recipe names no training data; give --train-data, such as folder:photos"
        )
    device = pick(recipe.machine)
    folder = Path(recipe.output.folder).expanduser()
    with ExitStack() as stack:
        stack.enter_context(distributed.start(device.type))
        distributed.on_main(lambda: claim_folders(recipe, inputs))
        if distributed.is_main():
            stack.enter_context(locked(folder))
        finished = prepared(folder, recipe, resume, allow_changes)
        if finished is not None:
            return finished
        log = Log(folder, recipe, tell=tell, writes=distributed.is_main())
        stack.callback(log.close)
        autocast = _AUTOCAST[recipe.machine.precision]
        scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)
        run = Run(
            recipe,
            folder,
            device,
            Numbers(device, autocast, scaler),
            _AUTOCAST[recipe.evaluation.score_precision or recipe.machine.precision],
            log,
            stack.enter_context(signals()),
            open_mix(recipe.data.train),
            eval_set_of(open_mix(recipe.data.val)) if recipe.data.val else None,
            eval_set_of(open_mix(recipe.data.keep_data)) if recipe.data.keep_data else None,
        )
        with map_worker_errors(), full_disk_named(folder):
            return _carried_out(run)


def _carried_out(run: Run) -> Outcome:
    begun = time.monotonic()
    saved = states(run.folder)
    progress = Progress()
    if saved:
        progress = read_progress(saved[-1])
        if progress.scaler:
            run.numbers.scaler.load_state_dict(progress.scaler)
        run.log.write("resumed", progress.total, step=progress.step, state=saved[-1].name)
    else:
        _begin(run)
    state = saved[-1] if saved else None
    while progress.stage < len(run.recipe.stages):
        _stage(run, progress, state)
        progress, state = _advanced(run, progress), None
    return _end(run, progress, time.monotonic() - begun)


def _begin(run: Run) -> None:
    """Build the model that everything starts from, and keep it in the run's folder."""
    recipe = run.recipe
    model, origins = initial_model(recipe.start, recipe.seed)
    run.log.write(
        "start",
        0,
        recipe=recipe.name,
        model=model.config.name,
        parameters=sum(p.numel() for p in model.parameters()),
        device=str(run.device),
        processes=distributed.world_size(),
        pairs=sum(len(part.source) for part in run.mix),
        origins=[str(origin) for origin in origins],
    )
    if run.validation is not None and distributed.is_main():
        shared = shared_pairs(run.validation, run.mix)
        what = "validation pairs are in the training data, so scores will be too high"
        run.warn(what, shared, "shared.txt")
    if distributed.is_main():
        weights.save_weights(model.config, model.state_dict(), run.folder / "start")
    distributed.barrier()


def _stage(run: Run, progress: Progress, state: Path | None) -> None:
    """Train one stage to its end, from its start or from a saved state."""
    stage = run.recipe.stages[progress.stage]
    training = set_up(run, progress)
    if state is not None:
        load_tensors(state, training.tensors())
        progress.finished = is_over(training, progress)  # a longer recipe may go on
        measure(run, training, progress)
    run.log.write(
        "stage",
        progress.total,
        stage=stage.name,
        number=progress.stage,
        step=progress.step,
        steps=training.steps,
        rate=training.rate,
        warmup=warmup_of(training.steps, stage.optimizer),
        batch=stage.global_batch_size,
        learns=sum(p.numel() for p in training.model.parameters() if p.requires_grad),
        batch_norm=batch_norm_mode(training.model),
    )
    if progress.before is None and progress.total == 0 and run.validation is not None:
        found = evaluate(run, training, progress)
        what = "validation pairs or pictures cannot be read, and are left out"
        run.warn(what, run.validation.skipped, "unread.txt")
        progress.before = found.mean_recall
        progress.course.add(found.mean_recall, 0, stage.plateau)
        save_state(run.folder, progress, training.tensors(), keep=run.recipe.output.keep)
    guard = Guard(stage, run.recipe.machine, training.rate, run.recipe.output.stop_at_chance)
    window = _Window()
    while not progress.finished:
        if progress.batch >= len(training.loader):  # another batch size, or more processes
            progress.epoch, progress.batch = progress.epoch + 1, 0
        for share in shares(training.loader, progress.epoch, progress.batch):
            _step(run, training, progress, share, guard, window)
            begun = time.monotonic()
            _after_step(run, training, progress)
            window.since += time.monotonic() - begun  # pairs a second are those of training alone
            if progress.finished:
                break
    what = "training pairs could not be read"
    reasons = [
        each for some in distributed.all_gather_object(training.loader.reasons) for each in some
    ]
    run.warn(what, reasons, f"skipped-{stage.name}.txt", progress.total)


def _step(
    run: Run,
    training: Training,
    progress: Progress,
    share: Share,
    guard: Guard,
    window: _Window,
) -> None:
    """Do one step: gradients, the optimizer, the clamp, the average."""
    progress.step += 1
    progress.total += 1
    if not int(distributed.all_reduce_sum(torch.tensor(len(share), device=run.device))):
        return  # no pair of this batch could be read, by any process
    step, stage, scaler = progress.step - 1, training.stage, run.numbers.scaler
    rate = training.rate * rate_at(step, training.steps, stage.optimizer)
    set_rate(training.optimizer, rate)
    local = math.ceil(stage.global_batch_size / distributed.world_size())
    found = backward(
        training.wrapped,
        share,
        stage,
        run.numbers,
        chunks=math.ceil(local / (stage.micro_batch_size or local)),
        seed=(run.recipe.seed, progress.stage, step),
        teacher=training.teacher,
        sentences=None if training.sentences is None else training.sentences.at(step),
    )
    average_unshared(training.towers)
    average_statistics(training.model)
    loss = float(found)
    guard.check(loss, step)
    scaler.unscale_(training.optimizer)
    learning = [p for group in training.optimizer.param_groups for p in group["params"]]
    norm = clip_gradients(learning, stage.optimizer.clip_norm)
    if not scaler.is_enabled():  # which passes over a step that float16 overflowed in
        guard.check_gradient(norm, step)
    scaler.step(training.optimizer)
    scaler.update()
    training.optimizer.zero_grad(set_to_none=True)
    clamp_logit_scale(training.model)
    if training.average is not None:
        training.average.update(training.model, step)
    window.add(loss, len(share))
    run.log.tick(f"stage {stage.name}", progress.step, training.steps)
    if progress.step % run.recipe.output.log_every == 0 or progress.step in (1, training.steps):
        run.log.write(
            "step",
            progress.total,
            stage=stage.name,
            step=progress.step,
            loss=loss,
            mean_loss=window.mean,
            rate=rate,
            logit_scale=float(training.model.logit_scale.detach().exp()),
            pairs_per_second=round(window.rate * distributed.world_size(), 1),
            skipped=training.loader.skipped,
            gradient_norm=norm,
            **_memory(run.device),
        )
        window.clear()


def _after_step(run: Run, training: Training, progress: Progress) -> None:
    """Evaluate, save or stop, as is due."""
    recipe, stage = run.recipe, training.stage
    progress.batch += 1
    epoch_ended = progress.batch >= len(training.loader)
    if epoch_ended:
        progress.epoch, progress.batch = progress.epoch + 1, 0
    evaluation, every = recipe.evaluation, recipe.evaluation.every_epochs
    progress.due = (
        progress.step >= training.steps
        or (epoch_ended and every > 0 and progress.epoch % every == 0)
        or (evaluation.every_steps is not None and progress.step % evaluation.every_steps == 0)
    )
    stop = run.stop.agreed(run.device)
    if not stop:  # who is told to stop has little time: what is due is done when it goes on
        try:
            measure(run, training, progress)
        except InterruptedRun:
            stop = run.stop.agreed(run.device)
    save_every = recipe.output.save_every
    if (
        stop
        or progress.finished
        or epoch_ended
        or (save_every is not None and progress.step % save_every == 0)
    ):
        progress.scaler = run.numbers.scaler.state_dict()
        save_state(run.folder, progress, training.tensors(), keep=recipe.output.keep)
        run.log.write("saved", progress.total, stage=stage.name, step=progress.step)
    if stop:
        raise InterruptedRun(
            f"stopped at step {progress.total}; the state is saved. Go on with: --resume auto",
            128 + stop,
        )


def _advanced(run: Run, progress: Progress) -> Progress:
    """Return the start of the next stage: the best weights so far, with their score to beat."""
    begun, best = progress.weights, progress.course.best
    interpolate, course = run.recipe.stages[progress.stage].interpolate, progress.course
    if course.best_step > 0 or (interpolate == "auto" and course.trained is not None):
        progress.weights = best_weights(progress, run.recipe)
        if interpolate is not None:
            best = mix_stage(run, progress, begun)
    return Progress(
        stage=progress.stage + 1,
        total=progress.total,
        scaler=progress.scaler,
        before=progress.before,
        weights=progress.weights,
        course=Course(best=best, mark=best),
    )


def _end(run: Run, progress: Progress, seconds: float) -> Outcome:
    """Write the final weights, measure them, and tell the whole story in a page."""
    recipe, final = run.recipe, run.folder / "final"
    model = weights.build(weights.read(run.folder / progress.weights))
    if distributed.is_main():
        weights.save_weights(model.config, model.state_dict(), final)
    if run.validation is not None:
        images, texts = embed(
            model.to(run.device), run.validation, autocast=run.scored, tick=run.stop_between
        )
        found = score(images, texts, run.validation)
        log_score(run, "final", progress, found)
        if distributed.is_main():
            keep_embeddings(run.folder, "after", images, texts)
    run.log.write("end", progress.total, seconds=round(seconds, 1), weights=str(final))
    outcome = None
    if distributed.is_main():
        scores = write_report(run.folder, recipe, run.validation)
        outcome = Outcome(
            str(run.folder),
            str(final),
            progress.total,
            round(seconds, 1),
            scores,
            mixtures(read_log(run.folder)),
        )
        write_outcome(run.folder, outcome)
    whole = distributed.broadcast_object(outcome)
    assert whole is not None
    return whole


@dataclass(slots=True)
class _Window:
    """Losses and pairs since the last line of the log."""

    losses: list[float] = field(default_factory=list)
    pairs: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, loss: float, pairs: int) -> None:
        self.losses.append(loss)
        self.pairs += pairs

    @property
    def mean(self) -> float:
        return sum(self.losses) / max(1, len(self.losses))

    @property
    def rate(self) -> float:
        return self.pairs / max(1e-9, time.monotonic() - self.since)

    def clear(self) -> None:
        self.losses, self.pairs, self.since = [], 0, time.monotonic()


def _memory(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    return {"memory_mb": torch.cuda.max_memory_allocated(device) >> 20}
