"""Arguments that are empty, as a shell makes them of a variable that is not set."""

from __future__ import annotations

from collections.abc import Sequence

from cn_clip.errors import UsageError


def refuse_empty(arguments: Sequence[str]) -> None:
    """Raise a ``UsageError`` for an empty argument; no command has a use for one.

    Else an empty path would be the current folder.
    """
    for at, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if equals and option.startswith("--") and not value.strip():
            raise UsageError(
                f"{option} is empty; give a value, or check the variable in {argument}"
            )
        if not argument.strip():
            before = arguments[at - 1] if at else ""
            where = before if before.startswith("-") else f"argument {at + 1}"
            raise UsageError(f"{where} is empty; give a value. Is a variable of the shell not set?")
