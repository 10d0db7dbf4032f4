"""Write docs/recipe.md: every option of a recipe, its type, default and help, and official flags.

Run it after any change to a recipe: ``make docs``, or ``python docs/generate_recipe.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cn_clip.train.recipe.flags import OFFICIAL
from cn_clip.train.recipe.schema import options, type_text
from cn_clip.train.recipe.toml import read_recipe, shipped

PAGE = Path(__file__).parent / "recipe.md"
HEAD = """\
# Options of a recipe

Every option, as `recipe.py` has it. This page is generated; to renew it:
`python docs/generate_recipe.py`. How it works: [training](training.md), [训练](zh/training.md).

In TOML, the part before the last dot is a table; each stage is a `[[stages]]`. On the command line
each is a flag, `--data.workers 4`; where the last part is the only one of its name it is enough,
`--workers 4`. For one stage: `--stages.locked.epochs 3`; for all: `--epochs 3`. A list is given by
several values; `none` or `off` takes an option away; `--early_stopping on` and `--lora on` take the
defaults of their tables.
"""


def rows() -> Iterator[str]:
    """Yield the table's rows, with the tables' names between."""
    yield "| Option | Value | Default | |\n|---|---|---|---|"
    for name, kind, default, told in options():
        shown = "" if default is None else f"`{_toml(default)}`"
        yield f"| `{name}` | {type_text(kind)} | {shown} | {told.replace('|', chr(92) + '|')} |"


def official() -> Iterator[str]:
    """Yield the official flags and what they set here."""
    yield "| Official flag | Here |\n|---|---|"
    for flag, meaning in OFFICIAL.items():
        sets = meaning.sets("1" if meaning.takes_value else "", 1)
        named = {"*batch": "global_batch_size", "*accumulate": "global_batch_size"}
        named |= {"*vision": "start.model", "*text": "start.model", "*logs": "output.folder"}
        named |= {"*distillation": "stages.NAME.loss.teacher"}
        names = ", ".join(dict.fromkeys(f"`{named.get(name, name)}`" for name, _ in sets))
        yield f"| `--{flag}` | {names or 'nothing to set: always so, or never needed'} |"


def render() -> str:
    """Return the whole page."""
    recipes = "\n".join(f"- `{name}`: {_first_comment(name)}" for name in shipped())
    return "\n".join(
        [
            HEAD,
            *rows(),
            "",
            "## Shipped recipes",
            "",
            recipes,
            "",
            "## Flags of the official training",
            "",
            "They are understood where the concept is the same. `--batch-size` is per process, as",
            "there, times their number and `--accum-freq`; `--lr` is the rate for that batch. With",
            "`--logs` and `--name`, the folder is LOGS/NAME. `--resume`, `--seed`, `--warmup`,",
            "`--beta1`, `--beta2`, `--eps` and `--mask-ratio` have the same names here.",
            "",
            *official(),
            "",
        ]
    )


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _first_comment(name: str) -> str:
    from importlib.resources import files

    read_recipe(name)  # it is one
    text = files("cn_clip.train").joinpath("recipe", f"{name}.toml").read_text("utf-8")
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("# "))
    return " ".join(lines)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
