from collections import Counter

import numpy as np
import pytest

from cn_clip.data.loading.permutation import permuted
from cn_clip.data.loading.sampler import Plan, batch_count, batches, plan_of
from cn_clip.data.sources.open import WeightedSource
from cn_clip.errors import UsageError


def epoch_of(plan, epoch):
    return list(
        zip(*(each.tolist() for each in plan.pairs_at(epoch, np.arange(len(plan)))), strict=True)
    )


def shares(plan, epoch, size, world_size, start=0):
    """The ids of each global batch, put together from the processes' shares."""
    ranks = [
        list(batches(plan, epoch, size, rank=rank, world_size=world_size, start=start))
        for rank in range(world_size)
    ]
    return [
        [
            pair
            for part in parts
            for pair in zip(part.sources.tolist(), part.indexes.tolist(), strict=True)
        ]
        for parts in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_a_permutation_holds_every_number_once(size):
    assert sorted(permuted(np.arange(size), size, 3, 1).tolist()) == list(range(size))


def test_a_permutation_is_the_same_for_one_position_and_for_all():
    every = permuted(np.arange(1000), 1000, 7)
    assert all(permuted(np.array([at]), 1000, 7)[0] == every[at] for at in range(0, 1000, 37))


def test_every_pair_is_equally_likely_everywhere():
    counts = np.zeros((12, 12))
    for seed in range(6000):
        counts[np.arange(12), permuted(np.arange(12), 12, seed)] += 1
    # 500 expected in each of 144 cells; chi-square of 121 degrees of freedom, 99.9 % below 176.
    assert ((counts - 500) ** 2 / 500).sum() < 176


def test_neighbours_of_the_source_are_not_neighbours_of_the_order():
    order = permuted(np.arange(10_000), 10_000, 0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.03


def test_an_epoch_holds_every_pair_once_and_the_next_has_another_order():
    plan = Plan((1000,), (1000,), seed=1)
    first, second = epoch_of(plan, 0), epoch_of(plan, 1)
    assert sorted(first) == sorted(second) == [(0, i) for i in range(1000)]
    assert first != second
    assert first == epoch_of(Plan((1000,), (1000,), seed=1), 0)
    assert first != epoch_of(Plan((1000,), (1000,), seed=2), 0)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("size", [8, 13])
def test_global_batches_do_not_depend_on_the_number_of_processes(world_size, size):
    plan = Plan((101,), (101,), seed=5)
    assert shares(plan, 3, size, world_size) == shares(plan, 3, size, 1)


def test_a_resumed_epoch_continues_where_it_stopped():
    plan = Plan((101, 33), (101, 66), seed=5)
    assert shares(plan, 2, 16, 2, start=4) == shares(plan, 2, 16, 1)[4:]


def test_the_last_batch_has_the_remaining_pairs_without_repeats():
    plan = Plan((10,), (10,), seed=0)
    got = shares(plan, 0, 4, 1)
    assert [len(batch) for batch in got] == [4, 4, 2]
    assert len({pair for batch in got for pair in batch}) == 10
    assert batch_count(plan, 4, world_size=3) == 2  # two pairs are not enough for three


def test_weights_are_respected_and_no_pair_repeats_before_all_were_seen():
    plan = plan_of([WeightedSource([0] * 100, 0.25), WeightedSource([0] * 40, 2.5)], seed=0)
    assert plan.counts == (25, 100)
    together = Counter()
    for epoch in range(4):
        pairs = epoch_of(plan, epoch)
        assert Counter(source for source, _ in pairs) == {0: 25, 1: 100}
        together.update(pairs)
    assert {together[0, i] for i in range(100)} == {1}
    assert {together[1, i] for i in range(40)} == {10}


def test_mixed_sources_are_spread_over_the_epoch():
    plan = Plan((1000, 1000), (1000, 1000), seed=0)
    sources, _ = plan.pairs_at(0, np.arange(2000))
    assert all(380 < sources[start : start + 1000].sum() < 620 for start in (0, 500, 1000))


def test_an_empty_epoch_and_a_batch_too_small_are_refused():
    with pytest.raises(UsageError, match="has no pairs"):
        plan_of([WeightedSource([0], 0.1)], seed=0)
    with pytest.raises(UsageError, match="a global batch of 2 cannot be split over 4 processes"):
        next(batches(Plan((9,), (9,), 0), 0, 2, world_size=4))
