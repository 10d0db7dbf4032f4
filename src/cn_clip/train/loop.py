"""The training loop: stage by stage, step by step. A run can be interrupted and resumed."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from cn_clip import distributed
from cn_clip.data.loading.loader import map_worker_errors
from cn_clip.data.sources.open import open_mix
from cn_clip.errors import UsageError
from cn_clip.eval.dataset import eval_set_of
from cn_clip.processes import cpu_lacks_bfloat16, usable_cpus
from cn_clip.train.batches.batch import CachedLoader, LocalBatch, local_batches
from cn_clip.train.model.center import center_texts
from cn_clip.train.model.freeze import batch_norm_mode
from cn_clip.train.optim import clamp_logit_scale, lr_at, set_lr, warmup_steps
from cn_clip.train.parallel import (
    average_batch_norm,
    average_unsharded_gradients,
    clip_gradients,
    pick,
)
from cn_clip.train.recipe.schema import Recipe
from cn_clip.train.run.checkpoint import Progress, load_tensors, read_progress, states
from cn_clip.train.run.events import ResumedEvent, SavedEvent, StageEvent, WarningEvent
from cn_clip.train.run.log import Event, Log
from cn_clip.train.run.loss_watchdog import LossWatchdog
from cn_clip.train.run.run_dir import (
    Outcome,
    claim_folders,
    disk_errors_named,
    lock_folder,
    prepare_folder,
)
from cn_clip.train.run.signals import InterruptedRun, catch_stop_signals
from cn_clip.train.run.state_writer import StateWriter
from cn_clip.train.scoring import evaluate, evaluate_and_keep_best, stage_finished
from cn_clip.train.stage import Run, Training, set_up
from cn_clip.train.stage_weights import finish, next_stage, save_start
from cn_clip.train.step import MixedPrecision, backward
from cn_clip.train.step_metrics import StepMetrics, Window, log_step
from cn_clip.train.stragglers import StepTimes, long_waits_reported
from cn_clip.translation import _

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    inputs: Sequence[str | Path] = (),
    on_event: Callable[[Event], None] = lambda event: None,
) -> Outcome:
    """Train by a recipe, or resume the run in its folder.

    The folder has the recipe, the log, the states, the best weights of each stage, the final
    weights in ``final``, and ``report.html``. A resumed run gives the same losses as an
    uninterrupted one, bit for bit on a CPU. Under torchrun, each process calls this.

    Args:
        recipe: the recipe.
        resume: resume the run in the folder, if there is one.
        allow_changes: resume although the recipe has changed.
        inputs: files that are read besides those of the recipe, such as its own file.
        on_event: called with every event of the log.

    Raises:
        UsageError: the recipe cannot be run here, or the folder has another run.
        DataError: the data cannot be read.
        CheckpointError: weights or a state cannot be read or written.
        TrainingError: the loss is NaN or infinite, or stays at chance.
        InterruptedRun: a signal stopped the run; its state is saved.
    """
    if not recipe.data.train:
        raise UsageError(
            _("the recipe has no training data; give --train-data, such as folder:photos")
        )
    device = pick(recipe.machine)
    folder = Path(recipe.output.folder).expanduser()
    with ExitStack() as stack:
        stack.enter_context(distributed.start(device.type))
        distributed.on_main(lambda: claim_folders(recipe, inputs))
        if distributed.is_main():
            stack.enter_context(lock_folder(folder))
        outcome = prepare_folder(folder, recipe, resume, allow_changes)
        if outcome is not None:
            return outcome
        log = Log(folder, recipe, on_event=on_event, writes=distributed.is_main())
        stack.callback(log.close)
        dtype = _AUTOCAST[recipe.machine.precision]
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        output = recipe.output
        writer = StateWriter(folder, keep=output.keep, background=output.background_saves)
        stack.callback(writer.close)
        run = Run(
            recipe=recipe,
            folder=folder,
            device=device,
            precision=MixedPrecision(device, dtype, scaler),
            score_dtype=_AUTOCAST[recipe.evaluation.score_precision or recipe.machine.precision],
            log=log,
            stop=stack.enter_context(catch_stop_signals()),
            states=writer,
            mix=open_mix(
                recipe.data.train,
                workers=usable_cpus(),
                on_progress=lambda done, of: log.tick(_("indexing shards"), done, of or 0),
            ),
            validation=eval_set_of(open_mix(recipe.data.val)) if recipe.data.val else None,
            kept=eval_set_of(open_mix(recipe.data.keep_data)) if recipe.data.keep_data else None,
        )
        with map_worker_errors(), disk_errors_named(folder):
            return _run_stages(run)


def _run_stages(run: Run) -> Outcome:
    started = time.monotonic()
    progress, state = _start_or_resume(run)
    while progress.stage < len(run.recipe.stages):
        _run_stage(run, progress, state)
        progress, state = next_stage(run, progress), None
    return finish(run, progress, time.monotonic() - started)


def _start_or_resume(run: Run) -> tuple[Progress, Path | None]:
    """Return where the run is, and the state that it resumes from, None at the start."""
    saved = states(run.folder)
    if not saved:
        save_start(run)
        if run.device.type == "cpu" and run.recipe.machine.precision == "bf16":
            _warn_of_slow_bfloat16(run)
        return Progress(), None
    progress, state = read_progress(saved[-1]), saved[-1]
    if progress.scaler:
        run.precision.scaler.load_state_dict(progress.scaler)
    run.log.record(ResumedEvent(progress.total, progress.step, state.name))
    return progress, state


def _warn_of_slow_bfloat16(run: Run) -> None:
    if cpu_lacks_bfloat16():
        message = _(
            "this CPU has no bfloat16 instructions: bf16 takes several times as long as fp32; use "
            "--precision fp32"
        )
        run.log.record(WarningEvent(0, message))


def _run_stage(run: Run, progress: Progress, state: Path | None) -> None:
    """Train one stage to its end, from its start or from a saved state."""
    training = set_up(run, progress)
    if state is not None:
        load_tensors(state, training.tensors())
        if progress.evaluation_pending:
            progress.evaluation_pending = False
            evaluate_and_keep_best(run, training, progress)
        progress.finished = stage_finished(training, progress)  # the stage may be longer now
    _log_stage(run, training, progress)
    if progress.before is None and progress.total == 0 and run.validation is not None:
        _evaluate_start(run, training, progress)
    if training.stage.center_texts and progress.step == 0:
        assert isinstance(training.loader, CachedLoader)
        center_texts(training.model, training.loader.mean_image())
    watchdog = LossWatchdog(
        training.stage, run.recipe.machine, training.peak_lr, run.recipe.output.stop_at_chance
    )
    times = StepTimes(run.device)
    times.watch(training.towers)
    with long_waits_reported(times, training.loader, partial(_report_wait, run, progress)):
        _train_stage(run, training, progress, watchdog, times)
    reasons = [
        reason
        for of_process in distributed.all_gather_object(training.loader.reasons)
        for reason in of_process
    ]
    file = f"skipped-{training.stage.name}.txt"
    run.warn(_("training pairs could not be read"), reasons, file, progress.total)


def _train_stage(
    run: Run, training: Training, progress: Progress, watchdog: LossWatchdog, times: StepTimes
) -> None:
    """Run the steps of a stage, from where ``progress`` is to the end."""
    window = Window()
    while not progress.finished:
        if progress.batch >= len(training.loader):  # after a change of batch size or processes
            progress.epoch, progress.batch = progress.epoch + 1, 0
        batches = local_batches(training.loader, progress.epoch, progress.batch)
        for batch in times.waits(batches):
            progress.step += 1
            progress.total += 1
            metrics = _train_step(run, training, progress, batch, watchdog)
            if metrics is not None:
                window.add(metrics.loss, len(batch))
                log_step(run, training, progress, metrics, window)
            for message in times.compare(training.loader):
                run.log.record(WarningEvent(progress.total, message))
            with window.paused(), times.paused():  # only training counts in the pairs per second
                _evaluate_and_save(run, training, progress)
            if progress.finished:
                break


def _report_wait(run: Run, progress: Progress, message: str) -> None:
    """Report from a process that waits; only the main process has a log."""
    if distributed.is_main():
        run.log.record(WarningEvent(progress.total, message))
    else:
        warnings.warn(message, stacklevel=2)


def _log_stage(run: Run, training: Training, progress: Progress) -> None:
    stage = training.stage
    run.log.record(
        StageEvent(
            progress.total,
            stage=stage.name,
            number=progress.stage,
            step=progress.step,
            steps=training.steps,
            lr=training.peak_lr,
            warmup=warmup_steps(training.steps, stage.optimizer),
            batch=stage.global_batch_size,
            trainable=sum(p.numel() for p in training.model.parameters() if p.requires_grad),
            batch_norm=batch_norm_mode(training.model),
        )
    )


def _evaluate_start(run: Run, training: Training, progress: Progress) -> None:
    """Measure the score before the first step, and save the state."""
    assert run.validation is not None
    recall = evaluate(run, training, progress)
    run.warn(
        _("validation pairs or images cannot be read, and are left out"),
        run.validation.skipped,
        "unread.txt",
    )
    progress.before = recall.mean_recall
    progress.early_stopping.add(recall.mean_recall, 0, training.stage.early_stopping)
    _save(run, training, progress, wait=False)


def _train_step(
    run: Run, training: Training, progress: Progress, batch: LocalBatch, watchdog: LossWatchdog
) -> StepMetrics | None:
    """Update the weights by one batch; return None if no process could read any pair of it.

    Raises:
        TrainingError: from the watchdog, before the weights are changed.
    """
    if not int(distributed.all_reduce_sum(torch.tensor(len(batch), device=run.device))):
        return None
    step, stage, scaler = progress.step - 1, training.stage, run.precision.scaler
    lr = training.peak_lr * lr_at(step, training.steps, stage.optimizer)
    set_lr(training.optimizer, lr)
    local_batch_size = math.ceil(stage.global_batch_size / distributed.world_size())
    loss_tensor = backward(
        training.wrapped,
        batch,
        stage,
        run.precision,
        chunks=math.ceil(local_batch_size / (stage.micro_batch_size or local_batch_size)),
        seed=(run.recipe.seed, progress.stage, step),
        teacher=training.teacher,
        text_targets=None if training.text_targets is None else training.text_targets.at(step),
    )
    average_unsharded_gradients(training.towers)
    average_batch_norm(training.model)
    loss = float(loss_tensor)
    watchdog.check(loss, step)
    scaler.unscale_(training.optimizer)
    parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
    norm = clip_gradients(parameters, stage.optimizer.max_grad_norm)
    if not scaler.is_enabled():  # the scaler skips steps in which float16 overflowed
        watchdog.check_gradient(norm, step)
    scaler.step(training.optimizer)
    scaler.update()
    training.optimizer.zero_grad(set_to_none=True)
    clamp_logit_scale(training.model)
    if training.average is not None:
        training.average.update(training.model, step)
    return StepMetrics(loss, lr, norm)


def _evaluate_and_save(run: Run, training: Training, progress: Progress) -> None:
    """Count the batch, then evaluate and save if due.

    Raises:
        InterruptedRun: a signal came; the state is saved.
    """
    progress.batch += 1
    epoch_ended = progress.batch >= len(training.loader)
    if epoch_ended:
        progress.epoch, progress.batch = progress.epoch + 1, 0
    evaluate_now = _evaluation_due(run.recipe, training, progress, epoch_ended)
    stop = run.stop.on_any_process(run.device)
    if evaluate_now and not stop:
        try:
            evaluate_and_keep_best(run, training, progress)
            progress.finished = stage_finished(training, progress)
        except InterruptedRun:
            stop = run.stop.on_any_process(run.device)
    # On a stop signal, save first; a pending evaluation runs after resume.
    progress.evaluation_pending = evaluate_now and stop != 0
    if stop or _save_due(run.recipe, progress, epoch_ended):
        progress.scaler = run.precision.scaler.state_dict()
        _save(run, training, progress, wait=bool(stop) or progress.finished)
    if stop:
        raise InterruptedRun(
            _(
                "stopped at step {total}; the state is saved. Resume with: --resume auto",
                total=progress.total,
            ),
            128 + stop,
        )


def _save(run: Run, training: Training, progress: Progress, *, wait: bool) -> None:
    """Save a state; without ``wait``, it may be complete later."""
    _log_saved(run, run.states.wait())
    run.states.save(progress, training.tensors())
    if wait or not run.recipe.output.background_saves:
        _log_saved(run, run.states.wait())


def _log_saved(run: Run, saved: Progress | None) -> None:
    if saved is not None and saved.step:  # not the one before the first step
        stage = run.recipe.stages[saved.stage].name
        run.log.record(SavedEvent(saved.total, stage, saved.step))


def _evaluation_due(
    recipe: Recipe, training: Training, progress: Progress, epoch_ended: bool
) -> bool:
    every_epochs, every_steps = recipe.evaluation.every_epochs, recipe.evaluation.every_steps
    return (
        progress.step >= training.steps
        or (epoch_ended and every_epochs > 0 and progress.epoch % every_epochs == 0)
        or (every_steps is not None and progress.step % every_steps == 0)
    )


def _save_due(recipe: Recipe, progress: Progress, epoch_ended: bool) -> bool:
    every = recipe.output.save_every
    return progress.finished or epoch_ended or (every is not None and progress.step % every == 0)
