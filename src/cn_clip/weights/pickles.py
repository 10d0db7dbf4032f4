"""Bounds on a pickle before anything unpickles it: its instructions are read, none is followed.

A pickle of a few hundred bytes can describe tuples of tuples that take for ever to hash, nest so
deep that the interpreter ends, or change the classes it names. State dicts do none of that.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any, BinaryIO

# ViT-H-14 with AdamW's state has 120,000 instructions.
MOST_OBJECTS = 1_000_000
MOST_LEVELS = 200

_NAMES = {
    "push": (
        "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT NONE NEWTRUE NEWFALSE "
        "BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES UNICODE BINUNICODE SHORT_BINUNICODE "
        "EMPTY_LIST EMPTY_TUPLE EMPTY_DICT EMPTY_SET"
    ),
    "make": "TUPLE1 TUPLE2 TUPLE3 REDUCE NEWOBJ BINPERSID",
    "make of marked": "TUPLE LIST DICT",
    "fill": "APPEND SETITEM BUILD",
    "fill with marked": "APPENDS SETITEMS ADDITEMS",
    "put": "PUT BINPUT LONG_BINPUT MEMOIZE",
    "get": "GET BINGET LONG_BINGET",
    "class": "GLOBAL STACK_GLOBAL",
    "nothing": "PROTO FRAME",
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "NEWOBJ": 2, "BINPERSID": 1} | {
    "APPEND": 1,
    "SETITEM": 2,
    "BUILD": 1,
}
_ENCODINGS = ("latin1", "latin-1", "utf-8")
_ALLOCATE = ("torch Tensor", "__builtin__ bytearray", "builtins bytearray")  # from a number alone


class Refused(ValueError):
    """A pickle does what no state dict does; the text continues a sentence about the file."""


@dataclass(slots=True)
class _Value:
    """What an instruction leaves on the stack: how deep it nests, how many objects it counts when
    every use of an object counts anew, whether it may still be filled, and what it says."""

    levels: int = 1
    objects: int = 1
    open: bool = True
    content: Any = None


_MARK = _Value()


def check_pickle(stream: BinaryIO, *, size: int) -> Any:
    """Read the pickle at the stream's position up to its end; return its value if that is plain.

    Args:
        stream: its reads end where the data does, whatever length they are asked for.
        size: bytes of the whole file; no storage in it has more elements.

    Raises:
        Refused: it does what no state dict does.
        Exception: whatever else damaged bytes make ``pickletools`` raise.
    """
    stack: list[_Value] = []
    memo: dict[int, _Value] = {}
    count = 0
    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        kind = _KINDS.get(name)
        count += 1
        if kind == "push":
            stack.append(_Value(content=argument))
        elif kind == "put":
            place = len(memo) if name == "MEMOIZE" else int(argument)
            if place > MOST_OBJECTS:  # unpicklers make room for all places before it
                raise Refused("its pickle keeps an object at an impossible place")
            memo[place] = stack[-1]
        elif kind == "get":
            stack.append(memo[int(argument)])
            count += stack[-1].objects
        elif name == "MARK":
            stack.append(_MARK)
        elif kind == "make":
            stack.append(_made(name, _popped(stack, _TAKES[name]), size))
        elif kind == "make of marked":
            stack.append(_made(name, _popped_to_mark(stack), size))
        elif kind == "fill":
            _fill(_popped(stack, _TAKES[name]), stack[-1])
        elif kind == "fill with marked":
            _fill(_popped_to_mark(stack), stack[-1])
        elif kind == "class":
            if name == "STACK_GLOBAL":
                argument = " ".join(str(value.content) for value in _popped(stack, 2))
            stack.append(_Value(open=False, content=argument))
        elif name == "POP":
            stack.pop()
        elif name == "STOP":
            return stack[-1].content
        elif kind != "nothing":
            raise Refused(f"its pickle has the instruction {name}, which no state dict needs")
        if count > MOST_OBJECTS:
            raise Refused(
                f"its pickle makes more than {MOST_OBJECTS:,} objects; re-save the state dict alone"
            )
    raise ValueError("a pickle without an end")


def _popped(stack: list[_Value], count: int) -> list[_Value]:
    values = stack[-count:]
    if len(values) < count or any(value is _MARK for value in values):
        raise ValueError("a pickle that takes more than it has")
    del stack[-count:]
    return values


def _popped_to_mark(stack: list[_Value]) -> list[_Value]:
    values = []
    while (value := stack.pop()) is not _MARK:
        values.append(value)
    return values[::-1]


def _made(name: str, parts: list[_Value], size: int) -> _Value:
    made = _Value()
    _fill(parts, made)
    if name.startswith("TUPLE") and len(parts) <= 8:
        made.content = tuple(part.content for part in parts)
    elif name == "BINPERSID":
        numbers = parts[0].content if isinstance(parts[0].content, tuple) else ()
        largest = max((n for n in numbers if isinstance(n, int)), default=0)
        if largest > size:
            raise ValueError(f"it promises {largest:,} numbers in {size:,} bytes")
    elif name == "REDUCE":
        called, arguments = parts[0].content, parts[1].content
        encoding = isinstance(arguments, tuple) and arguments and arguments[-1]
        if called in _ALLOCATE or (called == "_codecs encode" and encoding not in _ENCODINGS):
            named = called.replace(" ", ".")
            raise Refused(f"its pickle names {named}, and only tensors are read, never code")
    return made


def _fill(parts: list[_Value], target: _Value) -> None:
    """Put values into one; what lies in another, or is a class, must not change any more."""
    if target is _MARK or not target.open:
        raise Refused("its pickle changes a class, or an object that another one holds")
    for part in parts:
        if part.levels >= target.levels:
            target.levels = part.levels + 1
        target.objects += part.objects
        part.open = False
    if target.levels > MOST_LEVELS:
        raise Refused(
            f"its pickle nests objects more than {MOST_LEVELS} deep; re-save the state dict alone"
        )
