"""A pair out of its pickle, without unpickling it.

A pickle is a program, and even one that calls nothing can run for ever or nest until the process
ends. A pair is flat, so a few of the opcodes and a few of each are enough.
"""

from __future__ import annotations

import io
import pickletools
from typing import Any

_SCALARS = {
    *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_BUILD = {"MARK", "TUPLE", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"}
_READ = _SCALARS | _PUT | _GET | _BUILD | {"PROTO", "FRAME", "MEMOIZE", "STOP"}
_OPCODES = {ord(each.code): each for each in pickletools.opcodes}
_MAX_STEPS = 32  # a list of three, in protocol 0 with a memo for each, takes 14
_SHAPE = "(image id, text id, text)"
_MARK = object()

PickledPair = tuple[int | str, int | str, str]


def unpickled_pair(raw: bytes) -> PickledPair:
    """Return (image id, text id, text) of ``pickle.dumps`` of a tuple or list, of any protocol.

    Raises:
        ValueError: it is anything else; what it is, is named.
    """
    stream = io.BytesIO(raw)
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for _ in range(_MAX_STEPS):
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
                raise ValueError(f"its pickle gets {argument} from its memo, where nothing is")
            stack.append(memo[argument])
        elif name in _PUT or name == "MEMOIZE":
            memo[len(memo) if name == "MEMOIZE" else argument] = _top(stack)
        elif name in _BUILD:
            _build(name, stack)
    raise ValueError(f"its pickle has more than {_MAX_STEPS} opcodes; a pair needs fewer")


def _step(stream: io.BytesIO, stack: list[Any]) -> tuple[str, Any]:
    """Read an opcode and its argument, the latter only of those that a pair may have."""
    code = stream.read(1)
    opcode = _OPCODES.get(code[0]) if code else None
    if opcode is None:
        raise ValueError(
            f"its pickle has {code!r} for an opcode" if code else "its pickle ends early"
        )
    if opcode.name == "STACK_GLOBAL":
        raise _naming(*(str(each) for each in stack[-2:]))
    if opcode.name == "GLOBAL":
        raise _naming(*(stream.readline(80).decode("latin-1").strip() for _ in range(2)))
    if opcode.name not in _READ:
        raise ValueError(
            f"its pickle has the opcode {opcode.name}; a pair is {_SHAPE}, numbers and strings"
        )
    return opcode.name, opcode.arg.reader(stream) if opcode.arg is not None else None


def _build(name: str, stack: list[Any]) -> None:
    """Make a tuple or a list of what is on top of the stack, or add it to a list."""
    if name in ("TUPLE3", "APPEND"):
        at = max(0, len(stack) - (3 if name == "TUPLE3" else 1))
        items = stack[at:]
    else:
        at = next((n for n in reversed(range(len(stack))) if stack[n] is _MARK), -1)
        if at < 0:
            raise ValueError("its pickle lacks a mark")
        items = stack[at + 1 :]
    del stack[at:]
    # What holds only these cannot hold itself, and cannot nest.
    if not all(type(item) in (int, str) for item in items):
        raise ValueError(f"its pickle holds more than numbers and strings; a pair is {_SHAPE}")
    if name in ("TUPLE", "TUPLE3", "LIST"):
        stack.append(tuple(items) if name != "LIST" else items)
    elif isinstance(_top(stack), list):
        stack[-1] += items
    else:
        raise ValueError("its pickle adds to what is not a list")


def _pair(stack: list[Any]) -> PickledPair:
    found = _top(stack)
    if isinstance(found, tuple | list) and len(found) == 3 and isinstance(found[2], str):
        return found[0], found[1], found[2]
    what = f"{found!r:.80}" if found is not _MARK else "nothing"
    raise ValueError(f"its pickle holds {what}; expected {_SHAPE}")


def _top(stack: list[Any]) -> Any:
    if not stack:
        raise ValueError("its pickle takes from an empty stack")
    return stack[-1]


def _naming(*parts: str) -> ValueError:
    return ValueError(f"its pickle names {'.'.join(parts)}, and only data is read")
