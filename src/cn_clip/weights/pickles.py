"""Checks of a pickle before it is unpickled: opcodes are read, none is executed.

A pickle of a few hundred bytes can describe tuples of tuples that take forever to hash, nest deep
enough to crash the interpreter, or change the classes it names. State dicts do none of this.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any, BinaryIO

from cn_clip.translation import _

# ViT-H-14 with AdamW's state has 120,000 instructions.
MAX_OBJECTS = 1_000_000
MAX_DEPTH = 200

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
_ALLOCATE = ("torch Tensor", "__builtin__ bytearray", "builtins bytearray")  # of any size


class RefusedPickle(ValueError):
    """A pickle does something that no state dict does; the message follows the file name."""


@dataclass(slots=True)
class _Value:
    """A value on the stack: nesting depth, number of objects (repeated uses count again), whether
    it may still be changed, and its content if that is plain."""

    depth: int = 1
    objects: int = 1
    mutable: bool = True
    content: Any = None


_MARK = _Value()


def check_pickle(stream: BinaryIO, *, size: int) -> Any:
    """Check the pickle at the stream's position; return its value if that is plain.

    Args:
        stream: a stream whose reads return at most the remaining data.
        size: bytes of the whole file; no storage in it has more elements.

    Raises:
        RefusedPickle: the pickle does something that no state dict does.
        Exception: any error of ``pickletools`` on damaged bytes.
    """
    stack: list[_Value] = []
    memo: dict[int, _Value] = {}
    count = 0
    argument: Any
    for opcode, argument, _unused in pickletools.genops(stream):
        name = opcode.name
        kind = _KINDS.get(name)
        count += 1
        if kind == "push":
            stack.append(_Value(content=argument))
        elif kind == "put":
            index = len(memo) if name == "MEMOIZE" else int(argument)
            if index > MAX_OBJECTS:  # unpicklers allocate all memo entries before it
                raise RefusedPickle(_("its pickle has an impossible memo index"))
            memo[index] = stack[-1]
        elif kind == "get":
            stack.append(memo[int(argument)])
            count += stack[-1].objects
        elif name == "MARK":
            stack.append(_MARK)
        elif kind == "make":
            stack.append(_build(name, _pop(stack, _TAKES[name]), size))
        elif kind == "make of marked":
            stack.append(_build(name, _pop_to_mark(stack), size))
        elif kind == "fill":
            _fill(_pop(stack, _TAKES[name]), stack[-1])
        elif kind == "fill with marked":
            _fill(_pop_to_mark(stack), stack[-1])
        elif kind == "class":
            if name == "STACK_GLOBAL":
                argument = " ".join(str(value.content) for value in _pop(stack, 2))
            stack.append(_Value(mutable=False, content=argument))
        elif name == "POP":
            stack.pop()
        elif name == "STOP":
            return stack[-1].content
        elif kind != "nothing":
            raise RefusedPickle(
                _("its pickle has the opcode {name}, which no state dict needs", name=name)
            )
        if count > MAX_OBJECTS:
            raise RefusedPickle(
                _(
                    "its pickle makes more than {limit:,} objects; re-save the state dict alone",
                    limit=MAX_OBJECTS,
                )
            )
    raise ValueError(_("the pickle has no end"))


def _pop(stack: list[_Value], count: int) -> list[_Value]:
    values = stack[-count:]
    if len(values) < count or any(value is _MARK for value in values):
        raise ValueError(_("the pickle pops more than its stack has"))
    del stack[-count:]
    return values


def _pop_to_mark(stack: list[_Value]) -> list[_Value]:
    values = []
    while (value := stack.pop()) is not _MARK:
        values.append(value)
    return values[::-1]


def _build(name: str, parts: list[_Value], size: int) -> _Value:
    value = _Value()
    _fill(parts, value)
    if name.startswith("TUPLE") and len(parts) <= 8:
        value.content = tuple(part.content for part in parts)
    elif name == "BINPERSID":
        values = parts[0].content if isinstance(parts[0].content, tuple) else ()
        elements = max((v for v in values if isinstance(v, int)), default=0)
        if elements > size:
            raise ValueError(
                _(
                    "it declares {elements:,} elements in {size:,} bytes",
                    elements=elements,
                    size=size,
                )
            )
    elif name == "REDUCE":
        called, arguments = parts[0].content, parts[1].content
        encoding = isinstance(arguments, tuple) and arguments and arguments[-1]
        if called in _ALLOCATE or (called == "_codecs encode" and encoding not in _ENCODINGS):
            function = called.replace(" ", ".")
            raise RefusedPickle(
                _(
                    "its pickle names {function}; only tensors are read, never code",
                    function=function,
                )
            )
    return value


def _fill(parts: list[_Value], target: _Value) -> None:
    """Add values to a container; a class, or a value in another one, must not change any more."""
    if target is _MARK or not target.mutable:
        raise RefusedPickle(_("its pickle changes a class, or an object inside another one"))
    for part in parts:
        if part.depth >= target.depth:
            target.depth = part.depth + 1
        target.objects += part.objects
        part.mutable = False
    if target.depth > MAX_DEPTH:
        raise RefusedPickle(
            _(
                "its pickle nests objects more than {limit} deep; re-save the state dict alone",
                limit=MAX_DEPTH,
            )
        )
