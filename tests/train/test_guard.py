"""What stops a run: a NaN or infinite loss, a loss at chance, a signal."""

import math
import os
import signal
import threading

import pytest
import torch

from cn_clip.errors import TrainingError
from cn_clip.train.recipe.schema import Loss, Machine, Optimizer, Stage
from cn_clip.train.run.loss_watchdog import LossWatchdog
from cn_clip.train.run.signals import StopRequest, catch_stop_signals


def guard_of(precision="bf16", stop_at_chance=100, loss=None, batch=64, warmup=0):
    stage = Stage(
        name="first",
        epochs=1,
        global_batch_size=batch,
        loss=loss or Loss(),
        optimizer=Optimizer(warmup=warmup),
    )
    return LossWatchdog(stage, Machine(precision=precision), 5e-4, stop_at_chance)


def stopped_at(guard, losses):
    """Return the step at which a run of these losses is stopped, and why; or None."""
    for step, loss in enumerate(losses):
        try:
            guard.check(loss, step)
        except TrainingError as error:
            return step, str(error)
    return None


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_nan_loss_is_reported_with_the_learning_rate_and_a_remedy(loss):
    with pytest.raises(TrainingError) as caught:
        guard_of().check(loss, 6)
    said = str(caught.value)
    assert said.startswith(f"the loss is {loss} at step 7 of stage first")
    assert "5.0e-04 for a batch of 64" in said and "a tenth" in said and "--max-grad-norm 1" in said
    assert "are kept" in said


def test_in_float16_the_precision_is_the_likelier_cause():
    with pytest.raises(TrainingError, match=r"float16 has probably overflowed.*--precision bf16"):
        guard_of("fp16").check(float("nan"), 0)


def test_a_loss_at_chance_stops_the_run_with_causes_and_remedies():
    """OFA-Sys/Chinese-CLIP#362: a rate of 3e-4 and a loss near ln(128) for hours."""
    step, said = stopped_at(guard_of(batch=128), [math.log(128)] * 500)
    assert step == 99
    assert "after 100 steps the loss is 4.852, and ln(128) = 4.852" in said
    for each in (
        "5.0e-04 for a batch of 128",
        "a tenth",
        "cn-clip data check",
        "--stop-at-chance 0",
    ):
        assert each in said


def noise(count, around, spread, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (around + spread * torch.randn(count, generator=rng)).tolist()


@pytest.mark.parametrize(
    ("losses", "options"),
    [
        ([math.log(64) * (1 - n / 300) for n in range(300)], {}),  # it falls
        (noise(300, 0.9 * math.log(64), 0.3), {}),  # it stands, but below chance
        ([9.0] * 50 + [3.0] * 250, {}),  # a bad beginning
        ([math.log(64)] * 99, {}),  # too early to tell
        ([math.log(64)] * 300, {"stop_at_chance": 0}),
        ([math.log(64)] * 300, {"loss": Loss(kind="sigmoid")}),  # whose chance is another
        ([math.log(64)] * 300, {"loss": Loss(text_targets="s")}),  # pairs and sentences together
        ([math.log(64)] * 300, {"loss": Loss(teacher="t", teacher_features=1.0)}),
    ],
)
def test_a_run_with_a_falling_loss_continues(losses, options):
    assert stopped_at(guard_of(**options), losses) is None


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        (noise(300, math.log(64), 0.05), 99),
        ([8.0] * 300, 99),  # above chance is no better
        ([1.0] * 150 + [math.log(64)] * 100, 198),  # it collapsed later; a mean hides one good step
    ],
)
def test_a_run_whose_loss_stays_at_chance_is_stopped(losses, step):
    found, _ = stopped_at(guard_of(), losses)
    assert found == step


def test_after_a_resume_the_watchdog_waits_for_some_losses():
    guard = guard_of()
    for step in range(1000, 1049):
        guard.check(math.log(64), step)
    with pytest.raises(TrainingError, match="after 1050 steps"):
        guard.check(math.log(64), 1049)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_run_decides(number):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with catch_stop_signals() as stop:
        assert stop.on_any_process(torch.device("cpu")) == 0
        os.kill(os.getpid(), number)
        assert stop.on_any_process(torch.device("cpu")) == number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_waits():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), catch_stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_signal_handlers_are_restored_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingError), catch_stop_signals():
        assert signal.getsignal(signal.SIGTERM) is not before
        raise TrainingError("it ended")
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_does_not_change_signal_handlers():
    before, found = signal.getsignal(signal.SIGTERM), []

    def run():
        with catch_stop_signals() as stop:
            found.extend([stop, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [StopRequest(0), before]


def test_the_warm_up_does_not_count_as_chance():
    guard = guard_of(stop_at_chance=100, warmup=50)
    for step in range(149):
        guard.check(math.log(64), step)
    with pytest.raises(TrainingError, match="after 150 steps"):
        guard.check(math.log(64), 149)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_it_is_used(norm):
    guard = guard_of()
    guard.check_gradient(3.0, 6)
    with pytest.raises(TrainingError, match=r"gradient norm is (nan|inf) at step 8.*tenth"):
        guard.check_gradient(norm, 7)
