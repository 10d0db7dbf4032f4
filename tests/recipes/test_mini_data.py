"""The tables of recipes/mini are well-formed and consistent."""

import json
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "recipes" / "mini" / "data"


def table(name: str) -> list[list[str]]:
    lines = (DATA / name).read_text("utf-8").splitlines()
    return [line.split("\t") for line in lines if not line.startswith("#")]


def test_every_class_has_one_line_and_a_unique_first_name():
    rows = table("imagenet.tsv")
    assert len(rows) == 1000
    first = Counter(names.split(",")[0] for names, _, _ in rows)
    assert [name for name, count in first.items() if count > 1] == []


def test_looks_are_weights_of_known_classes():
    known = {names.split(",")[0] for names, _, _ in table("imagenet.tsv")}
    for names, _, _, looks in table("things.tsv"):
        entries = [entry.partition(":") for entry in looks.split(",") if entry]
        assert [name for name, _, _ in entries if name not in known] == [], names
        assert all(int(weight) > 0 for _, _, weight in entries), names


def test_every_thing_has_a_unique_first_name():
    first = Counter(row[0].split(",")[0] for row in table("things.tsv"))
    assert [name for name, count in first.items() if count > 1] == []


@pytest.mark.parametrize("name", ["clip_art.tsv", "games.tsv"])
def test_every_image_has_a_name_and_one_line(name):
    rows = table(name)
    assert all(len(row) == 4 and row[1].split(",")[0] for row in rows)
    assert max(Counter(row[0] for row in rows).values()) == 1


@pytest.mark.parametrize("name", ["imagenet.tsv", "things.tsv", "clip_art.tsv", "games.tsv"])
def test_no_field_has_stray_blanks_or_empty_entries(name):
    for row in table(name):
        for field in filter(None, row):
            entries = field.split(",")
            assert all(entry == entry.strip() and entry for entry in entries), row


def test_every_excluded_image_names_its_stamp():
    rows = [json.loads(line) for line in (DATA / "excluded.jsonl").read_text("utf-8").splitlines()]
    assert rows and all(row["image"] and row["stamp"] for row in rows)


def test_caption_forms_use_known_lists_and_chinese():
    lists: dict[str, list[str]] = {"thing": ["猫"]}
    for line in (DATA / "captions.txt").read_text("utf-8").splitlines():
        if line.startswith("["):
            current = lists.setdefault(line.strip("[]"), [])
        elif not line.startswith("#"):
            current.append(line)
    assert all(lists.values())
    for form in lists.pop("form"):
        parts = form.split()
        assert any(part in lists for part in parts), form
        assert [part for part in parts if part.isascii() and part not in lists] == [], form
