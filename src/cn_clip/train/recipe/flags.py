"""Flags of the command line as changes to a recipe: its own dotted names, and the official ones."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from cn_clip.errors import UnknownNameError, UsageError
from cn_clip.train.recipe.schema import Recipe, Stage, nested, options, spoken

_ON, _OFF = ("true", "on", "yes"), ("false", "off", "no")
_NONE = ("none", "off")


@dataclass(frozen=True, slots=True)
class Official:
    """An official flag: the options it sets, as ``(name, value)`` pairs, of its value here."""

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


def _logs(value: str, _: int) -> list[tuple[str, str]]:
    if value.lower() == "none":
        raise UsageError("--logs is None; a run is kept in a folder here, so give one")
    return [("*logs", value)]


def _positive(name: str) -> Callable[[str, int], list[tuple[str, str]]]:
    """Officially, -1 stands for never."""
    return lambda value, _: [(name, "none" if value in ("-1", "0") else value)]


def _bn_sync(_: str, world_size: int) -> list[tuple[str, str]]:
    if world_size > 1:
        warnings.warn(
            "--use-bn-sync is ignored: a BatchNorm that learns takes the statistics of its own "
            "process' batch; a ViT has none, and --freeze visual.* keeps those of RN50",
            stacklevel=2,
        )
    return []


# Every flag of cn_clip/training/params.py of the official package 1.6.0 and before, except those
# that are options here under the same name. The batch was stated per process and step, and
# accumulated.
OFFICIAL: dict[str, Official] = {
    "train-data": _same("data.train"),
    "val-data": _same("data.val"),
    "num-workers": _same("data.workers"),
    "logs": Official(_logs),
    "log-interval": _same("output.log_every"),
    "report-training-batch-acc": _ignored(),  # it is mistaken for recall, which is logged
    "batch-size": Official(lambda value, world: [("*batch", f"{_whole(value) * world}")]),
    "accum-freq": _same("*accumulate"),
    "valid-batch-size": _ignored(takes_value=True),  # the embedder chooses it
    "max-steps": _same("steps"),
    "max-epochs": _same("epochs"),
    "valid-step-interval": _same("evaluation.every_steps"),
    "valid-epoch-interval": _same("evaluation.every_epochs"),
    "context-length": _same("start.context_length"),
    # Stated for the batch that is trained with, not for another one.
    "lr": Official(lambda value, _: [("learning_rate", value), ("for_batch", "none")]),
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
    "use-flash-attention": _ignored(),  # the fastest attention is always taken
    "gather-with-grad": _ignored(),  # always
    "use-bn-sync": Official(_bn_sync, takes_value=False),
    "debug": _ignored(),  # the log is always whole
    "skip-aggregate": _ignored(),  # nothing is ever aggregated whole
    "reset-data-offset": _ignored(),  # weights given with --resume bring neither of the two
    "reset-optimizer": _ignored(),
    "save-epoch-frequency": _ignored(takes_value=True),  # always, and the last ones are kept
    "valid-num-workers": _ignored(takes_value=True),
    "local-rank": _ignored(takes_value=True),  # torchrun tells by a variable
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
        values: what ``read_recipe`` returned.
        flags: ``--data.workers 4``, ``--data.workers=4``; ``--stages.NAME.epochs 3`` for one stage,
            or ``--epochs 3`` for all: the last part of a name is enough where it is the only one.
            ``-`` and ``_`` are the same. Lists are given by naming the flag again. ``none`` or
            ``off`` takes an option away.
        world_size: processes, for the official ``--batch-size``, which is meant for each.

    Raises:
        UsageError: a flag is unknown, lacks its value, or has one of the wrong kind.
    """
    changed: dict[str, Any] = _copied(values)
    changed.setdefault("stages", [{}])
    stages = changed["stages"]
    if not isinstance(stages, list) or not all(isinstance(each, dict) for each in stages):
        raise UsageError("the recipe's stages are no list of tables; write [[stages]]")
    asked: dict[str, list[str]] = {}
    for name, value in _read(flags):
        for target, text in _meaning(name, value, world_size):
            asked.setdefault(target, []).append(text)
    distillation = asked.pop("*distillation", None)
    _official_sums(asked, world_size)
    for name, texts in asked.items():
        _set(changed, name, texts)
    if distillation and not any(_has_teacher(stage) for stage in changed["stages"]):
        raise UsageError("--distillation needs a teacher; give --teacher-model-name or --teacher")
    return changed


def _has_teacher(stage: Mapping[str, Any]) -> bool:
    loss = stage.get("loss")
    return isinstance(loss, Mapping) and bool(loss.get("teacher"))


def _read(flags: Sequence[str]) -> list[tuple[str, str | None]]:
    """Split flags into names and values; a switch has no value."""
    found: list[tuple[str, str | None]] = []
    waiting = list(flags)
    while waiting:
        flag = waiting.pop(0)
        if not flag.startswith("--") or len(flag) < 3:
            raise UsageError(f"{flag!r} is no flag; write --NAME VALUE")
        name, equals, value = flag[2:].partition("=")
        if equals:
            found.append((name, value))
        elif waiting and not waiting[0].startswith("--") and _takes_value(name):
            found.append((name, waiting.pop(0)))
            while waiting and not waiting[0].startswith("--") and _is_list(name):
                found.append((name, waiting.pop(0)))
        else:
            found.append((name, None))
    return found


def _takes_value(name: str) -> bool:
    official = _official(name)
    return official is None or official.takes_value


def _official(name: str) -> Official | None:
    return OFFICIAL.get(name.replace("_", "-"))


def _is_list(name: str) -> bool:
    """Whether a flag may be followed by several values."""
    plain = {"train-data": "train", "val-data": "val"}.get(name.replace("_", "-"), name)
    last = plain.replace("-", "_").split(".")[-1]
    return any(full.split(".")[-1] == last and _plural(kind) for full, kind, _, _ in options())


def _plural(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _meaning(name: str, value: str | None, world_size: int) -> list[tuple[str, str]]:
    """Return the options that a flag sets, by their full names."""
    official = _official(name)
    if official is not None:
        if official.takes_value and value is None:
            raise UsageError(f"--{name} needs a value")
        said = official.sets(value or "", world_size)
    else:
        said = [(name, value if value is not None else "true")]
    meant = [(_full(option.replace("-", "_"), name), text) for option, text in said]
    if value is None and official is None and not _is_switch(meant[0][0]):
        raise UsageError(f"--{name} needs a value")
    return meant


def _is_switch(full: str) -> bool:
    """Whether an option can be named alone, which sets it to true; unknown ones are told later."""
    parts = full.split(".")
    if parts[0] == "stages":
        parts[1:2] = ["NAME"]
    return not any(n == ".".join(parts) and kind is not bool for n, kind, _, _ in options())


def _full(name: str, flag: str) -> str:
    """Return the full name of an option, of its full name or its last part."""
    if name.startswith("*"):  # no option yet, but a part of one: see _official_sums
        return name
    known = [each for each, _, _, _ in options()]
    if name.startswith("stages."):
        return name  # which stages there are, the recipe tells
    if name in known or name == "plateau" or name == "lora":
        return name
    ends = [each for each in known if each.split(".")[-1] == name]
    if not ends:
        ends = [each for each in known if each.endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise UsageError(f"--{flag} could be {' or '.join(ends)}; write the whole name")
    every = {*known, *OFFICIAL, *(each.split(".")[-1] for each in known)}
    near = difflib.get_close_matches(name, {each.replace("-", "_") for each in every}, n=2)
    hint = f"did you mean {' or '.join(f'--{each}' for each in near)}? " if near else ""
    raise UsageError(f"unknown flag --{flag}; {hint}All flags are listed in docs/recipe.md")


def _official_sums(asked: dict[str, list[str]], world_size: int) -> None:
    """Turn the official batch per process, the two towers' names and LOGS/NAME into options."""
    if logs := asked.pop("*logs", None):
        folder = os.path.join(logs[-1], asked["name"][-1]) if "name" in asked else logs[-1]
        asked.setdefault("output.folder", [folder])
    batch, times = asked.pop("*batch", None), asked.pop("*accumulate", None)
    if batch is not None:
        rounds = _whole((times or ["1"])[-1])
        asked["stages.NAME.global_batch_size"] = [f"{_whole(batch[-1]) * rounds}"]
        if rounds > 1:  # as many as that are in memory at once
            asked["stages.NAME.micro_batch_size"] = [f"{_whole(batch[-1]) // world_size}"]
    elif times is not None:
        raise UsageError("--accum-freq multiplies --batch-size; give both, or --global-batch-size")
    vision, text = asked.pop("*vision", None), asked.pop("*text", None)
    if vision or text:
        if not (vision and text):
            raise UsageError("give both --vision-model and --text-model, or --start.model")
        asked["start.model"] = [f"{vision[-1]}@{text[-1]}"]


def _set(values: dict[str, Any], name: str, texts: list[str]) -> None:
    """Set one option, in every stage that its name is meant for."""
    if not name.startswith("stages.") and name not in ("plateau", "lora"):
        table, *rest = name.split(".")
        _set_in(values, Recipe, [table, *rest], texts, name)
        return
    _, which, *rest = name.split(".") if name.startswith("stages.") else ("", "NAME", name)
    stages = values["stages"]
    names = [str(stage.get("name", Stage().name)) for stage in stages]
    if which == "NAME":
        chosen = stages
    elif which in (plain := [each.replace("-", "_") for each in names]):  # as flags are read
        chosen = [stages[plain.index(which)]]
    elif which.isdecimal() and int(which) < len(stages):
        chosen = [stages[int(which)]]
    else:
        raise UnknownNameError("stage", which, names)
    if not rest:
        raise UsageError(f"--{name} names a stage; its options are --{name}.NAME")
    for stage in chosen:
        _set_in(stage, Stage, rest, texts, name)


def _set_in(table: dict[str, Any], cls: type, path: list[str], texts: list[str], name: str) -> None:
    hints = get_type_hints(cls)
    key, *rest = path
    if key not in hints:
        raise UnknownNameError(f"option in --{name}:", key, hints)
    inner = nested(hints[key])
    if rest and inner is not None:
        if not isinstance(table.setdefault(key, {}), dict):
            raise UsageError(f"the recipe's {key} is {table[key]!r:.60}, no table; --{name}")
        _set_in(table[key], inner, rest, texts, name)
        return
    if rest:
        raise UsageError(f"--{name}: {key} has no options inside")
    if inner is not None:  # a table can be switched, on with its defaults
        if texts[-1] in _NONE:
            table.pop(key, None)
        elif texts[-1] in _ON:
            table.setdefault(key, {})
        else:
            raise UsageError(f"--{name} is on or off; its options are --{name}.NAME")
        return
    _assign(table, key, hints[key], texts, name, cls)


def _assign(
    table: dict[str, Any], key: str, kind: Any, texts: list[str], name: str, cls: type
) -> None:
    optional = type(None) in get_args(kind)
    if optional and texts[-1] in _NONE:
        table.pop(key, None)
        return
    if _plural(kind):
        table[key] = [] if texts[-1] in _NONE else texts
        return
    table[key] = _parsed(kind, texts[-1], name)
    if cls is Stage and key in ("steps", "epochs"):  # one stands for the other
        table.pop({"steps": "epochs", "epochs": "steps"}[key], None)


def _parsed(kind: Any, text: str, name: str) -> Any:
    expected = spoken(kind)
    if type(None) in get_args(kind):
        kind, *words = (each for each in get_args(kind) if each is not type(None))
        if any(text in get_args(each) for each in words):  # such as auto, where a number can stand
            return text
    if kind is bool:
        if text.lower() in (*_ON, *_OFF):
            return text.lower() in _ON
        raise UsageError(f"--{name} is {text!r}; give true or false")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise UsageError(f"--{name} is {text!r}; give a {expected}") from None
    return text


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{text!r} is no whole number") from None


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list | tuple) else value
