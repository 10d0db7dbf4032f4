"""The index of tar shards: built once, in parallel, for all processes; equal to the rows."""

import json
import os
import threading
import warnings

import numpy as np
import pytest
from data.formats import WRITERS, jpeg
from data.test_sources import tar_bytes
from filelock import FileLock

from cn_clip.data.captions import digest, plain
from cn_clip.data.curate import row_keys
from cn_clip.data.loading.loader import Loader, Preparation
from cn_clip.data.sources import row_index, tar, tar_shards
from cn_clip.data.sources.array_file import ArrayFile, mapped, smallest, write_arrays
from cn_clip.data.sources.open import WeightedSource, id_digest, open_mix, open_source
from cn_clip.errors import DataError, UsageError
from cn_clip.train.batches import feature_cache
from cn_clip.train.batches.feature_cache import unique_images


def write_shards(folder, count, pairs=5):
    """Write shards in the format of img2dataset: ids count from 0 in each."""
    for shard in range(count):
        members = []
        for n in range(pairs):
            values = {"key": f"{n:04}", "caption": f"第{shard}片第{n}张图"}
            members += [
                (f"{n:04}.jpg", jpeg(shard * pairs + n)),
                (f"{n:04}.json", json.dumps(values, ensure_ascii=False).encode()),
                (f"{n:04}.txt", values["caption"].encode()),
            ]
        (folder / f"{shard:05}.tar").write_bytes(tar_bytes(members))
    return f"tar:{folder}/*.tar"


def rows_of(source):
    return [source.row(index) for index in range(len(source))]


@pytest.fixture
def built(monkeypatch):
    """The shards that are indexed, by name."""
    names = []
    write = tar._write_index

    def counted(file, state, to, **options):
        names.append(file.short_name)
        write(file, state, to, **options)

    monkeypatch.setattr(tar, "_write_index", counted)
    return names


def odd_members():
    """Samples of every kind: several texts, unreadable, empty, without JSON, with other keys."""
    texts = {"image_id": "7", "texts": [{"text_id": f"t{n}", "text": f"文{n}"} for n in range(3)]}
    return [
        ("a.jpg", jpeg(1)),
        ("a.json", json.dumps(texts).encode()),
        ("a.txt", b"unused"),
        ("b.jpg", jpeg(2)),
        ("b.json", b"{broken"),
        ("c.jpg", jpeg(3)),
        ("c.txt", "猫！".encode()),
        ("d.jpg", jpeg(4)),
        ("d.txt", b"\xff\xfe"),
        ("e.jpg", b""),
        ("e.json", b'{"caption": " ", "image_id": null}'),
        ("f.jpg", jpeg(5)),
        ("f.json", b'{"caption": 5}'),
        ("g.x.jpg", jpeg(6)),
        ("g.y.txt", b"dots"),
        ("c.jpg", jpeg(7)),
        ("c.txt", b"again"),
        ("h.jpg", jpeg(8)),
        ("h.txt", "长".encode() * 70_000),
    ]


def test_what_the_index_knows_is_in_the_rows(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes(odd_members()))
    source = open_source(f"tar:{tmp_path}/a.tar")
    rows = []
    for index in range(len(source)):
        try:
            rows.append(source.row(index))
        except DataError:
            rows.append(None)
    assert source.image_keys(2, 100).tolist() == [
        digest(f"\0{100 + at}") if row is None else digest(f"2\0{row.image_id}")
        for at, row in enumerate(rows)
    ]
    captions = [0 if row is None else digest(plain(row.text) or row.text) for row in rows]
    assert source.captions().tolist() == captions
    assert source.lengths().tolist() == [3, 3, 3, 0, 3, 0, 2, 0, 5, 6, 65535]
    assert [row.image_id for row in (rows[0], rows[8], rows[9])] == ["7", "g", "c#2"]
    assert source.image(6) == b""


def same_images(found, expected):
    assert found.fingerprint == expected.fingerprint
    assert found.first_rows.tolist() == expected.first_rows.tolist()
    assert [rows.tolist() for rows in found.of_rows] == [rows.tolist() for rows in expected.of_rows]


@pytest.mark.parametrize("order", ["random", "stream"])
def test_images_are_those_of_the_rows_and_no_row_is_read(tmp_path, monkeypatch, order):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "00001.tar").write_bytes(tar_bytes(odd_members()))
    uri = write_shards(tmp_path, 3)
    mix = open_mix([f"tar:{tmp_path}/{{00000,odd/00001,00002}}.tar?order={order}", uri])
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "index_of", lambda *_, **__: None)
        expected = unique_images(mix)
    monkeypatch.delattr(tar.Tar, "row")
    same_images(unique_images(mix), expected)
    assert len(expected.first_rows) == 5 + 9 + 5 + 15
    if order == "stream":
        assert expected.of_rows[0].tolist()[:8] == [0, 1, 2, 3, 4, 5, 5, 5]
        assert (np.diff(expected.first_rows[:19, 1]) > 0).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_keys_of_a_source_are_those_of_its_rows(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(row_keys, "_CHUNK", 4)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "00001.tar").write_bytes(tar_bytes(odd_members()))
    write_shards(tmp_path, 2)
    source = open_source(f"tar:{tmp_path}/{{00000,odd/00001,00001}}.tar")
    found = row_keys.keys_of_source(source, workers=workers)
    with monkeypatch.context() as patch:
        patch.setattr(row_keys, "index_of", lambda *_, **__: None)
        expected = row_keys.keys_of_source(source)
    readable = [index for index in range(21) if index not in expected.errors]
    assert found.errors == expected.errors and sorted(found.errors) == [8, 10, 12]
    for index in readable:
        row = source.row(index)
        image, caption = id_digest(source, index, row.image_id), digest(plain(row.text) or row.text)
        assert found.images[index] == expected.images[index] == image
        assert found.captions[index] == expected.captions[index] == caption


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_index_of_many_rows_is_built_once_and_knows_them(
    pictures, tmp_path, monkeypatch, kind, workers
):
    monkeypatch.setattr(row_index, "_MANY", 3)
    monkeypatch.setattr(row_index, "_CHUNK", 2)
    uri = WRITERS[kind](pictures)
    source = open_source(uri)
    rows = [source.row(index) for index in range(4)]
    index = row_index.index_of(source, workers=workers)
    assert index.image_keys(2, 7).tolist() == [digest(f"2\0{row.image_id}") for row in rows]
    assert index.captions().tolist() == [digest(plain(row.text)) for row in rows]
    assert index.lengths().tolist() == [len(row.text) + 1 for row in rows]
    monkeypatch.setattr(row_index, "_write", lambda *_: 1 / 0)  # it is there
    assert row_index.index_of(open_source(uri)).lengths().tolist() == index.lengths().tolist()
    with pytest.raises(ZeroDivisionError):  # another column makes other rows
        row_index.index_of(open_source(f"{uri}?image_id=text"))


def test_unreadable_rows_are_known_to_the_index(pictures, monkeypatch):
    monkeypatch.setattr(row_index, "_MANY", 3)
    uri = WRITERS["jsonl"](pictures)
    lines = (pictures / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    (pictures / "pairs.jsonl").write_text("\n".join([lines[0], "{", *lines[2:]]), encoding="utf-8")
    mix = open_mix([uri])
    found, keys = unique_images(mix), row_keys.keys_of_source(mix[0].source)
    assert list(keys.errors) == [1] and "line 2 is not JSON" in keys.errors[1]
    monkeypatch.setattr(row_index, "_MANY", 100)
    same_images(found, unique_images(mix))


def test_few_rows_and_folders_have_no_index(pictures):
    assert row_index.index_of(open_source(WRITERS["csv"](pictures))) is None
    (pictures / "007.txt").write_text("猫", encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert row_index.index_of(open_source(f"folder:{pictures}")) is None


def test_shards_are_opened_again_without_their_indexes(tmp_path, built):
    uri = write_shards(tmp_path, 3)
    expected = rows_of(open_source(uri))
    assert built == ["00000.tar", "00001.tar", "00002.tar"]
    for index in (tmp_path / ".cache" / "index").glob("*.index"):
        index.unlink()
    source = open_source(uri)
    assert len(source) == 15 and len(built) == 3
    assert source.row(7) == expected[7] and built[3:] == ["00001.tar"]
    assert rows_of(source) == expected and len(built) == 6


def test_only_changed_and_new_shards_are_indexed_again(tmp_path, built):
    uri = write_shards(tmp_path, 3)
    open_source(uri)
    (tmp_path / "00001.tar").write_bytes(tar_bytes([("z.jpg", jpeg(1)), ("z.txt", b"new")]))
    built.clear()
    source = open_source(uri)
    assert built == ["00001.tar"] and len(source) == 11
    assert source.row(5).text == "new"
    (tmp_path / "00003.tar").write_bytes(tar_bytes([("y.jpg", jpeg(1)), ("y.txt", b"newer")]))
    assert open_source(uri).row(11).text == "newer"
    assert built == ["00001.tar", "00003.tar"]


def test_an_older_time_of_a_shard_is_a_change_too(tmp_path, built):
    """Clocks of hosts differ, and old files are copied over new ones."""
    uri = write_shards(tmp_path, 2)
    open_source(uri)
    os.utime(tmp_path / "00001.tar", (1, 1))
    open_source(uri)
    assert built == ["00000.tar", "00001.tar", "00001.tar"]


def test_an_interrupted_build_continues_with_the_next_shard(tmp_path, built):
    uri = write_shards(tmp_path, 4)
    raw = (tmp_path / "00002.tar").read_bytes()
    (tmp_path / "00002.tar").write_bytes(raw[:3000])
    with pytest.raises(DataError, match=r"00002\.tar"):
        open_source(uri)
    (tmp_path / "00002.tar").write_bytes(raw)
    open_source(uri)
    assert built == [f"0000{n}.tar" for n in (0, 1, 2, 3, 2, 2)]  # again for the message


@pytest.mark.parametrize("order", ["random", "stream"])
def test_damaged_shards_are_counted_and_left_out_if_told_to(tmp_path, built, order):
    uri = write_shards(tmp_path, 20)
    for shard in (3, 11):
        path = tmp_path / f"{shard:05}.tar"
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"2 of 20 shards are damaged; .*first: .*00003\.tar"):
        open_source(uri)
    built.clear()
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"2 of 20 shards are left out; .*00003\.tar"):
            source = open_source(f"{uri}?damaged=skip&order={order}")
    texts = [row.text for row in rows_of(source)]
    assert texts == [f"第{s}片第{n}张图" for s in range(20) if s not in (3, 11) for n in range(5)]
    assert [message[:20] for message in source.unmatched()] == [f"{tmp_path}"[:20]] * 2
    assert not built and source.streamed == (order == "stream")
    write_shards(tmp_path, 20)
    assert len(open_source(f"{uri}?damaged=skip")) == 100


def test_shards_that_are_all_damaged_are_an_error(tmp_path):
    uri = write_shards(tmp_path, 2)
    for path in tmp_path.glob("*.tar"):
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="2 of 2 shards are damaged"):
        open_source(f"{uri}?damaged=skip")
    with pytest.raises(UsageError, match=r"damaged of .*: 'keep'.* stop, skip"):
        open_source(f"{uri}?damaged=keep")


def test_processes_build_the_same_index(tmp_path):
    uri = write_shards(tmp_path, 10)
    told = []
    source = open_source(uri, workers=2, on_progress=lambda *done: told.append(done))
    assert told == [(done, 10) for done in range(11)]
    assert [row.text for row in rows_of(source)[:6]] == [
        *(f"第0片第{n}张图" for n in range(5)),
        "第1片第0张图",
    ]


def test_a_process_waits_until_another_has_indexed(tmp_path, monkeypatch, built):
    monkeypatch.setattr(tar_shards, "_PATIENCE", 0.02)
    uri = write_shards(tmp_path, 2)
    open_source(uri)
    [table] = (tmp_path / ".cache" / "index").glob("*.table")
    content = table.read_bytes()
    table.unlink()
    built.clear()
    other = FileLock(table.with_suffix(".lock"))
    other.acquire()
    found = []
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        thread = threading.Thread(target=lambda: found.append(open_source(uri)))
        thread.start()
        thread.join(0.5)
        assert not found
        table.write_bytes(content)
        other.release()
        thread.join()
    assert len(found[0]) == 10 and not built
    assert "waiting until another process has indexed the shards" in str(raised[0].message)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_or_changes_is_skipped_and_counted(tmp_path, workers):
    source = open_source(write_shards(tmp_path, 4))
    (tmp_path / "00001.tar").unlink()
    (tmp_path / "00003.tar").write_bytes(tar_bytes([("z.jpg", jpeg(1)), ("z.txt", b"new")]))
    loader = Loader(
        [WeightedSource(source)], Preparation(32), 8, workers=workers, max_skipped_fraction=1.0
    )
    found = [row.text for batch in loader.batches(0) for row in batch.rows]
    assert sorted(found) == [f"第{shard}片第{n}张图" for shard in (0, 2) for n in range(5)]
    assert (loader.seen, loader.skipped) == (20, 10)
    assert sum("00001.tar cannot be read: No such file" in r for r in loader.reasons) == 5
    assert sum("00003.tar has changed since" in reason for reason in loader.reasons) == 5


def test_a_vanished_shard_ends_a_run_that_allows_no_skipped_pairs(tmp_path):
    source = open_source(write_shards(tmp_path, 4))
    (tmp_path / "00001.tar").unlink()
    loader = Loader([WeightedSource(source)], Preparation(32), 8, workers=0, max_skipped_fraction=0)
    with pytest.raises(DataError, match=r"the first: .*00001\.tar cannot be read"):
        list(loader.batches(0))


def test_an_index_takes_at_most_40_bytes_a_pair(tmp_path):
    uri = write_shards(tmp_path, 1, pairs=2000)
    open_source(uri)
    [index] = (tmp_path / ".cache" / "index").glob("*.index")
    assert index.stat().st_size <= 40 * 2000


# Arrays in a file


def test_arrays_come_back_from_a_file(tmp_path):
    arrays = {
        "a": np.arange(5, dtype=np.uint16),
        "b": np.linspace(0, 1, 6).reshape(2, 3),
        "none": np.empty(0, np.int32),
    }
    write_arrays(tmp_path / "x", arrays, {"名": ["值"]})
    file = ArrayFile(tmp_path / "x")
    assert file.values == {"名": ["值"]} and file.get("c") is None
    for name, array in arrays.items():
        assert file[name].dtype == array.dtype and np.array_equal(file[name], array)
    with pytest.raises(ValueError, match="read-only"):
        file["a"][0] = 1


@pytest.mark.parametrize("cut", [0, 10, 20, 60, 200, 1000])
def test_damaged_arrays_are_refused(tmp_path, cut):
    path = tmp_path / "x"
    write_arrays(path, {"a": np.arange(1000)}, {})
    raw = path.read_bytes()
    for damaged in (raw[:cut], raw[:-cut] or b"", bytes(len(raw)), raw[:30] + b"\xff" + raw[31:]):
        if damaged != raw:
            path.write_bytes(damaged)
            with pytest.raises(DataError, match="cannot be read"):
                mapped(path)


def test_a_replaced_file_is_mapped_again(tmp_path):
    for number in range(3):
        write_arrays(tmp_path / "new", {"a": np.array([number])}, {})
        (tmp_path / "new").replace(tmp_path / "x")
        assert mapped(tmp_path / "x")["a"].tolist() == [number]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([], "uint8"),
        ([0, 255], "uint8"),
        ([256], "uint16"),
        ([-1, 127], "int8"),
        ([-129], "int16"),
        ([1 << 32], "uint64"),
        ([-1, 1 << 31], "int64"),
    ],
)
def test_the_smallest_type_holds_all_values(values, dtype):
    found = smallest(np.array(values, np.int64))
    assert found.dtype == dtype and found.tolist() == values
