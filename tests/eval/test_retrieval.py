"""Retrieval on sources and on features: each image and text once, ids kept, errors named."""

import json

import numpy as np
import pytest
from conftest import TINY, make_model
from data.formats import IMAGES, PAIRS, WRITERS, write_csv, write_jsonl, write_tsv

from cn_clip.data.sources.open import open_mix
from cn_clip.embedder import Embedder
from cn_clip.embeddings.extract import extract
from cn_clip.embeddings.files import StoredEmbeddings, read_embeddings
from cn_clip.embeddings.inputs import read_images, read_texts
from cn_clip.errors import DataError, UsageError
from cn_clip.eval.dataset import eval_set_of
from cn_clip.eval.metrics.recall import retrieval
from cn_clip.eval.retrieval import evaluate_features, evaluate_retrieval, pairs_of


@pytest.fixture(scope="module")
def embedder():
    return Embedder.from_model(make_model(TINY["vit"]))


def by_hand(embedder):
    """Recall of the pairs of ``data.formats``, embedded one by one."""
    names = list(IMAGES)
    images = np.concatenate([embedder.embed_images(IMAGES[name]) for name in names])
    texts = np.concatenate([embedder.embed_texts(text) for _, _, text in PAIRS])
    pairs = [(names.index(name), row) for row, (name, _, _) in enumerate(PAIRS)]
    return retrieval(images, texts, np.array(pairs))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_source_gives_the_recall_of_its_pairs(pictures, embedder, kind):
    ticks = []
    mix = open_mix([WRITERS[kind](pictures)])
    measured = evaluate_retrieval(embedder, mix, tick=lambda *each: ticks.append(each))
    assert measured.recall == by_hand(embedder) and measured.failed == []
    assert measured.image_ids == ["007", "008", "猫"]
    assert measured.text_ids == ["001", "002", "003", "004"]
    assert ticks[-1] == (7, 7)


def test_an_unreadable_image_is_reported_and_excluded(pictures, embedder):
    mix = open_mix([write_jsonl(pictures)])
    (pictures / "008.jpg").write_bytes(b"no picture")
    (pictures / "猫.jpg").unlink()
    measured = evaluate_retrieval(embedder, mix)
    assert measured.image_ids == ["007"] and measured.pairs.tolist() == [[0, 0], [0, 1]]
    assert ["pairs.jsonl, line 3" in measured.failed[0], "no image" in measured.failed[1]] == [
        True,
        True,
    ]
    assert measured.recall.text_to_image.r1 == 1
    (pictures / "007.jpg").unlink()
    with pytest.raises(DataError, match="none of the 3 images is readable"):
        evaluate_retrieval(embedder, mix)


def official(folder, texts):
    write_tsv(folder)
    lines = [json.dumps(text, ensure_ascii=False) + "\n" for text in texts]
    (folder / "train_texts.jsonl").write_text("".join(lines), encoding="utf-8")
    return open_mix([f"tsv:{folder}/train_imgs.tsv?unpaired=yes"])


def test_by_id_equal_texts_are_two_texts_and_unpaired_images_are_in_the_gallery(pictures):
    mix = official(
        pictures,
        [
            {"text_id": 1, "text": "一只猫", "image_ids": ["007"]},
            {"text_id": 2, "text": "一只猫", "image_ids": ["008"]},
            {"text_id": 3, "text": "没有图片", "image_ids": []},
        ],
    )
    merged, single = eval_set_of(mix), eval_set_of(mix, merge=False)
    assert merged.text_ids == ["1", "3"] and single.text_ids == ["1", "2", "3"]
    assert single.image_ids == ["007", "008", "猫"]
    assert merged.pairs.tolist() == [[0, 0], [1, 0]]
    assert single.pairs.tolist() == [[0, 0], [1, 1]]
    assert merged.skipped == single.skipped == []


def test_by_id_a_text_id_with_two_texts_is_refused(pictures):
    texts = [{"text_id": 1, "text": text, "image_ids": ["007"]} for text in ("一", "二")]
    with pytest.raises(DataError, match=r"line 2: the text id '1' is also that of '一'"):
        eval_set_of(official(pictures, texts), merge=False)


def test_ids_of_two_sources_become_row_numbers(pictures, embedder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name, content in IMAGES.items():
        (other / f"{name}.jpg").write_bytes(content)
    mix = open_mix([write_csv(pictures), write_csv(other)])
    measured = evaluate_retrieval(embedder, mix)
    assert measured.image_ids == [0, 1, 2, 3, 4, 5]
    assert measured.text_ids == ["001", "002", "003", "004"]


@pytest.mark.parametrize("name", ["{}.npz", "{}.jsonl", "{}"])
def test_features_on_disk_give_the_recall_of_their_model(pictures, embedder, tmp_path, name):
    source = write_jsonl(pictures).removeprefix("jsonl:")
    each = [json.dumps({"image": f"{name}.jpg", "image_id": name}) + "\n" for name in IMAGES]
    (pictures / "each.jsonl").write_text("".join(each), encoding="utf-8")
    stored = []
    for kind, items in (
        ("images", read_images([str(pictures / "each.jsonl")])),
        ("texts", read_texts([source])),
    ):
        out = tmp_path / name.format(kind)
        extract(embedder, kind, items, out)
        stored.append(read_embeddings(out, kind))
    mix = open_mix([source])
    measured = evaluate_features(*stored, pairs_of(mix), truth=source)
    assert measured.recall == evaluate_retrieval(embedder, mix).recall
    assert measured.image_ids == ["007", "008", "猫"]


def features(name, ids, vectors=None):
    rows = np.eye(len(ids), dtype=np.float32) if vectors is None else vectors
    return StoredEmbeddings(name, ids, rows)


def test_ids_without_features_are_refused_and_other_lengths_warned_about():
    images, texts = features("i.npz", ["1", "2"]), features("t.npz", ["7", "8"])
    with pytest.raises(DataError, match=r"2 of the image ids in T are not in i.npz, such as '3'"):
        evaluate_features(images, texts, [("1", "7"), ("3", "7"), ("4", "7")], truth="T")
    with pytest.raises(DataError, match=r"1 of the text ids in T are not in t.npz, such as '9'"):
        evaluate_features(images, texts, [("1", "9")], truth="T")
    with pytest.raises(UsageError, match="no pair of image and text to measure"):
        evaluate_features(images, texts, [], truth="T")
    wide = features("w.npz", ["7", "8"], np.eye(2, 3, dtype=np.float32))
    with pytest.raises(UsageError, match="of dimension 3 and 2"):
        evaluate_features(images, wide, [("1", "7")], truth="T")
    long = features("l.npz", ["7", "8"], 5 * np.eye(2, dtype=np.float32))
    with pytest.warns(UserWarning, match="vector lengths are 5 to 5, not 1"):
        found = evaluate_features(images, long, [("1", "7"), ("2", "8")], truth="T")
    assert found.recall.mean_recall == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"image_id": 2, "feature": [1, 0, 0]}, r"line 2: .* shape \(3,\); expected 2 numbers"),
        ({"image_id": 2, "feature": [1, float("nan")]}, "vector of '2' holds NaN"),
        ({"image_id": 2, "feature": "a"}, "line 2: its feature is not a list of numbers"),
        ({"image_id": 1, "feature": [1, 0]}, "the id '1' is repeated"),
        ({"text_id": 2, "feature": [1, 0]}, 'line 2: expected {"image_id": 1, "feature"'),
    ],
)
def test_an_invalid_feature_is_named(tmp_path, line, said):
    file = tmp_path / "f.jsonl"
    rows = [{"image_id": 1, "feature": [0, 1]}, line]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_embeddings(file, "images")


def test_features_of_another_kind_or_unknown_format_are_refused(tmp_path, embedder):
    (tmp_path / "texts.txt").write_text("猫\n狗\n", encoding="utf-8")
    extract(embedder, "texts", read_texts([str(tmp_path / "texts.txt")]), tmp_path / "t.npz")
    assert read_embeddings(tmp_path / "t.npz", "texts").ids == ["1", "2"]
    with pytest.raises(DataError, match="holds texts, not images"):
        read_embeddings(tmp_path / "t.npz", "images")
    with pytest.raises(UsageError, match="no embeddings at"):
        read_embeddings(tmp_path / "missing.npz", "images")
    (tmp_path / "x.npz").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match=r"is not an .npz with embeddings and ids"):
        read_embeddings(tmp_path / "x.npz", "images")
    with pytest.raises(UsageError, match=r"give .npz, .jsonl"):
        read_embeddings(tmp_path / "texts.txt", "texts")
    with pytest.raises(DataError, match="0 files in img_emb"):
        read_embeddings(tmp_path, "images")
