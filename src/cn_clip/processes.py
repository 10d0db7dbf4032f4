"""How this process, and those that it starts, come to their end."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

GRACE = 2.0  # seconds that a worker has to remove what it has half written
_TWICE = 1.0  # seconds after which another Ctrl-C does not wait for what is being cleaned up
_POLL = 1.0  # seconds between looks at who the parent is
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
ENDING = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal ends this process. As after Ctrl-C, everything is cleaned up on the way."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number

    @property
    def code(self) -> int:
        """The exit code that shells give a process that a signal ended."""
        return 128 + self.number


@dataclass(slots=True)
class _Signals:
    """What ``raise_on_signals`` has answered."""

    first: int = 0
    at: float = 0.0
    held_back: int = 0  # how many blocks do not want to be disturbed
    waiting: int = 0  # what arrived meanwhile

    def answer(self, number: int) -> None:
        if self.held_back:
            self.waiting = self.waiting or number
        elif not self.first:
            self.first, self.at = number, time.monotonic()
            raise Interrupted(number)
        elif number == signal.SIGINT and time.monotonic() - self.at > _TWICE:
            os._exit(128 + number)


_signals = _Signals()


def heard() -> int:
    """Return the first signal that ``raise_on_signals`` has answered, or 0."""
    return _signals.first


def raise_on_signals() -> None:
    """From now on, raise ``Interrupted`` in the main thread for SIGINT, SIGTERM and SIGHUP.

    For programs only, before they start; a library leaves signals alone. What is ignored stays
    ignored: ``nohup`` and the background of a shell ask for that. Further signals do not disturb
    what the first one set off, but a later Ctrl-C ends at once.
    """
    pid = os.getpid()

    def answer(number: int, frame: FrameType | None) -> None:
        drop_dead_terminal()
        if os.getpid() == pid:
            _signals.answer(number)
        elif number == signal.SIGTERM:  # forked, and not set up yet
            os._exit(128 + number)

    def unraisable(dropped: Any, before: Callable[[Any], object] = sys.unraisablehook) -> None:
        if not isinstance(dropped.exc_value, Interrupted):
            before(dropped)
            return
        # Raised in a __del__ or a callback, which drop exceptions: once more, outside of it.
        _signals.first = 0
        again = threading.Timer(0.05, _send_to_main_thread, (dropped.exc_value.number,))
        again.daemon = True
        again.start()

    sys.unraisablehook = unraisable
    _on_signals(answer)


def drop_dead_terminal() -> None:
    """Send the output nowhere if its terminal is gone: writing to it would be an error."""
    try:
        import termios
    except ImportError:  # Windows
        return
    for stream in (1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


def exit_on_signals() -> None:
    """From now on, end at once by SIGINT, SIGTERM and SIGHUP: there is nothing left to clean up."""
    _on_signals(lambda number, frame: os._exit(128 + number))


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Let signals wait, for this thread and the processes that it starts meanwhile.

    A process that is not set up yet would answer them with a traceback. It inherits that they wait,
    and ``leave_signals_to_parent`` ends it.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    resource_tracker.ensure_running()  # it ignores the others, and lets them through in here
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    # Other threads take signals all the same, but this one answers them.
    main = threading.current_thread() is threading.main_thread()
    _signals.held_back += main
    try:
        yield
    finally:
        _signals.held_back -= main
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main and not _signals.held_back and (number := _signals.waiting):
            _signals.waiting = 0
            _signals.answer(number)


def leave_signals_to_parent(terminated: Callable[[int, FrameType | None], object]) -> None:
    """In a worker: ignore what a whole group of processes is sent, as the parent decides.

    ``terminated`` answers SIGTERM, by which the parent ends its workers.
    """
    for number in ENDING:
        signal.signal(number, terminated if number == signal.SIGTERM else signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def end_with_parent(*, grace: float = 0.0) -> None:
    """In a worker: end when the process that started it has ended, whatever ended that one.

    With a ``grace`` in seconds, the worker is sent SIGTERM so long before it is ended.
    """
    # A thread on the pipe that multiprocessing keeps for this, rather than PR_SET_PDEATHSIG: that
    # is Linux' alone, fires as soon as the thread ends that started the worker, and leaves no time
    # to remove what is half written. Where workers are forked, each holds the pipes of those before
    # it too, so they end from the last to the first; the parent's number makes that certain.
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is None:
        return
    started_by = os.getppid()

    def watch() -> None:
        while not connection.wait([parent.sentinel], _POLL) and os.getppid() == started_by:
            pass
        if grace:
            _send_to_main_thread(signal.SIGTERM)
            time.sleep(grace)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="cn_clip-parent", daemon=True).start()


def terminate_with_launcher() -> None:
    """Send this process SIGTERM once the program that launched it has ended."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_POLL)
        _send_to_main_thread(signal.SIGTERM)

    threading.Thread(target=watch, name="cn_clip-launcher", daemon=True).start()


def _send_to_main_thread(number: int) -> None:
    """Send a signal so that it wakes the main thread, which alone runs handlers."""
    ident = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and ident is not None:
        signal.pthread_kill(ident, number)
    else:
        signal.raise_signal(number)
