"""Cached features of a locked tower: those of the tower, each computed once, never another's."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, make_model
from data.formats import PAIRS, jpeg, write_csv, write_jsonl
from data.test_index import write_shards
from data.test_sources import tar_bytes

from cn_clip.data.loading.loader import Loader, Preparation, pixels_of, stack_pixels
from cn_clip.data.loading.sampler import BatchPart
from cn_clip.data.sources.base import Row
from cn_clip.data.sources.open import Chain, WeightedSource, open_mix
from cn_clip.embedder import Embedder
from cn_clip.errors import DataError, UsageError
from cn_clip.train.batches import feature_cache as cache
from cn_clip.train.batches.batch import CachedLoader, local_batches
from cn_clip.train.batches.feature_cache import (
    cache_image_features,
    tower_fingerprint,
    unique_images,
)
from cn_clip.train.batches.feature_sums import CheckedFeatures, check_features
from cn_clip.train.recipe.schema import Stage
from cn_clip.train.step import Heads, Towers

SMALL = Preparation(resolution=32)


class Tower:
    """The tiny ViT, and how many pictures it has seen."""

    def __init__(self):
        self.model = make_model(TINY["vit"])
        stage = Stage(epochs=1)
        self.towers = Towers(self.model, Heads(stage, 32, None), stage)
        self.sizes = []

    def __call__(self, pixels):
        self.sizes.append(len(pixels))
        with torch.no_grad():
            return self.towers.encode_pixels(pixels)


class Made:
    """Five pictures, each with three texts, in turn; what is in ``broken`` cannot be read."""

    name = "made"

    def __init__(self, broken=(), rows=15, first=0):
        self.broken, self.rows, self.first = broken, rows, first

    def __len__(self):
        return self.rows

    def row(self, index):
        return Row(f"第{index}张图", str(self.first + index % 5), str(index))

    def image(self, index):
        return b"broken" if index % 5 in self.broken else jpeg(self.first + index % 5)

    def where(self, index):
        return f"made, row {index}"


@pytest.fixture
def tower():
    return Tower()


@pytest.fixture(autouse=True)
def two_in_a_shard(monkeypatch):
    monkeypatch.setattr(cache, "_PER_SHARD", 2)


def cached(mix, tower, folder, preparation=SMALL, **options):
    mix = mix if isinstance(mix, list) else [WeightedSource(mix)]
    return cache_image_features(
        mix, tower, {"tower": "this"}, preparation, folder, workers=0, **options
    )


def part_of(indexes, sources=None, epoch=0):
    indexes = np.array(indexes)
    return BatchPart(
        epoch, 0, np.zeros_like(indexes) if sources is None else np.array(sources), indexes
    )


def own_output(tower, source, index, view=0, preparation=SMALL):
    row = source.row(index)
    pixels = pixels_of(source.image(index), row.image_id, view, preparation)
    return tower(stack_pixels([pixels], preparation.resolution))[0]


def test_features_are_the_towers_own_output_by_pair(tower, tmp_path):
    source = Made()
    found = cached(source, tower, tmp_path).features(part_of([3, 8, 0, 14]))
    assert found.dtype == torch.float32
    expected = torch.stack([own_output(tower, source, index) for index in (3, 8, 0, 14)])
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[0], found[1])  # rows of one picture


def test_features_equal_those_of_embedding(tower, tmp_path, pictures):
    mix = open_mix([write_csv(pictures)])
    found = cached(mix, tower, tmp_path / "features").features(part_of([0, 1, 2, 3]))
    files = [str(pictures / f"{image_id}.jpg") for image_id, _, _ in PAIRS]
    expected = Embedder.from_model(tower.model).embed_images(files)
    np.testing.assert_allclose(F.normalize(found, dim=-1).numpy(), expected, atol=1e-5)


def test_each_image_is_encoded_once_whatever_its_number_of_texts(tower, tmp_path):
    told = []
    cached(Made(), tower, tmp_path, tick=lambda *done: told.append(done))
    assert sum(tower.sizes) == 5
    assert told == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_the_same_id_in_two_sources_is_two_images(tower, tmp_path):
    """Ids are one source's; two may count from 0 both."""

    class Other(Made):
        def image(self, index):
            return jpeg(100 + index % 5)

    mix = [WeightedSource(Made()), WeightedSource(Other())]
    found = cached(mix, tower, tmp_path).features(part_of([1, 1], [0, 1]))
    assert sum(tower.sizes) == 10
    for row, part in zip(found, mix, strict=True):
        torch.testing.assert_close(row, own_output(tower, part.source, 1))


def test_a_second_run_computes_nothing_and_reads_the_same(tower, tmp_path):
    first = cached(Made(), tower, tmp_path).features(part_of(range(15)))
    tower.sizes.clear()
    told = []
    again = cached(Made(), tower, tmp_path, tick=lambda *done: told.append(done))
    assert tower.sizes == [] and told == [(5, 5)]
    assert torch.equal(again.features(part_of(range(15))), first)


def test_only_missing_shards_are_computed(tower, tmp_path):
    first = cached(Made(), tower, tmp_path).features(part_of(range(15)))
    tower.sizes.clear()
    (tmp_path / "features-00001.npy").unlink()
    again = cached(Made(), tower, tmp_path).features(part_of(range(15)))
    assert sum(tower.sizes) == 2
    torch.testing.assert_close(again, first)


def test_a_stopped_run_continues_with_the_next_shard(tower, tmp_path):
    class Killed(Exception):
        pass

    def dies(pixels):
        if sum(tower.sizes) >= 2:
            raise Killed
        return tower(pixels)

    with pytest.raises(Killed):
        cached(Made(), dies, tmp_path)
    assert [path.name for path in tmp_path.glob("*.npy")] == ["features-00000.npy"]
    cached(Made(), tower, tmp_path)
    assert sum(tower.sizes) == 5


def test_a_damaged_byte_is_found_by_the_check_and_a_missing_one_when_opened(tower, tmp_path):
    cached(Made(), tower, tmp_path)
    shards = sorted(tmp_path.glob("*.npy"))
    size = sum(shard.stat().st_size for shard in shards)
    assert check_features(str(tmp_path)) == CheckedFeatures(len(shards), size, [])
    content = bytearray(shards[1].read_bytes())
    content[-1] ^= 1
    shards[1].write_bytes(content)
    cached(Made(), tower, tmp_path)  # the sizes are right
    assert check_features(str(tmp_path)).damaged == [
        f"{shards[1]} is damaged; delete it, and it is computed again"
    ]
    shards[1].write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"features-00001\.npy has .* bytes, not .*; delete it"):
        cached(Made(), tower, tmp_path)
    shards[1].unlink()
    assert "cannot be read" in check_features(str(tmp_path)).damaged[0]
    cached(Made(), tower, tmp_path)
    assert not check_features(str(tmp_path)).damaged


def test_a_shard_without_a_checksum_gets_one(tower, tmp_path):
    cached(Made(), tower, tmp_path)
    (tmp_path / "features-00001.sum").unlink()
    assert "is missing or damaged" in check_features(str(tmp_path)).damaged[0]
    tower.sizes.clear()
    cached(Made(), tower, tmp_path)
    assert not tower.sizes and not check_features(str(tmp_path)).damaged


def test_features_do_not_depend_on_the_batch(tower, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_PER_SHARD", 4096)
    whole = cached(Made(), tower, tmp_path / "whole", batch=64)
    ones = cached(Made(), tower, tmp_path / "ones", batch=1)
    assert tower.sizes == [5, 1, 1, 1, 1, 1]
    part = part_of(range(5))
    torch.testing.assert_close(whole.features(part), ones.features(part))


def test_views_are_augmented_versions_that_epochs_take_in_turn(tower, tmp_path):
    augmented = Preparation(resolution=32, augmented=True, flip=True, seed=3)
    source = Made()
    found = cached(source, tower, tmp_path, augmented, views=2, batch=1)
    assert sum(tower.sizes) == 2 * 5
    views = [found.features(part_of([0, 4], epoch=epoch)) for epoch in range(4)]
    assert torch.equal(views[0], views[2]) and torch.equal(views[1], views[3])
    assert not torch.allclose(views[0], views[1])
    for view in (0, 1):
        expected = own_output(tower, source, 4, view, augmented)  # as an epoch online would
        torch.testing.assert_close(views[view][1], expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stamp": {"tower": "that"}}, "tower"),
        ({"stamp": {"tower": "this", "precision": "bf16"}}, "precision"),
        ({"preparation": Preparation(resolution=64)}, "preparation"),
        ({"preparation": Preparation(resolution=32, background="white")}, "preparation"),
        ({"views": 2}, "views"),
        ({"mix": [WeightedSource(Made(first=1))]}, "images"),
        ({"mix": [WeightedSource(Made()), WeightedSource(Made())]}, "images"),
        ({"stamp": {"tower": "that"}, "views": 3}, "tower, views"),
    ],
)
def test_features_of_something_else_are_refused_and_named(tower, tmp_path, changes, named):
    given = {
        "mix": [WeightedSource(Made())],
        "run": tower,
        "stamp": {"tower": "this"},
        "preparation": SMALL,
        "folder": tmp_path,
        "workers": 0,
    }
    cache_image_features(**given)
    tower.sizes.clear()
    with pytest.raises(UsageError, match=rf"another {named}; delete .* --output\.features"):
        cache_image_features(**given | changes)
    assert tower.sizes == []
    cache_image_features(**given)


def test_other_texts_of_the_same_images_use_the_cache(tower, tmp_path):
    """The length of texts is no part of a picture's preparation."""
    cached(Made(), tower, tmp_path)
    cached(Made(), tower, tmp_path, Preparation(resolution=32, context_length=20))
    assert sum(tower.sizes) == 5


def test_a_damaged_stamp_is_refused(tower, tmp_path):
    cached(Made(), tower, tmp_path)
    (tmp_path / "about.json").write_text("{")
    with pytest.raises(UsageError, match=r"about\.json cannot be read .*; delete the folder"):
        cached(Made(), tower, tmp_path)


def test_the_stamp_can_be_read_by_people(tower, tmp_path):
    cached(Made(), tower, tmp_path)
    about = json.loads((tmp_path / "about.json").read_text(encoding="utf-8"))
    assert about["tower"] == "this" and about["views"] == 1
    assert about["preparation"]["resolution"] == 32 and len(about["images"]) == 32


def test_a_fingerprint_changes_with_the_image_tower_alone(tiny_model):
    before = tower_fingerprint(tiny_model)
    with torch.no_grad():
        tiny_model.text_projection += 1
        assert tower_fingerprint(tiny_model) == before
        tiny_model.visual.proj[3, 4] += 1e-3
    assert tower_fingerprint(tiny_model) != before
    assert tower_fingerprint(make_model(TINY["vit"])) == before


def test_features_of_an_unreadable_image_are_nan(tower, tmp_path):
    found = cached(Made(broken={3}), tower, tmp_path, batch=1)
    part = part_of(range(15))
    broken = found.features(part).isnan().any(dim=1)
    assert broken.tolist() == [n % 5 == 3 for n in range(15)]
    features = found.features(part)
    assert features[3].isnan().all() and features[[0, 1, 2, 4]].isfinite().all()


# Many images


def tars(tmp_path, count):
    write_shards(tmp_path, count)
    return open_mix([f"tar:{tmp_path}/*.tar"])


def test_many_images_are_in_few_files_and_their_rows_are_mapped(tower, tmp_path, monkeypatch):
    mix = tars(tmp_path, 3)
    part = part_of(range(15))
    expected = cached(mix, tower, tmp_path / "small").features(part)
    monkeypatch.setattr(cache, "_KEPT_ROWS", 10)
    monkeypatch.setattr(cache, "_PER_LARGE_SHARD", 6)
    torch.testing.assert_close(cached(mix, tower, tmp_path / "large").features(part), expected)
    names = sorted(path.name for path in (tmp_path / "large").iterdir())
    shards = [f"features-0000{n}.{kind}" for n in range(3) for kind in ("npy", "sum")]
    assert names == ["about.json", *shards, "images.index"]
    assert cache.FEATURES(tmp_path / "large") is None
    tower.sizes.clear()
    monkeypatch.setattr(cache, "unique_images", lambda mix: 1 / 0)  # they are not looked for again
    torch.testing.assert_close(cached(mix, tower, tmp_path / "large").features(part), expected)
    assert not tower.sizes


def test_a_cache_of_small_shards_stays_in_use(tower, tmp_path, monkeypatch):
    mix = tars(tmp_path, 3)
    expected = cached(mix, tower, tmp_path / "small").features(part_of(range(15)))
    monkeypatch.setattr(cache, "_PER_LARGE_SHARD", 6)
    tower.sizes.clear()
    found = cached(mix, tower, tmp_path / "small").features(part_of(range(15)))
    assert torch.equal(found, expected) and not tower.sizes


def test_changed_shards_have_other_images(tower, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_KEPT_ROWS", 10)
    cached(tars(tmp_path, 3), tower, tmp_path / "features")
    (tmp_path / "00001.tar").write_bytes(tar_bytes([("z.jpg", jpeg(1)), ("z.txt", b"new")]))
    with pytest.raises(UsageError, match="of another images; delete the folder"):
        cached(open_mix([f"tar:{tmp_path}/*.tar"]), tower, tmp_path / "features")


def test_features_stored_in_half_precision_are_the_rounded_ones(tower, tmp_path):
    exact = cached(Made(broken={3}), tower, tmp_path / "exact").features(part_of(range(15)))
    half = cached(Made(broken={3}), tower, tmp_path / "half", precision="fp16")
    found, rounded = half.features(part_of(range(15))), exact.half().float()
    assert torch.equal(found.nan_to_num(9), rounded.nan_to_num(9))
    assert np.load(tmp_path / "half" / "features-00000.npy").dtype == np.float16
    with pytest.raises(UsageError, match="of another stored as; delete the folder"):
        cached(Made(broken={3}), tower, tmp_path / "half")


def test_images_of_a_streamed_source_are_read_shard_by_shard(tower, tmp_path, monkeypatch):
    write_shards(tmp_path, 3)
    begun = []
    monkeypatch.setattr(Chain, "read_ahead", lambda self, *span: begun.append(span))
    mix = open_mix([f"tar:{tmp_path}/*.tar?order=stream"])
    cached(mix, tower, tmp_path / "features", batch=2)
    assert begun == sorted(begun) and sum(stop - first for first, stop in begun) == 15


def loader_of(source, tower, folder, **options):
    mix = [WeightedSource(source)]
    return CachedLoader(mix, cached(mix, tower, folder), 4, context_length=52, seed=1, **options)


def test_batches_equal_those_of_the_online_loader(tower, tmp_path):
    source = Made(broken={2})
    online = Loader([WeightedSource(source)], SMALL, 4, seed=1, workers=0, max_skipped_fraction=1.0)
    offline = loader_of(source, tower, tmp_path, max_skipped_fraction=1.0)
    assert len(online) == len(offline) == 4
    for epoch, start in ((0, 0), (1, 2)):
        pairs = zip(
            local_batches(online, epoch, start), local_batches(offline, epoch, start), strict=True
        )
        for seen, kept in pairs:
            assert kept.rows == seen.rows
            assert torch.equal(kept.ids, seen.ids) and torch.equal(kept.keys, seen.keys)
            assert kept.pixels is None and seen.features is None
            torch.testing.assert_close(kept.features, tower(seen.pixels))
    assert (offline.seen, offline.skipped) == (online.seen, online.skipped)


def test_pairs_of_an_unreadable_image_are_skipped_counted_and_listed(tower, tmp_path):
    loader = loader_of(Made(broken={2}), tower, tmp_path, max_skipped_fraction=0.2)
    rows = [row for share in loader.local_batches(0) for row in share.rows]
    assert (loader.seen, loader.skipped, len(rows)) == (15, 3, 12)
    assert not any(row.image_id == "2" for row in rows)
    assert sorted(reason.split(":")[0] for reason in loader.reasons) == [
        "made, row 12",
        "made, row 2",
        "made, row 7",
    ]
    assert "was unreadable when its features were computed" in loader.reasons[0]


def test_too_many_unreadable_images_end_the_run(tower, tmp_path):
    loader = loader_of(Made(broken={2, 3}), tower, tmp_path, max_skipped_fraction=0.3)
    with pytest.raises(DataError, match="6 of 15 pairs cannot be read, above the limit of 30%"):
        list(loader.local_batches(0))


def test_processes_split_a_batch(tower, tmp_path):
    alone = [s.rows for s in loader_of(Made(), tower, tmp_path).local_batches(0)]
    two = [
        loader_of(Made(), tower, tmp_path, rank=n, world_size=2).local_batches(0) for n in (0, 1)
    ]
    assert [a.rows + b.rows for a, b in zip(*two, strict=True)] == alone


def test_empty_texts_and_invalid_lines_are_skipped(tower, tmp_path, pictures):
    uri = write_jsonl(pictures)
    manifest = pictures / "pairs.jsonl"
    lines = manifest.read_text(encoding="utf-8").splitlines()
    empty = json.dumps(json.loads(lines[1]) | {"text": "  "})
    manifest.write_text("\n".join([lines[0], empty, "{", *lines[2:]]) + "\n", encoding="utf-8")
    mix = open_mix([uri])
    found = cached(mix, tower, tmp_path / "features")
    loader = CachedLoader(mix, found, 8, context_length=52, max_skipped_fraction=1.0)
    (share,) = loader.local_batches(0)
    assert (loader.seen, loader.skipped) == (5, 2)
    assert {row.text_id for row in share.rows} == {"001", "003", "004"}
    assert share.features.isfinite().all()


def test_unique_images_are_found_without_opening_any(pictures):
    uri = write_csv(pictures)
    for path in pictures.glob("*.jpg"):
        path.unlink()
    found = unique_images(open_mix([uri]))
    assert len(found.first_rows) == 3
    assert found.of_rows[0][0] == found.of_rows[0][1]
    assert len({*found.of_rows[0].tolist()}) == 3


def test_a_full_disk_is_reported_and_finished_shards_are_kept(tower, tmp_path, monkeypatch):
    append = cache._append

    def full(stream, rows, shape):
        if stream.name.endswith("00001.npy"):
            raise OSError(28, "No space left on device")
        append(stream, rows, shape)

    monkeypatch.setattr(cache, "_append", full)
    with pytest.raises(DataError, match=r"could not be written .*No space left.*--resume auto"):
        cached(Made(), tower, tmp_path / "features")
    assert [path.name for path in (tmp_path / "features").glob("*.npy")] == ["features-00000.npy"]
    shutil.rmtree(tmp_path / "features")
