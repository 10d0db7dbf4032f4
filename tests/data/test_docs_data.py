"""The commands and the Python of docs/data.md, run on small files of the schemas it names."""

import base64
import contextlib
import csv
import hashlib
import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import make_image

from cn_clip.cli import run
from cn_clip.data.sources.open import open_source

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def jpeg(seed, size=(200, 150)):
    stream = io.BytesIO()
    make_image(seed, size).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_wukong(root):
    (root / "wukong_release").mkdir()
    for number in range(2):
        name = root / "wukong_release" / f"wukong_100m_{number}.csv"
        with name.open("w", newline="", encoding="utf-8") as stream:
            rows = csv.writer(stream)
            rows.writerow(["url", "caption"])
            for row in range(3):
                seed = 10 * number + row
                rows.writerow([f"https://img.example/a/{seed}.jpg?x=1", f"悟空，第{seed}张图片"])
                put(root / "wukong_pictures" / f"{seed}.jpg", jpeg(seed))
    row = "00514175-0237.jpg,悟空测试集的一张图片,https://img.example/t.jpg"
    put(root / "wukong_test" / "wukong_test.csv", f"dir,text,url\r\n{row}\r\n")
    put(root / "wukong_test" / "wukong_test_images" / "00514175-0237.jpg", jpeg(90))


def write_img2dataset(path, pictures, more):
    """As its writer does: KEY.jpg, KEY.txt and KEY.json with an indent of four."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, (content, caption) in enumerate(pictures):
            key = f"{path.stem}{number:04}"
            meta = {
                "url": f"https://img.example/{key}.jpg",
                "caption": caption,
                "key": key,
                "status": "success",
                "error_message": None,
                "width": 200,
                "height": 150,
                "original_width": 400,
                "original_height": 300,
                "exif": "{}",
                "sha256": hashlib.sha256(content).hexdigest(),
            } | more
            members = {
                "jpg": content,
                "txt": caption.encode(),
                "json": json.dumps(meta, indent=4).encode(),
            }
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def write_laion(root):
    (root / "laion2b_chinese_release").mkdir()
    rows = [
        {
            "SAMPLE_ID": 1407203026000 + number,
            "URL": f"https://img.example/l/{number}.jpg",
            "TEXT": f"中文图文对，编号{number}",
            "HEIGHT": 300.0,
            "WIDTH": 400.0,
            "LICENSE": "?",
            "LANGUAGE": "zh-CN",
            "NSFW": "UNLIKELY",
            "similarity": 0.31,
            "__index_level_0__": number,
        }
        for number in range(3)
    ]
    place = root / "laion2b_chinese_release" / "train-00000-of-00013.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place)
    for number in range(3):
        put(root / "laion_pictures" / f"{number}.jpg", jpeg(30 + number))


def write_translations(root):
    coco = {
        "images": [{"id": n, "file_name": f"COCO_train2014_{n:012}.jpg"} for n in (101, 102)],
        "annotations": [
            {"image_id": n, "id": 10 * n + k, "caption": f"翻译的第{n}张的第{k}句"}
            for n in (101, 102)
            for k in range(2)
        ],
    }
    put(root / "coco" / "captions_train2014_zh.json", json.dumps(coco, ensure_ascii=False))
    regions = [
        {
            "id": n,
            "regions": [
                {
                    "region_id": 100 * n + k,
                    "width": 50,
                    "height": 40,
                    "x": 1,
                    "y": 2,
                    "image_id": n,
                    "phrase": f"第{n}张里的第{k}处",
                }
                for k in range(2)
            ],
        }
        for n in (1, 2)
    ]
    put(root / "vg" / "region_descriptions_zh.json", json.dumps(regions, ensure_ascii=False))
    put(root / "vg" / "VG_100K" / "1.jpg", jpeg(41))
    put(root / "vg" / "VG_100K_2" / "2.jpg", jpeg(42))
    for number, split in ((101, "train"), (102, "train"), (103, "train"), (104, "val")):
        name = f"{split}2014/COCO_{split}2014_{number:012}.jpg"
        put(root / "coco" / name, jpeg(number))


def write_coco_cn(root):
    names = {number: f"COCO_train2014_{number:012}" for number in (101, 102, 103)}
    names[104] = f"COCO_val2014_{104:012}"
    splits = {"train": [103], "val": [104], "test": [101]}
    for split, numbers in splits.items():
        lines = "".join(f"{names[n]}\n" for n in numbers)
        put(root / "coco-cn" / f"coco-cn_{split}.txt", lines)
    lines = [f"{names[n]}#0\t人工撰写的第{n}句" for n in names] + [f"{names[101]}#1\t又一句话"]
    put(root / "coco-cn" / "imageid.human-written-caption.txt", "\n".join(lines) + "\n")


def write_official(root):
    """MUGE's test texts name no image; both datasets number theirs alike."""
    for dataset, seed in (("MUGE", 50), ("Flickr30k-CN", 70)):
        for at, split in enumerate(("train", "valid", "test")):
            pictures = {1000002 + n: jpeg(seed + 3 * at + n) for n in range(3)}
            lines = [f"{name}\t{base64.b64encode(c).decode()}\n" for name, c in pictures.items()]
            put(root / dataset / f"{split}_imgs.tsv", "".join(lines))
            alone = dataset == "MUGE" and split == "test"
            texts = [
                {
                    "text_id": 8428 + n,
                    "text": f"{dataset}{split}的第{n}条文本",
                    "image_ids": [] if alone else [name],
                }
                for n, name in enumerate(pictures)
            ]
            texts[0]["image_ids"] += [] if alone else [1000003]
            lines = [json.dumps(text, ensure_ascii=False) + "\n" for text in texts]
            put(root / dataset / f"{split}_texts.jsonl", "".join(lines))


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A folder with what the page says is downloaded, img2dataset's shards among it."""
    monkeypatch.setenv("CN_CLIP_CACHE", str(tmp_path / "cache"))
    for write in (write_wukong, write_laion, write_translations, write_coco_cn, write_official):
        write(tmp_path)
    told = "{}的一段说明文字"
    # The copies of an image of MUGE's and of Flickr30K-CN's test set, and a caption of the former.
    copies = [
        (jpeg(56, (160, 120)), told.format("甲")),
        (jpeg(77), told.format("乙")),
        (jpeg(203), "MUGE test 的第1条文本。"),
    ]
    clean = [(jpeg(200 + n), told.format(f"悟空{n}")) for n in range(3)]
    write_img2dataset(tmp_path / "wukong" / "00000.tar", [*clean, *copies], {})
    other = [(jpeg(210 + n, (1000, 750)), told.format(f"莱昂{n}")) for n in range(3)]
    more = {"NSFW": "UNLIKELY", "similarity": 0.31, "LICENSE": "?"}
    write_img2dataset(tmp_path / "laion" / "00000.tar", other, more)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands_in(block):
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        assert words[0] in ("cn-clip", "img2dataset"), line
        if words[0] == "cn-clip":
            yield words[1:]


def test_the_page_runs_on_files_of_the_schemas_it_names(downloads):
    scope, ran = {}, 0
    for language, block in FENCE.findall(PAGE.read_text(encoding="utf-8")):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(block, "docs/data.md", "exec"), scope)
        elif language == "sh":
            for words in commands_in(block):
                assert run([*words, "--workers", "0"]) == 0, " ".join(words)
                ran += 1
    assert ran == 16
    # 3 clean pairs of Wukong's shards, and half of the 3 of LAION's
    assert printed.getvalue() == "torch.Size([5, 3, 224, 224]) torch.Size([5, 12]) 0\n"
    assert scope["batch"].skipped == []


def test_pairs_of_the_test_sets_are_left_out(downloads):
    scope = {}
    for language, block in FENCE.findall(PAGE.read_text(encoding="utf-8")):
        if language == "python" and "Loader" not in block:
            exec(compile(block, "docs/data.md", "exec"), scope)
        elif language == "sh":
            for words in commands_in(block):
                if words[1] != "check":
                    run([*words, "--workers", "0"])
    lines = Path("wukong-removed.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    told = [json.loads(line) for line in lines]
    assert [(each["index"], each["reason"]) for each in told] == [
        (3, "image"),
        (4, "image"),
        (5, "caption"),
    ]
    places = [each["against"]["where"].partition(", ")[0] for each in told]
    assert places == [
        "MUGE/test_imgs.tsv",
        "Flickr30k-CN/test_texts.jsonl",
        "MUGE/test_texts.jsonl",
    ]
    # Picture 101 of MSCOCO is in COCO-CN's test set.
    coco = open_source("shards/coco/00000.tar")
    assert {coco.row(index).image_id for index in range(len(coco))} == {"102"}


def test_the_parquet_of_laion_is_a_source_with_a_folder_of_images(downloads):
    source = open_source("parquet:laion2b_chinese_release/*.parquet?root=laion_pictures")
    assert [source.row(n).text for n in range(3)] == [f"中文图文对，编号{n}" for n in range(3)]
    assert source.image(2) == jpeg(32)
