"""EvalSet: each picture and text once, true recall, pairs that training has seen."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, make_model
from data.formats import PAIRS, jpeg, write_csv, write_jsonl, write_tar
from train.runs import write_pairs

from cn_clip.data.sources.base import Row
from cn_clip.data.sources.open import WeightedSource, open_mix
from cn_clip.embedder import Embedder
from cn_clip.errors import DataError
from cn_clip.eval.dataset import eval_set_of
from cn_clip.train import validation as validate
from cn_clip.train.validation import embed, score, shared_pairs


class Made:
    """Rows as they are given: (image id, text, bytes or what reading them raises)."""

    def __init__(self, *rows, name="made"):
        self.rows, self.name = rows, name

    def __len__(self):
        return len(self.rows)

    def row(self, index):
        image_id, text, _ = self.rows[index]
        if text is None:
            raise DataError(f"{self.where(index)}: no row")
        return Row(text, image_id, str(index))

    def image(self, index):
        content = self.rows[index][2]
        if isinstance(content, Exception):
            raise content
        return content

    def where(self, index):
        return f"{self.name}, row {index}"


A, B, C = (jpeg(seed) for seed in (1, 2, 3))


def validation(*rows, name="val"):
    return eval_set_of([WeightedSource(Made(*rows, name=name))])


def test_each_image_and_text_is_listed_once():
    found = validation(("1", "猫", A), ("1", "一只猫", A), ("2", "猫", B), ("3", "狗", C))
    assert len(found.images) == 3 and found.texts == ["猫", "一只猫", "狗"]
    assert found.pairs.tolist() == [[0, 0], [0, 1], [1, 0], [2, 2]]
    assert found.image_bytes(1) == B


def test_a_caption_that_is_repeated_under_another_id_is_one_text():
    found = validation(("1", "A cat!", A), ("2", "a  CAT", B), ("2", "a cat", B))
    assert found.texts == ["A cat!"]
    assert found.pairs.tolist() == [[0, 0], [1, 0]]


def test_captions_of_punctuation_alone_are_not_all_the_same():
    assert validation(("1", "!", A), ("2", "?", B)).texts == ["!", "?"]


def test_ids_are_one_sources_and_a_caption_is_the_same_in_all():
    """Two texts that say the same compete with each other, whichever source they are from."""
    mix = [
        WeightedSource(Made(("1", "猫", A))),
        WeightedSource(Made(("1", "猫！", B), ("2", "狗", C))),
    ]
    found = eval_set_of(mix)
    assert found.images == [(0, 0), (1, 0), (1, 1)] and found.texts == ["猫", "狗"]
    assert found.pairs.tolist() == [[0, 0], [1, 0], [2, 1]]


def test_ids_are_one_files_where_a_source_has_several(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(seed))
        row = {"image": f"{name}.jpg", "text": f"图{name}", "image_id": "0", "text_id": "0"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    found = eval_set_of(open_mix([f"jsonl:{tmp_path}/*.jsonl"]))
    assert [found.image_bytes(n) for n in range(2)] == [jpeg(1), jpeg(2)]
    assert found.pairs.tolist() == [[0, 0], [1, 1]]


def test_rows_that_cannot_be_used_are_named_and_the_rest_counts():
    found = validation(("1", "猫", A), ("2", "  ", B), ("3", None, C))
    assert len(found.pairs) == 1
    assert found.skipped == ["val, row 1: its text is empty", "val, row 2: no row"]


def test_no_readable_validation_pairs_is_an_error():
    with pytest.raises(DataError, match="no readable pair in the data; see: cn-clip data check"):
        validation(("1", " ", A))


def test_every_format_gives_the_same_pairs(pictures):
    csv, tar = (eval_set_of(open_mix([write(pictures)])) for write in (write_csv, write_tar))
    texts = [[found.texts[text] for _, text in found.pairs] for found in (csv, tar)]
    assert sorted(texts[0]) == sorted(texts[1]) == sorted(text for _, _, text in PAIRS)


def test_embeddings_are_those_of_the_embedder(pictures, tiny_model):
    found = eval_set_of(open_mix([write_csv(pictures)]))
    images, texts = embed(tiny_model, found, autocast=None)
    embedder = Embedder.from_model(make_model(TINY["vit"]))
    files = [str(pictures / f"{name}.jpg") for name in ("007", "008", "猫")]
    np.testing.assert_array_equal(images, embedder.embed_images(files))
    np.testing.assert_array_equal(texts, embedder.embed_texts([text for _, _, text in PAIRS]))


def test_bfloat16_is_close_to_float32(pictures, tiny_model):
    found = eval_set_of(open_mix([write_csv(pictures)]))
    exact = embed(tiny_model, found, autocast=None)
    near = embed(tiny_model, found, autocast=torch.bfloat16)
    for a, b in zip(exact, near, strict=True):
        assert b.dtype == np.float32 and not np.array_equal(a, b)
        assert (a * b).sum(-1).min() > 0.99


def test_images_of_a_frozen_tower_are_not_embedded_again(pictures, tiny_model):
    found = eval_set_of(open_mix([write_csv(pictures)]))
    images, texts = embed(tiny_model, found, autocast=None)
    tiny_model.visual.forward = None
    again = embed(tiny_model, found, autocast=None, images=images)
    assert again[0] is images and np.array_equal(again[1], texts)


def test_an_unreadable_image_is_reported_once_and_never_retrieved(tiny_model):
    rows = [("1", "猫", A), ("2", "狗", b"broken"), ("3", "鸟", DataError("gone")), ("4", "船", C)]
    found = validation(*rows)
    images, texts = embed(tiny_model, found, autocast=None)
    assert not images[[1, 2]].any()
    np.testing.assert_allclose(np.linalg.norm(images[[0, 3]], axis=-1), 1, rtol=1e-5)
    embed(tiny_model, found, autocast=None)  # at the next evaluation
    assert [each.split(":")[0] for each in found.skipped] == ["val, row 1", "val, row 2"]
    assert score(images, texts, found).mean_recall <= 1


@pytest.mark.parametrize(
    ("order", "t2i", "i2t"),
    [([0, 1, 2, 3], (1, 1, 1), (1, 1, 1)), ([1, 0, 2, 3], (0.5, 1, 1), (0.5, 1, 1))],
)
def test_the_score_is_true_recall_in_both_directions(order, t2i, i2t):
    """Not the share of a batch that is found: all pictures and texts compete."""
    found = validation(*((str(n), text, A) for n, text in enumerate("猫狗鸟船")))
    result = score(np.eye(4, dtype=np.float32)[order], np.eye(4, dtype=np.float32), found)
    recall = result.text_to_image
    assert (recall.r1, recall.r5, recall.r10) == t2i
    recall = result.image_to_text
    assert (recall.r1, recall.r5, recall.r10) == i2t


def test_one_of_several_texts_is_enough():
    found = validation(("1", "猫", A), ("1", "一只猫", A), ("2", "狗", B))
    images = np.array([[1, 0], [0, 1]], np.float32)
    texts = np.array([[0.6, 0.8], [1, 0], [0, 1]], np.float32)
    result = score(images, texts, found)
    assert result.image_to_text.r1 == 1
    assert result.text_to_image.r1 == pytest.approx(2 / 3)


def test_the_same_caption_with_the_same_id_or_the_same_bytes_is_found():
    held = validation(("1", "一只猫", A), ("2", "狗", B), ("3", "鸟", C))
    training = Made(
        ("1", "一只猫。", C),  # the same id, saved anew
        ("renamed", "狗", B),
        ("9", "鸟", A),  # only the caption
        ("3", "船", C),  # only the picture
        name="train",
    )
    assert shared_pairs(held, [WeightedSource(training)]) == [
        "val, row 0 is also train, row 0",
        "val, row 1 is also train, row 1",
    ]


def test_disjoint_data_has_no_shared_pairs(pairs):
    train, val = pairs
    assert shared_pairs(eval_set_of(open_mix([val])), open_mix([train])) == []


def test_renamed_copies_are_found_across_formats_and_sources(tmp_path, pictures):
    held = eval_set_of(open_mix([write_jsonl(pictures)]))
    copies = tmp_path / "copies"
    copies.mkdir()
    for n, (image_id, _, text) in enumerate(PAIRS):
        (copies / f"IMG_{n}.jpg").write_bytes((pictures / f"{image_id}.jpg").read_bytes())
        (copies / f"IMG_{n}.txt").write_text(f"{text}！", encoding="utf-8")
    other = write_pairs(tmp_path, "other", range(4))
    found = shared_pairs(held, open_mix([other, f"folder:{copies}"]))
    assert len(found) == len(PAIRS) and all("IMG_" in each for each in found)


def test_unreadable_items_do_not_stop_the_comparison():
    held = validation(("1", "猫", DataError("gone")), ("2", "狗", B))
    training = Made(
        ("9", "猫", A), ("2", None, B), ("8", "狗", DataError("gone")), ("7", "狗", B), name="train"
    )
    assert shared_pairs(held, [WeightedSource(training)]) == ["val, row 1 is also train, row 3"]


def test_the_number_of_compared_training_rows_is_limited(monkeypatch):
    monkeypatch.setattr(validate, "_COMPARED_ROWS", 3)
    held = validation(("1", "猫", A))
    far = (
        Made(("5", "船", C), ("6", "船", C), name="a"),
        Made(("5", "船", C), ("1", "猫", A), name="b"),
    )
    assert shared_pairs(held, [WeightedSource(each) for each in far]) == []
    assert shared_pairs(held, [WeightedSource(far[1])]) == ["val, row 0 is also b, row 1"]
