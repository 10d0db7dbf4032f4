"""Pairs in the order of shards: what holds of the random order holds of this one too."""

from collections import Counter

import numpy as np
import pytest
from data.test_index import write_shards

from cn_clip.data.loading.loader import Loader, Preparation
from cn_clip.data.loading.sampler import Plan, batches, plan_of
from cn_clip.data.loading.stream_plan import StreamPlan
from cn_clip.data.sources.open import Chain, WeightedSource, open_mix, open_source
from cn_clip.errors import UsageError


def plan_for(*shards, weights=None, size=16, seed=3, **options):
    """Plan a mix; a source is the list of its shards' lengths, or its length if it is random."""
    lengths = [None if isinstance(each, int) else np.array(each) for each in shards]
    sizes = [each if isinstance(each, int) else sum(each) for each in shards]
    counts = [round(n * w) for n, w in zip(sizes, weights or [1] * len(sizes), strict=True)]
    return StreamPlan(sizes, counts, seed, shards=lengths, global_batch_size=size, **options)


def epoch_of(plan, epoch):
    pairs = plan.pairs_at(epoch, np.arange(len(plan)))
    return list(zip(*(column.tolist() for column in pairs), strict=True))


def global_batches(plan, epoch, size, world_size, start=0):
    ranks = [
        list(batches(plan, epoch, size, rank=rank, world_size=world_size, start=start))
        for rank in range(world_size)
    ]
    return [
        [pair for part in parts for pair in zip(part.sources, part.indexes, strict=True)]
        for parts in zip(*ranks, strict=True)
    ]


MIXES = {
    "one": (([10] * 30,), None),
    "unequal": (([1, 50, 3, 120, 7, 7, 9],), None),
    "fewer than slots": (([5],), None),
    "one shard": (([200],), None),
    "two": (([10] * 8, [7] * 20), None),
    "with a random one": (([10] * 8, 45, [3] * 9), None),
    "weights": (([10] * 8, 45, [3] * 9), [0.5, 1.7, 2.4]),
    "a weight near zero": (([10] * 30, 5, [4] * 3), [1, 0.1, 0.05]),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("size", [16, 23, 1000])
def test_no_pair_repeats_before_all_of_its_source_were_seen(mix, size):
    shards, weights = MIXES[mix]
    plan = plan_for(*shards, weights=weights, size=size, window=4)
    seen = Counter()
    for epoch in range(3):
        pairs = epoch_of(plan, epoch)
        counts = Counter(source for source, _ in pairs)
        assert [counts[n] for n in range(len(plan.counts))] == list(plan.counts)
        seen.update(pairs)
    for number, (length, count) in enumerate(zip(plan.sizes, plan.counts, strict=True)):
        times = [seen[number, index] for index in range(length)]
        assert sum(times) == 3 * count and max(times) - min(times) <= 1


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("mix", ["one", "weights"])
def test_global_batches_do_not_depend_on_the_number_of_processes(mix, world_size):
    shards, weights = MIXES[mix]
    for size in (16, 23):
        plan = plan_for(*shards, weights=weights, size=size)
        expected = global_batches(plan, 1, size, 1)
        if len(plan) % size < world_size:  # the last batch is dropped
            expected = expected[: len(plan) // size]
        assert global_batches(plan, 1, size, world_size) == expected
        assert global_batches(plan, 1, size, world_size, start=3) == expected[3:]


def test_a_pair_is_a_function_of_its_position():
    plan = plan_for([10] * 30, 45, size=16)
    every = epoch_of(plan, 1)
    for at in range(0, len(plan), 7):
        source, index = plan.pairs_at(1, np.array([at]))
        assert (source[0], index[0]) == every[at]
    assert every != epoch_of(plan, 0)
    assert every == epoch_of(plan_for([10] * 30, 45, size=16), 1)
    assert every != epoch_of(plan_for([10] * 30, 45, size=16, seed=4), 1)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_each_of_several_processes_reads_its_own_shards(world_size):
    """Each slot starts within a shard, which another slot ends in."""
    plan = plan_for([40] * 128, size=64)
    readers = [set() for _ in range(128)]
    for rank in range(world_size):
        for part in batches(plan, 0, 64, rank=rank, world_size=world_size):
            for shard in np.unique(part.indexes // 40).tolist():
                readers[shard].add(rank)
    assert sum(len(ranks) for ranks in readers) <= 128 + world_size


def test_few_shards_are_open_and_windows_are_read_once():
    plan = plan_for([40] * 64, size=64, open_shards=16, window=20)
    at_hand, opened = set(), Counter()
    for part in batches(plan, 0, 64):
        spans = set(part.spans)
        assert len(spans) <= 2 * 2 * 16  # windows, and parts of them at the ends of shards
        opened.update(spans - at_hand)
        at_hand = spans
        for index in part.indexes.tolist():
            assert any(span.first <= index < span.stop for span in spans)
    assert set(opened.values()) == {1}
    assert sum(span.stop - span.first for span in opened) == len(plan)


def test_a_window_lies_within_a_shard_or_is_cut_at_its_end():
    plan = plan_for([7, 30, 11, 2, 50], size=8, open_shards=8, window=16)
    ends = np.cumsum([7, 30, 11, 2, 50])
    for part in batches(plan, 0, 8):
        for span in part.spans:
            assert np.searchsorted(ends, span.first, "right") == np.searchsorted(
                ends, span.stop - 1, "right"
            )


def neighbours(plan, per_shard):
    """The correlation of the shard numbers of neighbours, over 100 batches."""
    shards = plan.pairs_at(0, np.arange(100 * 512))[1] // per_shard
    return np.corrcoef(shards[:-1], shards[1:])[0, 1]


def test_shards_are_mixed_within_a_batch():
    streamed = neighbours(plan_for([1000] * 500, size=512), 1000)
    random = neighbours(Plan((500_000,), (500_000,), 3), 1000)
    assert streamed <= random + 0.05


def test_sources_are_mixed_in_every_part_of_an_epoch():
    plan = plan_for([100] * 80, 16_000, size=64)
    sources, _ = plan.pairs_at(0, np.arange(len(plan)))
    for start in range(0, 24_000, 4000):
        assert 2300 < sources[start : start + 4000].sum() < 3050


# Sources


def test_the_source_chooses_the_order(tmp_path):
    uri = write_shards(tmp_path, 3)
    mix = open_mix([f"{uri}?order=stream", uri, f"tar:{tmp_path}/00001.tar?order=stream"])
    plan = plan_of(mix, 0, 8)
    assert isinstance(plan, StreamPlan) and plan.sizes == (15, 15, 5)
    assert isinstance(plan_of(mix[1:2], 0, 8), Plan)
    assert isinstance(plan_of([WeightedSource(open_source(f"{uri}?order=random"))], 0), Plan)
    with pytest.raises(UsageError, match=r"order of .*: 'sorted'.* random, stream"):
        open_source(f"{uri}?order=sorted")


def ids_of(mix, **options):
    start = options.pop("start", 0)
    loader = Loader(mix, Preparation(32), 8, seed=2, **options)
    return [[row.text for row in batch.rows] for batch in loader.batches(1, start)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batches_are_the_same_for_any_processes_and_workers(tmp_path, workers, world_size):
    mix = open_mix([f"{write_shards(tmp_path, 6)}?order=stream"])
    expected = ids_of(mix, workers=0)
    ranks = [ids_of(mix, workers=workers, rank=r, world_size=world_size) for r in range(world_size)]
    found = [[text for part in parts for text in part] for parts in zip(*ranks, strict=True)]
    assert found == expected[: len(found)]
    assert len({text for batch in expected for text in batch}) == 30


def test_only_what_a_batch_needs_is_read_after_a_resume(tmp_path, monkeypatch):
    mix = open_mix([f"{write_shards(tmp_path, 6)}?order=stream"])
    begun = []
    monkeypatch.setattr(Chain, "read_ahead", lambda self, *span: begun.append(span))
    expected = ids_of(mix, workers=0)
    assert sum(stop - first for first, stop in begun) == 30  # each window once
    begun.clear()
    assert ids_of(mix, workers=0, start=2) == expected[2:]
    assert sum(stop - first for first, stop in begun) <= 30
