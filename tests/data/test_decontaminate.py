import json

import pytest
from conftest import make_image
from PIL import Image

from cn_clip.cli import run
from cn_clip.data.captions import plain
from cn_clip.data.curate.decontaminate import (
    decontaminate,
    read_removed,
    write_removed,
    write_removed_report,
)
from cn_clip.data.sources.open import open_source
from cn_clip.errors import DataError, UsageError


def folder(root, pairs):
    """Write (name, image, captions) as a folder source."""
    root.mkdir()
    for name, picture, captions in pairs:
        if isinstance(picture, bytes):
            (root / f"{name}.png").write_bytes(picture)
        else:
            picture.save(root / f"{name}.png")
        (root / f"{name}.txt").write_text("\n".join(captions), encoding="utf-8")
    return open_source(str(root))


@pytest.fixture
def test_set(tmp_path):
    pairs = [(f"t{n}", make_image(n, (240, 200)), [f"测试集里的第{n}句话"]) for n in range(4)]
    return folder(tmp_path / "test", pairs)


@pytest.fixture
def train_set(tmp_path):
    first = make_image(0, (240, 200))
    return folder(
        tmp_path / "train",
        [
            ("a-clean", make_image(50, (240, 200)), ["干净的图", "也干净"]),
            ("b-resized", first.resize((100, 90)), ["一", "二"]),
            (
                "c-mirrored",
                make_image(1, (240, 200)).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
                ["三"],
            ),
            ("d-caption", make_image(60, (240, 200)), ["测试集里的，第２句话！", "别的话"]),
            ("e-broken", b"no picture", ["四"]),
        ],
    )


def test_copies_and_captions_of_the_test_set_are_found(train_set, test_set, tmp_path):
    found = decontaminate(train_set, test_set)
    told = [
        (train_set.row(r.index).text_id, r.reason, test_set.row(r.against).image_id)
        for r in found.removed
    ]
    assert told == [
        ("b-resized", "image", "t0"),
        ("b-resized#1", "image", "t0"),
        ("c-mirrored", "image", "t1"),
        ("d-caption", "caption", "t2"),
    ]
    assert len(found.unreadable) == 1 and "e-broken.txt, line 1: " in found.unreadable[0]
    assert decontaminate(train_set, test_set, workers=1) == found
    assert [r.reason for r in decontaminate(train_set, test_set, threshold=0).removed] == [
        "caption"
    ]
    only = decontaminate(train_set, test_set, min_caption=20)
    assert {r.reason for r in only.removed} == {"image"}


def on_paper(picture, size, at):
    paper = Image.new("RGB", size, "white")
    paper.paste(picture, at)
    return paper


def test_a_drawing_is_found_with_other_margins(tmp_path):
    drawing, other, third = (make_image(seed, (120, 100)) for seed in range(3))
    test = folder(
        tmp_path / "test",
        [("t", on_paper(drawing, (300, 200), (20, 60)), ["图"]), ("u", third, ["图"])],
    )
    pairs = [
        ("a-none", drawing, ["一"]),
        ("b-wide", on_paper(drawing, (200, 300), (70, 10)), ["二"]),
        ("c-mirrored", on_paper(drawing, (130, 130), (5, 25)).transpose(0), ["三"]),
        ("d-other", on_paper(other, (300, 200), (20, 60)), ["四"]),
        ("e-paper", on_paper(drawing, (300, 200), (300, 200)), ["五"]),
        ("f-framed", on_paper(third, (300, 300), (0, 0)), ["六"]),
    ]
    train = folder(tmp_path / "train", pairs)
    found = decontaminate(train, test)
    assert [train.row(r.index).text for r in found.removed] == ["一", "二", "三", "六"]


def test_photos_of_one_shape_do_not_match_by_their_padding(tmp_path):
    """Laid on squares, long dark images are a dark band on white, all of them."""
    dark = [
        Image.eval(make_image(seed, (360, 120)), lambda level: 60 + level // 6)
        for seed in range(12)
    ]
    test = folder(tmp_path / "test", [(f"t{n}", each, ["图"]) for n, each in enumerate(dark[:6])])
    train = folder(tmp_path / "train", [(f"r{n}", each, ["图"]) for n, each in enumerate(dark[6:])])
    assert decontaminate(train, test).removed == []


def test_a_flat_image_matches_by_its_pixels(tmp_path):
    white, black = Image.new("RGB", (90, 90), "white"), Image.new("RGB", (90, 90), "black")
    test = folder(tmp_path / "test", [("t", white, ["白色的一张图"])])
    train = folder(tmp_path / "train", [("a", black, ["黑"]), ("b", white.copy(), ["白"])])
    found = decontaminate(train, test)
    assert [(r.index, r.reason, r.distance) for r in found.removed] == [(1, "image", 0)]


def test_two_files_may_use_the_same_image_ids(tmp_path):
    """The second test set's image 1 is compared too, and stays another one in training."""
    for seed, name in enumerate(["a", "b", "c", "d"]):
        folder(tmp_path / name, [("1", make_image(seed, (240, 200)), [f"第{name}个图片的描述"])])
    copy = make_image(1, (240, 200)).resize((100, 90))
    folder(tmp_path / "e", [("1", copy, ["缩小的"])])
    train = open_source(f"folder:{tmp_path}/{{c,e}}")
    found = decontaminate(train, open_source(f"folder:{tmp_path}/{{a,b}}"))
    assert [(r.index, r.reason, r.against) for r in found.removed] == [(1, "image", 1)]
    assert found.test_images == 2


def test_the_list_is_read_back_for_the_same_source_only(train_set, test_set, tmp_path):
    found = decontaminate(train_set, test_set)
    out = tmp_path / "removed.jsonl"
    write_removed(found, train_set, test_set, out)
    assert read_removed(out, train_set).tolist() == [r.index for r in found.removed]
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert lines[1]["train"]["text_id"] == "b-resized"
    assert lines[1]["against"]["image_id"] == "t0"
    with pytest.raises(DataError, match=r"was made for 8 pairs of .*train, and .*test holds 4"):
        read_removed(out, test_set)
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="was not written by"):
        read_removed(tmp_path / "other.jsonl", train_set)


def test_the_report_shows_both_images(train_set, test_set, tmp_path):
    found = decontaminate(train_set, test_set)
    write_removed_report(found, train_set, test_set, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 2 * 4
    assert "http" not in page.replace("http-equiv", "")


def test_an_unreadable_test_image_is_an_error(train_set, tmp_path):
    broken = folder(tmp_path / "broken", [("x", b"no picture", ["一句话"])])
    with pytest.raises(DataError, match=r"unreadable test image: .*x\.txt"):
        decontaminate(train_set, broken)
    with pytest.raises(UsageError, match="the threshold is 200 bits of 256"):
        decontaminate(train_set, broken, threshold=200)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("一只猫。", "一只 猫"),
        ("ＡＢＣ１２", "abc12"),
        ("“猫”和狗", "猫和狗"),
        ("\u3000a\u200b b\n", "AB"),
    ],
)
def test_captions_are_compared_without_width_case_and_punctuation(text, other):
    assert plain(text) == plain(other)
    assert plain("一只猫") != plain("一只狗")


def test_from_the_command_line_to_clean_shards(train_set, test_set, tmp_path, capsys):
    removed, page = tmp_path / "removed.jsonl", tmp_path / "page.html"
    arguments = ["data", "decontaminate", f"{tmp_path}/train", "--against", f"{tmp_path}/test"]
    arguments += ["--out", str(removed), "--report", str(page), "--workers", "0"]
    assert run(arguments) == 1  # an image could not be compared
    told = capsys.readouterr()
    assert "4 of 8 pairs are in folder:" in told.out.replace("\n", " ")
    assert "e-broken" in told.err
    assert page.is_file()
    assert run(arguments) == 2
    assert "exists; give another place" in capsys.readouterr().err
    packed = ["data", "pack", f"{tmp_path}/train", "--out", f"{tmp_path}/out", "--json"]
    assert run([*packed, "--without", str(removed), "--workers", "0"]) == 1
    assert json.loads(capsys.readouterr().out)["pairs"] == 3
    clean = open_source(f"tar:{tmp_path}/out/*.tar")
    assert [clean.row(i).text for i in range(3)] == ["干净的图", "也干净", "别的话"]
