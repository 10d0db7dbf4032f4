"""What the official scripts share: their command line, and the checkpoint that they load.

Each script has the arguments and files of the official one, and calls the functions of a command.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import cn_clip
from cn_clip import cli
from cn_clip.config import TEXT_TOWERS, VISION_TOWERS, model_config
from cn_clip.errors import UsageError
from cn_clip.processes import exit_after
from cn_clip.translation import N_, _, translate

if TYPE_CHECKING:
    from cn_clip.embedder import Embedder

_PRECISIONS = {"amp": "float32", "fp32": "float32", "fp16": "float16"}


# What argparse says of these scripts' arguments; it translates by a function of its module.
_OF_ARGPARSE = (
    N_("usage: "),
    N_("options"),
    N_("positional arguments"),
    N_("show this help message and exit"),
    N_("the following arguments are required: %s"),
    N_("unrecognized arguments: %s"),
    N_("expected one argument"),
    N_("expected at least one argument"),
    N_("argument %(argument_name)s: %(message)s"),
    N_("invalid %(type)s value: %(value)r"),
    N_("invalid choice: %(value)r (choose from %(choices)s)"),
    N_("ambiguous option: %(option)s could match %(matches)s"),
)
argparse._ = translate  # type: ignore[attr-defined]


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are a ``UsageError``."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(_("{message}; see {program} --help", message=message, program=self.prog))


def run_script(main: Callable[[Sequence[str]], int]) -> None:
    """Run a script with the arguments of the process, and exit."""
    _leave_package_folder()
    exit_after(lambda: cli.end(lambda arguments: cli.guarded(main, arguments)))


def _leave_package_folder() -> None:
    """Remove the folders of this package from the module path, of child processes too.

    The official run_scripts put them there; their modules would be imported instead of others of
    the same name, such as ``html``.
    """
    inside = os.path.dirname(os.path.realpath(cn_clip.__file__)) + os.sep

    def outside(paths: list[str]) -> list[str]:
        real = ((path, os.path.realpath(path)) for path in paths)
        return [path for path, place in real if not f"{place}{os.sep}".startswith(inside)]

    sys.path[:] = outside(sys.path)
    if "PYTHONPATH" in os.environ:
        os.environ["PYTHONPATH"] = os.pathsep.join(
            outside(os.environ["PYTHONPATH"].split(os.pathsep))
        )


def parser_of(script: str, command: str) -> Arguments:
    """Return the parser of a script, whose help names the command that does the same."""
    return Arguments(
        prog=script,
        description=_(
            "The official script, with the arguments and files that it has in the official "
            "package. The same with all options: {command}",
            command=command,
        ),
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a checkpoint and its model."""
    parser.add_argument("--resume", required=True)
    parser.add_argument("--vision-model", choices=list(VISION_TOWERS))
    parser.add_argument("--text-model", choices=list(TEXT_TOWERS))
    parser.add_argument("--precision", choices=list(_PRECISIONS), default="amp")
    parser.add_argument("--context-length", type=int, default=52)
    parser.add_argument("--img-batch-size", type=int, default=64)


def load_checkpoint(options: argparse.Namespace) -> Embedder:
    """Load the checkpoint of ``--resume``; the model is detected from the file, and compared with
    the names that are given.

    Raises:
        UsageError: the file is missing, or only one tower is named.
        CheckpointError: the file has another model.
    """
    from cn_clip.embedder import load
    from cn_clip.weights import check_model

    expected = None
    if options.vision_model or options.text_model:
        if not (options.vision_model and options.text_model):
            raise UsageError(_("give both --vision-model and --text-model, or neither"))
        expected = model_config(f"{options.vision_model}@{options.text_model}")
    embedder = load(options.resume, precision=_PRECISIONS[options.precision])  # type: ignore[arg-type]
    if expected is not None:
        check_model(embedder.config, expected, options.resume)
    if not 2 <= options.context_length <= embedder.config.text.max_positions:
        raise UsageError(
            _(
                "--context-length {length} is not from 2 to {limit}",
                length=options.context_length,
                limit=embedder.config.text.max_positions,
            )
        )
    embedder.config = replace(embedder.config, context_length=options.context_length)
    return embedder
