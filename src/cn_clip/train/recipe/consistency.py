"""Consistency of a recipe: values out of range, and combinations that could only fail later."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from cn_clip.errors import UsageError
from cn_clip.train.recipe.schema import Recipe, Stage
from cn_clip.translation import _

_MAX_NAME_LENGTH = 64  # folders are named after stages


def check_recipe(recipe: Recipe) -> None:
    """Raise a ``UsageError`` for the first invalid option; the message gives the valid values."""
    _check_ranges(recipe)
    if recipe.machine.parallel == "fsdp" and recipe.machine.precision == "fp16":
        raise UsageError(_("machine.parallel = fsdp has no scaler for fp16; use --precision bf16"))
    names = [stage.name for stage in recipe.stages]
    if not names:
        raise UsageError(_("the recipe has no stage; give it a table [[stages]]"))
    if len(set(names)) < len(names) or not all(n.replace("-", "").isalnum() for n in names):
        raise UsageError(
            _(
                "the stages are named {names}; give each its own name, of letters, digits and "
                "hyphens",
                names=", ".join(names),
            )
        )
    if len(max(names, key=len)) > _MAX_NAME_LENGTH:
        raise UsageError(
            _(
                "the name of a stage has more than {limit} characters; shorten it",
                limit=_MAX_NAME_LENGTH,
            )
        )
    for stage in recipe.stages:
        _check_stage(stage, recipe)
    if recipe.data.keep_data and all(stage.interpolate != "auto" for stage in recipe.stages):
        raise UsageError(
            _(
                'data.keep_data is only used by interpolate = "auto"; add --interpolate auto, or '
                "leave --keep-data out"
            )
        )


def _check_ranges(table: Any, where: str = "") -> None:
    """Check the numbers of a table and of the tables in it."""
    for option in fields(table):
        value, name = getattr(table, option.name), f"{where}{option.name}"
        if is_dataclass(value):
            _check_ranges(value, f"{name}.")
        elif option.name == "stages":
            for stage in value:
                _check_ranges(stage, f"{name}.{stage.name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            low, high = option.metadata["within"]
            if not low <= value <= high:
                raise out_of_range(name, value, low, high)


def out_of_range(name: str, value: float, low: float, high: float) -> UsageError:
    """Return the error about a number of an option or a flag."""
    return UsageError(
        _("{name} is {value}; give {low} to {high}", name=name, value=value, low=low, high=high)
    )


def _check_stage(stage: Stage, recipe: Recipe) -> None:
    at = f"stages.{stage.name}"
    for entry in stage.optimizer.lr_multipliers:
        parse_lr_multiplier(entry)
    if (stage.epochs is None) == (stage.steps is None):
        raise UsageError(
            _("{at} must have either epochs or steps; early stopping may end it sooner", at=at)
        )
    if stage.early_stopping is not None and not recipe.data.val:
        raise UsageError(
            _(
                "{at} has early_stopping, but there are no validation pairs; give --val-data, or "
                "--early-stopping off",
                at=at,
            )
        )
    if stage.interpolate == "auto" and not recipe.data.val:
        raise UsageError(
            _(
                "{at}.interpolate is auto: the validation pairs choose the weight; give "
                "--val-data, or a number with --interpolate 0.5",
                at=at,
            )
        )
    if stage.early_stopping is not None and not (
        recipe.evaluation.every_epochs or recipe.evaluation.every_steps
    ):
        raise UsageError(
            _(
                "{at} has early_stopping, but evaluation.every_epochs is 0 and every_steps is not "
                "given; give one of them",
                at=at,
            )
        )
    if stage.cached and "visual.*" not in stage.freeze:
        raise UsageError(
            _("{at}.cached stores the image tower's features; add 'visual.*' to its freeze", at=at)
        )
    if stage.flip and not stage.augment:
        raise UsageError(_("{at}.flip mirrors augmented images; set augment to true", at=at))
    if stage.views > 1 and not (stage.cached and stage.augment):
        raise UsageError(
            _(
                "{at}.views needs cached and augmented images; set both to true, or views to 1",
                at=at,
            )
        )
    if stage.center_texts and not (stage.cached and recipe.machine.parallel == "ddp"):
        raise UsageError(
            _(
                "{at}.center_texts needs cached image features and parallel = ddp; set cached to "
                "true, or center_texts to false",
                at=at,
            )
        )
    if stage.cached and stage.mask_ratio:
        raise UsageError(
            _("{at} has cached features, so mask_ratio has no effect; set it to 0", at=at)
        )
    if stage.cached and stage.loss.teacher is not None:
        raise UsageError(
            _(
                "{at} has cached features, and a teacher needs the images; set cached to false",
                at=at,
            )
        )
    if stage.loss.kind == "sigmoid" and stage.loss.teacher and not stage.loss.teacher_features:
        raise UsageError(
            _(
                "{at}: the teacher's similarities mix with the clip loss; with the sigmoid loss "
                "set loss.teacher_features",
                at=at,
            )
        )


def parse_lr_multiplier(entry: str) -> tuple[str, float]:
    """Split an entry of ``lr_multipliers``, ``PATTERN=FACTOR``.

    Raises:
        UsageError: the entry has another form, or the factor is not within 0 to 1000.
    """
    pattern, _unused, factor = entry.rpartition("=")
    try:
        value = float(factor)
    except ValueError:
        value = -1.0
    if not pattern or not 0 <= value <= 1000:
        raise UsageError(
            _(
                "lr_multipliers has the entry {entry!r}; give PATTERN=FACTOR, such as "
                "visual.backbone.*=0.1",
                entry=entry,
            )
        )
    return pattern, value
