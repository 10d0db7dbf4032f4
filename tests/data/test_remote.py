"""Shards behind URLs: the same pairs as on this disk, whatever the server does."""

import errno
import os
import pickle
import threading
import time
from multiprocessing import forkserver

import pyarrow
import pyarrow.parquet
import pytest
from data.formats import jpeg
from data.object_server import serving
from data.test_index import write_shards
from data.test_sources import tar_bytes

from cn_clip.data.loading.loader import Loader, Preparation
from cn_clip.data.loading.sampler import plan_of
from cn_clip.data.loading.stream_plan import StreamPlan
from cn_clip.data.sources import block_cache, remote
from cn_clip.data.sources.block_cache import BlockCache
from cn_clip.data.sources.open import (
    WeightedSource,
    absolute_uri,
    open_mix,
    open_source,
    paths_of,
)
from cn_clip.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Forget stores and caches of other tests; wait less."""
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "_TIMEOUT", 0.6)
    remote._asked.clear()
    for name in ("_store", "_blocks"):
        getattr(remote, name).cache_clear()


@pytest.fixture
def bucket(tmp_path):
    folder = tmp_path / "bucket"
    folder.mkdir()
    write_shards(folder, 12)
    return folder


@pytest.fixture
def server(bucket, monkeypatch):
    with serving(bucket) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        forkserver._forkserver._stop()  # it has the environment of the test that started it
        yield server


def pairs_of(source):
    return [(source.row(n), source.image(n)) for n in range(len(source))]


def test_pairs_of_a_bucket_and_of_a_web_server_are_those_of_the_disk(bucket, server):
    expected = pairs_of(open_source(f"tar:{bucket}/*.tar"))
    for uri in (
        "tar:s3://b/*.tar",
        "s3://b/{00000..00011}.tar",
        f"{server.url}/b/{{00000..00011}}.tar",
    ):
        source = open_source(uri)
        assert pairs_of(source) == expected
        assert source.streamed and isinstance(plan_of([WeightedSource(source)], 0, 8), StreamPlan)
    assert not open_source("tar:s3://b/*.tar?order=random").streamed
    assert paths_of("0.5@tar:s3://b/*.tar") == []
    assert absolute_uri("tar:s3://b/*.tar") == "tar:s3://b/*.tar"


def write_tables(bucket, *, with_images):
    """Write two Parquet files as img2dataset does: with the images, or of images beside them."""
    for shard in range(2):
        rows = []
        for n in range(5):
            key, content = f"{shard:05}{n:04}", jpeg(shard * 5 + n)
            url = f"https://images.example.com/a/{key}.jpg"
            rows.append({"key": key, "caption": f"第{key}张图", "url": url, "status": "success"})
            if with_images:
                rows[-1]["jpg"] = content
            else:
                (bucket / f"{key}.jpg").write_bytes(content)
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, bucket / f"{shard:05}.parquet", row_group_size=2)


@pytest.mark.parametrize(
    ("with_images", "options"),
    [(True, "?image=jpg&image_id=key"), (False, "?image_id=key"), (False, "?image=url")],
)
def test_parquet_files_of_a_bucket_are_those_of_the_disk(bucket, server, with_images, options):
    write_tables(bucket, with_images=with_images)
    expected = pairs_of(open_source(f"parquet:{bucket}/*.parquet{options}"))
    assert len(expected) == 10
    for uri in (
        f"parquet:s3://b/*.parquet{options}",
        f"parquet:{server.url}/b/{{00000..00001}}.parquet{options}",
        f"parquet:{bucket}/*.parquet{options}&root=s3://b/",
    ):
        source = open_source(uri)
        assert pairs_of(source) == expected
        assert pairs_of(pickle.loads(pickle.dumps(source))) == expected


def test_workers_read_remote_images_of_a_remote_table(bucket, server):
    write_tables(bucket, with_images=False)
    mix = open_mix([f"{server.url}/b/{{00000..00001}}.parquet?image_id=key"])
    batches = list(Loader(mix, Preparation(32), 4, workers=1).batches(0))
    ids = sorted(row.image_id for batch in batches for row in batch.rows)
    assert ids == [f"{shard:05}{n:04}" for shard in range(2) for n in range(5)]


def test_a_remote_image_that_is_missing_is_one_sentence(bucket, server):
    write_tables(bucket, with_images=False)
    (bucket / "000010003.jpg").unlink()
    source = open_source("parquet:s3://b/*.parquet?image_id=key")
    with pytest.raises(DataError, match=r"s3://b/000010003.jpg: no such file"):
        source.image(8)
    server.faults["000010004.jpg"] = ["reset", 503]
    assert source.image(9)


def test_a_remote_table_that_changes_is_read_again(bucket, server):
    write_tables(bucket, with_images=True)
    uri = "parquet:s3://b/00000.parquet?image=jpg"
    first = pairs_of(open_source(uri))
    (bucket / "00000.parquet").write_bytes((bucket / "00001.parquet").read_bytes())
    assert pairs_of(open_source(uri)) != first


def test_many_shards_are_listed_and_not_asked_for_one_by_one(server):
    open_source("tar:s3://b/{00000..00011}.tar")
    asked = [request for request in server.requests if request[0] == "HEAD"]
    assert len(asked) <= 1  # whether the server redirects
    server.requests.clear()
    open_source("tar:s3://b/{00000..00011}.tar")
    assert dict(server.requests) == {("GET", ""): 1}


def test_globs_stay_within_a_folder(bucket, server):
    (bucket / "in").mkdir()
    (bucket / "in" / "x.tar").write_bytes((bucket / "00003.tar").read_bytes())
    assert len(open_source("tar:s3://b/*.tar")) == 60
    assert len(open_source("tar:s3://b/*/*.tar")) == 5
    assert len(open_source("tar:s3://b/0000[12].tar")) == 10
    with pytest.raises(DataError, match=r"no file matches s3://b/none\*"):
        open_source("tar:s3://b/none*.tar")
    with pytest.raises(UsageError, match="files of a web server cannot be listed; name them"):
        open_source(f"tar:{server.url}/b/*.tar")


@pytest.mark.parametrize("fault", ["reset", "stall", "truncate", 500, 503, 429])
def test_faults_that_pass_are_retried(bucket, server, fault):
    expected = pairs_of(open_source(f"tar:{bucket}/*.tar"))
    for n in range(12):
        server.faults[f"{n:05}.tar"] = [fault] if fault == "stall" else [fault] * 3
    assert pairs_of(open_source(f"tar:{server.url}/b/{{00000..00011}}.tar")) == expected
    assert not any(server.faults.values())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (404, r"00000\.tar: no such file"),
        (403, r"00000\.tar: access is refused; give the credentials"),
        (401, r"00000\.tar: access is refused; give the credentials"),
        ("reset", r"00000\.tar cannot be read: "),
        (503, r"00000\.tar cannot be read: .*503"),
    ],
)
def test_faults_that_stay_are_one_sentence(server, fault, message):
    server.faults["00000.tar"] = [fault] * 100
    for uri in (f"{server.url}/b/00000.tar", "s3://b/00000.tar"):
        with pytest.raises(DataError, match=message):
            open_source(uri)
    server.faults["*"] = [fault] * 100
    with pytest.raises(DataError):
        open_source("tar:s3://b/*.tar")


def test_a_missing_shard_is_named(server):
    for root in (f"{server.url}/b", "s3://b"):
        with pytest.raises(DataError, match=rf"{root}/00012\.tar: no such file"):
            open_source(f"tar:{root}/{{00000..00012}}.tar")


def ids_of(mix, **options):
    loader = Loader(mix, Preparation(32), 8, seed=2, **options)
    return [[row.text for row in batch.rows] for batch in loader.batches(0)], loader


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_disk(bucket, server, workers):
    expected, _ = ids_of(open_mix([f"tar:{bucket}/*.tar?order=stream"]), workers=0)
    found, loader = ids_of(open_mix(["tar:s3://b/*.tar"]), workers=workers)
    assert found == expected and not loader.skipped


@pytest.mark.parametrize("change", ["vanishes", "changes"])
def test_a_shard_that_vanishes_or_changes_is_skipped_and_counted(bucket, server, change):
    source = open_source("tar:s3://b/*.tar")
    remote._blocks.cache_clear()
    for folder in (bucket.parent / ".cache" / "blocks").iterdir():
        for block in folder.iterdir() if folder.is_dir() else []:
            block.unlink()
    if change == "vanishes":
        (bucket / "00004.tar").unlink()
    else:
        (bucket / "00004.tar").write_bytes(tar_bytes([("z.jpg", b"1"), ("z.txt", b"new")]))
    found, loader = ids_of([WeightedSource(source)], workers=0, max_skipped_fraction=0.2)
    texts = [text for batch in found for text in batch]
    assert sorted(texts) == sorted(
        f"第{s}片第{n}张图" for s in range(12) if s != 4 for n in range(5)
    )
    assert (loader.seen, loader.skipped) == (60, 5)
    assert all("00004.tar" in reason for reason in loader.reasons)


def test_an_index_of_another_version_is_built_again(bucket, server):
    assert open_source("tar:s3://b/*.tar").row(20).text == "第4片第0张图"
    content = tar_bytes([("z.jpg", b"1"), ("z.txt", b"new")])
    (bucket / "00004.tar").write_bytes(
        content + bytes(len((bucket / "00004.tar").read_bytes()) - len(content))
    )
    assert open_source("tar:s3://b/*.tar").row(20).text == "new"


def test_a_truncated_shard_is_named(bucket, server):
    raw = (bucket / "00004.tar").read_bytes()
    (bucket / "00004.tar").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=r"s3://b/00004\.tar"):
        open_source("tar:s3://b/*.tar")


def test_an_endpoint_that_redirects_elsewhere_is_refused(bucket, server):
    with serving(bucket) as other:
        server.elsewhere = other.url
        for uri in ("s3://b/00000.tar", f"{server.url}/b/00000.tar"):
            server.faults["00000.tar"] = ["redirect"] * 9
            with pytest.raises(DataError, match=rf"redirects to {other.url}, which is refused"):
                open_source(uri)
        assert not other.requests


def test_other_kinds_of_sources_are_not_remote():
    with pytest.raises(
        UsageError, match="only tar shards and Parquet files are read from remote places"
    ):
        open_source("csv:s3://b/pairs.csv")


def test_a_hub_is_read_by_its_urls(bucket, server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    nested = bucket / "owner" / "name" / "resolve" / "main" / "data"
    nested.mkdir(parents=True)
    (nested / "0.tar").write_bytes((bucket / "00007.tar").read_bytes())
    assert open_source("hf://datasets/owner/name/data/0.tar").row(0).text == "第7片第0张图"
    with pytest.raises(UsageError, match="write hf://datasets/OWNER/NAME/PATH"):
        open_source("tar:hf://datasets/owner")


def test_a_source_is_pickled_without_connections(server):
    source = open_source("tar:s3://b/*.tar")
    again = pickle.loads(pickle.dumps(source))
    assert pairs_of(again) == pairs_of(source)


# The cache of blocks


def test_a_block_is_fetched_once_by_many_readers(tmp_path):
    calls = []

    def fetch():
        calls.append(1)
        time.sleep(0.05)
        return b"0123456789"

    found = []

    def read():
        found.append(BlockCache(tmp_path, 1 << 20).read("ab", 3, 2, 4, fetch))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"2345"] * 8 and len(calls) == 1


def test_a_damaged_block_is_fetched_again(tmp_path):
    cache = BlockCache(tmp_path, 1 << 20)
    assert cache.read("ab", 0, 0, 10, lambda: b"first") == b"first"
    assert cache.read("ab", 0, 1, 2, lambda: b"other") == b"ir"
    (path,) = (path for path in tmp_path.rglob("ab-0"))
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert BlockCache(tmp_path, 1 << 20).read("ab", 0, 0, 10, lambda: b"other") == b"other"


def test_a_mark_of_a_killed_process_does_not_block(tmp_path):
    (tmp_path / "ab").mkdir()
    mark = tmp_path / "ab" / "ab-0.mark"
    mark.touch()
    os.utime(mark, (1, 1))
    assert BlockCache(tmp_path, 1 << 20).read("ab", 0, 0, 9, lambda: b"new") == b"new"
    assert not mark.exists()


def test_an_error_of_a_fetch_leaves_no_mark(tmp_path):
    def fail():
        raise DataError("gone")

    cache = BlockCache(tmp_path, 1 << 20)
    for _ in range(2):
        with pytest.raises(DataError, match="gone"):
            cache.read("ab", 0, 0, 9, fail)
    assert cache.read("ab", 0, 0, 9, lambda: b"new") == b"new"


def test_the_bytes_are_bounded_and_the_least_used_go_first(tmp_path):
    cache = BlockCache(tmp_path, 100_000)
    for number in range(60):
        cache.read("ab", number, 0, 1, lambda: bytes(5000))
        time.sleep(0.002)
        BlockCache(tmp_path, 100_000).read("ab", 0, 0, 1, lambda: bytes(5000))
    stored = sorted(path.name for path in tmp_path.rglob("ab-*"))
    assert sum(path.stat().st_size for path in tmp_path.rglob("ab-*")) <= 110_000
    assert "ab-0" in stored and "ab-59" in stored and "ab-1" not in stored


def test_a_full_disk_is_a_warning_and_reading_goes_on(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(block_cache.Path, "write_bytes", full)
    cache = BlockCache(tmp_path, 1 << 20)
    with pytest.warns(UserWarning, match="cannot be kept in .*No space left.*fetched anew"):
        assert cache.read("ab", 0, 1, 2, lambda: b"first") == b"ir"
    assert cache.read("ab", 1, 1, 2, lambda: b"other") == b"th"


def test_a_limit_that_is_no_number_is_refused(monkeypatch):
    for text in ("much", "0", "-1", "nan"):
        monkeypatch.setenv("CN_CLIP_BLOCKS_GB", text)
        with pytest.raises(UsageError, match=f"CN_CLIP_BLOCKS_GB is '{text}'; give a number"):
            block_cache.default_cache()
