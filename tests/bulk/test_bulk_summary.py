"""The summary of manifests saves reading them, and never changes what is found."""

import json
import os
import shutil
from dataclasses import asdict

import pytest
from bulk.runs import plan_in, run_in, write_images

from cn_clip.bulk import shard as module
from cn_clip.bulk import summary
from cn_clip.bulk.shard import planned_shards, run_shard
from cn_clip.bulk.status import status_of
from cn_clip.bulk.store import open_store
from cn_clip.bulk.store.folder import FolderStore
from cn_clip.bulk.verify import verify


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Write a summary of few manifests, too; forget the plans and models of other tests."""
    monkeypatch.setattr(summary, "_WORTH", 1)
    yield
    planned_shards.cache_clear()
    module._embedder.cache_clear()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_checkpoint):
    """A finished run of four shards, one with a quarantine."""
    folder = tmp_path_factory.mktemp("finished")
    images = write_images(folder / "images", 10)
    (images / "0004.jpg").write_bytes(b"no image")
    plan_in(folder / "out", tiny_checkpoint, images, shards_of=3)
    run_in(folder / "out")
    return folder / "out"


@pytest.fixture
def out(tmp_path, finished):
    return shutil.copytree(finished, tmp_path / "out")


class Counting(FolderStore):
    """Notes which manifests are read."""

    def __init__(self, root):
        super().__init__(root)
        self.seen = []

    def read(self, name, start=0, stop=None):
        if name.startswith("manifests/"):
            self.seen.append(int(name[-10:-5]))
        return super().read(name, start, stop)


def found_in(out):
    """Return what status and verify find, and the manifests that they read."""
    store = Counting(out)
    found = asdict(status_of(store)), asdict(verify(store))
    return found, sorted(store.seen)


def summary_of(out):
    return out / ".work" / "manifests.summary"


def test_manifests_are_read_once(out):
    first, seen = found_in(out)
    assert seen == [0, 1, 2, 3]
    assert first[0]["rows_out"] == 9 and first[1]["done"] == 4
    assert found_in(out) == (first, [])
    summary_of(out).unlink()
    assert found_in(out) == (first, [0, 1, 2, 3])


def changed(values, **new):
    return json.dumps(values | new) + "\n"  # with another key, or shard, of the same size


CHANGES = {
    "attempt": lambda values: changed(values, attempt=7),
    "key": lambda values: changed(values, key="0" * 16),
    "model": lambda values: changed(values, model="another"),
    "plan": lambda values: changed(values, plan="another"),
    "shard": lambda values: changed(values, shard=2),
    "counts": lambda values: changed(values, rows_in=2, rows_out=2),
    "files": lambda values: changed(values, files=dict([*values["files"].items()][1:])),
    "bytes": lambda values: json.dumps(values).replace('"bytes": ', '"bytes": 1'),
    "type": lambda values: changed(values, attempt=None),
    "huge": lambda values: changed(values, attempt=1 << 32),
    "text": lambda values: "{",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_manifest_is_judged_as_without_a_summary(out, change):
    sound, _seen = found_in(out)
    path = out / "manifests/00001.json"
    path.write_text(CHANGES[change](json.loads(path.read_text())))
    found, seen = found_in(out)
    assert set(seen) == {1}
    assert found[1]["damages"] == (change != "attempt") and found != sound
    summary_of(out).unlink()
    assert found_in(out)[0] == found


@pytest.mark.parametrize("name", ["img_emb/img_emb_00001.npy", "quarantine/00001.jsonl"])
@pytest.mark.parametrize("is_missing", [False, True])
def test_a_file_that_is_not_as_written_is_found_from_the_summary(out, name, is_missing):
    found_in(out)
    (out / name).unlink() if is_missing else (out / name).write_bytes(b"x")
    (status, found), _seen = found_in(out)
    assert status["done"] == 4 and list(found["damaged"]) == [1]
    assert name in found["damaged"][1] and found["done"] == 3


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "head", "folder"])
def test_a_damaged_summary_is_not_used(out, damage):
    sound, _seen = found_in(out)
    path = summary_of(out)
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        head = content.replace(b'"shards": 4', b'"shards": 9')
        damaged = {"flipped": flipped, "short": content[:-9], "empty": b"", "head": head}
        path.write_bytes(damaged[damage])
    found, seen = found_in(out)
    assert found == sound and set(seen) == {0, 1, 2, 3}


def test_the_summary_of_a_first_plan_serves_with_the_second(out, tmp_path, tiny_checkpoint):
    found_in(out)
    plan_in(out, tiny_checkpoint, write_images(tmp_path / "more", 2), shards_of=3)
    assert run_shard(str(out), 4).rows_out == 2
    (status, found), seen = found_in(out)
    assert (status["done"], found["done"], seen) == (5, 5, [4])


def test_a_discarded_shard_leaves_the_summary(out):
    found_in(out)
    (out / "img_emb/img_emb_00002.npy").unlink()
    assert verify(open_store(str(out)), discard=True).discarded == 1
    (status, found), _seen = found_in(out)
    assert status["done"] == found["done"] == 3 and found["missing"] == [range(2, 3)]


def test_files_are_listed_in_the_order_of_the_disk(tmp_path):
    for number in range(300):
        (tmp_path / f"{number * 7919 % 300:05}.json").touch()
    names = [entry.name for entry in FolderStore(tmp_path).entries("")]
    inodes = [os.stat(tmp_path / name).st_ino for name in names]
    assert inodes == sorted(inodes) and len(names) == 300
