"""Refusal of empty arguments, which come from unset shell variables."""

from __future__ import annotations

from collections.abc import Sequence

from cn_clip.errors import UsageError
from cn_clip.translation import _


def refuse_empty(arguments: Sequence[str]) -> None:
    """Raise a ``UsageError`` for an empty argument, which no command accepts.

    An empty path would otherwise mean the current folder.
    """
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if equals and option.startswith("--") and not value.strip():
            raise UsageError(
                _(
                    "{option} is empty; give a value, or check the variable in {argument}",
                    option=option,
                    argument=argument,
                )
            )
        if not argument.strip():
            previous = arguments[index - 1] if index else ""
            name = previous if previous.startswith("-") else _("argument {index}", index=index + 1)
            raise UsageError(
                _("{name} is empty; give a value. Is a variable of the shell not set?", name=name)
            )
