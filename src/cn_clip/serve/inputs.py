"""Texts and images in the JSON of a request."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from cn_clip.serve.problems import RequestError
from cn_clip.text import read_json, valid_text
from cn_clip.translation import _

Request = TypeVar("Request", bound=BaseModel)


class Url(NamedTuple):
    """The address of an image."""

    url: str


Content = bytes | Url


def parse(model: type[Request], body: bytes) -> Request:
    """Return the JSON of a body as a request.

    Raises:
        RequestError: it is not JSON, or not such a request; the first fault is named.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        if error.errors(include_url=False)[0]["type"] != "json_invalid":
            raise _invalid(error) from None
    # Not JSON, or with half an emoji, which browsers send when they cut a text.
    try:
        return model.model_validate(read_json(body))
    except ValidationError as error:
        raise _invalid(error) from None
    except ValueError as error:
        raise RequestError(
            _("the body is not JSON: {reason}", reason=_json_fault(error)), code="invalid_json"
        ) from None


def image_content(value: Any, param: str) -> Content:
    """Return an image of a request: base64, a data URI, or an object that has one of these.

    Args:
        value: a string; ``{"image": ...}``; ``{"url": ...}``; or a part as OpenAI writes it,
            ``{"type": "image_url", "image_url": {"url": ...}}``.
        param: its place in the request, for messages.

    Raises:
        RequestError: it is none of these.
    """
    if isinstance(value, dict):
        inner = next(
            (value[k] for k in ("image", "image_url", "url", "base64") if k in value), None
        )
        if isinstance(inner, dict):
            inner = inner.get("url")
        value = inner
    if not isinstance(value, str) or not value.strip():
        raise RequestError(
            _('{param} is not an image; give {{"image": "BASE64"}} or a data: URI', param=param),
            param=param,
        )
    value = value.strip()
    if value.startswith(("http://", "https://")):
        return Url(value)
    if value.startswith("data:"):
        head, comma, value = value.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RequestError(
                _("{param} is a data: URI without base64; give data:image/…;base64,…", param=param),
                param=param,
            )
    try:
        # Python ignores missing padding errors in no mode; both alphabets are common.
        padded = value.translate(_ALPHABET) + "=" * (-len(value) % 4)
        return base64.b64decode(padded, validate=True)
    except (ValueError, binascii.Error):
        raise RequestError(
            _("{param} is not base64; encode the bytes of the image file", param=param),
            param=param,
        ) from None


_ALPHABET = str.maketrans("-_", "+/", " \n\r\t")


def is_image(value: Any) -> bool:
    """Return whether an input for an embedding is an image, not a text."""
    if isinstance(value, dict):
        return value.get("type") != "text" and "text" not in value
    return isinstance(value, str) and value.startswith("data:image/")


def text_of(value: Any, param: str, limit: int) -> str:
    """Return a text of a request.

    Args:
        value: a string, or ``{"text": ...}``.
        param: its place in the request, for messages.
        limit: of characters.

    Raises:
        RequestError: it is not a text, empty, or too long.
    """
    if isinstance(value, dict):
        value = value.get("text")
    if not isinstance(value, str):
        raise RequestError(
            _("{param} is not a string; token ids are not supported", param=param), param=param
        )
    if not value.strip():
        raise RequestError(_("{param} is empty; give a text", param=param), param=param)
    if len(value) > limit:
        raise RequestError(
            _(
                "{param} has {count:,} characters, above the limit of {limit:,}",
                param=param,
                count=len(value),
                limit=limit,
            ),
            param=param,
        )
    return valid_text(value)


def check_count(values: Sequence[object], param: str, limit: int) -> None:
    """Refuse too many values.

    Raises:
        RequestError: there are more than the limit.
    """
    if len(values) > limit:
        raise RequestError(
            _(
                "{param} has {count:,} items, above the limit of {limit:,}; send several requests",
                param=param,
                count=len(values),
                limit=limit,
            ),
            param=param,
        )


def _invalid(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ""
    for part in first["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.isidentifier() and part[:1].islower():  # not the name of a type
            place += f".{part}" if place else part
    name = place or _("the body")
    return RequestError(_("{name}: {reason}", name=name, reason=first["msg"]), param=place or None)


def _json_fault(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return _("{reason} at character {place}", reason=error.msg, place=error.pos)
    if isinstance(error, UnicodeDecodeError):
        return _("byte {place} is not UTF-8", place=error.start)
    return str(error)
