"""Damaged files of every format end in a result or in a documented error, whatever they hold."""

import sys
import time

import pytest
from fuzz import readers, runner

from cn_clip.errors import CNClipError, DataError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are watched by /proc")


def check(found):
    found = list(found)
    bad = [each for each in found if each.kind not in runner.GOOD]
    assert not bad, "\n".join(" ".join(map(str, row)) for row in runner.table(bad))
    return found


@pytest.mark.parametrize("name", sorted(readers.FORMATS))
def test_a_valid_file_is_read(name, tmp_path):
    readers.write_valid(name, tmp_path / "files")
    kind, *details = runner.judged(lambda: readers.FORMATS[name].read(tmp_path / "files"))
    assert kind == "ok" or (name == "tiff_lab" and kind == "refused"), details


def test_damaged_files_end_in_a_result_or_in_one_sentence():
    found = check(runner.outcomes(jobs(6), workers=2))
    kinds = {each.kind for each in found}
    assert kinds == {"ok", "refused"}


@pytest.mark.full
def test_thirty_thousand_damaged_files_end_in_a_result_or_in_one_sentence(tmp_path):
    each = -(-30_000 // len(readers.FORMATS))
    check(runner.outcomes(jobs(each, seed=2), workers=2, save=tmp_path / "bad"))


def jobs(count, seed=1):
    return [(name, seed, number) for number in range(count) for name in readers.FORMATS]


# The runner itself: what it would call bad is made, and it does call it that.


def write(folder):
    (folder / "x.txt").write_text("x")


def fine(_):
    pass


def raw(_):
    raise KeyError("x")


def refuses(_):
    raise DataError("x is no y; give z")


def long(_):
    class Long(CNClipError):
        def __str__(self):
            return "x" * 301

    raise Long


def slow(_):
    while True:
        pass


def asleep(_):
    time.sleep(60)


def greedy(_):
    memory = bytearray(1100 << 20)
    memory[:: 1 << 12] = b"x" * len(memory[:: 1 << 12])


def endless(_):
    bytearray(1 << 40)


def crashing(_):
    import ctypes

    ctypes.string_at(0)


def running(_):
    import os

    os.system("true")


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        (refuses, "refused"), (raw, "harness"), (long, "message"), (slow, "hang"), (asleep, "hang"),
        (greedy, "memory"), (endless, "memory"), (crashing, "crash"), (running, "execution"),
    ],
)  # fmt: skip
def test_the_runner_reports_faults(what, kind):
    also = {"made": readers.Format(write, what), "fine": readers.Format(write, fine)}
    jobs = [("made", 1, 1), ("fine", 1, 1)]
    deadline = 0.5 if kind == "hang" else 10
    first, second = runner.outcomes(jobs, workers=1, deadline=deadline, also=also)
    assert (first.kind, second.kind) == (kind, "ok")  # the next process does its work


def test_a_mutant_is_a_function_of_its_numbers(tmp_path):
    for place in ("a", "b"):
        for name in ("csv", "png", "pt_zip", "recipe"):
            readers.damage(name, 3, 5, tmp_path / place / name)
    a, b = (
        {path.relative_to(tmp_path / place): path.read_bytes()
         for path in (tmp_path / place).rglob("*") if path.is_file()}
        for place in ("a", "b")
    )  # fmt: skip
    assert a == b
    assert a != {
        path: readers.valid_files(path.parts[0])[str(path.relative_to(path.parts[0]))] for path in a
    }
