"""Top k and recall against a full sort, with many ties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cn_clip.errors import UsageError
from cn_clip.eval.metrics.recall import retrieval
from cn_clip.topk import top_k

QUICK = settings(deadline=None, max_examples=80)
# Small whole numbers: products are exact whatever the order of summation, and many are equal.
SMALL = st.integers(-2, 2).map(float)


def vectors(count, dim):
    return arrays(np.float32, (count, dim), elements=SMALL)


@st.composite
def cases(draw):
    images, texts = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    dim = draw(st.integers(1, 3))
    pair = st.tuples(st.integers(0, images - 1), st.integers(0, texts - 1))
    pairs = draw(st.lists(pair, min_size=1, max_size=30))
    return draw(vectors(images, dim)), draw(vectors(texts, dim)), np.array(pairs)


def sorted_whole(query, gallery):
    """Reference: rows by score, ties by row."""
    return sorted(range(len(gallery)), key=lambda row: (-float(gallery[row] @ query), row))


@QUICK
@given(cases(), st.data())
def test_top_k_equals_the_start_of_a_stable_sort(case, data):
    gallery, queries, _ = case
    k = data.draw(st.integers(1, len(gallery)))
    block = data.draw(st.sampled_from([1, 50, 1 << 20]))
    found = top_k(queries, gallery, k, block=block)
    expected = [sorted_whole(query, gallery)[:k] for query in queries]
    assert found.indexes.tolist() == expected
    assert found.scores.tolist() == [
        [float(gallery[row] @ query) for row in rows]
        for query, rows in zip(queries, expected, strict=True)
    ]


def test_top_k_of_a_large_gallery_is_in_order():
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(20, 8)), rng.normal(size=(5003, 8))
    found = top_k(queries, gallery, 10, block=3 * 5003)
    assert np.array_equal(found.indexes, np.argsort(-(queries @ gallery.T), axis=1)[:, :10])


@QUICK
@given(cases())
def test_recall_is_the_fraction_of_queries_with_a_positive_in_the_top_k(case):
    images, texts, pairs = case
    found = retrieval(images, texts, pairs, block=64)
    for recall, queries, gallery, wanted in (
        (found.text_to_image, texts, images, {(t, i) for i, t in pairs.tolist()}),
        (found.image_to_text, images, texts, {(i, t) for i, t in pairs.tolist()}),
    ):
        orders = {q: sorted_whole(queries[q], gallery) for q in {q for q, _ in wanted}}
        for share, k in ((recall.r1, 1), (recall.r5, 5), (recall.r10, 10)):
            hits = [any((q, row) in wanted for row in order[:k]) for q, order in orders.items()]
            assert share == pytest.approx(sum(hits) / len(hits))


def test_invalid_input_is_refused():
    rows = np.ones((4, 3), np.float32)
    with pytest.raises(UsageError, match=r"k = 5 does not fit a gallery of 4 rows; give 1"):
        top_k(rows, rows, 5)
    with pytest.raises(UsageError, match="k = 0 does"):
        top_k(rows, rows, 0)
    with pytest.raises(UsageError, match="of dimension 3 and 2"):
        top_k(rows, rows[:, :2], 1)
    with pytest.raises(UsageError, match="row 2 of the gallery contains NaN"):
        top_k(rows, np.where(np.arange(4)[:, None] == 2, np.nan, rows), 1)
