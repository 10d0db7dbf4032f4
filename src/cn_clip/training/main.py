"""The official training script: ``torchrun -m cn_clip.training.main``, with the official arguments.

Calls what ``cn-clip train`` calls. The run is in ``LOGS/NAME``; its final weights are also in
``LOGS/NAME/checkpoints/epoch_latest.pt``, the official file. The same command resumes a run that
was interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip.config import model_config
from cn_clip.errors import UsageError
from cn_clip.translation import _

if TYPE_CHECKING:
    from cn_clip.train.run.run_dir import Outcome

# The defaults of the official script, for arguments that are not given.
_DEFAULTS = {
    "num-workers": "4",
    "logs": "./logs/",
    "name": "train_clip",
    "log-interval": "10",
    "batch-size": "64",
    "max-epochs": "32",
    "wd": "0.2",
    "warmup": "500",
    "precision": "amp",
    "seed": "123",
}
# By image tower: Radford et al., arXiv:2103.00020, table 20.
_OPTIMIZERS = {
    "RN50": {"lr": "5e-4", "beta1": "0.9", "beta2": "0.999", "eps": "1e-8"},
    "ViT-L": {"lr": "4e-4", "beta1": "0.9", "beta2": "0.98", "eps": "1e-6"},
    "ViT": {"lr": "5e-4", "beta1": "0.9", "beta2": "0.98", "eps": "1e-6"},
}
_TOWERS = {"vision-model": "ViT-B-16", "text-model": "RoBERTa-wwm-ext-base-chinese"}


def main(arguments: Sequence[str]) -> int:
    """Train with the official arguments; return the exit code."""
    from cn_clip.cli.train import processes, run_training
    from cn_clip.train.recipe.flags import apply_flags
    from cn_clip.train.recipe.toml import build_recipe

    if "--help" in arguments or "-h" in arguments:
        print(
            _(
                "The official training script, with its arguments: --train-data, --val-data, "
                "--resume, --logs, --name and so on. docs/recipe.md lists what each one sets. The "
                "same with all options: cn-clip train --help"
            )
        )
        return 0
    given, checkpoint = _without_resume(arguments)
    flags = [*_defaults(given, checkpoint), *given]
    model_config(f"{_value(given, 'vision-model')}@{_value(given, 'text-model')}")  # fail early
    if checkpoint is not None:
        flags += ["--start.checkpoint", checkpoint]
    recipe = build_recipe(apply_flags({}, flags, processes()))
    return run_training(recipe, resume=True, on_outcome=_write_checkpoint)


def _without_resume(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the other arguments, and the checkpoint to start from.

    A checkpoint of the run itself is none: the run is resumed anyway.
    """
    kept, checkpoint = [], None
    rest = list(arguments)
    while rest:
        name, equals, value = (argument := rest.pop(0)).partition("=")
        if name != "--resume":
            kept.append(argument)
            continue
        if not equals and not rest:
            raise UsageError(_("--resume needs a value; give the path of a checkpoint"))
        checkpoint = value if equals else rest.pop(0)
    folder = os.path.join(_value(kept, "logs"), _value(kept, "name"), "checkpoints")
    if checkpoint and os.path.realpath(os.path.dirname(checkpoint)) == os.path.realpath(folder):
        return kept, None
    return kept, checkpoint or None


def _defaults(given: list[str], checkpoint: str | None) -> list[str]:
    """Return the official defaults as flags; the flags that are given follow and count."""
    names = {argument.partition("=")[0].lstrip("-").replace("_", "-") for argument in given}
    defaults = dict(_DEFAULTS)
    if "max-steps" in names:
        del defaults["max-epochs"]
    if checkpoint is None or names & set(_TOWERS):
        defaults |= _TOWERS
    tower = _value(given, "vision-model")
    kind = next((name for name in _OPTIMIZERS if tower.startswith(name)), "ViT")
    defaults |= _OPTIMIZERS[kind]
    return [f"--{name}={value}" for name, value in defaults.items()]


def _value(given: Sequence[str], name: str) -> str:
    """Return the value of an argument, by default the official one."""
    value = (_DEFAULTS | _TOWERS)[name]
    for at, argument in enumerate(given):
        written, equals, text = argument.partition("=")
        if written.lstrip("-").replace("_", "-") == name:
            value = text if equals else next(iter(given[at + 1 : at + 2]), value)
    return value


def _write_checkpoint(outcome: Outcome) -> None:
    """Write the final weights as the official training does, for the official scripts."""
    from cn_clip import weights

    folder = Path(outcome.folder) / "checkpoints"
    folder.mkdir(exist_ok=True)
    weights.save_official(weights.build(weights.read(outcome.weights)), folder / "epoch_latest.pt")


def __getattr__(name: str) -> object:
    """Return the function that scripts import from here."""
    if name != "convert_models_to_fp32":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cn_clip.clip.model import convert_models_to_fp32

    return convert_models_to_fp32


if __name__ == "__main__":
    from cn_clip.cli.official import run_script

    run_script(main)
