"""Parse a pickled pair without the pickle module.

A pickle is a program: even one without calls can run forever or nest until the process crashes. A
pair is flat and needs few opcodes.
"""

from __future__ import annotations

import io
import pickletools
from typing import Any

from cn_clip.translation import N_, _, translate

_SCALARS = {
    *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_BUILD = {"MARK", "TUPLE", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"}
_READ = _SCALARS | _PUT | _GET | _BUILD | {"PROTO", "FRAME", "MEMOIZE", "STOP"}
_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
_MAX_STEPS = 32  # a list of three in protocol 0, with a memo for each item, takes 14
_SHAPE = N_("(image id, text id, text)")
_MARK = object()

PickledPair = tuple[int | str, int | str, str]


def parse_pickled_pair(raw: bytes) -> PickledPair:
    """Return (image id, text id, text) of ``pickle.dumps`` of a tuple or list, of any protocol.

    Raises:
        ValueError: it is not such a pickle.
    """
    stream = io.BytesIO(raw)
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for _unused in range(_MAX_STEPS):
        name, argument = _step(stream, stack)
        if name == "STOP":
            return _pair(stack)
        if name == "MARK":
            stack.append(_MARK)
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in _SCALARS:
            stack.append(argument)
        elif name in _GET:
            if argument not in memo:
                raise ValueError(
                    _(
                        "its pickle gets {argument} from its memo, which is not set",
                        argument=argument,
                    )
                )
            stack.append(memo[argument])
        elif name in _PUT or name == "MEMOIZE":
            memo[len(memo) if name == "MEMOIZE" else argument] = _top(stack)
        elif name in _BUILD:
            _build(name, stack)
    raise ValueError(
        _("its pickle has more than {limit} opcodes; expected a pair", limit=_MAX_STEPS)
    )


def _step(stream: io.BytesIO, stack: list[Any]) -> tuple[str, Any]:
    """Read an opcode and its argument; the argument only of opcodes that a pair may use."""
    code = stream.read(1)
    opcode = _OPCODES.get(code[0]) if code else None
    if opcode is None:
        raise ValueError(
            _("its pickle has the unknown opcode {code!r}", code=code)
            if code
            else _("its pickle ends early")
        )
    if opcode.name == "STACK_GLOBAL":
        raise _refuse_name(*(str(item) for item in stack[-2:]))
    if opcode.name == "GLOBAL":
        raise _refuse_name(*(stream.readline(80).decode("latin-1").strip() for _ in range(2)))
    if opcode.name not in _READ:
        raise ValueError(
            _(
                "its pickle has the opcode {name}; a pair is {shape}, numbers and strings",
                name=opcode.name,
                shape=translate(_SHAPE),
            )
        )
    return opcode.name, opcode.arg.reader(stream) if opcode.arg is not None else None


def _build(name: str, stack: list[Any]) -> None:
    """Make a tuple or a list of the top items of the stack, or append them to a list."""
    if name in ("TUPLE3", "APPEND"):
        at = max(0, len(stack) - (3 if name == "TUPLE3" else 1))
        items = stack[at:]
    else:
        at = next((n for n in reversed(range(len(stack))) if stack[n] is _MARK), -1)
        if at < 0:
            raise ValueError(_("its pickle lacks a mark"))
        items = stack[at + 1 :]
    del stack[at:]
    # A list of numbers and strings cannot contain itself or nest.
    if not all(type(item) in (int, str) for item in items):
        raise ValueError(
            _(
                "its pickle holds more than numbers and strings; a pair is {shape}",
                shape=translate(_SHAPE),
            )
        )
    if name in ("TUPLE", "TUPLE3", "LIST"):
        stack.append(tuple(items) if name != "LIST" else items)
    elif isinstance(_top(stack), list):
        stack[-1] += items
    else:
        raise ValueError(_("its pickle appends to something other than a list"))


def _pair(stack: list[Any]) -> PickledPair:
    value = _top(stack)
    if isinstance(value, tuple | list) and len(value) == 3 and isinstance(value[2], str):
        return value[0], value[1], value[2]
    shown = f"{value!r:.80}" if value is not _MARK else _("nothing")
    raise ValueError(
        _("its pickle holds {shown}; expected {shape}", shown=shown, shape=translate(_SHAPE))
    )


def _top(stack: list[Any]) -> Any:
    if not stack:
        raise ValueError(_("its pickle takes from an empty stack"))
    return stack[-1]


def _refuse_name(*parts: str) -> ValueError:
    return ValueError(_("its pickle names {name}; only data is read", name=".".join(parts)))
