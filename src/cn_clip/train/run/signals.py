"""Stop signals: a run saves its state and ends when it receives SIGTERM, SIGHUP or Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch

from cn_clip import distributed
from cn_clip.errors import CNClipError
from cn_clip.processes import TERMINATION_SIGNALS, drop_dead_terminal
from cn_clip.translation import _


class InterruptedRun(CNClipError):
    """A signal stopped the run, and its state is saved; ``code`` is the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True)
class StopRequest:
    """The signal that this process received, 0 if none."""

    signal: int = 0

    def on_any_process(self, device: torch.device) -> int:
        """Return the signal that any process received; all processes return the same."""
        if distributed.world_size() == 1:
            return self.signal
        return int(distributed.all_reduce_max(torch.tensor(self.signal, device=device)))


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Record SIGTERM, SIGHUP and Ctrl-C instead of ending; a second Ctrl-C ends at once.

    Ignored signals stay ignored, as under ``nohup``.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread receives signals
        return

    def handle(number: int, frame: FrameType | None) -> None:
        drop_dead_terminal()  # otherwise the next printed line would raise
        if request.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = number
        if number == signal.SIGINT:
            print(_("cn-clip: stopping after this step; again: at once"), file=sys.stderr)

    previous = {
        number: signal.signal(number, handle)
        for number in TERMINATION_SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
