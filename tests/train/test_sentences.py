"""Batches of texts beside the pairs: which texts a step has, and what cannot be one."""

import numpy as np
import pytest
from train.runs import write_sentences

from cn_clip import distributed
from cn_clip.data.loading.loader import token_ids
from cn_clip.embeddings.files import read_captions
from cn_clip.errors import UsageError
from cn_clip.train.batches.text_targets import TextTargets


def batches(folder, size=8, *, dim=32, seed=0):
    return TextTargets(
        str(folder), size, dim=dim, context_length=52, stage="all", seed=seed
    )  # fmt: skip


def numbers(folder, batch):
    """Which texts a batch holds, by the vector that is nearest to each of its places."""
    vectors = read_captions(folder).vectors
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = batch.targets.numpy() @ unit.T
    np.testing.assert_allclose(cosines.max(1), 1, atol=1e-6)
    return cosines.argmax(1).tolist()


def among(monkeypatch, world, rank):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    monkeypatch.setattr(distributed, "rank", lambda: rank)


def test_every_epoch_has_every_text_once_in_a_new_order(sentences):
    targets = batches(sentences)
    epochs = [
        [n for step in range(first, first + 5) for n in numbers(sentences, targets.at(step))]
        for first in (0, 5, 10)
    ]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_texts_that_fill_no_batch_wait_for_another_epoch(sentences):
    targets = batches(sentences, 12)
    epochs = [
        {n for step in range(first, first + 3) for n in numbers(sentences, targets.at(step))}
        for first in (0, 3, 6)
    ]
    assert [len(epoch) for epoch in epochs] == [36, 36, 36]
    assert len(set.union(*epochs)) > 36


def test_targets_are_those_of_the_texts(sentences):
    texts = read_captions(sentences).ids
    batch = batches(sentences).at(3)
    wanted = token_ids([texts[n] for n in numbers(sentences, batch)], 52)
    assert batch.ids.equal(wanted)


def test_a_batch_has_texts_of_similar_length(sentences):
    lengths = [len(text) for text in read_captions(sentences).ids]
    targets = batches(sentences)
    found = [sorted(lengths[n] for n in numbers(sentences, targets.at(step))) for step in range(5)]
    assert sorted(found) == np.sort(lengths).reshape(5, 8).tolist()


def test_which_texts_a_step_has_depends_on_seed_and_step_alone(sentences):
    targets = batches(sentences)
    found = [numbers(sentences, targets.at(step)) for step in range(12)]
    for step in (11, 0, 7):  # begun there, as by a resumed run, or gone back to
        assert numbers(sentences, batches(sentences).at(step)) == found[step]
        assert numbers(sentences, targets.at(step)) == found[step]
    assert numbers(sentences, batches(sentences, seed=1).at(0)) != found[0]


@pytest.mark.parametrize("world", [2, 3])
def test_batches_of_processes_are_disjoint_and_together_the_batch(sentences, monkeypatch, world):
    for step in (0, 6):
        whole = numbers(sentences, batches(sentences).at(step))
        shares = []
        for rank in range(world):
            with monkeypatch.context() as patch:
                among(patch, world, rank)
                shares.append(numbers(sentences, batches(sentences).at(step)))
        assert sorted(n for share in shares for n in share) == sorted(whole)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_embeddings_of_another_width_are_refused(tmp_path):
    folder = write_sentences(tmp_path / "texts", dim=24)
    said = r"stages\.all\.loss\.text_targets: .* have width 24, the model's 32; .*project"
    with pytest.raises(UsageError, match=said):
        batches(folder)


@pytest.mark.parametrize(("size", "world"), [(41, 1), (3, 4)])
def test_fewer_texts_than_a_batch_or_than_processes_are_refused(
    sentences, monkeypatch, size, world
):
    among(monkeypatch, world, 0)
    said = (
        rf"text_targets_batch_size is {size}, with 40 texts in .* {world} processes; give {world}"
    )
    with pytest.raises(UsageError, match=said):
        batches(sentences, size)
