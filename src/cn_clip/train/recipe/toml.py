"""Reads recipes from TOML. Unknown keys are refused, so that a misspelt one is not ignored."""

from __future__ import annotations

import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cn_clip.errors import UnknownNameError, UsageError
from cn_clip.install import update_command
from cn_clip.text import path_text
from cn_clip.train.recipe.consistency import check_recipe
from cn_clip.train.recipe.renamed import refuse_renamed
from cn_clip.train.recipe.schema import VERSION, Recipe, nested_class, type_text
from cn_clip.translation import _

_MAX_BYTES = 1 << 16  # the shipped recipes have a few thousand
_MAX_LINE_LENGTH = 2000  # tomllib takes minutes for a key with 100,000 dots
_MAX_DEPTH = 16  # of nested tables and lists; a recipe has five
_STAGE_NUMBER = re.compile(r"^stages\.\d+\.")


def shipped() -> list[str]:
    """Return the names of the shipped recipes."""
    folder = files("cn_clip.train").joinpath("recipe")
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name[-5:] == ".toml")


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """Read a shipped recipe by its name, or a TOML file, as plain values for ``build_recipe``.

    Raises:
        UsageError: no such recipe or file, or the file is not TOML.
    """
    known = shipped()
    try:
        path = Path(name_or_path).expanduser()
        is_file = path.suffix == ".toml" or path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, unknown user, NUL
        raise UsageError(
            _(
                "{name_or_path!r} is not a valid path: {error}",
                name_or_path=name_or_path,
                error=error,
            )
        ) from None
    if name_or_path in known:
        text = files("cn_clip.train").joinpath("recipe", f"{name_or_path}.toml").read_text("utf-8")
    elif is_file:
        text = _text_of(path)
    else:
        raise UnknownNameError(_("recipe"), name_or_path, known)
    return _tables(text, _("the recipe {name_or_path}", name_or_path=name_or_path))


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as stream:  # a bounded read: the path may be a device
            content = stream.read(_MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            _(
                "the recipe {path} cannot be read: byte {position:,} is not UTF-8; save it as "
                "UTF-8",
                path=path,
                position=error.start,
            )
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(
            _("the recipe {path} cannot be read: {error}", path=path, error=error)
        ) from None
    if len(content) > _MAX_BYTES:
        raise UsageError(
            _(
                "the recipe {path} has more than {limit:,} bytes; is it a recipe?",
                path=path,
                limit=_MAX_BYTES,
            )
        )
    if max(map(len, text.splitlines()), default=0) > _MAX_LINE_LENGTH:
        raise UsageError(
            _(
                "the recipe {path} has a line of more than {limit:,} characters; break it",
                path=path,
                limit=_MAX_LINE_LENGTH,
            )
        )
    return text


def _tables(text: str, what: str) -> dict[str, Any]:
    """Parse TOML of limited depth; ``what`` names it in messages."""
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise UsageError(_("{what} is nested too deeply", what=what)) from None
    except ValueError as error:  # TOMLDecodeError, or an integer with thousands of digits
        raise UsageError(_("{what} is not TOML: {error}", what=what, error=error)) from None
    level: list[Any] = [values]
    for _unused in range(_MAX_DEPTH):
        level = [child for value in level for child in _children(value)]
    if level:
        raise UsageError(_("{what} is nested too deeply", what=what))
    return values


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain values, and check it.

    Raises:
        UsageError: a key is unknown, a value has the wrong type or is out of range, or the recipe
            has a newer version.
    """
    version = values.get("version", VERSION)
    if isinstance(version, int) and not isinstance(version, bool) and version > VERSION:
        raise UsageError(
            _(
                "the recipe has version {version}, this cn_clip reads up to {supported_version}; "
                "update with: {command}",
                version=version,
                supported_version=VERSION,
                command=update_command(),
            )
        )
    recipe: Recipe = _build(Recipe, values, "")
    check_recipe(recipe)
    return recipe


def difference(old: Recipe, new: Recipe) -> list[str]:
    """Return a line for each option that differs, such as ``data.workers: 2, now 4``."""
    before, after = _flat(asdict(old)), _flat(asdict(new))
    return [
        _(
            "{name}: {before!r}, now {after!r}",
            name=name,
            before=before.get(name),
            after=after.get(name),
        )
        for name in sorted(before | after)
        if before.get(name) != after.get(name)
    ]


def _build(cls: Any, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise UsageError(
            _(
                "the recipe's {where} is {values!r:.60}; expected a table",
                where=where.rstrip(".") or _("top level"),
                values=values,
            )
        )
    hints = get_type_hints(cls)
    given = {}
    for key, value in values.items():
        if key not in hints:
            refuse_renamed(key, hints, _STAGE_NUMBER.sub("", where))
            raise UnknownNameError(
                _("option of {where}", where=where.rstrip(".") or _("the recipe")), key, hints
            )
        given[key] = _value(hints[key], value, f"{where}{key}")
    return cls(**given)


def _value(kind: Any, value: Any, where: str) -> Any:
    """Check a TOML value against a type, and return it converted to that type."""
    origin, inner = get_origin(kind), nested_class(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _value(_union_member(kind, value), value, where)
    if origin is tuple:
        rows = [value] if isinstance(value, str) else value
        if not isinstance(rows, list | tuple):
            raise UsageError(
                _(
                    "{where} is {value!r:.60}; expected a {kind}",
                    where=where,
                    value=value,
                    kind=type_text(kind),
                )
            )
        return tuple(_value(get_args(kind)[0], row, f"{where}.{n}") for n, row in enumerate(rows))
    if inner is not None:
        return _build(inner, value, f"{where}.")
    if origin is Literal:
        if value not in get_args(kind):
            raise UnknownNameError(where, str(value), get_args(kind))
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(
            _(
                "{where} is {value!r:.60}; expected a {kind}",
                where=where,
                value=value,
                kind=type_text(kind),
            )
        )
    if isinstance(value, str):
        _check_text(value, where)
    return value


def _check_text(value: str, where: str) -> None:
    """Refuse text that cannot be a path, a name or a pattern."""
    if not value.strip():
        raise UsageError(_("{where} is empty; give a value, or leave it out", where=where))
    if not value.isprintable() and any(c in value for c in "\0\r\n"):
        raise UsageError(
            _("{where} is {value!r}; remove the line break or the NUL", where=where, value=value)
        )
    if (written := path_text(value)) != value:
        raise UsageError(
            _(
                "{where} is {written!r}, which is not UTF-8, and a recipe is a UTF-8 file; rename "
                "the file, or link to it under another name",
                where=where,
                written=written,
            )
        )
    try:
        Path(value).expanduser()
    except RuntimeError:  # ~NAME
        raise UsageError(
            _("{where} is {value!r}, the home of an unknown user", where=where, value=value)
        ) from None


def _union_member(kind: Any, value: Any) -> Any:
    """Return the member of a union for a value: the ``Literal`` for a string, if there is one."""
    members = [arg for arg in get_args(kind) if arg is not type(None)]
    literals = [member for member in members if get_origin(member) is Literal]
    return literals[0] if literals and isinstance(value, str) else members[0]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        pairs = [(table.get("name", str(n)), table) for n, table in enumerate(value)]
    else:
        return {prefix.rstrip("."): value}
    return {k: v for key, inner in pairs for k, v in _flat(inner, f"{prefix}{key}.").items()}
