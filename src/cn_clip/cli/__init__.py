"""The command line, ``cn-clip VERB``: each file parses one verb, calls functions, prints.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted, 143 and 129 ended by SIGTERM and SIGHUP.
Errors are one sentence on stderr.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from cyclopts import App, CycloptsError

from cn_clip import __version__
from cn_clip.cli.classify import classify
from cn_clip.cli.convert import convert
from cn_clip.cli.crash import DEBUG, unexpected
from cn_clip.cli.data import data
from cn_clip.cli.doctor import doctor
from cn_clip.cli.embed import embed
from cn_clip.cli.empty import refuse_empty
from cn_clip.cli.eval import eval_app
from cn_clip.cli.models import models
from cn_clip.cli.train import train
from cn_clip.errors import CNClipError, UsageError, one_line
from cn_clip.processes import Interrupted, received_signal

app = App(
    name="cn-clip",
    version=__version__,
    help="Chinese-CLIP: pictures and Chinese text in one space.",
    suppress_keyboard_interrupt=False,  # run() answers it
)
app.command(models)
app.command(classify)
app.command(embed)
app.command(convert)
app.command(data)
app.command(train)
app.command(eval_app)
app.command(doctor)


# What the system refuses, rather than a fault of this program.
_REFUSED = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE,
    errno.ENFILE, errno.ENAMETOOLONG, errno.EFBIG,
)  # fmt: skip
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    _open_streams()
    code = run(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_flushed(code))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("once", UserWarning)
        warnings.showwarning = _one_line
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    try:
        refuse_empty(arguments)
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except KeyboardInterrupt as error:
        return _interrupted(error.number if isinstance(error, Interrupted) else signal.SIGINT)
    except Exception as error:
        if number := received_signal():  # the signal came where only another error gets through
            return _interrupted(number)
        return _failed(error, arguments)
    return code if isinstance(code, int) else 0


def _interrupted(number: int) -> int:
    said = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    return _fail(said, 128 + number)


def _failed(error: Exception, arguments: Sequence[str]) -> int:
    """Tell of an error in one sentence; return the exit code."""
    if isinstance(error, CycloptsError):
        return _fail(f"{str(error).strip()} See: cn-clip --help", 2)
    if isinstance(error, CNClipError):
        return _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    if isinstance(error, BrokenPipeError) and _reader_is_gone():  # `head`, say, has seen enough
        _discard(sys.stdout)
        return 1
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        raise error
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in _NO_MEMORY)
    ):
        return _fail("out of memory; give smaller pictures, a smaller model or another device", 1)
    if isinstance(error, OSError) and error.errno in _REFUSED:
        what = error.filename if error.filename is not None else "a file or the output"
        return _fail(f"{what} cannot be read or written: {error.strerror}", 1)
    return _fail(unexpected(error, arguments), 1)


def _fail(sentence: str, code: int) -> int:
    _tell(f"cn-clip: {one_line(sentence)}")
    return code


def _one_line(message: Warning | str, *_: object, **__: object) -> None:
    _tell(f"cn-clip: warning: {one_line(str(message))}")


def _tell(line: str) -> None:
    """Print to stderr; if nobody can read it, the exit code must do."""
    with suppress(OSError, ValueError):  # a full disk, a terminal that is gone, a closed stream
        print(line, file=sys.stderr)


def _open_streams() -> None:
    """Make the standard streams usable, whatever started this process."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: else the next file would take its number
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # labels are Chinese, consoles may not be
            stream.reconfigure(errors="backslashreplace")


def _flushed(code: int) -> int:
    """Write out what is printed; return the exit code, which tells if that cannot be done."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        _discard(sys.stdout)
        code = code or 1
        if not isinstance(error, BrokenPipeError):
            _fail(f"the output cannot be written: {getattr(error, 'strerror', error)}", code)
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        _discard(sys.stderr)
    return code


def _discard(stream: TextIO) -> None:
    """Send a stream that cannot be written nowhere: Python would try again when it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _reader_is_gone() -> bool:
    """Whether it is the output that nobody reads any more, and no other pipe."""
    if not hasattr(select, "poll"):
        return True
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return True
