"""Recipes from TOML: strictly, so that a key with a typing error is refused and not ignored."""

from __future__ import annotations

import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cn_clip.errors import UnknownNameError, UsageError
from cn_clip.text import path_text
from cn_clip.train.recipe.checks import check_recipe
from cn_clip.train.recipe.schema import VERSION, Recipe, nested, spoken

_MOST_BYTES = 1 << 16  # of a recipe; those shipped have a few thousand
_LONGEST_LINE = 2000  # characters; tomllib takes minutes for a key of a hundred thousand dots
_MOST_LEVELS = 16  # of tables and lists in it; a recipe has five


def shipped() -> list[str]:
    """Return the names of the recipes in the package."""
    folder = files("cn_clip.train").joinpath("recipe")
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name[-5:] == ".toml")


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """Read a shipped recipe by its name, or a TOML file, as plain values for ``build_recipe``.

    Raises:
        UsageError: there is none, or it is not TOML.
    """
    known = shipped()
    try:
        path = Path(name_or_path).expanduser()
        is_file = path.suffix == ".toml" or path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, no such user, a NUL
        raise UsageError(f"{name_or_path!r} is no usable path: {error}") from None
    if name_or_path in known:
        text = files("cn_clip.train").joinpath("recipe", f"{name_or_path}.toml").read_text("utf-8")
    elif is_file:
        text = _text_of(path)
    else:
        raise UnknownNameError("recipe", name_or_path, known)
    return _tables(text, f"the recipe {name_or_path}")


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as stream:  # not all of what may be a disk
            content = stream.read(_MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the recipe {path} cannot be read: byte {error.start:,} is not UTF-8; save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"the recipe {path} cannot be read: {error}") from None
    if len(content) > _MOST_BYTES:
        raise UsageError(f"the recipe {path} has more than {_MOST_BYTES:,} bytes; is it a recipe?")
    if max(map(len, text.splitlines()), default=0) > _LONGEST_LINE:
        raise UsageError(
            f"the recipe {path} has a line of more than {_LONGEST_LINE:,} characters; break it"
        )
    return text


def _tables(text: str, what: str) -> dict[str, Any]:
    """Read TOML that nests no deeper than recipes do."""
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise UsageError(f"{what} is nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, and numbers of thousands of digits
        raise UsageError(f"{what} is not TOML: {error}") from None
    level: list[Any] = [values]
    for _ in range(_MOST_LEVELS):
        level = [each for value in level for each in _inside(value)]
    if level:
        raise UsageError(f"{what} is nested too deeply")
    return values


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def from_toml(text: str) -> Recipe:
    """Read what ``Recipe.to_toml`` wrote.

    Raises:
        UsageError: it is not TOML, or as ``build_recipe``.
    """
    return build_recipe(_tables(text, "the recipe"))


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """Make a recipe of plain values and check that it can be run.

    Raises:
        UsageError: a key is unknown, a value of the wrong kind or impossible, or the recipe is of a
            newer version.
    """
    version = values.get("version", VERSION)
    if isinstance(version, int) and not isinstance(version, bool) and version > VERSION:
        raise UsageError(
            f"the recipe is of version {version}, this cn_clip reads up to {VERSION}; update with: "
            "pip install -U cn-clip"
        )
    recipe: Recipe = _built(Recipe, values, "")
    check_recipe(recipe)
    return recipe


def difference(old: Recipe, new: Recipe) -> list[str]:
    """Say, a line each, which options differ: ``data.workers: 2, now 4``."""
    before, after = _flat(asdict(old)), _flat(asdict(new))
    return [
        f"{name}: {before.get(name)!r}, now {after.get(name)!r}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name)
    ]


def _built(cls: Any, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise UsageError(f"the recipe's {where.rstrip('.') or 'top'} is {values!r:.60}, no table")
    hints = get_type_hints(cls)
    given = {}
    for key, value in values.items():
        if key not in hints:
            raise UnknownNameError(f"option of {where.rstrip('.') or 'the recipe'}", key, hints)
        given[key] = _value(hints[key], value, f"{where}{key}")
    return cls(**given)


def _value(kind: Any, value: Any, where: str) -> Any:
    """Check a value of TOML against a type, and return it as that."""
    origin, inner = get_origin(kind), nested(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _value(_one_of(kind, value), value, where)
    if origin is tuple:
        rows = [value] if isinstance(value, str) else value
        if not isinstance(rows, list | tuple):
            raise UsageError(f"{where} is {value!r:.60}; expected a {spoken(kind)}")
        return tuple(_value(get_args(kind)[0], row, f"{where}.{n}") for n, row in enumerate(rows))
    if inner is not None:
        return _built(inner, value, f"{where}.")
    if origin is Literal:
        if value not in get_args(kind):
            raise UnknownNameError(where, str(value), get_args(kind))
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{where} is {value!r:.60}; expected a {spoken(kind)}")
    if isinstance(value, str):
        _check_text(value, where)
    return value


def _check_text(value: str, where: str) -> None:
    """Refuse texts that are no path, no name and no pattern, before anything is done with them."""
    if not value.strip():
        raise UsageError(f"{where} is empty; give a value, or leave it out")
    if not value.isprintable() and any(c in value for c in "\0\r\n"):
        raise UsageError(f"{where} is {value!r}; remove the line break or the NUL")
    if (written := path_text(value)) != value:
        raise UsageError(
            f"{where} is {written!r}, a name that is not UTF-8, and a recipe is a file of UTF-8; "
            "rename it, or make a link to it with another name"
        )
    try:
        Path(value).expanduser()
    except RuntimeError:  # it begins like a user's home
        raise UsageError(f"{where} is {value!r}, the home of a user who is not known") from None


def _one_of(kind: Any, value: Any) -> Any:
    """Return the type of a union that a value is meant for; a string is a word, if it has words."""
    kinds = [each for each in get_args(kind) if each is not type(None)]
    words = [each for each in kinds if get_origin(each) is Literal]
    return words[0] if words and isinstance(value, str) else kinds[0]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        pairs = [(each.get("name", str(n)), each) for n, each in enumerate(value)]
    else:
        return {prefix.rstrip("."): value}
    return {k: v for key, each in pairs for k, v in _flat(each, f"{prefix}{key}.").items()}
