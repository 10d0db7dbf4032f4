"""Near-duplicates over shards, the similarity filter, and the list of kept images."""

import contextlib
import json
import pickle

import numpy as np
import pytest
from conftest import make_image
from shard_folders import clustered, ids, unit, use_one_thread, write_shard, write_shards

from cn_clip.cli import run
from cn_clip.data.sources.open import open_source
from cn_clip.embeddings.inputs import read_images
from cn_clip.errors import DataError, UsageError
from cn_clip.shards.building import Options, build_index
from cn_clip.shards.folder import SPAN, ShardFolder
from cn_clip.shards.kept import read_kept
from cn_clip.shards.near_duplicates import remove_duplicates
from cn_clip.shards.similarity import filter_pairs, pair_cosines

OF = 300


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    use_one_thread(monkeypatch)


def kept_ids(path):
    return [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]


def planted(count=1500, copies=200, noise=0.05, seed=0):
    """Vectors with near-copies of some of them at random places; which ones those are."""
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(count, 64)) + 0.5)
    of = rng.choice(count, copies)
    near = unit(vectors[of] + noise * rng.normal(size=(copies, 64)) / 8)
    order = rng.permutation(count + copies)
    return np.concatenate([vectors, near])[order]


def lowest(vectors, threshold):
    """Which rows have no row before them that is as near, by float64."""
    stored = [
        block.astype(np.float32 if number % 2 else np.float16).astype(np.float64)
        for number, block in enumerate(np.split(vectors, range(OF, len(vectors), OF)))
    ]
    rows = np.concatenate(stored)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    near = np.tril(rows @ rows.T >= threshold, -1)
    return ~near.any(axis=1)


@pytest.fixture
def indexed(tmp_path):
    vectors = planted()
    folder = write_shards(tmp_path / "shards", vectors, OF)
    build_index(folder, lambda: clustered(32, dim=64), Options(recall=0.9))
    return folder, vectors


@pytest.mark.parametrize("codes", ["int8", "int4"])
def test_what_is_removed_has_a_near_duplicate_before_it_and_nothing_else_is(tmp_path, codes):
    vectors = planted()
    folder = write_shards(tmp_path / "shards", vectors, OF)
    build_index(folder, lambda: clustered(32, dim=64), Options(codes=codes))
    done = remove_duplicates(folder, tmp_path / "kept.jsonl", threshold=0.97)
    expected = ids(len(vectors), OF)[lowest(vectors, 0.97)]
    assert 190 <= len(vectors) - len(expected) <= 200  # the planted ones, not all after theirs
    found = kept_ids(tmp_path / "kept.jsonl")
    assert set(expected) <= set(found)
    missed = len(found) - len(expected)
    assert missed <= 0.02 * len(done.removed)  # in lists that are not compared
    assert (done.removed[:, 1] < done.removed[:, 0]).all() and done.kept == len(found)


def test_a_thousand_copies_of_one_image_leave_one(tmp_path):
    same = np.repeat(clustered(1), 1000, axis=0)
    folder = write_shards(tmp_path / "shards", np.concatenate([same, clustered(500, seed=4)]), OF)
    build_index(folder, lambda: clustered(8), Options())
    done = remove_duplicates(folder, tmp_path / "kept.jsonl", threshold=0.999)
    assert kept_ids(tmp_path / "kept.jsonl")[0] == 1
    assert len(done.removed) == 999 and set(done.removed[:, 0]) == set(ids(1000, OF)[1:])


def test_processes_remove_the_same(indexed, tmp_path, monkeypatch):
    from cn_clip.shards import near_duplicates

    folder, _vectors = indexed
    one = remove_duplicates(folder, tmp_path / "1.jsonl")
    monkeypatch.setattr(near_duplicates, "_JOB_ROWS", 200)
    two = remove_duplicates(folder, tmp_path / "2.jsonl", workers=2)
    assert np.array_equal(one.removed, two.removed)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_a_list_within_a_list(indexed, tmp_path):
    folder, vectors = indexed
    every = ids(len(vectors), OF)
    some = tmp_path / "some.jsonl"
    chosen = every[1::2]
    some.write_text("".join(f'{{"id": {image}}}\n' for image in chosen))
    assert np.array_equal(read_kept(some), chosen)
    done = remove_duplicates(folder, tmp_path / "kept.jsonl", within=read_kept(some))
    assert set(kept_ids(tmp_path / "kept.jsonl")) <= set(chosen) and done.images == len(chosen)
    assert set(done.removed.ravel()) <= set(chosen)


def test_without_an_index_of_all_shards_there_is_no_comparison(tmp_path):
    folder = write_shards(tmp_path / "shards", clustered(40), 20)
    with pytest.raises(UsageError, match="bulk index"):
        remove_duplicates(folder, tmp_path / "kept.jsonl")
    build_index(folder, lambda: clustered(8), Options())
    write_shard(folder, 2, clustered(20, seed=9))
    with pytest.raises(UsageError, match="bulk index"):
        remove_duplicates(folder, tmp_path / "kept.jsonl")


def test_images_that_only_embed_alike_are_kept_if_they_are_looked_at(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("a", "b", "c", "gone")]
    first = make_image(1, (96, 96))
    first.save(paths[0])
    make_image(2, (96, 96)).save(paths[1])
    first.resize((64, 64)).save(paths[2])
    vectors = np.concatenate([np.repeat(clustered(1), 4, axis=0), clustered(30, seed=3)])
    names = [str(path) for path in paths] + ["x"] * 30
    folder = tmp_path / "shards"
    write_shard(folder, 0, vectors, image_path=names)
    build_index(folder, lambda: clustered(8), Options())
    done = remove_duplicates(folder, tmp_path / "1.jsonl", threshold=0.999)
    assert done.removed[:, 0].tolist() == [2, 3, 4]
    done = remove_duplicates(folder, tmp_path / "2.jsonl", threshold=0.999, look=True)
    assert 2 not in done.removed[:, 0] and 4 not in done.removed[:, 0]


def test_a_copy_is_found_behind_images_that_only_embed_alike(tmp_path):
    # The other images are nearer to the copy than its original, and more than a few.
    count = 12
    paths = [tmp_path / f"{number}.png" for number in range(count + 1)]
    for number, path in enumerate(paths[:-1]):
        make_image(number, (96, 96)).save(path)
    make_image(0, (96, 96)).resize((64, 64)).save(paths[-1])
    vectors = np.repeat(clustered(1), count + 1, axis=0)
    vectors[:1] = unit(vectors[:1] + 0.05 * unit(np.random.default_rng(0).normal(size=(1, 32))))
    folder = tmp_path / "shards"
    names = [str(path) for path in paths] + ["x"] * 30
    write_shard(folder, 0, np.concatenate([vectors, clustered(30, seed=3)]), image_path=names)
    build_index(folder, lambda: clustered(8), Options())
    done = remove_duplicates(folder, tmp_path / "kept.jsonl", threshold=0.99, look=True)
    assert done.removed.tolist() == [[count + 1, 1]]


def test_every_image_that_looks_like_a_lower_one_near_to_it_is_removed(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(60)]
    for number, path in enumerate(paths):
        side = 64 + number // 20 * 16  # three sizes of 20 images
        make_image(number % 20, (96, 96)).resize((side, side)).save(path)
    vectors = np.repeat(clustered(4), 15, axis=0)[np.random.default_rng(1).permutation(60)]
    folder = tmp_path / "shards"
    write_shard(folder, 0, vectors, image_path=[str(path) for path in paths])
    build_index(folder, lambda: clustered(8), Options(lists=4))
    done = remove_duplicates(folder, tmp_path / "kept.jsonl", threshold=0.999, look=True)
    near = np.tril(vectors @ vectors.T >= 0.999, -1)
    images = np.arange(60) % 20
    expected = (near & (images[:, None] == images)).any(axis=1)
    assert done.removed[:, 0].tolist() == (1 + np.flatnonzero(expected)).tolist()
    assert expected.sum() > 5


def test_a_worker_has_no_copy_of_the_list_and_opens_the_index_once(indexed, tmp_path, monkeypatch):
    from cn_clip.shards import near_duplicates

    folder, vectors = indexed
    within = ids(len(vectors), OF)[::2]
    one = remove_duplicates(folder, tmp_path / "1.jsonl", within=within)
    opened, sizes = [], []

    class Counted(near_duplicates.ShardIndex):
        @classmethod
        def open(cls, path):
            opened.append(path)
            return super().open(path)

    def without_workers(compare, workers):
        sizes.append(len(pickle.dumps(compare)))
        return contextlib.nullcontext(lambda jobs: map(compare, jobs))

    monkeypatch.setattr(near_duplicates, "ShardIndex", Counted)
    monkeypatch.setattr(near_duplicates, "parallel_map", without_workers)
    monkeypatch.setattr(near_duplicates, "_JOB_ROWS", 200)
    two = remove_duplicates(folder, tmp_path / "2.jsonl", within=within)
    assert np.array_equal(one.removed, two.removed) and len(one.removed)
    assert sizes[0] < 1000 < within.nbytes
    assert len(opened) == 2  # once to plan, once to compare all jobs


# The similarity filter.


def pairs_of(tmp_path, count=700):
    rng = np.random.default_rng(5)
    images = clustered(count)
    texts = unit(images + rng.uniform(0, 3, (count, 1)) * rng.normal(size=images.shape) / 6)
    return write_shards(tmp_path / "pairs", images, OF, text_emb=texts), images, texts


def test_the_filter_keeps_the_pairs_above_a_cosine(tmp_path):
    folder, images, texts = pairs_of(tmp_path)
    done = filter_pairs(ShardFolder.open(folder), tmp_path / "kept.jsonl", min_cosine=0.7)
    cosines = (images * texts).sum(axis=1)
    clear = np.abs(cosines - 0.7) > 2e-3  # float16
    wanted = ids(len(images), OF)[clear & (cosines > 0.7)]
    found = np.array(kept_ids(tmp_path / "kept.jsonl"))
    assert np.array_equal(np.intersect1d(found, ids(len(images), OF)[clear]), wanted)
    assert done.pairs == len(images) and done.kept == len(found)
    assert abs(done.quantiles[0.5] - np.median(cosines)) < 2e-3


@pytest.mark.parametrize("workers", [0, 2])
def test_the_filter_keeps_a_share_of_the_best_pairs(tmp_path, workers):
    folder, images, texts = pairs_of(tmp_path)
    out = tmp_path / "kept.jsonl"
    done = filter_pairs(ShardFolder.open(folder), out, share=0.3, workers=workers)
    assert abs(done.kept / len(images) - 0.3) < 0.01
    cosines = (images * texts).sum(axis=1)
    assert abs((cosines >= done.min_cosine).mean() - 0.3) < 0.01


def test_rows_without_a_direction_are_never_kept():
    images = clustered(4).astype(np.float16)
    texts = images.copy()
    images[1], texts[2, 0], images[3, 1] = 0, np.nan, np.inf
    assert pair_cosines(images, texts).round(2).tolist() == [1, -1, -1, -1]


def test_shards_without_texts_or_with_other_numbers_of_rows_are_refused(tmp_path):
    folder, _images, texts = pairs_of(tmp_path)
    out = tmp_path / "kept.jsonl"
    with pytest.raises(UsageError, match="give one of"):
        filter_pairs(ShardFolder.open(folder), out)
    np.save(folder / "text_emb" / "text_emb_00001.npy", texts[:7])
    with pytest.raises(DataError, match=r"shard 1 .* other numbers"):
        filter_pairs(ShardFolder.open(folder), out, min_cosine=0.5)
    (folder / "text_emb" / "text_emb_00001.npy").unlink()
    with pytest.raises(UsageError, match="no text embeddings"):
        filter_pairs(ShardFolder.open(folder), out, min_cosine=0.5)
    (folder / "metadata" / "metadata_00000.parquet").write_bytes(b"PAR1")
    np.save(folder / "text_emb" / "text_emb_00001.npy", texts[OF : 2 * OF])
    with pytest.raises(DataError, match="is not Parquet"):
        filter_pairs(ShardFolder.open(folder), out, min_cosine=0.5)
    assert not out.exists()


def test_the_list_is_a_source_of_pairs_and_a_list_of_images(tmp_path, capsys):
    paths = [tmp_path / f"图{number}.png" for number in range(6)]
    for number, path in enumerate(paths):
        make_image(number, (40, 40)).save(path)
    vectors = clustered(6)
    texts = np.concatenate([vectors[:4], -vectors[4:]])
    captions = [f"第{number}张图" for number in range(6)]
    folder = tmp_path / "shards"
    names = [str(path) for path in paths]
    for shard, rows in enumerate((slice(0, 3), slice(3, 6))):
        write_shard(
            folder, shard, vectors[rows], text_emb=texts[rows], image_path=names[rows],
            caption=captions[rows], id=names[rows],
        )  # fmt: skip
    out = tmp_path / "kept.jsonl"
    words = ["bulk", "filter", str(folder), "--min-cosine", "0.5", "--out", str(out)]
    assert run([*words, "--workers", "0"]) == 0
    assert "4 of 6 pairs" in capsys.readouterr().out
    source = open_source(f"jsonl:{out}")
    assert [source.row(index).text for index in range(len(source))] == captions[:4]
    assert source.image(3) == paths[3].read_bytes()
    assert [item.id for item in read_images([str(out)])] == names[:4]
    assert read_kept(out).tolist() == [1, 2, 3, SPAN + 1]
    assert run([*words, "--workers", "0"]) == 2  # it exists
    assert run([*words, "--workers", "0", "--overwrite"]) == 0


def write_captioned(folder, count):
    """Write images with their captions beside them, and return the folder."""
    folder.mkdir()
    for number in range(count):
        make_image(number, (40, 40)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"第{number}张图", encoding="utf-8")
    return folder


def test_a_list_of_images_in_a_folder_is_packed(tmp_path):
    source = write_captioned(tmp_path / "源", 4)
    kept = tmp_path / "kept.jsonl"
    lines = [json.dumps({"id": n, "image": str(source / f"{n}.png")}) for n in (1, 3)]
    kept.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["data", "pack", f"folder:{source}", "--keep", str(kept), "--workers", "0"]
    assert run([*words, "--out", str(tmp_path / "packed")]) == 0
    packed = open_source(f"tar:{tmp_path}/packed/*.tar")
    assert [packed.row(n).text for n in range(len(packed))] == ["第1张图", "第3张图"]


def test_a_list_of_images_in_tar_shards_is_packed(tmp_path, capsys, monkeypatch):
    source = write_captioned(tmp_path / "source", 6)
    packed = tmp_path / "tars"
    words = ["data", "pack", f"folder:{source}", "--out", str(packed), "--images-per-shard", "4"]
    assert run([*words, "--workers", "0"]) == 0
    source = open_source(f"tar:{packed}/*.tar")
    labels = [f"tar:{packed}/{n // 4:05d}.tar#{source.row(n).image_id}" for n in range(6)]
    kept = tmp_path / "kept.jsonl"
    chosen = [labels[n] for n in (0, 3, 5)]
    kept.write_text("".join(json.dumps({"id": 1, "image": each}) + "\n" for each in chosen))
    monkeypatch.chdir(tmp_path)
    words = ["data", "pack", "tar:tars/*.tar", "--keep", "kept.jsonl", "--workers", "0"]
    assert run([*words, "--out", "again"]) == 0
    again = open_source("tar:again/*.tar")
    assert [again.row(n).text for n in range(len(again))] == [source.row(n).text for n in (0, 3, 5)]
    kept.write_text('{"id": 1, "image": "tar:/elsewhere/0.tar#1"}\n')
    assert run([*words, "--out", "other"]) == 1
    assert "has no image of" in capsys.readouterr().err


def test_other_files_are_no_lists(tmp_path, capsys):
    path = tmp_path / "notes.jsonl"
    for content in (b"mine", b'{"id": "a"}', b'{"id": true}', b"[]", b"\xff\n", b'{"id": 1e400}'):
        path.write_bytes(content)
        with pytest.raises(DataError, match="was not written by"):
            read_kept(path)
    folder, *_unused = pairs_of(tmp_path)
    words = ["bulk", "filter", str(folder), "--min-cosine", "0.5"]
    assert run([*words, "--out", str(path), "--overwrite"]) == 2
    assert "was not written by" in capsys.readouterr().err
    assert run([*words, "--out", "kept.csv"]) == 2
    assert run([*words, "--out", str(folder / "kept.jsonl")]) == 2
