"""Diagnosis against brute force on small random sets."""

import itertools

import numpy as np
import pytest

from cn_clip.errors import UsageError
from cn_clip.eval.diagnosis import measure as diagnosis
from cn_clip.eval.diagnosis.measure import (
    compare_models,
    diagnose,
    hubs_of,
    recall_by_length,
    similar_captions,
)
from cn_clip.eval.metrics.recall import retrieval


def unit(rng, shape):
    rows = rng.normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(params=range(3))
def case(request):
    rng = np.random.default_rng(request.param)
    images, texts = unit(rng, (30, 6)), unit(rng, (40, 6))
    pairs = np.stack([rng.permutation(40) % 30, np.arange(40)], axis=1)
    captions = ["字" * int(n) for n in rng.integers(1, 60, 40)]
    return images, texts, captions, np.unique(pairs, axis=0)


def test_recall_equals_that_of_retrieval(case):
    images, texts, captions, pairs = case
    found = diagnose("m", images, texts, captions, pairs)
    whole = retrieval(images, texts, pairs)
    assert found.text_to_image == whole.text_to_image
    assert found.image_to_text == whole.image_to_text


def test_length_bins_partition_the_texts(case):
    images, texts, captions, pairs = case
    found = diagnose("m", images, texts, captions, pairs)
    assert sum(part.texts for part in found.lengths) == 40
    mean = sum(part.texts * part.recall.r5 for part in found.lengths) / 40
    assert mean == pytest.approx(found.text_to_image.r5)
    for part in found.lengths:
        here = [n for n, c in enumerate(captions) if part.low <= len(c) <= part.high]
        assert part.recall.r10 == pytest.approx(np.mean(found.image_ranks[here] < 10))


def test_hub_counts_equal_those_of_a_full_sort(case):
    images, texts, captions, pairs = case
    found = diagnose("m", images, texts, captions, pairs).hubs
    first = np.argsort(-(texts @ images.T), axis=1, kind="stable")[:, :10]
    counts = [int((first == n).sum()) for n in range(30)]
    right = [sum((n, t) in set(map(tuple, pairs.tolist())) and n in first[t] for t in range(40))
             for n in range(30)]  # fmt: skip
    assert found.counts.tolist() == counts
    assert found.correct.tolist() == right
    assert found.never_retrieved == counts.count(0) / 30
    z = (np.array(counts) - np.mean(counts)) / np.std(counts)
    assert found.skewness == pytest.approx(np.mean(z**3))
    assert found.counts[found.largest(3)].tolist() == sorted(counts, reverse=True)[:3]


def test_equal_counts_have_no_skewness():
    found = hubs_of(np.array([[0], [1], [2]]), np.array([[True], [True], [False]]), 3)
    assert (found.skewness, found.never_retrieved) == (0, 0)
    assert found.correct.tolist() == [1, 1, 0]


def test_similar_captions_have_no_common_image(case):
    _, texts, _, pairs = case
    of = {t: {i for i, other in pairs.tolist() if other == t} for t in range(40)}
    oracle = {
        (a, b)
        for a, b in itertools.combinations(range(40), 2)
        if texts[a] @ texts[b] >= 0.5 and not of[a] & of[b]
    }
    for block in (1 << 22, 70):  # all at once, and a row at a time
        found = similar_captions(texts, pairs, threshold=0.5, block=block)
        assert set(map(tuple, found.pairs.tolist())) == oracle
        assert found.texts == len(set().union(*oracle))
        assert found.complete
        assert (np.diff(found.cosines) <= 0).all()


def test_the_search_for_similar_captions_stops_at_the_limit(case, monkeypatch):
    monkeypatch.setattr(diagnosis, "_MAX_SIMILAR", 20)
    _, texts, _, pairs = case
    found = similar_captions(texts, pairs, threshold=-1.0, block=40)
    assert not found.complete
    assert len(found.pairs) < 40 * 39 / 2


def test_every_cosine_is_counted_once(case):
    images, texts, captions, pairs = case
    found = diagnose("m", images, texts, captions, pairs).cosines
    assert found.pairs.sum() == len(pairs)
    assert found.non_pairs.sum() == pytest.approx(30 * 40 - len(pairs), abs=3)
    assert found.top_correct.sum() + found.top_wrong.sum() == 40
    products = texts @ images.T
    assert found.medians[0] == pytest.approx(
        np.median(products[pairs[:, 1], pairs[:, 0]]), abs=1e-6
    )
    products[pairs[:, 1], pairs[:, 0]] = np.nan
    assert found.medians[1] == pytest.approx(np.nanmedian(products), abs=0.02)


def test_the_difference_of_two_models_is_that_of_their_recall(case):
    images, texts, captions, pairs = case
    perfect = np.empty_like(texts)
    perfect[pairs[:, 1]] = images[pairs[:, 0]]
    ours = diagnose("perfect", images, perfect, captions, pairs)
    theirs = diagnose("random", images, texts, captions, pairs)
    rows = {row.metric: row for row in compare_models(ours, theirs)}
    assert len(rows) == 8
    row = rows["text to image, R@1"]
    assert (row.first, row.second) == (1, theirs.text_to_image.r1)
    assert row.interval.value == pytest.approx(1 - theirs.text_to_image.r1)
    assert row.interval.excludes_zero


def test_unpaired_items_are_distractors(case):
    images, texts, captions, pairs = case
    some = pairs[(pairs[:, 0] > 4) & (pairs[:, 1] > 7)]
    found = diagnose("m", images, texts, captions, some)
    whole = retrieval(images, texts, some)
    assert found.text_to_image == whole.text_to_image
    assert found.image_to_text == whole.image_to_text
    assert set(found.texts) == set(some[:, 1]) and set(found.images) == set(some[:, 0])
    assert len(found.hubs.counts) == 30


def test_a_gallery_smaller_than_ten_is_diagnosed():
    rng = np.random.default_rng(0)
    images, texts = unit(rng, (3, 4)), unit(rng, (2, 4))
    found = diagnose("m", images, texts, ["一", "二"], np.array([[0, 0], [2, 1], [1, 1]]))
    assert found.hubs.k == 3
    assert found.hubs.counts.tolist() == [2, 2, 2]
    assert found.text_to_image.r10 == 1


def test_nan_embeddings_are_refused():
    texts = np.full((1, 4), np.nan, np.float32)
    with pytest.raises(UsageError, match="NaN"):
        diagnose("m", np.ones((1, 4), np.float32), texts, ["一"], np.array([[0, 0]]))


def test_lengths_count_characters():
    found = recall_by_length(["猫", "一只猫", "a cat"], np.array([0, 0, 20]))
    assert [(part.low, part.high, part.recall.r1) for part in found] == [
        (1, 1, 1.0), (3, 3, 1.0), (5, 5, 0.0)]  # fmt: skip
