import json
import os
import pickle
import signal
import zlib
from multiprocessing import resource_sharer

import numpy as np
import pytest
import torch
from conftest import encoded, make_image
from data.formats import IMAGES, PAIRS, jpeg, write_csv

from cn_clip.data.loading.loader import (
    Loader,
    Preparation,
    keys_of,
    map_worker_errors,
    stack_keys,
)
from cn_clip.data.sources.base import Row
from cn_clip.data.sources.open import Chain, WeightedSource, open_source
from cn_clip.errors import DataError
from cn_clip.image.decode import read_image, to_pixels
from cn_clip.tokenizer import Tokenizer

SMALL = Preparation(resolution=32)


class Made:
    """Pairs made on the spot: every eleventh image is broken if asked for."""

    name = "made"

    def __init__(self, size, broken=0):
        self.size, self.broken = size, broken
        self.content = [jpeg(seed) for seed in range(5)]

    def __len__(self):
        return self.size

    def row(self, index):
        return Row(f"第{index}张图" + "长" * (index % 30), str(index), f"t{index}")

    def image(self, index):
        return b"broken" if index < self.broken else self.content[index % 5]

    def where(self, index):
        return f"made, row {index}"


class Deadly(Made):
    def image(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().image(index)


def loader_of(source, size=16, **options):
    return Loader(
        [WeightedSource(source)], options.pop("preparation", SMALL), size, seed=3, **options
    )


def ids_of(loader, epoch=0, start=0):
    return [[row.image_id for row in batch.rows] for batch in loader.batches(epoch, start)]


def test_a_batch_holds_exact_pixels_and_tokens(pictures):
    source = open_source(write_csv(pictures))
    (batch,) = loader_of(source, workers=0).batches(0)
    assert batch.pixels.shape == (4, 3, 32, 32)
    assert batch.pixels.dtype == torch.uint8
    tokens = Tokenizer()([row.text for row in batch.rows])
    for at, row in enumerate(batch.rows):
        expected = to_pixels(read_image(IMAGES[row.image_id]), 32)
        assert np.array_equal(batch.pixels[at].permute(1, 2, 0).numpy(), expected)
    assert np.array_equal(batch.ids.numpy(), tokens[:, : batch.ids.shape[1]])
    assert not tokens[:, batch.ids.shape[1] :].any()
    assert sorted(row.text for row in batch.rows) == sorted(text for _, _, text in PAIRS)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_order_is_the_same_for_any_processes_and_workers(workers, world_size):
    expected = ids_of(loader_of(Made(70), workers=0))
    ranks = [
        ids_of(loader_of(Made(70), workers=workers, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert [flat(parts) for parts in zip(*ranks, strict=True)] == expected
    assert sorted(flat(expected), key=int) == [str(i) for i in range(70)]


def flat(lists):
    return [each for one in lists for each in one]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_starts_at_any_batch_without_reading_earlier_ones(workers):
    class Counting(Made):
        asked = 0

        def row(self, index):
            self.asked += 1
            return super().row(index)

    source = Counting(70)
    expected = ids_of(loader_of(Made(70), workers=0), epoch=2)
    assert ids_of(loader_of(source, workers=workers), epoch=2, start=3) == expected[3:]
    assert workers or source.asked == 70 - 3 * 16


def test_augmentation_depends_on_seed_epoch_and_id_alone():
    preparation = Preparation(resolution=32, augmented=True, seed=7)

    def pixels(epoch, **options):
        loader = loader_of(Made(20), preparation=preparation, **options)
        batches = list(loader.batches(epoch))
        names = [row.image_id for batch in batches for row in batch.rows]
        return dict(zip(names, torch.cat([batch.pixels for batch in batches]), strict=True))

    first = pixels(0, workers=0)
    assert all(torch.equal(first[name], other) for name, other in pixels(0, workers=2).items())
    assert all(torch.equal(first[n], o) for n, o in pixels(0, workers=0, size=5).items())
    assert not all(torch.equal(first[n], o) for n, o in pixels(1, workers=0).items())


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pairs_are_skipped_counted_and_listed(workers):
    loader = loader_of(Made(200, broken=10), workers=workers)
    got = flat(ids_of(loader))
    assert sorted(got, key=int) == [str(i) for i in range(10, 200)]
    assert (loader.seen, loader.skipped, len(loader.reasons)) == (200, 10, 10)
    assert sorted(r.partition(":")[0] for r in loader.reasons)[0] == "made, row 0"
    assert all("not an image in a known format" in reason for reason in loader.reasons)


def corrupted(folder):
    """240 pairs of which twelve are damaged, each in another way."""
    good = jpeg(1, (200, 160))
    header = bytearray(encoded(make_image(), "PNG"))
    header[16:24] = (50_000).to_bytes(4) * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4)
    pictures = {
        0: b"",
        1: b"not an image",
        2: good[: len(good) // 2],
        3: good[:300],
        4: bytes(len(good)),
        5: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        6: bytes(header),
    }
    lines = []
    for number in range(240):
        (folder / f"{number}.jpg").write_bytes(pictures.get(number, good))
        record = {"image": f"{number}.jpg", "text": f"第{number}张", "image_id": number}
        lines.append(json.dumps(record, ensure_ascii=False).encode())
    (folder / "7.jpg").unlink()
    lines[8] = b'{"image": "8.jpg", "text": "  "}'
    lines[9] = b'{"image": "9.jpg", "text": ["a", "b"]}'
    lines[10] = '{"image": "10.jpg", "text": "猫"}'.encode("gbk")
    lines[11] = b'{"image": "11.jpg", "te'
    (folder / "pairs.jsonl").write_bytes(b"\n".join(lines))
    return open_source(f"{folder}/pairs.jsonl")


@pytest.mark.parametrize("workers", [0, 2])
def test_five_percent_damaged_in_twelve_ways_are_counted_exactly(workers, tmp_path):
    loader = loader_of(corrupted(tmp_path), workers=workers)
    got = flat(ids_of(loader))
    assert sorted(got, key=int) == [str(number) for number in range(12, 240)]
    assert (loader.seen, loader.skipped, len(set(loader.reasons))) == (240, 12, 12)
    assert all(f"{tmp_path}/pairs.jsonl, line " in reason for reason in loader.reasons)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_pairs_end_the_run(workers):
    loader = loader_of(Made(200, broken=30), workers=workers)
    with pytest.raises(DataError, match=r"of 2?\d\d pairs cannot be read, above the limit of 10%"):
        list(loader.batches(0))
    assert ids_of(loader_of(Made(200, broken=30), max_skipped_fraction=0.2, workers=workers))


def test_a_batch_of_unreadable_pairs_is_empty():
    (batch,) = loader_of(Made(3, broken=3), max_skipped_fraction=1.0, workers=0).batches(0)
    assert (batch.pixels.shape, len(batch.rows), len(batch.skipped)) == ((0, 3, 32, 32), 0, 3)
    assert batch.ids.shape[0] == 0


def test_a_killed_worker_is_reported_and_does_not_hang():
    with pytest.raises(DataError, match=r"for process 0 died \(worker 0: DataLoader worker"):
        list(loader_of(Deadly(40), workers=2).batches(0))


def test_a_batch_that_went_with_its_worker_names_the_worker(tmp_path):
    gone = str(tmp_path / "socket"), 1  # what a worker left behind of a batch's memory
    with (
        pytest.raises(
            DataError, match="the batch of a DataLoader worker is lost: FileNotFoundError"
        ),
        map_worker_errors(),
    ):
        resource_sharer._ResourceSharer.get_connection(gone)
    with pytest.raises(FileNotFoundError), map_worker_errors():
        (tmp_path / "another").read_bytes()


def test_texts_are_padded_to_one_of_few_lengths():
    lengths = {batch.ids.shape[1] for batch in loader_of(Made(70), size=2, workers=0).batches(0)}
    assert lengths <= {8, 12, 16, 24, 32, 40, 52}


def test_prefetch_is_bounded_by_bytes():
    batch = 16 * 3 * 32 * 32
    assert loader_of(Made(70), workers=2, prefetch_bytes=8 * batch)._prefetch == 4
    assert loader_of(Made(70), workers=2, prefetch_bytes=1)._prefetch == 1


def test_sources_reach_spawned_workers():
    made = pickle.loads(pickle.dumps(Made(3)))
    assert made.row(1) == Made(3).row(1)


def test_pairs_with_equal_image_id_text_id_or_text_have_a_common_key():
    rows = [
        Row("A cat!", "1", "7"),
        Row("a  CAT", "2", "8"),
        Row("!", "1", "9"),
        Row("?", "3", "7"),
    ]
    source = Made(4)
    keys = stack_keys([keys_of(row, source, 0, n) for n, row in enumerate(rows)])
    assert keys.dtype == torch.int64 and keys.shape == (4, 3)
    same = keys[:, None] == keys[None]
    assert same.any(-1).int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    assert stack_keys([]).shape == (0, 3)


def test_the_same_ids_in_two_sources_or_files_of_a_mix_are_not_the_same_pair(pictures):
    row = Row("猫", "1", "1")
    one = keys_of(row, Made(4), 0, 0)
    other = keys_of(Row("狗", "1", "1"), Made(4), 1, 0)
    assert not set(one) & set(other)
    chain = Chain("two", [Made(4), Made(4)])
    first, second = (keys_of(row, chain, 0, index) for index in (0, 4))
    assert first[:2] != second[:2] and first[2] == second[2]
