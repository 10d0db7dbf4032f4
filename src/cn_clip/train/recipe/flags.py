"""Command-line flags as changes to a recipe: its own dotted names, and the official flags."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cn_clip.errors import UnknownNameError, UsageError
from cn_clip.train.recipe.consistency import out_of_range
from cn_clip.train.recipe.renamed import RENAMED, refuse_renamed
from cn_clip.train.recipe.schema import Recipe, Stage, nested_class, options, type_text
from cn_clip.translation import _

_ON, _OFF = ("true", "on", "yes"), ("false", "off", "no")
_NONE = ("none", "off")
_STAGE_TABLES = ("early_stopping", "lora")  # optional tables of a stage, switched on or off


@dataclass(frozen=True, slots=True)
class Official:
    """An official flag: ``sets(value, world_size)`` returns the (option, value) pairs it sets."""

    sets: Callable[[str, int], list[tuple[str, str]]]
    takes_value: bool = True


def _same(name: str) -> Official:
    return Official(lambda value, _: [(name, value)])


def _switch(name: str, value: str = "true") -> Official:
    return Official(lambda _, __: [(name, value)], takes_value=False)


def _ignored(takes_value: bool = False) -> Official:
    return Official(lambda _, __: [], takes_value)


def _precision(value: str, _: int) -> list[tuple[str, str]]:
    return [("machine.precision", "bf16" if value == "amp" else value)]


def _logs(value: str, _unused: int) -> list[tuple[str, str]]:
    if value.lower() == "none":
        raise UsageError(_("--logs is None, but a run needs a folder; give one"))
    return [("*logs", value)]


def _positive(name: str) -> Callable[[str, int], list[tuple[str, str]]]:
    """Map the official -1, never, to none."""
    return lambda value, _: [(name, "none" if value in ("-1", "0") else value)]


def _bn_sync(_unused: str, world_size: int) -> list[tuple[str, str]]:
    if world_size > 1:
        warnings.warn(
            _(
                "--use-bn-sync is ignored: a trainable BatchNorm uses the statistics of its "
                "process's batch; a ViT has none, and --freeze visual.* keeps those of RN50"
            ),
            stacklevel=2,
        )
    return []


# Every flag of cn_clip/training/params.py of the official package up to 1.6.0, except those with
# the same name here. The official batch size is per process, before gradient accumulation.
OFFICIAL: dict[str, Official] = {
    "train-data": _same("data.train"),
    "val-data": _same("data.val"),
    "num-workers": _same("data.workers"),
    "logs": Official(_logs),
    "log-interval": _same("output.log_every"),
    "report-training-batch-acc": _ignored(),  # easily mistaken for recall, which is logged
    "batch-size": Official(
        lambda value, world: [("*batch", f"{_whole(value, '--batch-size') * world}")]
    ),
    "accum-freq": _same("*accumulate"),
    "valid-batch-size": _ignored(takes_value=True),  # chosen by the embedder
    "max-steps": _same("steps"),
    "max-epochs": _same("epochs"),
    "valid-step-interval": _same("evaluation.every_steps"),
    "valid-epoch-interval": _same("evaluation.every_epochs"),
    "context-length": _same("start.context_length"),
    # For the batch that is trained with, so it is not scaled.
    "lr": Official(lambda value, _: [("learning_rate", value), ("reference_batch_size", "none")]),
    "wd": _same("weight_decay"),
    "save-step-frequency": Official(_positive("output.save_every")),
    "precision": Official(_precision),
    "vision-model": _same("*vision"),
    "text-model": _same("*text"),
    "clip-weight-path": _same("start.image"),
    "bert-weight-path": _same("start.text"),
    "grad-checkpointing": _switch("machine.grad_checkpointing"),
    "freeze-vision": _switch("freeze", "visual.*"),
    "use-augment": Official(
        lambda _, __: [("augment", "true"), ("flip", "true")], takes_value=False
    ),
    "skip-scheduler": _switch("schedule", "constant"),
    "use-flash-attention": _ignored(),  # the fastest attention is always used
    "gather-with-grad": _ignored(),  # always so
    "use-bn-sync": Official(_bn_sync, takes_value=False),
    "debug": _ignored(),  # the log is always complete
    "skip-aggregate": _ignored(),  # all features are never gathered at once
    "reset-data-offset": _ignored(),  # --resume with weights restores neither
    "reset-optimizer": _ignored(),
    "save-epoch-frequency": _ignored(takes_value=True),  # every epoch; the last states are kept
    "valid-num-workers": _ignored(takes_value=True),
    "local-rank": _ignored(takes_value=True),  # torchrun sets LOCAL_RANK
    "distillation": _switch("*distillation"),
    "distllation": _switch("*distillation"),  # as the official README spells it
    "teacher-model-name": _same("teacher"),
    "kd-loss-weight": _same("teacher_weight"),
}


def apply_flags(
    values: Mapping[str, Any], flags: Sequence[str], world_size: int = 1
) -> dict[str, Any]:
    """Return a recipe's plain values with flags applied to them.

    Args:
        values: plain values of a recipe, from ``read_recipe``.
        flags: ``--data.workers 4`` or ``--data.workers=4``; ``--stages.NAME.epochs 3`` for one
            stage, ``--epochs 3`` for all. The last part of a name is enough if it is unique. ``-``
            and ``_`` are the same. Repeated flags make a list. ``none`` or ``off`` removes an
            option.
        world_size: number of processes; the official ``--batch-size`` is per process.

    Raises:
        UsageError: a flag is unknown or renamed, lacks its value, or has a value of the wrong
            type.
    """
    changed: dict[str, Any] = _copied(values)
    changed.setdefault("stages", [{}])
    stages = changed["stages"]
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise UsageError(_("the recipe's stages are not a list of tables; write [[stages]]"))
    settings: dict[str, list[str]] = {}
    typed: dict[str, str] = {}  # option -> the flag that sets it
    for name, value in _parse(flags):
        for option, text in _settings_of(name, value, world_size):
            settings.setdefault(option, []).append(text)
            typed[option] = f"--{name}"
    distillation = settings.pop("*distillation", None)
    _combine_official(settings, world_size)
    typed["stages.NAME.global_batch_size"] = typed.get("*batch", "--global-batch-size")
    for name, texts in settings.items():
        flag = typed.get(name, f"--{name.rpartition('.')[2].replace('_', '-')}")
        _set(changed, _Setting(name, texts, flag))
    if distillation and not any(_has_teacher(stage) for stage in changed["stages"]):
        raise UsageError(
            _("--distillation needs a teacher; give --teacher-model-name or --teacher")
        )
    return changed


def _has_teacher(stage: Mapping[str, Any]) -> bool:
    loss = stage.get("loss")
    return isinstance(loss, Mapping) and bool(loss.get("teacher"))


def _parse(flags: Sequence[str]) -> list[tuple[str, str | None]]:
    """Split flags into names and values; a switch has no value."""
    parsed: list[tuple[str, str | None]] = []
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or len(flag) < 3:
            raise UsageError(_("{flag!r} is not a flag; write --NAME VALUE", flag=flag))
        name, equals, value = flag[2:].partition("=")
        if equals:
            parsed.append((name, value))
        elif rest and not rest[0].startswith("--") and _takes_value(name):
            parsed.append((name, rest.pop(0)))
            while rest and not rest[0].startswith("--") and _is_list(name):
                parsed.append((name, rest.pop(0)))
        else:
            parsed.append((name, None))
    return parsed


def _takes_value(name: str) -> bool:
    official = _official(name)
    return official is None or official.takes_value


def _official(name: str) -> Official | None:
    return OFFICIAL.get(name.replace("_", "-"))


def _is_list(name: str) -> bool:
    """Return whether a flag may be followed by several values."""
    plain = {"train-data": "train", "val-data": "val"}.get(name.replace("_", "-"), name)
    last = plain.replace("-", "_").split(".")[-1]
    return any(full.split(".")[-1] == last and _is_tuple(kind) for full, kind, _, _ in options())


def _is_tuple(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _settings_of(name: str, value: str | None, world_size: int) -> list[tuple[str, str]]:
    """Return ``(full option name, value)`` of each option that a flag sets."""
    official = _official(name)
    if official is not None:
        if official.takes_value and value is None:
            raise UsageError(_("--{name} needs a value", name=name))
        pairs = official.sets(value or "", world_size)
    else:
        pairs = [(name, value if value is not None else "true")]
    settings = [(_full_name(option.replace("-", "_"), name), text) for option, text in pairs]
    if value is None and official is None and not _is_switch(settings[0][0]):
        raise UsageError(_("--{name} needs a value", name=name))
    return settings


def _is_switch(full: str) -> bool:
    """Return whether an option needs no value; unknown options are refused later."""
    parts = full.split(".")
    if parts[0] == "stages":
        parts[1:2] = ["NAME"]
    return not any(n == ".".join(parts) and kind is not bool for n, kind, _, _ in options())


def _full_name(name: str, flag: str) -> str:
    """Return the full name of an option from its full name or its last part."""
    if name.startswith("*"):  # part of an option: see _combine_official
        return name
    known = [full for full, _, _, _ in options()]
    if name.startswith("stages."):
        return name  # checked against the recipe's stages later
    if name in known or name in _STAGE_TABLES:
        return name
    matches = [full for full in known if full.split(".")[-1] == name]
    if not matches:
        matches = [full for full in known if full.endswith(f".{name}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(
            _(
                "--{flag} could be {matches}; write the whole name",
                flag=flag,
                matches=_(" or ").join(map(_as_flag, matches)),
            )
        )
    new = ".".join(RENAMED.get(part, part) for part in name.split("."))
    if new != name:
        raise UsageError(
            _("--{flag} is now --{new}; write the new name", flag=flag, new=new.replace("_", "-"))
        )
    names = {*known, *OFFICIAL, *(full.split(".")[-1] for full in known)}
    close = difflib.get_close_matches(name, {each.replace("-", "_") for each in names}, n=2)
    hint = _("did you mean {flags}? ", flags=_(" or ").join(map(_as_flag, close))) if close else ""
    raise UsageError(
        _(
            "unknown flag --{flag}; {hint}See: cn-clip train --help. All options: --show recipe",
            flag=flag,
            hint=hint,
        )
    )


def _as_flag(name: str) -> str:
    """Return the flag of an option, for all stages."""
    return f"--{name.removeprefix('stages.NAME.').replace('_', '-')}"


def _combine_official(settings: dict[str, list[str]], world_size: int) -> None:
    """Replace parts of options (``*batch`` and others) that several official flags combine to."""
    if logs := settings.pop("*logs", None):
        folder = os.path.join(logs[-1], settings["name"][-1]) if "name" in settings else logs[-1]
        settings.setdefault("output.folder", [folder])
    batch, accumulation = settings.pop("*batch", None), settings.pop("*accumulate", None)
    if batch is not None:
        accumulated = _whole((accumulation or ["1"])[-1], "--accum-freq")
        of_step = int(batch[-1])
        settings["stages.NAME.global_batch_size"] = [f"{of_step * accumulated}"]
        if accumulated > 1:  # one accumulation step is in memory at once
            settings["stages.NAME.micro_batch_size"] = [f"{of_step // world_size}"]
    elif accumulation is not None:
        raise UsageError(
            _("--accum-freq multiplies --batch-size; give both, or --global-batch-size")
        )
    vision, text = settings.pop("*vision", None), settings.pop("*text", None)
    if vision or text:
        if not (vision and text):
            raise UsageError(_("give both --vision-model and --text-model, or --start.model"))
        settings["start.model"] = [f"{vision[-1]}@{text[-1]}"]


@dataclass(frozen=True, slots=True)
class _Setting:
    """An option, its texts, and the flag as the user typed it, for messages."""

    name: str
    texts: list[str]
    flag: str


def _set(values: dict[str, Any], setting: _Setting) -> None:
    """Set one option, for stages in every stage that its name selects."""
    name = setting.name
    if not name.startswith("stages.") and name not in _STAGE_TABLES:
        table, *rest = name.split(".")
        _set_in(values, Recipe, [table, *rest], setting)
        return
    _unused, which, *rest = name.split(".") if name.startswith("stages.") else ("", "NAME", name)
    stages = values["stages"]
    names = [str(stage.get("name", Stage().name)) for stage in stages]
    if which == "NAME":
        chosen = stages
    elif which in (plain := [stage_name.replace("-", "_") for stage_name in names]):  # as in flags
        chosen = [stages[plain.index(which)]]
    elif which.isdecimal() and int(which) < len(stages):
        chosen = [stages[int(which)]]
    else:
        raise UnknownNameError(_("stage"), which, names)
    if not rest:
        raise UsageError(
            _(
                "{flag} names a stage; give one of its options, such as {flag}.epochs",
                flag=setting.flag,
            )
        )
    for stage in chosen:
        _set_in(stage, Stage, rest, setting)


def _set_in(table: dict[str, Any], cls: type, path: list[str], setting: _Setting) -> None:
    flag, texts = setting.flag, setting.texts
    hints = get_type_hints(cls)
    key, *rest = path
    if key not in hints:
        refuse_renamed(key, hints, f"--{setting.name.rpartition(key)[0]}")
        raise UnknownNameError(_("option in {flag}:", flag=flag), key, hints)
    inner = nested_class(hints[key])
    if rest and inner is not None:
        if not isinstance(table.setdefault(key, {}), dict):
            raise UsageError(
                _(
                    "the recipe's {key} is {table!r:.60}; {flag} needs it to be a table",
                    key=key,
                    table=table[key],
                    flag=flag,
                )
            )
        _set_in(table[key], inner, rest, setting)
        return
    if rest:
        raise UsageError(_("{flag}: {key} has no options", flag=flag, key=key))
    if inner is not None:  # a table is switched off, or on with its defaults
        if texts[-1] in _NONE:
            table.pop(key, None)
        elif texts[-1] in _ON:
            table.setdefault(key, {})
        else:
            some = fields(inner)[0].name.replace("_", "-")
            raise UsageError(
                _(
                    "{flag} is on or off; its options are such as {flag}.{some}",
                    flag=flag,
                    some=some,
                )
            )
        return
    _assign(table, key, hints[key], setting, cls)


def _assign(table: dict[str, Any], key: str, kind: Any, setting: _Setting, cls: type) -> None:
    texts = setting.texts
    optional = type(None) in get_args(kind)
    if optional and texts[-1] in _NONE:
        table.pop(key, None)
        return
    if _is_tuple(kind):
        table[key] = [] if texts[-1] in _NONE else texts
        return
    table[key] = _parsed(kind, texts[-1], setting.flag)
    _check_range(table[key], cls, key, setting.flag)
    if cls is Stage and key in ("steps", "epochs"):  # one replaces the other
        table.pop({"steps": "epochs", "epochs": "steps"}[key], None)


def _check_range(value: Any, cls: type, key: str, flag: str) -> None:
    """Check a number before the whole recipe is, whose message names its option, not the flag."""
    within = next(option for option in fields(cls) if option.name == key).metadata.get("within")
    if within is None or isinstance(value, bool | str):
        return
    low, high = within
    if not low <= value <= high:
        raise out_of_range(flag, value, low, high)


def _parsed(kind: Any, text: str, flag: str) -> Any:
    expected = type_text(kind)
    if type(None) in get_args(kind):
        kind, *literals = (arg for arg in get_args(kind) if arg is not type(None))
        if any(text in get_args(literal) for literal in literals):  # such as auto
            return text
    if get_origin(kind) is Literal and text not in get_args(kind):
        raise UnknownNameError(flag, text, map(str, get_args(kind)))
    if kind is bool:
        if text.lower() in (*_ON, *_OFF):
            return text.lower() in _ON
        raise UsageError(_("{flag} is {text!r}; give true or false", flag=flag, text=text))
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise UsageError(
                _(
                    "{flag} is {text!r}; give a {expected}",
                    flag=flag,
                    text=text,
                    expected=expected,
                )
            ) from None
    return text


def _whole(text: str, flag: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            _("{flag} is {text!r}; give a whole number", flag=flag, text=text)
        ) from None


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list | tuple) else value
