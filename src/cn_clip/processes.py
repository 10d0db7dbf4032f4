"""Termination of this process and its workers: signals, and workers whose parent is gone."""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from cn_clip.translation import _

GRACE = 2.0  # seconds for a worker to remove temporary files
_FORCE_AFTER = 1.0  # seconds after which a second Ctrl-C exits without cleaning up
_POLL_SECONDS = 1.0  # between checks of the parent process
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
TERMINATION_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A termination signal arrived; like ``KeyboardInterrupt``, it unwinds and cleans up."""

    def __init__(self, number: int) -> None:
        super().__init__(_("ended by {signal}", signal=signal.Signals(number).name))
        self.number = number

    @property
    def code(self) -> int:
        """The exit code of shells for this signal."""
        return 128 + self.number


@dataclass(slots=True)
class _SignalState:
    """The state of ``raise_on_signals``."""

    first: int = 0  # the first signal, or 0
    first_at: float = 0.0  # monotonic seconds
    blocks: int = 0  # open ``blocked_signals`` contexts
    pending: int = 0  # a signal that arrived in one of them, or 0

    def handle(self, number: int) -> None:
        if self.blocks:
            self.pending = self.pending or number
        elif not self.first:
            self.first, self.first_at = number, time.monotonic()
            raise Interrupted(number)
        elif number == signal.SIGINT and time.monotonic() - self.first_at > _FORCE_AFTER:
            os._exit(128 + number)


_signals = _SignalState()


_cpu_limit: int | None = None


def limit_cpus(count: int) -> None:
    """Use at most this many CPUs from now on: a scheduler counts them, but binds to none."""
    global _cpu_limit
    _cpu_limit = count


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use: by its affinity, its cgroup's quota
    and ``limit_cpus``."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no cgroup, or no quota ("max")
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count if _cpu_limit is None else min(count, _cpu_limit))


def cpu_info(*fields: str) -> list[str]:
    """Return the distinct lines of /proc/cpuinfo that start with a field; none without the file."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        return sorted({line for line in text.splitlines() if line.startswith(fields)})
    return []


def cpu_lacks_bfloat16() -> bool:
    """Return whether the CPUs are known to have no instructions for bfloat16."""
    flags = cpu_info("flags", "Features")  # the latter of ARM
    return bool(flags) and not any("bf16" in line for line in flags)


def received_signal() -> int:
    """Return the first signal that ``raise_on_signals`` received, or 0."""
    return _signals.first


def raise_on_signals() -> None:
    """From now on, raise ``Interrupted`` in the main thread for SIGINT, SIGTERM and SIGHUP.

    For programs only, at their start; a library must not handle signals. Ignored signals stay
    ignored, as under ``nohup``. Later signals do not interrupt the clean-up of the first, except
    a Ctrl-C more than a second later, which exits at once.
    """
    pid = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        drop_dead_terminal()
        if os.getpid() == pid:
            _signals.handle(number)
        elif number == signal.SIGTERM:  # a forked process without own signal handlers yet
            os._exit(128 + number)

    def unraisable(dropped: Any, previous: Callable[[Any], object] = sys.unraisablehook) -> None:
        if not isinstance(dropped.exc_value, Interrupted):
            previous(dropped)
            return
        # Raised in a __del__ or a callback, which drop exceptions: send the signal again.
        _signals.first = 0
        timer = threading.Timer(0.05, _send_to_main_thread, (dropped.exc_value.number,))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = unraisable
    _on_signals(handle)


def drop_dead_terminal() -> None:
    """Redirect stdout and stderr to null if their terminal is gone: writing would fail."""
    try:
        import termios
    except ImportError:  # Windows
        return
    for stream in (1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream)
                os.close(null)


def exit_on_signals() -> None:
    """From now on, exit at once on SIGINT, SIGTERM and SIGHUP: there is nothing to clean up."""
    _on_signals(lambda number, frame: os._exit(128 + number))


def exit_after(run: Callable[[], None]) -> NoReturn:
    """Run the main function of a process, which ends in ``sys.exit``, and exit; a signal ends it
    with 128 plus its number."""
    code = 0
    raise_on_signals()
    try:
        run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except Interrupted as error:  # before or after the command runs
        code = error.code
    exit_on_signals()
    sys.exit(code)


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in TERMINATION_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Block signals in this thread and in processes started here.

    A new process would print a traceback on a signal. It inherits the blocked signals, until it
    calls ``ignore_signals_in_worker``.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    resource_tracker.ensure_running()  # unblocks SIGINT and SIGTERM in this thread
    signal.pthread_sigmask(signal.SIG_BLOCK, TERMINATION_SIGNALS)
    # Other threads may still receive signals, but Python runs handlers in the main thread.
    main = threading.current_thread() is threading.main_thread()
    _signals.blocks += main
    try:
        yield
    finally:
        _signals.blocks -= main
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main and not _signals.blocks and (number := _signals.pending):
            _signals.pending = 0
            _signals.handle(number)


def ignore_signals_in_worker(on_sigterm: Callable[[int, FrameType | None], object]) -> None:
    """In a worker: ignore signals to the process group; the parent handles them.

    ``on_sigterm`` handles SIGTERM, which the parent sends to end its workers.
    """
    for number in TERMINATION_SIGNALS:
        signal.signal(number, on_sigterm if number == signal.SIGTERM else signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINATION_SIGNALS)


def end_with_parent(*, grace: float = 0.0) -> None:
    """In a worker: exit when its parent process ends for any reason.

    With ``grace`` in seconds, the worker receives SIGTERM that long before it exits.
    """
    # A thread waits on multiprocessing's sentinel pipe. PR_SET_PDEATHSIG is Linux only, fires when
    # the thread ends that started the worker, and leaves no time to remove temporary files. A
    # forked worker also inherits the pipes of earlier ones, which delays their end: so the parent's
    # process id is checked too.
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is None:
        return
    started_by = os.getppid()

    def watch() -> None:
        while not connection.wait([parent.sentinel], _POLL_SECONDS) and os.getppid() == started_by:
            pass
        if grace:
            _send_to_main_thread(signal.SIGTERM)
            time.sleep(grace)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="cn_clip-parent", daemon=True).start()


def terminate_with_launcher() -> None:
    """Send SIGTERM to this process when the program that launched it ends."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_POLL_SECONDS)
        _send_to_main_thread(signal.SIGTERM)

    threading.Thread(target=watch, name="cn_clip-launcher", daemon=True).start()


def _send_to_main_thread(number: int) -> None:
    """Send a signal to the main thread, which runs all Python signal handlers."""
    ident = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and ident is not None:
        signal.pthread_kill(ident, number)
    else:
        signal.raise_signal(number)
