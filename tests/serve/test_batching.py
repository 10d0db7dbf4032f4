"""Batches of concurrent requests: coalescing, bounds, failures, clients that leave."""

import asyncio
import threading
import time

import pytest

from cn_clip.serve import batching
from cn_clip.serve.batching import Batcher
from cn_clip.serve.problems import RequestError


def make(run, **options):
    return Batcher(run, **{"name": "t", "budget": 100, "max_items": 100, "bound": 1000, **options})


async def ask(batcher, items, costs=None):
    costs = costs or [1] * len(items)
    with batcher.admitted(sum(costs)):
        return await batcher.run(items, costs)


def in_loop(test):
    """Run a test that is a coroutine."""

    def wrapped():
        asyncio.run(asyncio.wait_for(test(), 10))

    wrapped.__name__ = test.__name__
    return wrapped


class Tower:
    """Doubles numbers; waits for ``gate``; refuses negative numbers."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.batches = []

    def __call__(self, items):
        self.gate.wait(5)
        self.batches.append(list(items))
        if any(item < 0 for item in items):
            raise ValueError("negative")
        return [2 * item for item in items]


@in_loop
async def test_each_caller_gets_the_results_of_its_own_items_in_order():
    tower = Tower()
    batcher = make(tower)
    batcher.start()
    results = await asyncio.gather(*(ask(batcher, [n, n + 1000]) for n in range(50)))
    assert results == [[2 * n, 2 * n + 2000] for n in range(50)]
    await batcher.close()


@in_loop
async def test_requests_during_a_batch_form_the_next_one():
    tower = Tower()
    batcher = make(tower)
    batcher.start()
    tower.gate.clear()
    tasks = [asyncio.create_task(ask(batcher, [0]))]
    await asyncio.sleep(0.05)
    tasks += [asyncio.create_task(ask(batcher, [n])) for n in range(1, 9)]
    await asyncio.sleep(0.05)
    tower.gate.set()
    await asyncio.gather(*tasks)
    assert tower.batches == [[0], [1, 2, 3, 4, 5, 6, 7, 8]]
    await batcher.close()


@in_loop
async def test_a_batch_stays_within_its_padded_budget():
    tower = Tower()
    batcher = make(tower, budget=20)
    batcher.start()
    tower.gate.clear()
    first = asyncio.create_task(ask(batcher, [0]))
    await asyncio.sleep(0.02)
    # 3 items of cost 2, then one of cost 10: with it, the batch would be padded to 4 x 10.
    rest = asyncio.create_task(ask(batcher, [1, 2, 3, 4, 5], [2, 2, 2, 10, 10]))
    huge = asyncio.create_task(ask(batcher, [6], [500]))  # alone it may exceed the budget
    await asyncio.sleep(0.02)
    tower.gate.set()
    await asyncio.gather(first, rest, huge)
    assert tower.batches == [[0], [1, 2, 3], [4, 5], [6]]
    await batcher.close()


@in_loop
async def test_one_bad_item_fails_alone():
    tower = Tower()
    batcher = make(tower)
    batcher.start()
    tower.gate.clear()
    tasks = [asyncio.create_task(ask(batcher, [n])) for n in (0, 1, -5, 2)]
    await asyncio.sleep(0.02)
    tower.gate.set()
    results = await asyncio.gather(*tasks)
    assert [results[0], results[1], results[3]] == [[0], [2], [4]]
    assert isinstance(results[2][0], ValueError)
    assert await ask(batcher, [7]) == [14] and batcher.healthy  # the queue survives
    await batcher.close()


@in_loop
async def test_a_tower_that_loses_a_result_fails_its_items_and_not_the_queue():
    batcher = make(lambda items: items[1:])
    batcher.start()
    assert [type(r) for r in await ask(batcher, [1, 2])] == [RuntimeError] * 2
    assert batcher.healthy
    await batcher.close()


@in_loop
async def test_beyond_the_bound_requests_are_refused_at_once():
    tower = Tower()
    batcher = make(tower, bound=10)
    batcher.start()
    tower.gate.clear()
    inside = asyncio.create_task(ask(batcher, [1, 2], [4, 4]))
    await asyncio.sleep(0.02)
    start = time.perf_counter()
    with pytest.raises(RequestError, match="busy") as caught:
        await ask(batcher, [3], [4])
    assert time.perf_counter() - start < 0.05
    assert caught.value.status == 429 and caught.value.retry_after >= 1
    tower.gate.set()
    assert await inside == [2, 4] and batcher.inside == 0
    assert await ask(batcher, [3], [400]) == [6]  # an empty queue takes any request
    await batcher.close()


@in_loop
async def test_a_slow_tower_has_a_shorter_queue():
    batcher = make(lambda items: (time.sleep(0.1), items)[1], max_items=1, max_wait=0.35)
    batcher.start()
    assert await ask(batcher, [0]) == [0]  # 10 items per second
    inside = [asyncio.create_task(ask(batcher, [n])) for n in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(RequestError, match="busy"):
        await ask(batcher, [3])
    assert await asyncio.gather(*inside) == [[0], [1], [2]]
    await batcher.close()


@in_loop
async def test_items_of_a_client_that_left_are_dropped():
    tower = Tower()
    batcher = make(tower)
    batcher.start()
    tower.gate.clear()
    first = asyncio.create_task(ask(batcher, [0]))
    await asyncio.sleep(0.02)
    leaving = asyncio.create_task(ask(batcher, [1, 2]))
    staying = asyncio.create_task(ask(batcher, [3]))
    await asyncio.sleep(0.02)
    leaving.cancel()
    await asyncio.sleep(0.02)
    assert batcher.inside == 2
    tower.gate.set()
    assert await first == [0] and await staying == [6]
    assert tower.batches == [[0], [3]]
    await batcher.close()


@in_loop
async def test_closing_finishes_what_is_inside_and_refuses_more():
    tower = Tower()
    batcher = make(tower)
    batcher.start()
    tower.gate.clear()
    inside = asyncio.create_task(ask(batcher, [1]))
    await asyncio.sleep(0.02)
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0.02)
    with pytest.raises(RequestError) as caught:
        await ask(batcher, [2])
    assert caught.value.status == 503
    tower.gate.set()
    assert await inside == [2]
    await closing
    assert not batcher.healthy


@in_loop
async def test_a_stuck_batch_makes_the_queue_unhealthy():
    tower = Tower()
    batcher = make(tower)
    batcher.start()
    assert batcher.healthy
    tower.gate.clear()
    task = asyncio.create_task(ask(batcher, [1]))
    await asyncio.sleep(0.05)
    before, batching.STALLED = batching.STALLED, 0.01
    try:
        assert not batcher.healthy
    finally:
        batching.STALLED = before
    tower.gate.set()
    await task
    assert batcher.healthy
    await batcher.close()


@in_loop
async def test_closing_waits_for_items_that_are_still_prepared():
    batcher = make(Tower())
    batcher.start()
    with batcher.admitted(1):
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.02)
        assert await batcher.run([3], [1]) == [6]
    await closing
    assert not batcher.healthy


@in_loop
async def test_closing_ends_when_the_last_admitted_client_leaves():
    batcher = make(Tower())
    batcher.start()
    with batcher.admitted(1):
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.02)
    await asyncio.wait_for(closing, 1)
    assert not batcher.healthy
