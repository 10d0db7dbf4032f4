"""Every message is one printable line of at most 300 characters."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cn_clip.errors import (
    MAX_MESSAGE,
    CNClipError,
    DataError,
    MissingWeightsError,
    UnknownModelError,
    UsageError,
    one_line,
)


@given(st.text(max_size=2000))
def test_a_message_is_one_printable_line(message: str) -> None:
    line = one_line(message)
    assert len(line) <= MAX_MESSAGE and line.isprintable()


def test_a_long_value_keeps_the_start_and_the_remedy() -> None:
    line = str(DataError(f"/9j/{'A' * 80_000} is not a path; decode base64 first"))
    assert line.startswith("/9j/AAA") and line.endswith("is not a path; decode base64 first")
    assert len(line) < 150


def test_a_long_list_is_shortened_in_the_middle() -> None:
    line = str(DataError(f"unknown key 'x'; available: {', '.join(map(str, range(999)))}; see y"))
    assert line.startswith("unknown key 'x'; available: 0, 1") and line.endswith("998; see y")
    assert len(line) == MAX_MESSAGE


@pytest.mark.parametrize("message", ["short", "a path/of/" + "x" * 200])
def test_a_message_that_fits_is_unchanged(message: str) -> None:
    assert str(DataError(message)) == str(MissingWeightsError(message)) == message


def test_line_breaks_and_lone_surrogates_do_not_reach_the_terminal() -> None:
    assert str(DataError("two\nlines \ud83d\x1b[31m")) == "two lines \\ud83d\\x1b[31m"


def kinds(base: type[CNClipError]) -> list[type[CNClipError]]:
    return [base, *(kind for child in base.__subclasses__() for kind in kinds(child))]


def test_errors_of_every_kind_come_from_a_worker_as_they_were() -> None:
    from cn_clip.serve import problems  # noqa: F401
    from cn_clip.train.run import signals  # noqa: F401

    assert len(kinds(CNClipError)) > 10
    for kind in kinds(CNClipError):
        error = kind("the message") if issubclass(kind, OSError) else kind.__new__(kind)
        error.args = ("the message",)
        error.__dict__["status"] = 404
        sent = pickle.loads(pickle.dumps(error))
        assert (type(sent), str(sent), sent.__dict__) == (kind, "the message", error.__dict__)
    unknown = pickle.loads(pickle.dumps(UnknownModelError("model", "vit-b-61", ["ViT-B-16"])))
    assert isinstance(unknown, UsageError) and "did you mean ViT-B-16?" in str(unknown)
