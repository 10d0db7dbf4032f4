"""Small images and the same pairs in every format."""

import base64
import csv
import io
import json
import pickle
from typing import NamedTuple

import lmdb
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from cn_clip.data.shard import write_shard
from cn_clip.data.sources.tar import Sample

# (image_id, text_id, text): ids with leading zeros, a text with a tab, a comma and quotes.
PAIRS = [
    ("007", "001", "一只坐着的猫"),
    ("007", "002", "猫，\t在“窗”边, 晒太阳"),
    ("008", "003", "火箭发射"),
    ("猫", "004", "a cup of 咖啡"),
]


class Pair(NamedTuple):
    image: bytes
    text: str
    image_id: str
    text_id: str


def read_pair(source, index):
    """Read a row and its image."""
    row = source.row(index)
    return Pair(source.image(index), row.text, row.image_id, row.text_id)


def jpeg(seed, size=(48, 40)):
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "JPEG")
    return stream.getvalue()


IMAGES = {"007": jpeg(7), "008": jpeg(8), "猫": jpeg(9)}


def records():
    return [
        {"image": f"{image_id}.jpg", "text": text, "image_id": image_id, "text_id": text_id}
        for image_id, text_id, text in PAIRS
    ]


def write_csv(pictures):
    with (pictures / "pairs.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, records()[0])
        writer.writeheader()
        writer.writerows(records())
    return f"csv:{pictures}/pairs.csv"


def write_jsonl(pictures):
    lines = [json.dumps(record, ensure_ascii=False) for record in records()]
    (pictures / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"jsonl:{pictures}/pairs.jsonl"


def write_parquet(pictures):
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(records()), pictures / "pairs.parquet", row_group_size=2
    )
    return f"parquet:{pictures}/pairs.parquet"


def write_tsv(pictures):
    lines = [f"{name}\t{base64.b64encode(content).decode()}" for name, content in IMAGES.items()]
    (pictures / "train_imgs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = [{"text_id": t, "text": text, "image_ids": [i]} for i, t, text in PAIRS]
    lines = [json.dumps(text, ensure_ascii=False) for text in texts]
    (pictures / "train_texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return f"tsv:{pictures}/train_imgs.tsv"


def write_lmdb(pictures):
    """As the official script writes it."""
    put(pictures / "lmdb" / "pairs", [(str(n), pickle.dumps(p)) for n, p in enumerate(PAIRS)])
    put(pictures / "lmdb" / "pairs", [("num_samples", str(len(PAIRS)).encode())])
    coded = [(name, base64.b64encode(content)) for name, content in IMAGES.items()]
    put(pictures / "lmdb" / "imgs", [*coded, ("num_images", str(len(IMAGES)).encode())])
    return f"lmdb:{pictures}/lmdb"


def put(path, items):
    path.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as t:
        for key, value in items:
            t.put(key.encode(), value)


def write_tar(pictures):
    samples = [
        Sample(content, ".jpg", name, [(t, text) for i, t, text in PAIRS if i == name])
        for name, content in IMAGES.items()
    ]
    write_shard(pictures / "000.tar", samples)
    return f"tar:{pictures}/000.tar"


WRITERS = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "tsv": write_tsv,
    "lmdb": write_lmdb,
    "tar": write_tar,
}
