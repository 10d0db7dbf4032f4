"""Recipes from TOML: strictly, so that a key with a typing error is refused and not ignored."""

from __future__ import annotations

import tomllib
import types
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cn_clip.errors import UnknownNameError, UsageError
from cn_clip.train.recipe import VERSION, Recipe, nested, spoken
from cn_clip.train.requirements import check_recipe


def shipped() -> list[str]:
    """Return the names of the recipes in the package."""
    folder = files("cn_clip.train").joinpath("recipes")
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name[-5:] == ".toml")


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """Read a shipped recipe by its name, or a TOML file, as plain values for ``build_recipe``.

    Raises:
        UsageError: there is none, or it is not TOML.
    """
    known, path = shipped(), Path(name_or_path).expanduser()
    if name_or_path in known:
        text = files("cn_clip.train").joinpath("recipes", f"{name_or_path}.toml").read_text("utf-8")
    elif path.suffix == ".toml" or path.is_file():
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the recipe {path} cannot be read: {error}") from None
    else:
        raise UnknownNameError("recipe", name_or_path, known)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the recipe {name_or_path} is not TOML: {error}") from None


def from_toml(text: str) -> Recipe:
    """Read what ``Recipe.to_toml`` wrote."""
    return build_recipe(tomllib.loads(text))


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """Make a recipe of plain values and check that it can be run.

    Raises:
        UsageError: a key is unknown, a value of the wrong kind or impossible, or the recipe is of a
            newer version.
    """
    version = values.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
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
    return value


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
