"""Nothing of a source is lost without a word: real tools' files, odd names, damaged indexes."""

import base64
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.formats import IMAGES, WRITERS, jpeg, read_pair, write_csv, write_tsv
from data.test_sources import link, manifest, tar_bytes

from cn_clip.cli import run
from cn_clip.data.curate.check import check
from cn_clip.data.sources import index_cache as cache
from cn_clip.data.sources.open import _expand_braces, open_source
from cn_clip.embeddings.inputs import read_images
from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.image.decode import find_images

GBK = os.fsdecode("中文".encode("gbk"))


def rows_of(source):
    rows = [source.row(index) for index in range(len(source))]
    return [(row.image_id, row.text_id, row.text) for row in rows]


# Folders


def test_two_images_of_one_stem_have_two_ids(pictures):
    (pictures / "a.jpg").write_bytes(jpeg(1))
    (pictures / "a.png").write_bytes(jpeg(2))
    (pictures / "b.jpg").write_bytes(jpeg(3))
    for name in "ab":
        (pictures / f"{name}.txt").write_text("照片", encoding="utf-8")
    source = open_source(str(pictures))
    assert [row[0] for row in rows_of(source)] == ["a.jpg", "a.png", "b"]
    assert [source.image(at) for at in range(3)] == [jpeg(1), jpeg(2), jpeg(3)]


def test_a_folder_names_what_it_passes_over_and_reads_linked_folders(pictures, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "more").symlink_to(pictures)
    (pictures / "007.txt").write_text("猫", encoding="utf-8")
    (pictures / "x.psd").touch()
    with pytest.warns(UserWarning, match=r"1 file is skipped, .*\(1 .psd\)"):
        source = open_source(str(tmp_path / "photos"))
    assert rows_of(source) == [("more/007", "more/007", "猫")]
    assert sum("1 .psd" in each for each in source.unmatched()) == 1


def test_metadata_of_macos_is_passed_over_counted_and_named(pictures):
    place = pictures / "mac"
    place.mkdir()
    apple = b"\0\5\x16\7\0\2\0\0Mac OS X        "
    for name in ("007.jpg", "._007.jpg", "._007.txt", "._.DS_Store"):
        (place / name).write_bytes(apple if name.startswith(".") else IMAGES["007"])
    (place / "007.txt").write_text("猫", encoding="utf-8")
    told = r"1 file is skipped, .*\(1 \._\* \(metadata of macOS\)\)"
    with pytest.warns(UserWarning, match=told):
        source = open_source(str(place))
    assert rows_of(source) == [("007", "007", "猫")]
    assert len(source.unmatched()) == 1
    with pytest.warns(UserWarning, match=told):
        assert find_images([str(place)]) == [place / "007.jpg"]
    members = [(name, (place / name).read_bytes()) for name in ("007.jpg", "._007.jpg")]
    members += [("007.txt", b"cat"), ("._007.txt", apple)]
    source = manifest(pictures, tar_bytes(members), "s.tar")
    assert rows_of(source) == [("007", "007", "cat")]
    assert len(source.unmatched()) == 1 and "1 ._* (metadata of macOS)" in source.unmatched()[0]


def test_what_a_source_passes_over_is_printed_once(pictures, tmp_path, capsys):
    for name in ("a", "007", "008", "猫"):
        (pictures / f"{name}.txt").write_text("猫", encoding="utf-8")
    (pictures / "x.psd").touch()
    for command in (["pack"], ["decontaminate", "--against", write_csv(pictures)]):
        out = str(tmp_path / command[0]) + ".jsonl" * (len(command) > 1)
        run(["data", *command, f"folder:{pictures}", "--out", out, "--workers", "0"])
        err = capsys.readouterr().err
        assert err.count("1 .psd") == 1 and "1 items" in err and "a.txt has no image" in err


def test_a_pipe_is_reported_and_other_rows_are_read(pictures):
    os.mkfifo(pictures / "x.jpg")
    for name in ("x", "007"):
        (pictures / f"{name}.txt").write_text("猫", encoding="utf-8")
    source = open_source(str(pictures))
    assert source.image(0) == IMAGES["007"]
    with pytest.raises(DataError, match=r"x\.jpg cannot be read: it is a named pipe"):
        source.image(1)
    devices = manifest(pictures, "image,text\n/dev/zero,a\n007.jpg,b\n")
    with pytest.raises(DataError, match=r"line 2: no image /dev/zero \(it is a device"):
        devices.image(0)
    assert devices.image(1) == IMAGES["007"]


@pytest.mark.parametrize("to", ["tar", "tsv", "lmdb"])
def test_names_that_are_not_utf8_go_through_every_command(tmp_path, to, capsys):
    folder = tmp_path / GBK
    folder.mkdir()
    (folder / f"{GBK}.jpg").write_bytes(jpeg(1, (80, 80)))
    (folder / f"{GBK}.txt").write_text("一只坐着的猫", encoding="utf-8")
    uri, out = f"folder:{folder}", tmp_path / "out"
    page = tmp_path / "page.html"
    assert run(["data", "check", uri, "--report", str(page), "--workers", "0"]) == 0
    assert "%D6%D0%CE%C4" in page.read_text(encoding="utf-8")
    assert run(["data", "pack", uri, "--to", to, "--out", str(out), "--workers", "0"]) == 0
    back = {"tar": f"tar:{out}/00000.tar", "tsv": f"tsv:{out}/train_imgs.tsv"}
    source = open_source(back.get(to, f"lmdb:{out}"))
    assert source.row(0).image_id == "%D6%D0%CE%C4"
    command = ["data", "decontaminate", uri, "--against", uri, "--out", str(tmp_path / "r.jsonl")]
    other_page = str(tmp_path / "other.html")
    assert run([*command, "--report", other_page, "--workers", "0"]) == 0
    assert "%D6%D0%CE%C4" in (tmp_path / "r.jsonl").read_text(encoding="utf-8")


# Text


def test_half_an_emoji_is_a_broken_character_that_check_counts(pictures, tmp_path):
    lines = [r'{"image": "007.jpg", "text": "猫\ud83d"}', r'{"image": "008.jpg", "text": "火箭"}']
    source = manifest(pictures, "\n".join(lines), "p.jsonl")
    assert source.row(0).text == "猫\ufffd"
    found = check(source)
    assert found.counts["character"] == 1 and found.fit
    [problem] = [each for each in found.problems if each.kind == "character"]
    assert problem.index == 0 and "line 1: '猫\ufffd' has a broken" in problem.text
    for to in ("tar", "tsv", "lmdb"):
        out = str(tmp_path / to)
        assert run(["data", "pack", source.name, "--to", to, "--out", out, "--workers", "0"]) == 0


# CSV


def test_a_quote_that_is_not_closed_is_an_error_with_its_line(pictures):
    rows = [f"007.jpg,第{at}张" for at in range(500)]
    for stray in (
        ['007.jpg,"5寸屏幕', *rows],  # to the end
        ['007.jpg,"5寸屏幕', *rows, '007.jpg,"7寸屏幕', *rows],  # to the next one
        ['007.jpg,"5寸屏幕', *rows, '007.jpg,屏幕7寸"', *rows],  # to one that ends a field
        ['007.jpg,"5寸屏幕', *rows[:20], '007.jpg,屏幕7寸"'],
    ):
        with pytest.raises(DataError, match="line 3: a quote is opened and not closed"):
            manifest(pictures, "\n".join(["image,text", "007.jpg,第一张", *stray]))


TABLES = {  # header -> a row of the n-th caption
    "image,text": "{n}.jpg,{text}",
    "text,image": "{text},{n}.PNG",
    "text_id,text,image": "{n},{text},http://a.b/{n}",
    "image\ttext\timage_id": "photos/{n}\t{text}\ta{n}",
}


@pytest.mark.parametrize("header", TABLES)
@pytest.mark.parametrize("lines", [12, 150])
def test_a_quoted_caption_of_many_lines_is_one_caption(pictures, header, lines):
    """Each line has as many separators as a row, as the two halves of a verse have a comma."""
    separator = "\t" if "\t" in header else ","
    verse = separator.join(
        ["春眠不觉晓", "处处闻啼鸟", "夜来风雨声"][: header.count(separator) + 1]
    )
    poem = "\n".join([verse] * lines)
    rows = [
        TABLES[header].format(n=n, text=text) for n, text in enumerate(["一", f'"{poem}"', "二"])
    ]
    source = manifest(pictures, "\n".join([header, *rows]), "p.csv")
    assert [row[2] for row in rows_of(source)] == ["一", poem, "二"]


@pytest.mark.parametrize("header", TABLES)
def test_an_open_quote_is_named_wherever_the_caption_stands(pictures, header):
    texts = [f"第{n}张" for n in range(30)]
    texts[4], texts[20] = '"5寸屏幕', '屏幕7寸"'
    rows = [TABLES[header].format(n=n, text=text) for n, text in enumerate(texts)]
    rows[10] = rows[10].replace(".jpg", ".webp") + "\n"
    with pytest.raises(DataError, match=r"line 6: a quote is opened .* 17 more lines"):
        manifest(pictures, "\n".join([header, *rows]), "p.csv")


def test_a_wrong_quote_within_a_line_costs_that_row_only(pictures):
    source = manifest(pictures, 'image,text\n007.jpg,"5寸"屏幕\n008.jpg,火箭\n')
    with pytest.raises(DataError, match=r"line 2: ',' expected after '\"'; quote fields"):
        source.row(0)
    assert source.row(1).text == "火箭" and source.where(1).endswith("line 3")


def test_a_caption_of_many_lines_with_commas_is_one_caption(pictures):
    poem = "\n".join(["白日依山尽,黄河入海流", "欲穷千里目,更上一层楼"] * 4)
    source = manifest(pictures, f'image,text\n007.jpg,"{poem}"\n')
    assert source.row(0).text == poem


def test_a_line_separator_of_unicode_ends_no_caption(pictures):
    source = manifest(pictures, "image,text\n007.jpg,一\u2028二\x0b三\n")
    assert source.row(0).text == "一\u2028二\x0b三"


@pytest.mark.parametrize(
    "content",
    [
        "image\ttext\n007.jpg\t猫,狗\n",
        "image;text\n007.jpg;猫,狗\n",
        "image|text\n007.jpg|猫,狗\n",
        "sep=;\nimage;text\n007.jpg;猫,狗\n",
        "sep=|\r\nimage|text\r\n007.jpg|猫,狗\r\n",
        'image,text\r007.jpg,"猫,狗"\r',
        'image;text\r007.jpg;"猫,狗"\r',
        "\ufeffimage;text\r\n007.jpg;猫,狗\r\n",
        "\ufeffsep=;\r\nimage;text\r\n007.jpg;猫,狗\r\n",
    ],
)
def test_csv_of_other_tools_is_read(pictures, content):
    source = manifest(pictures, content)
    assert rows_of(source) == [("007.jpg", "0", "猫,狗")] and source.image(0) == IMAGES["007"]


def test_a_comma_stays_the_separator_where_the_header_has_it(pictures):
    assert manifest(pictures, "image,text,a;b\n007.jpg,猫;狗,x\n").row(0).text == "猫;狗"
    named = manifest(pictures, "bild;satz\n007.jpg;猫\n", options="?image=bild&text=satz")
    assert named.row(0).text == "猫"
    with pytest.raises(DataError, match="two columns are called 'text'"):
        manifest(pictures, "image,text,text\n007.jpg,猫,狗\n")


def test_paths_written_on_windows_are_found(pictures):
    (pictures / "sub").mkdir()
    (pictures / "sub" / "x.jpg").write_bytes(jpeg(5))
    assert manifest(pictures, "image,text\nsub\\x.jpg,猫\n").image(0) == jpeg(5)


# Parquet


def parquet(pictures, table):
    pq.write_table(table, pictures / "p.parquet", row_group_size=2)
    return open_source(f"{pictures}/p.parquet")


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_every_kind_of_string_column_is_read(pictures, kind):
    table = {
        "image": pa.array(["007.jpg", "008.jpg", "007.jpg"], pa.string()).cast(kind)
        if pa.types.is_dictionary(kind)
        else pa.array(["007.jpg", "008.jpg", "007.jpg"], kind),
        "text": pa.array(["猫", "火箭", "猫"]).dictionary_encode()
        if pa.types.is_dictionary(kind)
        else pa.array(["猫", "火箭", "猫"], kind),
        "image_id": pa.array([7, 2**63 + 8, 7], pa.uint64()),
    }
    source = parquet(pictures, pa.table(table))
    expected = [("7", "0", "猫"), (str(2**63 + 8), "1", "火箭"), ("7", "2", "猫")]
    assert rows_of(source) == expected and source.image(1) == IMAGES["008"]
    assert rows_of(pickle.loads(pickle.dumps(source))) == expected


def test_images_as_bytes_and_hugging_faces_struct_are_read(pictures):
    structs = [{"bytes": jpeg(1), "path": "x.jpg"}, {"bytes": None, "path": "007.jpg"}, None]
    source = parquet(pictures, pa.table({"image": structs, "text": ["a", "b", "c"]}))
    assert [source.row(at).image_id for at in range(2)] == ["0", "007.jpg"]
    assert [source.image(0), source.image(1)] == [jpeg(1), IMAGES["007"]]
    with pytest.raises(DataError, match="row 2: image is None"):
        source.row(2)
    plain = parquet(pictures, pa.table({"image": [jpeg(2), jpeg(3)], "text": ["a", "b"]}))
    assert [read_pair(plain, at).image for at in range(2)] == [jpeg(2), jpeg(3)]


def test_each_text_of_a_list_makes_a_pair(pictures):
    texts = [["猫", "一只猫"], [], ["火箭"], None]
    columns = {"image": ["007.jpg"] * 4, "text": texts, "text_id": ["a", "b", "c", "d"]}
    source = parquet(pictures, pa.table(columns))
    assert len(source) == 5
    assert [source.row(at).text for at in (0, 1, 3)] == ["猫", "一只猫", "火箭"]
    assert [source.row(at).text_id for at in (0, 1, 3)] == ["a", "a#1", "c"]
    for at, row in ((2, 1), (4, 3)):  # an image without a text is told, not left out
        with pytest.raises(DataError, match=f"row {row}: text is None; expected a string"):
            source.row(at)


def test_a_column_of_no_use_is_named_with_its_type(pictures):
    with pytest.raises(DataError, match=r"column text is list<.*: double>; expected strings"):
        parquet(pictures, pa.table({"image": ["007.jpg"], "text": [[1.5]]}))
    with pytest.raises(DataError, match=r"column image_id is double; expected .*\?image_id=COLUMN"):
        parquet(pictures, pa.table({"image": ["a"], "text": ["b"], "image_id": [1.5]}))
    # Another column of a usual name is taken first.
    table = pa.table({"image": [[1.5]], "file_name": ["007.jpg"], "text": ["猫"]})
    assert parquet(pictures, table).image(0) == IMAGES["007"]


def test_a_damaged_parquet_file_is_one_sentence(pictures):
    WRITERS["parquet"](pictures)
    whole = (pictures / "pairs.parquet").read_bytes()
    for content in (whole[:-100], whole[:200] + bytes(300) + whole[500:], b"", b"PAR1PAR1"):
        with pytest.raises(DataError, match="is damaged or not a Parquet file"):
            manifest(pictures, content, "bad.parquet")


# Indexes


def test_an_index_goes_to_a_temporary_folder_where_the_home_cannot_be_written(
    pictures, monkeypatch
):
    uris = [WRITERS["tar"](pictures), WRITERS["parquet"](pictures)]
    monkeypatch.delenv("CN_CLIP_CACHE")
    for home in ("/proc/none", "/dev/null"):
        cache._temporary_root.cache_clear()
        monkeypatch.setenv("HOME", home)
        with pytest.warns(UserWarning, match=rf"cannot write {home}/.*; indexes .* CN_CLIP_CACHE"):
            sources = [open_source(uri) for uri in uris]
        assert [len(each) for each in sources] == [4, 4]
        assert len(pickle.loads(pickle.dumps(sources[1]))) == 4
    cache._temporary_root.cache_clear()


def test_a_named_cache_that_cannot_be_written_is_one_sentence(pictures, monkeypatch):
    monkeypatch.setenv("CN_CLIP_CACHE", "/dev/null/cache")
    for kind in ("tar", "parquet"):
        with pytest.raises(CNClipError, match=r"cannot be written: /dev/null/cache \(.*CN_CLIP_"):
            open_source(WRITERS[kind](pictures))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("damage", [lambda b: b[:-40], lambda b: b"", lambda b: bytes(len(b))])
def test_a_damaged_index_is_built_again(pictures, tmp_path, kind, damage):
    uri = WRITERS[kind](pictures)
    expected = rows_of(open_source(uri))
    [index] = (tmp_path / ".cache" / "index").iterdir()
    index.write_bytes(damage(index.read_bytes()))
    assert rows_of(open_source(uri)) == expected
    assert rows_of(open_source(uri)) == expected


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_several_may_build_one_index_at_once(pictures, kind):
    uri = WRITERS[kind](pictures)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: rows_of(open_source(uri)), range(16)))
    assert found == [found[0]] * 16


# Tar shards


def test_members_pair_wherever_they_stand_and_whatever_dots_they_have(pictures):
    members = [
        ("./a.b.jpg", jpeg(1)),
        ("c.jpg", jpeg(2)),
        ("d.img.jpg", jpeg(3)),
        ("e.jpg", jpeg(4)),
    ]
    members += [("a.b.txt", b"ab"), ("./c.txt", b"c"), ("d.cap.txt", b"d"), ("e.seg.png", b"x")]
    members += [("e.txt", b"e"), ("e.cls", b"1"), ("长" * 60 + ".jpg", jpeg(5))]
    members += [("长" * 60 + ".txt", "长".encode()), ("f.psd", b"x"), ("f.txt", b"f")]
    source = manifest(pictures, tar_bytes(members), "s.tar")
    expected = [("a.b", jpeg(1), "ab"), ("c", jpeg(2), "c"), ("d", jpeg(3), "d")]
    expected += [("e", jpeg(4), "e"), ("长" * 60, jpeg(5), "长")]
    found = [read_pair(source, at) for at in range(len(source))]
    assert [(each.image_id, each.image, each.text) for each in found] == expected
    told = source.unmatched()
    assert len(told) == 2 and "1 file is skipped" in told[0] and "(1 .psd)" in told[0]
    assert told[1].endswith("member f has no image")


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_of_both_kinds_are_read(pictures, kind):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
        for suffix, content in ((".jpg", jpeg(1)), (".txt", b"a")):
            info = tarfile.TarInfo("d/" * 80 + GBK + suffix)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    source = manifest(pictures, stream.getvalue(), "s.tar")
    assert rows_of(source)[0][0] == "d/" * 80 + "%D6%D0%CE%C4" and source.image(0) == jpeg(1)


def test_archives_joined_to_one_lose_no_sample(pictures):
    members = [("a.jpg", jpeg(1)), ("a.txt", b"one"), ("a.jpg", jpeg(2)), ("a.txt", b"two")]
    source = manifest(pictures, tar_bytes(members), "s.tar")
    assert rows_of(source) == [("a", "a", "one"), ("a#2", "a#2", "two")]
    assert [source.image(0), source.image(1)] == [jpeg(1), jpeg(2)]


def test_a_hard_link_is_named(pictures):
    info = link("b.jpg", "a.jpg")
    info.type = tarfile.LNKTYPE
    members = [("a.jpg", jpeg(1)), ("a.txt", b"a"), (info, b""), ("b.txt", b"b")]
    told = manifest(pictures, tar_bytes(members), "s.tar").unmatched()
    assert "'b.jpg' is skipped: it is a hard link to 'a.jpg'" in told[0]
    assert told[1].endswith("member b has no image")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("s.tar.gz", b"\x1f\x8b\x08", "compressed with gzip: gunzip it first"),
        ("s.tgz", b"\x1f\x8b\x08", "compressed with gzip"),
        ("s.tar.bz2", b"BZh91AY", "compressed with bzip2"),
        ("s.tar.zst", b"\x28\xb5\x2f\xfd", "compressed with zstd"),
        ("s.tar", b"\x1f\x8b\x08", "compressed with gzip"),
        ("s.tar", b"PK\x03\x04", "is a zip file"),
        ("p.csv", b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml", "is a spreadsheet or .* CSV"),
        ("p.csv", b"PK\x03\x04" + bytes(26) + b"xl/workbook.xml", "is a spreadsheet or .* CSV"),
        ("p.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is a spreadsheet or .* CSV"),
        ("p.jsonl", b"<!DOCTYPE HTML><html>", "is a web page, not the file"),
        ("p.csv", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("p.jsonl", b"\x1f\x8b\x08", "compressed with gzip"),
        ("p.parquet", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("s.tar", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_a_file_of_the_wrong_format_is_named_with_the_remedy(pictures, name, content, sentence):
    with pytest.raises(DataError, match=sentence):
        manifest(pictures, content, name)


def test_a_header_that_claims_gigabytes_reserves_none(pictures):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = b"L", 1 << 40
    with pytest.raises(DataError, match="not a complete tar file: a header claims 1,099,511,"):
        manifest(pictures, info.tobuf(tarfile.GNU_FORMAT) + bytes(1024), "s.tar")


# The official TSV


def test_base64_of_web_pages_and_of_either_alphabet_is_read_by_both_readers(pictures):
    write_tsv(pictures)
    content = next(c for s in range(99) if b"/" in base64.b64encode(c := jpeg(s))[30:])
    texts = {
        "007": b"data:image/jpeg;base64," + base64.b64encode(content),
        "008": base64.urlsafe_b64encode(content),
    }
    path = pictures / "train_imgs.tsv"
    path.write_bytes(b"".join(b"%s\t%s\n" % (k.encode(), v) for k, v in texts.items()))
    source = open_source(f"tsv:{path}")
    assert [source.image(0), source.image(2)] == [content] * 2
    assert [item.content for item in read_images([str(path)])] == [content] * 2


# Paths


def test_braces_of_a_thousand_million_names_are_refused_at_once(pictures):
    for braces in ("{0..999999999}", "{0..99999}{0..99999}", "{1..%s}" % ("9" * 5000)):
        with pytest.raises(
            UsageError, match=r"names [\d,]+ files, above the limit|not a valid path"
        ):
            open_source(f"tar:{pictures}/{braces}.tar")


@pytest.mark.parametrize(
    ("pattern", "names"),  # what bash prints for them
    [
        ("x{8..11}", ["x8", "x9", "x10", "x11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{a,b}{1,2}", ["a1", "a2", "b1", "b2"]),
        ("{a,x{b,c}y,d}", ["a", "xby", "xcy", "d"]),
        ("{a,{1..3}{b,c}}", ["a", "1b", "1c", "2b", "2c", "3b", "3c"]),
        ("{,.gz}", ["", ".gz"]),
        ("{a}{}", ["{a}{}"]),
        ("{a{b,c}}", ["{ab}", "{ac}"]),
        ("a,b}", ["a,b}"]),
        ("{a,b", ["{a,b"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, names):
    assert _expand_braces(pattern) == names


@pytest.mark.parametrize(
    "pattern",
    [
        "{a,b}" * 40_000,
        "{" * 40_000 + "a,b" + "}" * 40_000,
        "{{a,b}{0..999999},c}",
        "{0..999999}{{0..999999},a}",
        "{" + "{0..999998}," * 2 + "a}",
    ],
)
def test_nested_braces_of_too_many_names_are_refused_at_once(pattern):
    with pytest.raises(UsageError, match=r"above the limit|nested braces"):
        _expand_braces(pattern)


@pytest.mark.parametrize(
    "uri", ["folder:", "", "csv:", "tar:a\0b.tar", "csv:x.csv\0", "tsv:/dev/zero"]
)
def test_a_source_without_a_usable_path_is_one_sentence(uri):
    with pytest.raises(CNClipError):
        open_source(uri)


def test_json_that_python_refuses_costs_its_row_only(pictures):
    rows = ['{"image": "007.jpg", "text": "a"}', "[" * 100_000, '{"image": 1' + "0" * 5000 + "}"]
    source = manifest(pictures, "\n".join(rows), "p.jsonl")
    assert source.row(0).text == "a"
    for at in (1, 2):
        with pytest.raises(DataError, match=f"line {at + 1} is not JSON"):
            source.row(at)


def test_pack_says_how_much_makes_no_pair(pictures, tmp_path, capsys):
    (pictures / "007.txt").write_text("猫", encoding="utf-8")
    out = str(tmp_path / "out")
    assert run(["data", "pack", f"folder:{pictures}", "--out", out, "--workers", "0"]) == 0
    said = capsys.readouterr().err
    assert (
        f"2 items of folder:{pictures} are not in a pair" in said and "cn-clip data check" in said
    )


@pytest.mark.full
def test_a_home_that_cannot_be_written_is_a_note_of_the_command(pictures):
    uri = WRITERS["tar"](pictures)
    environment = {**os.environ, "HOME": "/proc/none"}
    environment.pop("CN_CLIP_CACHE")
    command = [sys.executable, "-m", "cn_clip", "data", "check", uri, "--json", "--workers", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["pairs"] == 4
    assert (
        done.stderr.count("\n") == 1 and "Name a lasting folder with CN_CLIP_CACHE" in done.stderr
    )


@pytest.mark.parametrize("kind", ["csv", "jsonl", "folder", "tsv"])
@pytest.mark.parametrize("encoding", ["no-such", "gb\x0018030", "hex", "idna"])
def test_an_encoding_that_is_not_one_of_text_is_named(pictures, kind, encoding):
    for image in pictures.glob("*.jpg"):
        image.with_suffix(".txt").write_text("猫", encoding="utf-8")
    uri = f"folder:{pictures}" if kind == "folder" else WRITERS[kind](pictures)
    joint = "&" if "?" in uri else "?"
    with pytest.raises(DataError, match=r"gb18030|is not"):
        source = open_source(f"{uri}{joint}encoding={encoding}")
        for index in range(len(source)):
            source.row(index)
