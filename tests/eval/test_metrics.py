import numpy as np
import pytest

from cn_clip.errors import UsageError
from cn_clip.eval.metrics.recall import Recall, Retrieval, ranks_of_best, recall_at, retrieval


def drawn(seed, queries=23, gallery=31, dim=3):
    """Small whole numbers: products are exact, and many are equal."""
    rng = np.random.default_rng(seed)
    q = rng.integers(-1, 2, (queries, dim)).astype(np.float32)
    g = rng.integers(-1, 2, (gallery, dim)).astype(np.float32)
    each = [rng.choice(gallery, rng.integers(1, 4), replace=False) for _ in range(queries)]
    pairs = np.array([(i, j) for i, found in enumerate(each) for j in found])
    return q, g, rng.permutation(pairs)


def sorted_ranks(queries, gallery, pairs):
    """Reference: sort the gallery for each query and return the first positive's position."""
    ranks = []
    for i, query in enumerate(queries):
        order = list(np.argsort(-(gallery @ query), kind="stable"))
        ranks.append(min(order.index(j) for q, j in pairs if q == i))
    return ranks


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("block", [1, 100, 1 << 24])
def test_ranks_are_those_of_a_stable_sort_of_the_whole_gallery(seed, block):
    queries, gallery, pairs = drawn(seed)
    ranks = ranks_of_best(queries, gallery, pairs, block=block)
    assert ranks.dtype == np.int64
    assert ranks.tolist() == sorted_ranks(queries, gallery, pairs)


def test_ranks_of_distinct_scores_are_those_of_a_sort():
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(40, 16)), rng.normal(size=(50, 16))
    pairs = np.stack([np.arange(40), rng.integers(0, 50, 40)], axis=1)
    assert ranks_of_best(queries, gallery, pairs, block=333).tolist() == sorted_ranks(
        queries, gallery, pairs
    )


def test_float16_ranks_equal_those_of_float32():
    rng = np.random.default_rng(1)
    queries, gallery = rng.normal(size=(2, 60, 16)).astype(np.float16)
    pairs = np.stack([np.arange(60)] * 2, axis=1)
    wide = ranks_of_best(queries.astype(np.float32), gallery.astype(np.float32), pairs)
    assert ranks_of_best(queries, gallery, pairs).tolist() == wide.tolist()


def test_ties_rank_by_row():
    gallery = np.ones((4, 2), np.float32)
    ranks = ranks_of_best(np.ones((2, 2), np.float32), gallery, np.array([[0, 3], [0, 1], [1, 2]]))
    assert ranks.tolist() == [1, 2]


def test_recall_at_k_is_the_fraction_of_ranks_below_k():
    ranks = np.array([0, 4, 5, 9, 10])
    assert [recall_at(ranks, k) for k in (1, 5, 10)] == [0.2, 0.4, 0.8]
    with pytest.raises(UsageError, match="no ranks"):
        recall_at(ranks[:0], 1)


@pytest.mark.parametrize("seed", range(4))
def test_retrieval_measures_both_directions_over_paired_queries(seed):
    images, texts, pairs = drawn(seed)
    pairs = pairs[pairs[:, 0] % 4 != 0]  # some images and texts are unpaired
    found = retrieval(images, texts, pairs, block=64)
    for recall, queries, gallery, positives in (
        (found.image_to_text, images, texts, pairs),
        (found.text_to_image, texts, images, pairs[:, ::-1]),
    ):
        asking = sorted(set(positives[:, 0].tolist()))
        own = [(asking.index(q), j) for q, j in positives.tolist()]
        ranks = sorted_ranks(queries[asking], gallery, own)
        for share, k in ((recall.r1, 1), (recall.r5, 5), (recall.r10, 10)):
            assert share == sum(rank < k for rank in ranks) / len(ranks)


def test_order_and_repetition_of_pairs_change_nothing():
    images, texts, pairs = drawn(5)
    assert retrieval(images, texts, pairs) == retrieval(
        images, texts, np.concatenate([pairs[::-1], pairs])
    )


def test_mean_recall_is_the_mean_of_the_six():
    found = Retrieval(Recall(0.1, 0.2, 0.3), Recall(0.4, 0.5, 0.9))
    assert found.text_to_image.mean == pytest.approx(0.2)
    assert found.mean_recall == pytest.approx(2.4 / 6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_embedding_that_is_not_finite_is_named_by_its_row(value):
    images, texts, pairs = drawn(0)
    texts[[7, 9], 1] = value
    with pytest.raises(UsageError, match="row 7 of the texts"):
        retrieval(images, texts, pairs)
    with pytest.raises(UsageError, match="row 7 of the gallery"):
        ranks_of_best(images, texts, pairs)


def test_opposite_infinities_in_a_row_are_found():
    images, texts, pairs = drawn(0)
    images[3, :2] = np.inf, -np.inf
    with pytest.raises(UsageError, match="row 3 of the images"):
        retrieval(images, texts, pairs)


def test_invalid_input_is_refused():
    images, texts, pairs = drawn(0)
    with pytest.raises(UsageError, match="query 4 has no positive"):
        ranks_of_best(images, texts, pairs[pairs[:, 0] != 4])
    with pytest.raises(UsageError, match="to measure; give at least one"):
        retrieval(images, texts, pairs[:0])
    with pytest.raises(UsageError, match=r"expected integers \(P, 2\)"):
        retrieval(images, texts, pairs.astype(np.float32))
    with pytest.raises(UsageError, match=r"pair 1 is \(0, 31\), but there are only 23 and 31"):
        retrieval(images, texts, np.array([[0, 0], [0, 31]]))
    with pytest.raises(UsageError, match=r"pair 0 is \(-1, 0\)"):
        retrieval(images, texts, np.array([[-1, 0]]))
    with pytest.raises(UsageError, match="of dimension 2 and 3"):
        ranks_of_best(images[:, :2], texts, pairs)
    with pytest.raises(UsageError, match=r"shape \(3,\)"):
        retrieval(images[0], texts, pairs)
