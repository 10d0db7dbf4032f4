"""The index over embedding shards: what it finds, resuming, growth, damage."""

import json
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
from shard_folders import best_ids, clustered, ids, use_one_thread, write_shard, write_shards

from cn_clip.errors import CNClipError, DataError, UsageError
from cn_clip.shards import building, encoding
from cn_clip.shards.building import Options, build_index
from cn_clip.shards.folder import SPAN, ShardFolder, parse_range, shards_and_rows
from cn_clip.shards.index import INDEX, ShardIndex

COUNT, OF = 6000, 500
VECTORS = clustered(COUNT)
QUERIES = clustered(40, seed=1)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    use_one_thread(monkeypatch)


def texts():
    return clustered(64, seed=2)


def built(folder, **options):
    shards = options.pop("shards", None)
    return build_index(folder, texts, Options(**options), shards=shards)


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path / "shards", VECTORS, OF)


def recall(found, best):
    return np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, best, strict=True)])


def test_without_an_index_the_search_is_exact(folder):
    found = ShardIndex.open(folder).search(QUERIES, 10)
    assert np.array_equal(found.indexes, best_ids(VECTORS, QUERIES, 10, OF))


@pytest.mark.parametrize("codes", ["int8", "int4", pytest.param("pq", marks=pytest.mark.full)])
def test_an_index_finds_the_best_rows_with_their_exact_scores(folder, codes):
    done = built(folder, codes=codes, recall=0.95)
    assert (done.rows, done.shards) == (COUNT, COUNT // OF)
    index = ShardIndex.open(folder)
    assert index.lists is not None and not index.unindexed and len(index) == COUNT
    found = index.search(QUERIES, 10)
    assert recall(found.indexes, best_ids(VECTORS, QUERIES, 10, OF)) >= 0.95
    exact = ShardIndex.open(folder, range(99)).reader
    for query, row, scores in zip(QUERIES, found.indexes, found.scores, strict=True):
        order = np.argsort(row)
        assert np.allclose(exact.read(row[order]) @ query, scores[order], atol=1e-6)


def test_a_single_row_that_is_as_good_as_any_is_found(folder):
    built(folder)
    found = ShardIndex.open(folder).search(VECTORS[[0, 777, COUNT - 1]], 1)
    assert found.indexes[:, 0].tolist() == ids(COUNT, OF)[[0, 777, COUNT - 1]].tolist()


def test_an_index_of_parts_made_by_processes_is_the_same(folder, monkeypatch, tmp_path):
    built(folder)
    one = (folder / INDEX / "lists-all" / "lists.bin").read_bytes()
    assert len(one) == COUNT * (16 + 8)
    plans = encoding.planned_parts(ShardFolder.open(folder))
    halves = [encoding.PartPlan(part) for part in np.array_split(plans[0].shards, 4)]
    monkeypatch.setattr(building, "planned_parts", lambda _folder: halves)
    done = built(folder, workers=2)
    assert (done.parts, done.encoded) == (4, 4)
    assert (folder / INDEX / "lists-all" / "lists.bin").read_bytes() == one


def test_only_new_shards_are_read_again(folder, monkeypatch):
    monkeypatch.setattr(encoding, "_PART_ROWS", 2 * OF)
    assert built(folder).encoded == 6
    more = clustered(OF, seed=5)
    write_shard(folder, 12, more)
    index = ShardIndex.open(folder)
    assert index.unindexed == [12] and len(index) == COUNT + OF
    assert index.search(more[:1], 1).indexes[0, 0] == 12 * SPAN + 1  # searched exactly
    done = built(folder)
    assert (done.encoded, done.parts, done.rows) == (1, 7, COUNT + OF)
    assert ShardIndex.open(folder).search(more[:1], 1).indexes[0, 0] == 12 * SPAN + 1


def test_a_part_of_the_shards_finds_what_all_of_them_find_there(folder):
    built(folder)
    best = best_ids(VECTORS, QUERIES, COUNT, OF)
    inside = [row[shards_and_rows(row)[0] // 4 == 1][:10] for row in best]
    by_all = ShardIndex.open(folder, range(4, 8))
    assert by_all.lists is not None
    assert recall(by_all.search(QUERIES, 10).indexes, inside) >= 0.95
    done = built(folder, shards=range(4, 8))
    assert done.rows == 4 * OF
    own = ShardIndex.open(folder, range(4, 8))
    assert own.lists.about["rows"] == 4 * OF and len(own) == 4 * OF
    assert recall(own.search(QUERIES, 10).indexes, inside) >= 0.95


def test_rows_of_zeros_and_nan_are_never_found(tmp_path):
    vectors = clustered(600).astype(np.float16)
    vectors[5], vectors[300, 3], vectors[301, 0] = 0, np.nan, np.inf
    write_shard(tmp_path, 0, vectors[:200])
    write_shard(tmp_path, 3, vectors[200:])
    write_shard(tmp_path, 4, vectors[:0])
    build_index(tmp_path, texts, Options(lists=4))
    index = ShardIndex.open(tmp_path)
    found = index.search(QUERIES, 600)
    bad = {6, 3 * SPAN + 101, 3 * SPAN + 102}
    assert found.indexes.shape == (40, 597) and not bad & set(found.indexes.ravel().tolist())
    assert np.isfinite(found.scores).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_of_zeros_and_nan_are_not_found_without_an_index(tmp_path, dtype):
    vectors = clustered(50)
    vectors[5], vectors[30, 3], vectors[31, 0] = 0, np.nan, np.inf
    write_shard(tmp_path, 0, vectors, dtype=dtype)
    found = ShardIndex.open(tmp_path).search(QUERIES, 50)
    good = np.delete(np.arange(50), [5, 30, 31]) + 1
    assert np.isfinite(found.scores).all()
    assert all(sorted(row) == good.tolist() for row in found.indexes.tolist())


def test_more_results_than_rows_are_all_rows(tmp_path):
    write_shards(tmp_path, VECTORS[:7], 3)
    assert ShardIndex.open(tmp_path).search(QUERIES[:2], 50).indexes.shape == (2, 7)
    built(tmp_path)
    assert ShardIndex.open(tmp_path).search(QUERIES[:2], 50).indexes.shape == (2, 7)


@pytest.mark.parametrize(
    "name",
    ["lists-all/lists.bin", "lists-all/sizes.npy", "lists-all/shards.npy", "lists-all/index.json",
     "trained/centroids.faiss", "trained/queries.npy", "trained/trained.json"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["gone", "short", "other", "empty"])
def test_a_damaged_index_is_not_used_and_can_be_built_again(folder, name, damage):
    shutil.copytree(_prepared(folder), folder / INDEX)
    path = folder / INDEX / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "other":
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 0xFF
        path.write_bytes(flipped)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "short" else b"")
    best = best_ids(VECTORS, QUERIES[:5], 10, OF)
    assert recall(ShardIndex.open(folder).search(QUERIES[:5], 10).indexes, best) >= 0.8
    built(folder)
    index = ShardIndex.open(folder)
    assert index.lists is not None
    assert recall(index.search(QUERIES[:5], 10).indexes, best) >= 0.9


_INDEXES = {}


def _prepared(folder):
    """An index of the same shards, built once; their files have other times."""
    if not _INDEXES:
        other = folder.parent / "other"
        shutil.copytree(folder, other)
        built(other)
        kept = folder.parent.parent / "kept-index"
        shutil.copytree(other / INDEX, kept)
        _INDEXES["kept"] = kept
    return _INDEXES["kept"]


def test_a_damaged_part_is_made_again(folder, monkeypatch):
    monkeypatch.setattr(encoding, "_PART_ROWS", 4 * OF)
    assert built(folder).encoded == 3
    parts = sorted((folder / INDEX / "parts").iterdir())
    parts[0].write_bytes(b"")
    parts[3].write_bytes(parts[3].read_bytes()[:-9])
    assert built(folder).encoded == 2


def _build(folder):
    os.environ["OMP_NUM_THREADS"] = "1"
    encoding._PART_ROWS = OF
    build_index(folder, texts)


def test_a_killed_build_continues_and_a_second_one_is_refused(folder):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_build, args=(folder,))
    process.start()
    parts = folder / INDEX / "parts"
    while process.is_alive() and len(list(parts.glob("*.npz"))) < 2:
        time.sleep(0.001)
    if process.is_alive():
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(UsageError, match="another process builds"):
            built(folder)
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    best = best_ids(VECTORS, QUERIES, 10, OF)
    assert recall(ShardIndex.open(folder).search(QUERIES, 10).indexes, best) >= 0.95
    assert built(folder).rows == COUNT
    assert recall(ShardIndex.open(folder).search(QUERIES, 10).indexes, best) >= 0.95


def test_a_full_disk_leaves_the_old_index(folder, full_disk):
    with pytest.raises(CNClipError, match="could not write"):
        built(folder)


def test_shards_of_two_models_are_refused(folder):
    write_shard(folder, 12, clustered(5, dim=16))
    with pytest.raises(DataError, match="of different models"):
        ShardIndex.open(folder).search(QUERIES, 10)


def test_a_shard_without_a_manifest_does_not_count(folder):
    (folder / "manifests" / "00003.json").unlink()
    assert 3 not in ShardFolder.open(folder).numbers
    (folder / "img_emb" / "img_emb_00005.npy").unlink()
    with pytest.raises(DataError, match=r"shard 5 .* is finished, but its file is missing"):
        ShardFolder.open(folder)


def test_folders_without_shards_are_refused(tmp_path, folder):
    with pytest.raises(UsageError, match="no embedding shards"):
        ShardFolder.open(tmp_path / "none")
    with pytest.raises(UsageError, match="no finished shard in that range"):
        ShardFolder.open(folder, range(50, 60))
    (folder / "img_emb" / "img_emb_3.npy").write_bytes(b"")
    with pytest.raises(DataError, match="shard 3 twice"):
        ShardFolder.open(folder)


def test_an_id_that_does_not_exist_has_no_vector(folder):
    index = ShardIndex.open(folder)
    for image in (0, -1, OF + 1, 99 * SPAN + 1, (1 << 62)):
        assert not index.vector(image).any()
    assert np.allclose(index.vector(SPAN + 2), VECTORS[OF + 1], atol=1e-3)


def test_ranges():
    assert parse_range("0:250") == range(250)
    for text in ("", "3", "3:3", "5:2", "-1:3", "a:b", "0:99999999999"):
        with pytest.raises(UsageError, match="--shards"):
            parse_range(text)


def test_what_the_index_says_of_itself(folder):
    built(folder)
    about = json.loads((folder / INDEX / "lists-all" / "index.json").read_text())
    assert about["format"] == "cn-clip shard index 1" and about["rows"] == COUNT


def test_vectors_stored_by_columns_are_refused_where_single_rows_are_read(folder):
    path = folder / "img_emb" / "img_emb_00000.npy"
    np.save(path, np.asfortranarray(np.load(path)))
    with pytest.raises(DataError, match="by columns"):
        ShardIndex.open(folder).vector(1)


def test_other_codes_or_lists_than_the_index_has_are_refused_not_ignored(folder):
    built(folder, codes="int8", lists=20)
    assert built(folder).lists == built(folder, codes="int8", lists=20).lists == 20
    with pytest.raises(UsageError, match=r"--codes is int4, .* with int8; .* --retrain"):
        built(folder, codes="int4")
    with pytest.raises(UsageError, match=r"--lists is 30, .* with 20; .* --retrain"):
        built(folder, lists=30)
    done = built(folder, lists=30, retrain=True)
    assert done.lists == 30 and done.bytes == COUNT * (VECTORS.shape[1] + 8)  # int8 as before
    assert built(folder, codes="int4", retrain=True).bytes < done.bytes


def test_more_lists_than_rows_are_cut_and_the_same_command_goes_on(tmp_path):
    write_shards(tmp_path, VECTORS[:40], 20)
    assert built(tmp_path, lists=64).lists < 64
    assert built(tmp_path, lists=64).encoded == 0
