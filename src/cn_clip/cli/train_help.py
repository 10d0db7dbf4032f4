"""The help of ``cn-clip train``: the options of a recipe that people use, in groups.

They are parsed by ``train/recipe/flags.py``, not by cyclopts; the texts are those of the recipe's
schema.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cn_clip.cli import help as translated_help
from cn_clip.translation import N_

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

# Title -> (flags, placeholder of the value, the option whose help is shown).
GROUPS = {
    N_("Data"): (
        ("--train-data", "SOURCE...", "data.train"),
        ("--val-data", "SOURCE...", "data.val"),
        ("--keep-data", "SOURCE...", "data.keep_data"),
        ("--workers", "INT", "data.workers"),
    ),
    N_("Initial weights"): (
        ("--start.checkpoint", "MODEL", "start.checkpoint"),
        ("--image", "FILE", "start.image"),
        ("--text", "FILE", "start.text"),
    ),
    N_("Training"): (
        ("--epochs", "INT", "stages.NAME.epochs"),
        ("--steps", "INT", "stages.NAME.steps"),
        ("--learning-rate", "FLOAT", "stages.NAME.optimizer.learning_rate"),
        ("--lr", "FLOAT", "lr"),
        ("--global-batch-size", "INT", "stages.NAME.global_batch_size"),
        ("--batch-size", "INT", ""),
        ("--micro-batch-size", "INT", "stages.NAME.micro_batch_size"),
        ("--freeze", "PATTERN...", "stages.NAME.freeze"),
        ("--augment", "", "stages.NAME.augment"),
        ("--interpolate", "FLOAT", "stages.NAME.interpolate"),
        ("--lora", "on", "stages.NAME.lora"),
        ("--every-steps", "INT", "evaluation.every_steps"),
    ),
    N_("Machine"): (
        ("--device", "NAME", "machine.device"),
        ("--precision", "NAME", "machine.precision"),
        ("--grad-checkpointing", "", "machine.grad_checkpointing"),
    ),
    N_("Output"): (
        ("--output.folder", "FOLDER", "output.folder"),
        ("--save-every", "INT", "output.save_every"),
        ("--tensorboard", "", "output.tensorboard"),
    ),
}
_OF_PROCESS = N_("The same per process, as in the official package")
_UNSCALED = N_("Peak learning rate, not scaled to the batch size")
_LORA = N_("Train low-rank updates of the attention matrices alone")


@dataclass(frozen=True, slots=True)
class TrainHelp(translated_help.TranslatedHelp):
    """The help formatter of ``train``: the groups come before the command's own parameters."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        if panel.format == "parameter" and panel.entries:
            for group in _panels(panel):
                translated_help.TranslatedHelp.__call__(self, console, options, group)
        translated_help.TranslatedHelp.__call__(self, console, options, panel)


def _panels(like: HelpPanel) -> list[HelpPanel]:
    from cyclopts.help import HelpEntry

    from cn_clip.train.recipe.schema import options

    texts = {name: text for name, _kind, _default, text in options()}
    texts |= {"": _OF_PROCESS, "lr": _UNSCALED, "stages.NAME.lora": _LORA}
    panels = []
    for title, rows in GROUPS.items():
        entries = [
            HelpEntry(
                positive_names=tuple(flags.split()),
                metavar=value or None,
                description=_inline(texts[option]),
            )
            for flags, value, option in rows
        ]
        panels.append(like.copy(title=title, description=None, entries=entries))
    return panels


def _inline(text: str) -> Any:
    from cyclopts.help import InlineText

    return InlineText.from_format(f"{text}.", format="markdown")
