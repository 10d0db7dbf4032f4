"""The published scores; only the right split is measured."""

import json
from dataclasses import replace

import pytest
from conftest import TINY, make_model
from data.formats import write_tsv

from cn_clip.config import MODELS
from cn_clip.embedder import Embedder
from cn_clip.errors import DataError, UnknownNameError
from cn_clip.eval.metrics.recall import Recall, Retrieval
from cn_clip.eval.protocols import (
    compare_with_published,
    open_split,
    protocol,
    protocols,
    run_protocol,
)

FIVE = ["RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14"]


@pytest.mark.parametrize("name", ["muge-valid", "flickr30k-cn-test", "coco-cn-test"])
def test_the_published_retrieval_tables_are_complete(name):
    wanted = protocol(name)
    assert set(wanted.published) == {"zero-shot", "fine-tuned"}
    for directions in wanted.published.values():
        assert list(directions) == list(wanted.directions)
        for figures in directions.values():
            assert list(figures) == FIVE
            for r1, r5, r10 in figures.values():
                assert 0 < r1 < r5 <= r10 <= 100


def test_the_published_mean_recalls_of_muge_match_its_scores():
    means = {
        "zero-shot": [63.0, 71.1, 74.1, 76.1, 78.8],
        "fine-tuned": [69.2, 77.4, 80.1, 81.3, 83.6],
    }
    for setup, published in means.items():
        figures = protocol("muge-valid").published[setup]["text_to_image"].values()
        assert [sum(each) / 3 for each in figures] == pytest.approx(published, abs=0.1)


def test_the_ten_classification_sets_have_a_metric_and_a_score():
    sets = [each for each in protocols().values() if each.task == "classification"]
    assert len(sets) == 10
    assert all(each.metric != "recall" and each.best_of_five for each in sets)
    for each in sets:
        assert set(each.rerun) <= set(FIVE) <= set(MODELS)


@pytest.fixture
def split(pictures):
    """A folder with a split as the official TSV, and the protocol it fits."""
    write_tsv(pictures)
    for part in ("imgs.tsv", "texts.jsonl"):
        (pictures / f"train_{part}").rename(pictures / f"test_{part}")
    return pictures


def small(**changes):
    return replace(protocol("flickr30k-cn-test"), images=3, texts=4, **changes)


def test_a_split_with_other_counts_is_refused(split):
    said = r"Flickr30K-CN, test set, has 1,000 images and 5,000 texts, but .* has 3 .* and 4"
    with pytest.raises(DataError, match=said):
        open_split(protocol("flickr30k-cn-test"), str(split))
    for data in (str(split), f"tsv:{split}/test_imgs.tsv"):
        assert len(open_split(small(), data).texts) == 4
    with pytest.raises(UnknownNameError, match="did you mean flickr30k-cn-test"):
        protocol("flickr30k-cn")


def test_unreadable_rows_and_images_are_refused(split):
    embedder = Embedder.from_model(make_model(TINY["vit"]))
    images = (split / "test_imgs.tsv").read_text(encoding="utf-8")
    lines = images.splitlines()
    (split / "test_imgs.tsv").write_text("\n".join(["007\tAAAA", *lines[1:]]), encoding="utf-8")
    with pytest.raises(
        DataError, match="1 of 3 images are unreadable, so scores cannot be compared"
    ):
        run_protocol(embedder, open_split(small(), str(split)))
    with (split / "test_texts.jsonl").open("a", encoding="utf-8") as stream:
        stream.write("\n" + json.dumps({"text_id": 9, "text": "", "image_ids": ["007"]}))
    with pytest.raises(DataError, match=r"1 of 5 rows of .* are unreadable"):
        open_split(small(), str(split))


def test_scores_are_compared_with_those_published_for_the_model(split):
    embedder = Embedder.from_model(make_model(TINY["vit"]))
    measured = run_protocol(embedder, open_split(small(), str(split)))
    assert all(
        each.published is None and each.difference is None
        for each in compare_with_published(small(), measured)
    )
    figures = Retrieval(Recall(0.7, 0.9, 0.95), Recall(0.8, 0.95, 0.99))
    whole = replace(measured, model="ViT-H-14", recall=figures)
    rows = compare_with_published(small(), whole, setup="fine-tuned")
    assert [(row.direction, row.measure) for row in rows][:4] == [
        ("text_to_image", "R@1"),
        ("text_to_image", "R@5"),
        ("text_to_image", "R@10"),
        ("image_to_text", "R@1"),
    ]
    assert [row.published for row in rows] == [83.8, 96.9, 98.6, 95.3, 99.7, 100.0]
    assert rows[0].difference == pytest.approx(70 - 83.8)
