"""The command line, ``cn-clip COMMAND``: each file parses one command, calls functions, prints.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted, 143 and 129 ended by SIGTERM and SIGHUP.
An error is one sentence on stderr.
"""

from __future__ import annotations

import errno
import io
import os
import select
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from cyclopts import App, CycloptsError

from cn_clip import __version__
from cn_clip.cli.crash import DEBUG, report_crash
from cn_clip.cli.empty import refuse_empty
from cn_clip.cli.help import TranslatedHelp
from cn_clip.errors import CNClipError, UsageError, one_line
from cn_clip.processes import Interrupted, received_signal
from cn_clip.translation import _

app = App(
    name="cn-clip",
    version=__version__,
    help="Chinese-CLIP: image and Chinese text embeddings in one space.",
    help_formatter=TranslatedHelp(),
    suppress_keyboard_interrupt=False,  # run() handles it
)
# Each is imported when it is run, or its help is shown.
_COMMANDS = (
    "models:models",
    "classify:classify",
    "embed:embed",
    "bulk:bulk",
    "index:index",
    "search:search",
    "library:library_app",
    "serve:serve",
    "convert:convert",
    "export:export",
    "data:data",
    "train:train_app",
    "eval:eval_app",
    "bench:bench",
    "doctor:doctor",
)
for _command in _COMMANDS:
    app.command(f"cn_clip.cli.{_command}", name=_command.partition(":")[0])


# Errors of the system, not faults of this program.
_SYSTEM_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE,
    errno.ENFILE, errno.ENAMETOOLONG, errno.EFBIG,
)  # fmt: skip
_LEAST_WIDTH = 40  # columns
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory")


def main() -> None:
    """Run the command line and exit."""
    end(run)


def end(run: Callable[[Sequence[str]], int]) -> None:
    """Run a function with the arguments of the process, and exit with its code."""
    _open_streams()
    _set_least_width()
    sys.exit(_flush(run(sys.argv[1:])))


def load_commands(group: App = app) -> None:
    """Import all commands, so that a list of them has their descriptions."""
    for name in group:
        if not name.startswith("-"):
            load_commands(group[name])


def run(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit code."""
    return guarded(_dispatch, arguments)


def guarded(work: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> int:
    """Run a function as a command: errors and warnings are sentences on stderr. Return the exit
    code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("once", UserWarning)
        warnings.showwarning = _print_warning
        return _guarded(work, arguments)


def _dispatch(arguments: Sequence[str]) -> object:
    refuse_empty(arguments)
    if not arguments or arguments[0] in ("--help", "-h"):
        load_commands()
    return app(arguments, exit_on_error=False, print_error=False, result_action="return_value")


def _guarded(work: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> int:
    try:
        _check_folder()
        code = work(arguments)
    except KeyboardInterrupt as error:
        return _interrupted(error.number if isinstance(error, Interrupted) else signal.SIGINT)
    except Exception as error:
        # A library may turn the exception of a signal into another error.
        if number := received_signal():
            return _interrupted(number)
        return _failed(error, arguments)
    return code if isinstance(code, int) else 0


def _check_folder() -> None:
    """Raise a ``UsageError`` if the current folder was deleted: no process can start in it."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError(
            _("the current folder does not exist any more; change to another")
        ) from None


def _interrupted(number: int) -> int:
    interrupted = number == signal.SIGINT
    message = (
        _("interrupted")
        if interrupted
        else _("ended by {signal}", signal=signal.Signals(number).name)
    )
    return _fail(message, 128 + number)


def _failed(error: Exception, arguments: Sequence[str]) -> int:
    """Print an error as one sentence; return the exit code."""
    if isinstance(error, CycloptsError):
        from cn_clip.cli.usage import usage_message  # for errors alone

        return _fail(usage_message(error), 2)
    if isinstance(error, CNClipError):
        return _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    if isinstance(error, BrokenPipeError) and _reader_is_gone():  # such as `head`
        _redirect_to_null(sys.stdout)
        return 1
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        raise error
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    ):
        return _fail(_("out of memory; give smaller images, a smaller model or another device"), 1)
    if isinstance(error, OSError) and error.errno in _SYSTEM_ERRORS:
        file = error.filename if error.filename is not None else _("a file or the output")
        return _fail(
            _("{file} cannot be read or written: {reason}", file=file, reason=error.strerror), 1
        )
    return _fail(report_crash(error, arguments), 1)


def _fail(sentence: str, code: int) -> int:
    _print_to_stderr(f"cn-clip: {one_line(sentence)}")
    return code


def _print_warning(message: Warning | str, *_unused: object, **__: object) -> None:
    _print_to_stderr(_("cn-clip: warning: {message}", message=one_line(str(message))))


def _print_to_stderr(line: str) -> None:
    with suppress(OSError, ValueError):  # a full disk, a closed terminal, a closed stream
        print(line, file=sys.stderr)


def _open_streams() -> None:
    """Open closed standard streams, and let them print any character."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: else the next opened file gets its descriptor
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the console may not support Chinese
            stream.reconfigure(errors="backslashreplace")


def _set_least_width() -> None:
    """Format for at least 40 columns; Rich takes minutes for a help text in one or two."""
    if shutil.get_terminal_size().columns < _LEAST_WIDTH:
        os.environ["COLUMNS"] = str(_LEAST_WIDTH)


def _flush(code: int) -> int:
    """Flush the output; return the exit code, 1 if the output cannot be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        _redirect_to_null(sys.stdout)
        code = code or 1
        if not isinstance(error, BrokenPipeError):
            _fail(
                _(
                    "the output cannot be written: {reason}",
                    reason=getattr(error, "strerror", error),
                ),
                code,
            )
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        _redirect_to_null(sys.stderr)
    return code


def _redirect_to_null(stream: TextIO) -> None:
    """Redirect a stream that cannot be written, since Python flushes it again at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _reader_is_gone() -> bool:
    """Whether the broken pipe is stdout, and not another one."""
    if not hasattr(select, "poll"):
        return True
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return True
