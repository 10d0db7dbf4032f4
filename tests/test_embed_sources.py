"""``embed`` and ``classify`` read the sources that ``train`` reads; a table is never a list."""

import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import make_image
from data.formats import IMAGES, PAIRS, write_csv, write_jsonl, write_parquet, write_tsv

from cn_clip.cli import run
from cn_clip.data.sources.list_or_table import refuse_table
from cn_clip.embedder import load
from cn_clip.embeddings.inputs import read_images, read_texts
from cn_clip.errors import DataError, UsageError

WRITERS = [write_csv, write_jsonl, write_parquet, write_tsv]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_image_and_every_text_of_a_source_comes_once(pictures, write):
    uri = write(pictures)
    images = list(read_images([uri]))
    assert [item.id for item in images] == list(IMAGES)
    for item in images:
        content = item.content if isinstance(item.content, bytes) else item.content.read_bytes()
        assert content == IMAGES[item.id]
    assert [(item.id, item.content) for item in read_texts([uri])] == [
        (text_id, text) for _image_id, text_id, text in PAIRS
    ]


def test_a_csv_of_images_or_of_texts_alone_is_enough(tmp_path):
    make_image(1).save(tmp_path / "a.jpg")
    (tmp_path / "images.csv").write_text("SKU;图片\n1;a.jpg\n", encoding="utf-8")
    (tmp_path / "texts.csv").write_text(
        "搜索词,标题\n1,红色的杯子\n2,蓝色的杯子\n", encoding="utf-8"
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"title": ["红色的杯子", "蓝色的杯子"]}), tmp_path / "texts.parquet"
    )
    assert [i.id for i in read_images([f"{tmp_path}/images.csv"])] == ["a.jpg"]
    for name in ("texts.csv", "texts.parquet"):
        texts = [(item.id, item.content) for item in read_texts([f"{tmp_path}/{name}"])]
        assert texts == [("0", "红色的杯子"), ("1", "蓝色的杯子")]
    with pytest.raises(DataError, match="no column for the text"):
        list(read_texts([f"{tmp_path}/images.csv"]))


def test_a_tar_of_images_without_texts_is_embedded(pictures, tiny_checkpoint, tmp_path):
    names = [f"{image_id}.jpg" for image_id in IMAGES]
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for name in names:
            archive.add(pictures / name, name)
    out = tmp_path / "x.npz"
    words = ["embed", "images", f"{tmp_path}/images.tar", "--device", "cpu", "--out", str(out)]
    assert run([*words, "--model", str(tiny_checkpoint)]) == 0
    embedder = load(tiny_checkpoint, device="cpu")
    with np.load(out) as stored:
        assert stored["ids"].tolist() == list(IMAGES)
        expected = embedder.embed_images([pictures / name for name in names])
        np.testing.assert_allclose(stored["embeddings"], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_embed_writes_the_embeddings_of_a_csv_in_gbk(pictures, tiny_checkpoint, kind, tmp_path):
    embedder = load(tiny_checkpoint, device="cpu")
    rows = [f"{image_id}.jpg,{text}" for image_id, _text_id, text in PAIRS if "," not in text]
    table = "图片,描述\n" + "\n".join(rows)
    (pictures / "shop.csv").write_bytes(table.encode("gbk"))
    words = ["embed", kind, f"csv:{pictures}/shop.csv?encoding=gb18030", "--device", "cpu"]
    words += ["--model", str(tiny_checkpoint), "--out", f"{tmp_path}/x.npz"]
    assert run(words) == 0
    with np.load(tmp_path / "x.npz") as stored:
        written, ids = stored["embeddings"], stored["ids"].tolist()
    images, texts = zip(*(row.split(",") for row in rows), strict=True)
    distinct = list(dict.fromkeys(images))
    expected = (
        embedder.embed_images([pictures / image for image in distinct])
        if kind == "images"
        else embedder.embed_texts(texts)
    )
    assert ids == (distinct if kind == "images" else [str(n) for n in range(len(texts))])
    np.testing.assert_allclose(written, expected, atol=1e-6)


def test_a_table_and_its_images_are_not_overwritten(pictures, tiny_checkpoint, capsys):
    write_csv(pictures)
    words = ["embed", "texts", f"{pictures}/pairs.csv", "--model", str(tiny_checkpoint)]
    assert run([*words, "--out", f"{pictures}/pairs.csv"]) == 2
    before = (pictures / "pairs.csv").read_bytes()
    (pictures / "pairs.csv").rename(pictures / "pairs.jsonl")  # a suffix that embed writes
    assert run(["embed", "texts", f"csv:{pictures}/pairs.jsonl", *words[3:], "--overwrite",
                "--out", f"{pictures}/pairs.jsonl"]) == 2  # fmt: skip
    assert "both input and output" in capsys.readouterr().err
    assert (pictures / "pairs.jsonl").read_bytes() == before


def test_classify_takes_a_source(pictures, tiny_checkpoint, capsys):
    words = ["--labels", "猫,狗", "--model", str(tiny_checkpoint), "--device", "cpu", "--json"]
    shown = []
    for given in (
        [write_csv(pictures)],
        [write_tsv(pictures)],
        [f"{pictures}/{n}.jpg" for n in IMAGES],
    ):
        assert run(["classify", *given, *words]) == 0
        shown.append(json.loads(capsys.readouterr().out)["images"])
    assert [row["image"] for row in shown[1]] == list(IMAGES)
    assert [row["image"] for row in shown[0]] == [row["image"] for row in shown[2]]
    for rows in shown[:2]:
        assert [r["predictions"] for r in rows] == [r["predictions"] for r in shown[2]]


def test_an_unreadable_image_of_a_source_is_counted(pictures, tiny_checkpoint, tmp_path, capsys):
    uri = write_csv(pictures)
    (pictures / "008.jpg").unlink()
    words = ["--model", str(tiny_checkpoint), "--device", "cpu"]
    assert run(["embed", "images", uri, "--out", f"{tmp_path}/x.npz", *words]) == 1
    assert "1 failed" in capsys.readouterr().out
    assert run(["classify", uri, "--labels", "猫,狗", *words]) == 1
    assert "1 of 3 images failed" in capsys.readouterr().err


TABLES = {
    "a header": "image,caption\na.jpg,红色的杯子\n",
    "a header alone": "image,caption\n",
    "a Chinese header": "图片\t标题\na.jpg\t红色的杯子\n",
    "semicolons": "SKU;图片;价格\n1;a.jpg;3\n2;b.jpg;4\n",
    "another header": "商品图,商品名\na.jpg,红色的杯子\nb.JPG,蓝色的杯子\n",
    "no header": "a.jpg,红色的杯子\nb.png,蓝色的杯子\n",
    "Excel's mark": "\ufeffimage,caption\na.jpg,红色的杯子\n",
    "spaces": "Image Path, Caption\na.jpg, 红色的杯子\n",
}
LISTS = {
    "captions": "红色的杯子\n蓝色的杯子\n",
    "captions with commas": "红色的杯子,大号\n蓝色的杯子,小号\n",
    "one word that is a column": "文本\n图片\n标题\n",
    "a comma in the first alone": "title, caption\n" + "红色的杯子\n" * 20,
    "a sentence about a file": "see a.jpg for this, please\nsee b.jpg as well, too\n",
    "names of images": "a.jpg\nb.jpg\n",
    "empty": "",
    "line ends": "\n\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "gbk"])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_in_a_list_is_refused_with_what_to_give(tmp_path, name, encoding):
    if encoding == "gbk" and name == "Excel's mark":
        return
    path = tmp_path / "list.txt"
    path.write_bytes(TABLES[name].encode(encoding))
    for read in (read_texts, read_images):
        with pytest.raises(UsageError, match=r"is a table .*give it as csv:"):
            list(read([str(path)]))


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_not_taken_for_a_table(name):
    refuse_table(LISTS[name].encode(), name)


def test_labels_in_a_table_are_refused(tmp_path, image_folder, capsys):
    (tmp_path / "labels.txt").write_text(TABLES["a header"], encoding="utf-8")
    code = run(["classify", str(image_folder), "--labels-file", f"{tmp_path}/labels.txt"])
    assert code == 2 and "is a table" in capsys.readouterr().err
