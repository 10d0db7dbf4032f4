"""What stops a run that cannot come to anything, with its likely cause."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch

from cn_clip import distributed
from cn_clip.errors import CNClipError, TrainingError
from cn_clip.processes import TERMINATION_SIGNALS, drop_dead_terminal
from cn_clip.train.recipe.schema import Machine, Stage

_WINDOW = 50  # losses that are averaged
_AT_CHANCE = 0.98  # of ln(batch)


@dataclass(slots=True)
class Guard:
    """Watches the losses of a stage."""

    stage: Stage
    machine: Machine
    rate: float
    stop_at_chance: int
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def check_gradient(self, norm: float, step: int) -> None:
        """Raise a ``TrainingError`` for a gradient that is no number: nothing is changed by it."""
        if not math.isfinite(norm):
            raise TrainingError(self._broken("length of the gradient", norm, step))

    def check(self, loss: float, step: int) -> None:
        """Take up the loss of a step (from 0).

        Raises:
            TrainingError: it is no number, or stands where telling nothing apart would leave it.
        """
        if not math.isfinite(loss):
            raise TrainingError(self._broken("loss", loss, step))
        self._recent.append(loss)
        batch, what = self.stage.global_batch_size, self._rate_told
        chance = math.log(batch)
        full, options = len(self._recent) == _WINDOW, self.stage.loss
        # What is added to a loss of pairs hides where that stands.
        alone = options.sentences is None and not (options.teacher and options.teacher_features)
        # Counted from the end of the warm-up, in which little is learned yet.
        late = step + 1 >= self.stage.optimizer.warmup + self.stop_at_chance
        if self.stop_at_chance and late and full:
            mean = sum(self._recent) / _WINDOW
            if options.kind == "clip" and alone and mean >= _AT_CHANCE * chance:
                raise TrainingError(
                    f"after {step + 1} steps the loss stands at {mean:.3f}, and ln({batch}) = "
                    f"{chance:.3f} is chance. Either {what} is too high: start again with a tenth; "
                    "or images and texts do not match: cn-clip data check; or all pairs of a batch "
                    "are alike. --stop-at-chance 0 continues"
                )

    @property
    def _rate_told(self) -> str:
        return f"the learning rate ({self.rate:.1e} for a batch of {self.stage.global_batch_size})"

    def _broken(self, what: str, value: float, step: int) -> str:
        cause = (
            "float16 has overflowed, most likely; take --precision bf16"
            if self.machine.precision == "fp16"
            else f"{self._rate_told} is too high, most likely; take a tenth, and --clip-norm 1"
        )
        return (
            f"the {what} is {value} at step {step + 1} of stage {self.stage.name}: {cause}. The "
            "best weights and the last state are kept"
        )


class InterruptedRun(CNClipError):
    """The run was told to stop, has saved its state, and can go on; ``code`` is its exit code."""

    def __init__(self, said: str, code: int) -> None:
        super().__init__(said)
        self.code = code


@dataclass(slots=True)
class Stop:
    """Whether a signal has asked the run to stop, and which."""

    signal: int = 0

    def agreed(self, device: torch.device) -> int:
        """Return the signal that any process was sent; all return the same."""
        if distributed.world_size() == 1:
            return self.signal
        return int(distributed.all_reduce_max(torch.tensor(self.signal, device=device)))


@contextmanager
def signals() -> Iterator[Stop]:
    """Note SIGTERM, SIGHUP and Ctrl-C instead of dying of them; a second Ctrl-C ends at once.

    What is ignored stays ignored, as under ``nohup``.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread hears them
        return

    def heard(number: int, frame: FrameType | None) -> None:
        drop_dead_terminal()  # else its next line would end the run, and not this
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number
        if number == signal.SIGINT:
            print("cn-clip: stopping after this step; again: at once", file=sys.stderr)

    before = {
        number: signal.signal(number, heard)
        for number in TERMINATION_SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
