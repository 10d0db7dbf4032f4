import csv
import io
import json
import os
import pickle
import sys
import tarfile
from pathlib import Path

import pytest
from data.formats import IMAGES, PAIRS, WRITERS, jpeg, put, read_pair, records, write_csv, write_tsv
from PIL import Image

from cn_clip.data.encode import UNCHANGED, encode_image
from cn_clip.data.sources.open import open_mix, open_source, paths_of, split_source
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.image.decode import read_image


def pairs_of(source):
    read = [read_pair(source, index) for index in range(len(source))]
    return [(pair.image, pair.image_id, pair.text_id, pair.text) for pair in read]


EXPECTED = [(IMAGES[image_id], image_id, text_id, text) for image_id, text_id, text in PAIRS]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_pairs(kind, pictures):
    source = open_source(WRITERS[kind](pictures))
    assert pairs_of(source) == EXPECTED
    assert source.unmatched() == []
    assert str(pictures) in source.where(1)
    # The second opening uses the index that the first one kept; a worker gets a pickled copy.
    assert pairs_of(pickle.loads(pickle.dumps(source))) == EXPECTED
    assert pairs_of(open_source(source.name)) == EXPECTED


@pytest.mark.parametrize("kind", WRITERS)
def test_the_kind_is_detected_from_the_path(kind, pictures):
    uri = WRITERS[kind](pictures)
    assert pairs_of(open_source(uri.partition(":")[2])) == EXPECTED


def test_a_folder_makes_a_pair_of_each_caption_line(pictures):
    (pictures / "007.txt").write_text("一只坐着的猫\r\n\r\n窗边的猫\n", encoding="utf-8-sig")
    (pictures / "008.txt").write_text("火箭发射", encoding="utf-8")
    (pictures / "alone.txt").write_text("没有图", encoding="utf-8")
    source = open_source(str(pictures))
    assert pairs_of(source) == [
        (IMAGES["007"], "007", "007", "一只坐着的猫"),
        (IMAGES["007"], "007", "007#2", "窗边的猫"),
        (IMAGES["008"], "008", "008", "火箭发射"),
    ]
    assert source.where(1).endswith("007.txt, line 3")
    assert [told.rpartition("/")[2] for told in source.unmatched()] == [
        "猫.jpg has no 猫.txt next to it",
        "alone.txt has no image next to it",
    ]


def test_a_test_set_without_pairs_can_be_compared_with_and_not_trained_on(pictures):
    """MUGE's test set says of no text which image it belongs to."""
    write_tsv(pictures)
    lines = [{"text_id": 1, "text": "火箭", "image_ids": []}, {"text_id": 2, "text": "猫"}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (pictures / "train_texts.jsonl").write_text(text, encoding="utf-8")
    uri = f"tsv:{pictures}/train_imgs.tsv"
    with pytest.raises(DataError, match=r"line 1: .* no image ids; .* add \?unpaired=yes"):
        open_source(uri).row(0)
    source = open_source(f"{uri}?unpaired=yes")
    told = [source.row(index) for index in (0, 2, 3, 4)]
    assert [(row.text, row.image_id) for row in told] == [
        ("火箭", ""), ("", "007"), ("", "008"), ("", "猫")
    ]  # fmt: skip
    assert [source.image(index) for index in (2, 3, 4)] == list(IMAGES.values())
    assert source.where(3).endswith("train_imgs.tsv, line 2") and source.unmatched() == []
    with pytest.raises(DataError, match=r"line 1: its text has no image"):
        source.image(0)
    with pytest.raises(DataError, match=r"line 2: expected .* \[1\]}$"):
        source.row(1)
    with pytest.raises(UsageError, match="unpaired=1 is unknown; give yes or no"):
        open_source(f"{uri}?unpaired=1")


def test_several_files_are_one_source_and_sources_mix(pictures):
    write_tsv(pictures)
    for name in ("001", "002"):
        (pictures / f"{name}.tar").write_bytes(
            tar_bytes([(f"{name}.jpg", jpeg(1)), (f"{name}.txt", b"a")])
        )
    chain = open_source(f"tar:{pictures}/{{001..002}}.tar")
    assert [chain.row(i).image_id for i in range(len(chain))] == ["001", "002"]
    assert len(open_source(f"tar:{pictures}/00?.tar")) == 2
    mix = open_mix([f"0.5@tar:{pictures}/001.tar", f"{pictures}/train_imgs.tsv"])
    assert [(part.weight, len(part.source)) for part in mix] == [(0.5, 1), (1.0, 4)]
    with pytest.raises(UsageError, match=r"weight 0 is not a number above zero"):
        open_mix([f"0@tar:{pictures}/001.tar"])


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("tars:x", "unknown kind of source 'tars'; did you mean tar"),
        ("nothing/here", "no such file or folder: nothing/here"),
        ("csv:none.csv", "no such file"),
        ("tar:none-*.tar", "no file matches none-"),
        ("tar:none.tar", "cannot be read"),
        ("folder:none", "no such folder"),
        ("lmdb:none", "no LMDB at"),
        ("csv:none.csv?txt=a", "unknown option of csv: 'txt'; did you mean text"),
    ],
)
def test_a_source_that_cannot_be_opened_is_one_sentence(uri, sentence):
    with pytest.raises(CNClipError, match=sentence):
        open_source(uri)


# Manifests


def manifest(pictures, content, name="pairs.csv", options=""):
    (pictures / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_source(f"{pictures}/{name}{options}")


def test_a_byte_order_mark_and_crlf_change_nothing(pictures):
    text = "image,caption\r\n007.jpg,猫\r\n\r\n008.jpg,火箭\r\n"
    source = manifest(pictures, b"\xef\xbb\xbf" + text.encode())
    assert [source.row(i).text for i in range(len(source))] == ["猫", "火箭"]
    assert source.where(1).endswith("line 4")


def test_quoted_fields_span_lines_and_lone_quotes_are_text(pictures):
    rows = [["007.jpg", 'a "b"\n二行,逗号'], ["008.jpg", "plain"]]
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([["image", "text"], *rows])
    source = manifest(pictures, stream.getvalue() + '008.jpg,5" nail\n')
    assert [source.row(i).text for i in range(3)] == ['a "b"\n二行,逗号', "plain", '5" nail']
    assert [source.where(i).rpartition(" ")[2] for i in range(3)] == ["2", "4", "5"]


def test_gbk_is_detected_named_and_converted_on_request(pictures):
    content = "image,text\n007.jpg,一只坐着的猫\n".encode("gbk")
    with pytest.raises(
        DataError, match=r"line 2 is not UTF-8; as GBK it reads '007.jpg,一只坐着的猫'"
    ):
        manifest(pictures, content).row(0)
    assert manifest(pictures, content, options="?encoding=gbk").row(0).text == "一只坐着的猫"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.csv", "image,text\n007.jpg,a,b\n", "line 2 has 3 fields, its header 2"),
        ("p.jsonl", '{"image": "007.jpg", "text": "a"}\n{"image"\n', "line 2 is not JSON"),
        (
            "p.jsonl",
            '{"image": "007.jpg", "text": ["a", "b"]}\n',
            "text is a list of 2; give every",
        ),
        ("p.jsonl", '{"image": "007.jpg", "text": 3}\n', "text is 3; expected a string"),
        ("p.jsonl", '{"image": "none.jpg", "text": "a"}\n', "no image .*none.jpg"),
        ("p.jsonl", '{"url": "http://a/b/x.jpg", "text": "a"}\n', "download it first"),
        ("p.csv", "image,words\n007.jpg,a\n", "no column for the text"),
        ("p.csv", "", "is empty; expected a header in the first line"),
        (
            "p.jsonl",
            '[{"image": "007.jpg", "text": "a"}]',
            "not a JSON object.*; write .*jq -c '.\\[",
        ),
        (
            "p.jsonl",
            '[\n{"image": "007.jpg", "text": "a"}\n]',
            "line 1 is not JSON.*jq -c '.\\[",
        ),
        ("p.jsonl", '{\n"image": "007.jpg"}', "line 1 is not JSON.*jq -c . FILE"),
        ("p.csv", 'image,text\n007.jpg,"a\n' + "b\n" * 100_000, "a quote is opened"),
        ("p.csv", "image,text\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ],
)
def test_a_bad_manifest_names_the_line(pictures, name, content, sentence):
    with pytest.raises(DataError, match=sentence):
        source = manifest(pictures, content, name)
        for index in range(len(source)):
            read_pair(source, index)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("p.json", r"is a JSON file; write one object per line \(jq .*, or give jsonl:p.json if"),
        ("p.XLSX", r"is a spreadsheet; save it as CSV"),
        ("p.xls", r"is a spreadsheet; save it as CSV"),
        ("p.pkl", r"unknown kind of source; write KIND:PATH"),
    ],
)
def test_a_file_that_is_no_source_is_named_with_the_remedy(pictures, monkeypatch, name, sentence):
    monkeypatch.chdir(pictures)
    (pictures / name).write_text("{}")
    with pytest.raises(UsageError, match=sentence):
        open_source(name)


def test_columns_root_and_addresses_can_be_named(pictures, tmp_path):
    text = "bild,satz\nhttp://a.b/c/007.jpg?size=1,猫\n"
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    source = open_source(f"{tmp_path}/list.csv?image=bild&text=satz&root={pictures}")
    assert read_pair(source, 0).image == IMAGES["007"]
    with pytest.raises(DataError, match="no column 'wort'; it has bild, satz"):
        open_source(f"{tmp_path}/list.csv?image=bild&text=wort")


def test_the_files_named_in_an_address_are_inputs(pictures, tmp_path, monkeypatch):
    csv, root = write_csv(pictures).removeprefix("csv:"), tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    monkeypatch.chdir(root / "inner")
    assert paths_of(f"0.5@csv:{csv}?root={pictures}") == [Path(csv), pictures]
    assert paths_of(f"csv:{csv}?root=none") == [Path(csv), Path("none")]
    for holds_the_current_folder in (".", "..", root, "/"):
        assert paths_of(f"csv:{csv}?root={holds_the_current_folder}") == [Path(csv)]
    assert paths_of(f"tsv:{csv}?texts={pictures}/t.jsonl") == [Path(csv), pictures / "t.jsonl"]


@pytest.mark.parametrize("kind", WRITERS)
def test_the_bytes_of_an_image_have_one_limit_in_every_format(kind, pictures, monkeypatch):
    uri, limit = WRITERS[kind](pictures), min(map(len, IMAGES.values())) - 1
    modules = [module for name, module in sys.modules.items() if name.startswith("cn_clip.")]
    for name, small in (("MAX_ENCODED", limit), ("MAX_BASE64", limit // 3 * 4 + 4)):
        for module in (module for module in modules if hasattr(module, name)):
            monkeypatch.setattr(module, name, small)
    said = f"above the limit of ({limit:,}|{limit // 3 * 4 + 4:,})"
    if kind == "tar":
        said = "holds no image with a text"  # the other members are read
    for use in (read_image, lambda content: encode_image(content, UNCHANGED)):
        with pytest.raises(CNClipError, match=said):
            use(open_source(uri).image(0))


def tar_of(path, names):
    with tarfile.open(path, "w") as archive:
        for name, content in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_a_tar_gives_its_images_without_texts_to_what_needs_no_texts(tmp_path):
    first, second, third = (IMAGES[key] for key in list(IMAGES)[:3])
    shards = [
        tar_of(tmp_path / "0.tar", {"a.jpg": first, "b.png": second}),
        tar_of(
            tmp_path / "1.tar",
            {"c.jpg": third, "d.jpg": first, "d.txt": "猫".encode(), "e.jpg": second,
             "e.json": b'{"key": "7", "caption": null}', "f.txt": b"alone"},
        ),
    ]  # fmt: skip
    uri = f"tar:{tmp_path}/*.tar"
    expected = [("", "a", ""), ("", "b", ""), ("", "c", ""), ("猫", "d", "d"), ("", "7", "")]
    for given, required in ((uri, ["image"]), (f"{uri}?unpaired=yes", ["image", "text"])):
        source = open_source(given, required=required)
        rows = [source.row(number) for number in range(len(source))]
        assert [(row.text, row.image_id, row.text_id) for row in rows] == expected
        images = [source.image(number) for number in range(len(source))]
        assert images == [first, second, third, first, second]
        assert source.unmatched() == [f"{shards[1]}, member f has no image"]
    assert len(open_source(f"tar:{shards[1]}")) == 2  # its pairs, as before; e has a JSON
    with pytest.raises(DataError, match="no image with a text"):
        open_source(f"tar:{shards[0]}")
    with pytest.raises(DataError, match="holds no image"):
        open_source(f"tar:{tar_of(tmp_path / 'texts.tar', {'a.txt': b'x'})}?unpaired=yes")
    with pytest.raises(UsageError, match="unpaired=1 is unknown; give yes or no"):
        open_source(f"{uri}?unpaired=1")


# The official formats


def test_ids_unmatched_or_repeated_in_a_tsv_are_named(pictures):
    write_tsv(pictures)
    with (pictures / "train_imgs.tsv").open("a", encoding="utf-8") as stream:
        stream.write("008\tAAAA\nalone\tAAAA\n")
    with (pictures / "train_texts.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('\n{"text_id": 9, "text": "x", "image_ids": [99]}\n{"text": "y"}\nnot json\n')
    source = open_source(f"{pictures}/train_imgs.tsv")
    assert read_pair(source, 0).image == IMAGES["007"]
    for index, sentence in (
        (2, "the image id '008' is repeated, in .*line 2 and .*line 4"),
        (4, "no image has the id '99'"),
        (5, 'expected {"text_id"'),
        (6, "line 7 is not JSON"),
    ):
        with pytest.raises(DataError, match=sentence):
            read_pair(source, index)
    assert source.unmatched() == [f"the image 'alone' of {pictures}/train_imgs.tsv has no text"]


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_a_pickle_in_an_lmdb_is_never_run(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = WRITERS["lmdb"](pictures)
    put(pictures / "lmdb" / "pairs", [("0", pickle.dumps(Harmful())), ("1", b"\x80junk")])
    source = open_source(uri)
    with pytest.raises(DataError, match=r"key 0 is not a pair: its pickle names (posix|nt)\.mkdir"):
        source.row(0)
    with pytest.raises(DataError, match="key 1 is not a pair"):
        source.row(1)
    assert not (tmp_path / "harmed").exists()


def test_an_lmdb_with_fewer_images_than_its_count_is_reported(pictures):
    uri = WRITERS["lmdb"](pictures)
    put(pictures / "lmdb" / "pairs", [("num_samples", b"9")])
    put(pictures / "lmdb" / "imgs", [("num_images", b"70")])
    source = open_source(uri)
    with pytest.raises(DataError, match="no key '8'"):
        source.row(8)
    assert source.unmatched() == [f"{pictures}/lmdb: expected 70 images, found 3"]


# Tar shards


def tar_bytes(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def link(name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def test_img2dataset_shards_are_read_as_they_are(pictures):
    """Members as img2dataset 1.45 writes them: key.jpg, key.txt, key.json with these fields."""
    told = {"url": "http://a/b.jpg", "caption": "一只猫", "key": "000000001", "status": "success"}
    members = [("000000001.jpg", jpeg(1)), ("000000001.txt", "一只猫".encode())]
    members += [("000000001.json", json.dumps(told).encode()), ("000000002.jpg", jpeg(2))]
    source = manifest(pictures, tar_bytes(members), "00000.tar")
    assert pairs_of(source) == [(jpeg(1), "000000001", "000000001", "一只猫")]
    assert source.unmatched() == [
        f"{pictures}/00000.tar, member 000000002 has neither text nor JSON"
    ]


def test_a_member_may_have_its_caption_in_the_json_alone(pictures):
    members = [
        ("a/x.y.png", jpeg(1)),
        ("a/x.json", '{"caption": "猫"}'.encode()),
        ("a/x.png", jpeg(2)),
    ]
    source = manifest(pictures, tar_bytes(members), "s.tar")
    assert pairs_of(source) == [(jpeg(2), "a/x", "a/x", "猫")]


def test_members_that_lead_out_or_are_no_files_are_left_out(pictures):
    good = [("ok.jpg", jpeg(1)), ("ok.txt", b"fine")]
    bad = [("/etc/x.jpg", b"1"), ("../x.jpg", b"1"), (link("l.jpg", "/etc/passwd"), b"")]
    source = manifest(pictures, tar_bytes([*bad, *good]), "s.tar")
    assert [row[1] for row in pairs_of(source)] == ["ok"]
    assert [told.rpartition(": ")[2] for told in source.unmatched()] == [
        "its path leads outside of the archive",
        "its path leads outside of the archive",
        "it is a link, a device or sparse, not a regular file",
    ]


def test_a_tar_still_being_written_is_refused(pictures):
    whole = tar_bytes([("a.jpg", jpeg(1)), ("a.txt", b"fine"), ("b.jpg", bytes(100_000))])
    data = whole.index(bytes(100_000))
    for length in (data + 5_000, data - 512, data + 100_352):
        with pytest.raises(DataError, match=r"it is still being written|is not a complete tar"):
            manifest(pictures, whole[:length], "s.tar")
    with pytest.raises(DataError, match="not a complete tar"):
        manifest(pictures, b"no tar at all" * 100, "s.tar")


def test_a_size_below_zero_does_not_send_the_reader_backwards(pictures):
    whole = bytearray(tar_bytes([("a.jpg", jpeg(1)), ("a.txt", b"fine")]))
    whole[124:136] = b"\xff" * 10 + b"\xfc\x00"  # base-256, -1024
    whole[148:156] = b" " * 8
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    with pytest.raises(DataError, match=r"claims -1024 bytes|not a complete tar"):
        manifest(pictures, bytes(whole), "s.tar")


def test_an_index_is_built_again_when_the_tar_changes(pictures):
    first = manifest(pictures, tar_bytes([("a.jpg", jpeg(1)), ("a.txt", b"one")]), "s.tar")
    second = manifest(pictures, tar_bytes([("b.jpg", jpeg(1)), ("b.txt", b"other")]), "s.tar")
    for read in (first.row, first.image):
        with pytest.raises(DataError, match=r"s\.tar has changed since it was opened"):
            read(0)
    assert (second.row(0).text, second.row(0).image_id) == ("other", "b")


def test_the_images_are_the_packed_ones(pictures):
    source = open_source(WRITERS["tar"](pictures))
    assert Image.open(io.BytesIO(source.image(3))).size == (48, 40)
    assert [source.row(i).text for i in range(4)] == [record["text"] for record in records()]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_split_is_found_in_every_layout(pictures, kind):
    uri = WRITERS[kind](pictures)
    path = Path(uri.partition(":")[2])
    names = {"tsv": "train_imgs.tsv", "lmdb": "lmdb/train", "tar": "train/000.tar"}
    place = pictures / names.get(kind, f"train{path.suffix}")
    if place != path:
        held = path.rename(pictures / "moved")  # lmdb/train lies where lmdb was
        place.parent.mkdir(exist_ok=True)
        held.rename(place)
    found = open_source(split_source(str(pictures), "train"))
    assert len(found) == len(PAIRS)
    assert {found.row(n).text for n in range(len(found))} == {text for _, _, text in PAIRS}


def test_a_split_that_is_not_there_is_named_with_where_it_was_looked_for(pictures):
    with pytest.raises(DataError, match=r"no split 'test': neither test_imgs.tsv, lmdb/test, .*"):
        split_source(str(pictures), "test")
