"""Text and paths where they enter: valid Unicode, links without loops, plain files only."""

import json
import os
import socket
import time
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from conftest import encoded, make_image

from cn_clip.cli import run
from cn_clip.embeddings.inputs import read_images, read_texts
from cn_clip.errors import ImageError, UsageError
from cn_clip.files import as_path, find, read_file, read_lines, resolve_in, walk
from cn_clip.image import decode as image
from cn_clip.text import path_text, read_json, valid_text

GBK = os.fsdecode("中文".encode("gbk"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("猫\ud83d", "猫\ufffd"),
        ("\ud83d\ude00", "😀"),  # both halves, as two characters
        ("\ude00\ud83d猫", "\ufffd\ufffd猫"),
        ("猫😀", "猫😀"),
    ],
)
def test_half_an_emoji_becomes_one_replacement_and_two_halves_an_emoji(text, expected):
    assert valid_text(text) == expected
    assert read_json(json.dumps({text: [text]})) == {expected: [expected]}
    assert read_json(json.dumps([text]).encode()) == [expected]


def test_labels_and_templates_of_the_command_line_enter_as_valid_text(tmp_path, capsys):
    make_image().save(tmp_path / "a.png")
    command = ["classify", str(tmp_path / "a.png"), "--labels", "猫\ud83d,狗", "--json"]
    assert run([*command, "--template", "{}\ude00"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["labels"], said["templates"]) == (["猫\ufffd", "狗"], ["{}\ufffd"])


@pytest.mark.parametrize("raw", [b"\xed\xa0\xbd", b"[" * 100_000, b"9" * 5_000, b"[1"])
def test_invalid_json_is_a_value_error(raw):
    with pytest.raises(ValueError):
        read_json(raw)


def test_a_name_that_is_not_utf8_round_trips():
    written = path_text(f"p/{GBK}.jpg")
    assert written == "p/%D6%D0%CE%C4.jpg" and written.encode()
    assert unquote_to_bytes(written) == os.fsencode(f"p/{GBK}.jpg")
    assert path_text("p/中文.jpg") == "p/中文.jpg"


@pytest.mark.parametrize("given", ["", "a\0b", "a" * 300, "~nobody-of-this-name/x"])
def test_an_invalid_path_is_refused_with_one_sentence(given):
    with pytest.raises(UsageError, match=r"path is empty|is not a valid path"):
        as_path(given)
    with pytest.raises(ImageError):
        image.find_images([given])
    for read in (read_images, read_texts):
        with pytest.raises(UsageError):
            list(read([given]))


def test_only_plain_files_of_a_bounded_size_are_read_and_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "big").write_bytes(bytes(11))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        for name, said in (
            ("folder.jpg", "a folder"),
            ("pipe.jpg", "a named pipe"),
            ("s", "a socket"),
            ("/dev/zero", "a device"),
            ("big", "above the limit of 10"),
            ("a\0b", "NUL"),
            ("none", "No such file"),
        ):
            with pytest.raises(OSError, match=said):
                read_file(os.path.join(tmp_path, name), 10)
    (tmp_path / "big").write_bytes(bytes(10))
    assert read_file(tmp_path / "big", 10) == bytes(10)


def test_lines_end_at_line_ends_only(tmp_path):
    (tmp_path / "t").write_bytes("\ufeff一\u2028二\r\n三\x0b四\r五\n\n".encode())
    assert read_lines(tmp_path / "t") == ["一\u2028二", "三\x0b四", "五", ""]


def test_linked_folders_are_searched_and_each_real_one_once(tmp_path):
    for name in ("real", "photos/own"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("real/a.jpg", "photos/b.jpg", "photos/own/c.jpg"):
        (tmp_path / name).touch()
    photos = tmp_path / "photos"
    for name, to in (
        ("more", "../real"),
        ("again", "../real"),
        ("itself", "."),
        ("above", ".."),
        ("also_own", "own"),
        ("broken.jpg", "nowhere"),
    ):
        (photos / name).symlink_to(to)
    found = [str(each.relative_to(photos)) for each in walk(photos).files]
    assert found == ["again/a.jpg", "b.jpg", "broken.jpg", "own/c.jpg"]
    assert image.find_images([photos]) == [photos / each for each in found]


def test_a_glob_over_a_loop_of_links_ends(tmp_path):
    for at in range(3):
        (tmp_path / f"d{at}").mkdir()
        (tmp_path / f"d{at}" / "x.tar").touch()
        for other in range(3):
            (tmp_path / f"d{at}" / f"to{other}").symlink_to(tmp_path)
    begin = time.monotonic()
    assert [path.name for path in find(f"{tmp_path}/**/*.tar")] == ["x.tar"] * 3
    assert find(f"{tmp_path}/d?/x.tar") == [tmp_path / f"d{at}/x.tar" for at in range(3)]
    assert time.monotonic() - begin < 2


def test_globs_match_as_the_standard_library_does(tmp_path):
    from glob import glob

    for name in ("a/b/c.tar", "a/d.tar", "e.tar", ".h/i.tar", "a/.j.tar", "k[1]/l.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for pattern in (
        "**/*.tar",
        "*/*.tar",
        "a/**",
        ".h/*",
        "?.tar",
        "[d-f].tar",
        "a/**/c.tar",
        "x*",
    ):
        expected = {each.rstrip("/") for each in glob(f"{tmp_path}/{pattern}", recursive=True)}
        assert {str(each) for each in find(f"{tmp_path}/{pattern}")} == expected, pattern
    assert find(f"{tmp_path}/k[1]/*") == [tmp_path / "k[1]/l.tar"]  # a name that is there


def test_files_of_other_formats_are_counted_and_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(make_image(), "JPEG"))
    for name in ("b.PSD", "c.psd", "d.jxl", "a.txt", ".DS_Store", "LICENSE", "e"):
        (tmp_path / name).touch()
    told = "4 files are skipped, not of a supported image format"
    with pytest.warns(UserWarning, match=rf"{told} \(2 .psd, 1 without a suffix, 1 .jxl\)"):
        assert image.find_images([tmp_path]) == [tmp_path / "a.jpg"]
    with pytest.warns(UserWarning, match="2 .psd"):
        assert len(image.find_images([f"{tmp_path}/*"])) == 1
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ImageError, match=r"holds no image .*; .* \(2 .psd"):
        image.find_images([tmp_path])


@pytest.mark.skipif(os.getuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    assert "cannot be listed: Permission denied" in walk(tmp_path).closed[0]


def test_a_path_from_windows_is_found_if_the_one_with_slashes_exists(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.jpg").touch()
    assert resolve_in(tmp_path, "a\\b.jpg") == tmp_path / "a" / "b.jpg"
    assert resolve_in(tmp_path, "a\\c.jpg") == tmp_path / "a\\c.jpg"
    (tmp_path / "a\\b.jpg").touch()  # a name may hold one here
    assert resolve_in(tmp_path, "a\\b.jpg") == tmp_path / "a\\b.jpg"


def test_lists_of_images_and_texts_in_common_forms_are_read(tmp_path):
    (tmp_path / "p").mkdir()
    name = f"p/{GBK}.jpg"
    (tmp_path / name).write_bytes(encoded(make_image(), "JPEG"))
    (tmp_path / "list.txt").write_bytes(os.fsencode(name) + b"\rp\\" + os.fsencode(f"{GBK}.jpg"))
    items = list(read_images([str(tmp_path / "list.txt")]))
    assert [item.id for item in items] == ["p/%D6%D0%CE%C4.jpg", "p\\%D6%D0%CE%C4.jpg"]
    assert [item.content for item in items] == [tmp_path / name] * 2
    (tmp_path / "t.jsonl").write_text(
        '{"text_id": "\\ud83d", "text": "猫\\ud83d"}', encoding="utf-8"
    )
    [item] = read_texts([str(tmp_path / "t.jsonl")])
    assert (item.id, item.content) == ("\ufffd", "猫\ufffd")


def test_an_endless_line_is_not_read_completely(tmp_path, monkeypatch):
    from cn_clip.data.sources import lines
    from cn_clip.errors import DataError

    with (tmp_path / "t.txt").open("wb") as stream:
        stream.truncate(200 << 20)  # sparse: 200 MB of zeros
    monkeypatch.setattr(lines, "_BLOCK", 1 << 20)
    with pytest.raises(DataError, match=r"line 1 has 68,157,440 bytes or more, above"):
        list(read_texts([str(tmp_path / "t.txt")]))
    with pytest.raises(DataError, match="line 1 has 209,715,200 bytes or more"):
        lines.Lines(tmp_path / "t.txt")[0]


def test_the_whole_file_system_is_not_searched():
    for root in (Path("/"), Path("/../")):
        with pytest.raises(UsageError, match="the whole file system"):
            walk(root)
