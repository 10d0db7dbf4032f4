"""Checks of a recipe: values out of range and combinations that could only fail later."""

from __future__ import annotations

from cn_clip.errors import UsageError
from cn_clip.train.recipe.schema import VERSION, Recipe, Stage

_MAX_NAME_LENGTH = 64  # folders are named after stages


def check_recipe(recipe: Recipe) -> None:
    """Raise a ``UsageError`` for the first invalid option; the message gives the valid values."""
    for name, (value, low, high) in _ranges(recipe).items():
        if value is not None and not low <= value <= high:
            raise UsageError(f"{name} is {value}; give {low} to {high}")
    if recipe.machine.parallel == "fsdp" and recipe.machine.precision == "fp16":
        raise UsageError("machine.parallel = fsdp has no scaler for fp16; use --precision bf16")
    names = [stage.name for stage in recipe.stages]
    if not names:
        raise UsageError("the recipe has no stage; give it a table [[stages]]")
    if len(set(names)) < len(names) or not all(n.replace("-", "").isalnum() for n in names):
        raise UsageError(
            f"the stages are named {', '.join(names)}; give each its own name, of letters, digits "
            "and hyphens"
        )
    if len(max(names, key=len)) > _MAX_NAME_LENGTH:
        raise UsageError(
            f"the name of a stage has more than {_MAX_NAME_LENGTH} characters; shorten it"
        )
    for stage in recipe.stages:
        _check_stage(stage, recipe)
    if recipe.data.keep_data and all(stage.interpolate != "auto" for stage in recipe.stages):
        raise UsageError(
            'data.keep_data is only used by interpolate = "auto"; add --interpolate auto, or '
            "leave --keep-data out"
        )


def _ranges(recipe: Recipe) -> dict[str, tuple[float | None, float, float]]:
    """Return (value, minimum, maximum) of every numeric option."""
    ranges: dict[str, tuple[float | None, float, float]] = {
        "version": (recipe.version, 1, VERSION),
        "seed": (recipe.seed, 0, (1 << 63) - 1),
        "data.workers": (recipe.data.workers, 0, 1024),
        "data.prefetch_mb": (recipe.data.prefetch_mb, 1, 1 << 30),
        "data.max_skipped_fraction": (recipe.data.max_skipped_fraction, 0, 1),
        "output.keep": (recipe.output.keep, 1, 1000),
        "output.log_every": (recipe.output.log_every, 1, 1 << 30),
        "output.save_every": (recipe.output.save_every, 1, 1 << 30),
        "output.stop_at_chance": (recipe.output.stop_at_chance, 0, 1 << 30),
        "evaluation.every_epochs": (recipe.evaluation.every_epochs, 0, 1 << 30),
        "evaluation.every_steps": (recipe.evaluation.every_steps, 1, 1 << 30),
        "start.resolution": (recipe.start.resolution, 1, 4096),
        "start.context_length": (recipe.start.context_length, 2, 512),
    }
    for stage in recipe.stages:
        at, optimizer = f"stages.{stage.name}", stage.optimizer
        ranges |= {
            f"{at}.epochs": (stage.epochs, 1, 1 << 30),
            f"{at}.steps": (stage.steps, 1, 1 << 40),
            # The contrastive loss of a single pair is zero.
            f"{at}.global_batch_size": (stage.global_batch_size, 2, 1 << 30),
            f"{at}.micro_batch_size": (stage.micro_batch_size, 1, 1 << 30),
            f"{at}.mask_ratio": (stage.mask_ratio, 0, 0.99),
            f"{at}.dropout": (stage.dropout, 0, 0.99),
            f"{at}.views": (stage.views, 1, 1000),
            f"{at}.interpolate": (
                None if isinstance(stage.interpolate, str) else stage.interpolate,
                0,
                1,
            ),
            f"{at}.optimizer.learning_rate": (optimizer.learning_rate, 0, 10),
            f"{at}.optimizer.reference_batch_size": (optimizer.reference_batch_size, 1, 1 << 30),
            f"{at}.optimizer.warmup": (optimizer.warmup, 0, 1 << 40),
            f"{at}.optimizer.weight_decay": (optimizer.weight_decay, 0, 10),
            f"{at}.optimizer.beta1": (optimizer.beta1, 0, 0.99999),
            f"{at}.optimizer.beta2": (optimizer.beta2, 0, 0.9999999),
            f"{at}.optimizer.eps": (optimizer.eps, 0, 1),
            f"{at}.optimizer.max_grad_norm": (optimizer.max_grad_norm, 1e-6, 1e6),
            f"{at}.optimizer.layer_decay": (optimizer.layer_decay, 0.01, 1),
            f"{at}.optimizer.ema": (optimizer.ema, 0, 0.9999999),
            f"{at}.loss.teacher_weight": (stage.loss.teacher_weight, 0, 1),
            f"{at}.loss.teacher_features": (stage.loss.teacher_features, 0, 1e6),
            f"{at}.loss.text_targets_weight": (stage.loss.text_targets_weight, 0, 1e6),
            f"{at}.loss.text_targets_batch_size": (stage.loss.text_targets_batch_size, 1, 1 << 30),
        }
        if stage.early_stopping is not None:
            stopping = f"{at}.early_stopping"
            ranges[f"{stopping}.patience"] = (stage.early_stopping.patience, 1, 1 << 30)
            ranges[f"{stopping}.min_gain"] = (stage.early_stopping.min_gain, 0, 1)
        if stage.lora is not None:
            ranges[f"{at}.lora.rank"] = (stage.lora.rank, 1, 1 << 16)
            ranges[f"{at}.lora.alpha"] = (stage.lora.alpha, 0, 1e6)
    return ranges


def _check_stage(stage: Stage, recipe: Recipe) -> None:
    at = f"stages.{stage.name}"
    for entry in stage.optimizer.lr_multipliers:
        parse_lr_multiplier(entry)
    if (stage.epochs is None) == (stage.steps is None):
        raise UsageError(f"{at} must have either epochs or steps; early stopping may end it sooner")
    if stage.early_stopping is not None and not recipe.data.val:
        raise UsageError(
            f"{at} has early_stopping, but there are no validation pairs; give --val-data, or "
            "--early-stopping off"
        )
    if stage.interpolate == "auto" and not recipe.data.val:
        raise UsageError(
            f"{at}.interpolate is auto: the validation pairs choose the weight; give --val-data, "
            "or a number with --interpolate 0.5"
        )
    if stage.early_stopping is not None and not (
        recipe.evaluation.every_epochs or recipe.evaluation.every_steps
    ):
        raise UsageError(
            f"{at} has early_stopping, but evaluation.every_epochs is 0 and every_steps is not "
            "given; give one of them"
        )
    if stage.cached and "visual.*" not in stage.freeze:
        raise UsageError(
            f"{at}.cached stores the image tower's features; add 'visual.*' to its freeze"
        )
    if stage.flip and not stage.augment:
        raise UsageError(f"{at}.flip mirrors augmented images; set augment to true")
    if stage.views > 1 and not (stage.cached and stage.augment):
        raise UsageError(
            f"{at}.views needs cached and augmented images; set both to true, or views to 1"
        )
    if stage.center_texts and not (stage.cached and recipe.machine.parallel == "ddp"):
        raise UsageError(
            f"{at}.center_texts needs cached image features and parallel = ddp; set cached to "
            "true, or center_texts to false"
        )
    if stage.cached and stage.mask_ratio:
        raise UsageError(f"{at} has cached features, so mask_ratio has no effect; set it to 0")
    if stage.cached and stage.loss.teacher is not None:
        raise UsageError(
            f"{at} has cached features, and a teacher needs the images; set cached to false"
        )
    if stage.loss.kind == "sigmoid" and stage.loss.teacher and not stage.loss.teacher_features:
        raise UsageError(
            f"{at}: the teacher's similarities mix with the clip loss; with the sigmoid loss set "
            "loss.teacher_features"
        )


def parse_lr_multiplier(entry: str) -> tuple[str, float]:
    """Split an entry of ``lr_multipliers``, ``PATTERN=FACTOR``.

    Raises:
        UsageError: the entry has another form, or the factor is not within 0 to 1000.
    """
    pattern, _, factor = entry.rpartition("=")
    try:
        value = float(factor)
    except ValueError:
        value = -1.0
    if not pattern or not 0 <= value <= 1000:
        raise UsageError(
            f"stages.NAME.optimizer.lr_multipliers has the entry {entry!r}; give PATTERN=FACTOR, "
            "such as visual.backbone.*=0.1"
        )
    return pattern, value
