"""The command line, ``cn-clip VERB``: each file parses one verb, calls functions, prints.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted. Errors are one sentence on stderr.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from cn_clip import __version__
from cn_clip.cli.classify import classify
from cn_clip.cli.convert import convert
from cn_clip.cli.data import data
from cn_clip.cli.doctor import doctor
from cn_clip.cli.embed import embed
from cn_clip.cli.eval import eval_app
from cn_clip.cli.models import models
from cn_clip.cli.train import train
from cn_clip.errors import CNClipError, UsageError, one_line

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # labels are Chinese, consoles may not be
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("once", UserWarning)
        warnings.showwarning = _one_line
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _fail(f"{str(error).strip()} See: cn-clip --help", 2)
    except UsageError as error:
        return _fail(str(error), 2)
    except CNClipError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        sys.stderr.close()
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        return _fail("out of memory; give smaller pictures, a smaller model or another device", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return code if isinstance(code, int) else 0


def _fail(sentence: str, code: int) -> int:
    print(f"cn-clip: {one_line(sentence)}", file=sys.stderr)
    return code


def _one_line(message: Warning | str, *_: object, **__: object) -> None:
    print(f"cn-clip: warning: {one_line(str(message))}", file=sys.stderr)
