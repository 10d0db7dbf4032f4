"""Errors of Cyclopts in one sentence of ours, which names options as they are typed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from cyclopts import exceptions

from cn_clip.errors import UnknownNameError
from cn_clip.translation import N_, _, translate

if TYPE_CHECKING:
    from cyclopts import App, CycloptsError

_VALUES = {int: N_("a whole number"), float: N_("a number"), bool: N_("true or false")}


def usage_message(error: CycloptsError) -> str:
    """Return what is wrong with the arguments, and where the help of the command is."""
    command = " ".join(["cn-clip", *(error.command_chain or ())])
    return _("{error}; see: {command} --help", error=_problem(error), command=command)


def _problem(error: CycloptsError) -> str:
    match error:
        case _ if error.msg is not None:
            return str(error)
        case exceptions.UnknownCommandError(app=app, unused_tokens=[command, *_rest]) if app:
            if command.startswith("-"):
                return _("unknown option {option}", option=command)
            return str(UnknownNameError(_("command"), command, _commands(app)))
        case exceptions.UnknownOptionError():
            return _unknown_option(error)
        case exceptions.ConsumeMultipleError():
            return _("{option} has too few or too many values", option=_option(error))
        case exceptions.MissingArgumentError():
            return _missing(error)
        case exceptions.RepeatArgumentError():
            return _("{option} is given more than once; give it once", option=_option(error))
        case exceptions.CoercionError():
            return _wrong_kind(error)
        case exceptions.ValidationError():
            return _invalid(error)
        case exceptions.UnusedCliTokensError(unused_tokens=[unused, *_rest]):
            return _("unexpected argument {argument!r}; leave it out", argument=unused)
        case exceptions.MixedArgumentError() | exceptions.ArgumentOrderError():
            return _(
                "{option} is given by its name and by its position; give it once",
                option=_option(error),
            )
    return str(error)


def _commands(app: App) -> list[str]:
    return [name for name in app if not name.startswith("-")]


def _unknown_option(error: exceptions.UnknownOptionError) -> str:
    option = (error.token.keyword or error.token.value).partition("=")[0]
    return unknown_option(
        option, [name for argument in error.argument_collection for name in argument.names]
    )


def unknown_option(option: str, known: Sequence[str]) -> str:
    """Return the words for an option that does not exist, with the nearest of those that do."""
    near = difflib.get_close_matches(option, known, n=1, cutoff=0.6)
    if near:
        return _("unknown option {option} (did you mean {name}?)", option=option, name=near[0])
    return _("unknown option {option}", option=option)


def _missing(error: exceptions.MissingArgumentError) -> str:
    option = _option(error)
    tokens = [] if error.argument is None else error.argument.tokens
    if error.keyword is not None or any(token.keyword is not None for token in tokens):
        return _("{option} needs a value", option=option)
    return _("{option} is missing", option=option)


def _wrong_kind(error: exceptions.CoercionError) -> str:
    option, kind = _option(error), error.target_type
    value = error.token.value if error.token else ""
    if get_origin(kind) is Literal:
        return str(UnknownNameError(option, value, map(str, get_args(kind))))
    if kind in _VALUES:
        expected = translate(_VALUES[kind])
        return _(
            "{option} is {value!r}; give {expected}", option=option, value=value, expected=expected
        )
    return _("{option} has the invalid value {value!r}", option=option, value=value)


def _invalid(error: exceptions.ValidationError) -> str:
    reason = error.exception_message
    if error.argument is None:
        return reason or str(error)
    value: Any = error.argument.tokens[0].value if error.argument.tokens else error.argument.value
    limit = re.fullmatch(r"Must be (.+?)\.?", reason)  # of Cyclopts' validator of numbers
    if limit is None:
        return _("{option} is {value}: {reason}", option=_option(error), value=value, reason=reason)
    return _(
        "{option} is {value}; give {limit}", option=_option(error), value=value, limit=limit[1]
    )


def _option(error: CycloptsError) -> str:
    """Return the name of the option or argument that an error is about, as it was typed."""
    token, argument = getattr(error, "token", None), error.argument
    tokens = [] if argument is None else argument.tokens
    typed = [getattr(error, "keyword", None), getattr(token, "keyword", None)]
    typed += [one.keyword for one in reversed(tokens)]
    name = next((one for one in typed if one), None)
    return name or (argument.name if argument is not None else "")
