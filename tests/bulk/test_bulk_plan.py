"""Plans: every input is in one shard, whatever the source; a plan never changes."""

import hashlib
import json
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from bulk.runs import plan_in, request_of, write_images
from data.formats import PAIRS, WRITERS
from data.test_index import write_shards

from cn_clip.bulk import plan as bulk_plan
from cn_clip.bulk.inputs import inputs_of
from cn_clip.bulk.plan import Planned, existing_plans, read_plans
from cn_clip.bulk.planning import claim_output, make_plan
from cn_clip.bulk.store import open_store
from cn_clip.cli import run
from cn_clip.errors import CNClipError, DataError, UsageError


def inputs_in(out):
    """Return the inputs of each shard."""
    store = open_store(str(out))
    shards = []
    for plan in existing_plans(store):
        planned = Planned(store, plan)
        for number in plan.numbers:
            shard = planned.shard(number)
            assert shard.count == plan.rows_of(number)
            lines = planned.lines(shard)
            shards.append(list(inputs_of(lines, shard.skip, shard.count, plan.embed)))
            assert len(shards[-1]) == shard.count
    return shards


@pytest.mark.parametrize("shards_of", [1, 3, 4, 7, 60, 1000])
def test_shards_of_any_size_hold_every_image_of_tar_shards_once(
    tmp_path, tiny_checkpoint, shards_of
):
    uri = write_shards(tmp_path, 12)
    plan = plan_in(tmp_path / "out", tiny_checkpoint, uri, shards_of=shards_of)
    shards = inputs_in(tmp_path / "out")
    assert plan.rows == 60 and [len(s) for s in shards] == [len(s) for s in shards]
    assert all(len(shard) == min(shards_of, 60) for shard in shards[:-1])
    texts = [each.text for shard in shards for each in shard]
    assert texts == [f"第{shard}片第{n}张图" for shard in range(12) for n in range(5)]
    assert len({each.id for shard in shards for each in shard}) == 60


@pytest.mark.parametrize("kind", sorted(WRITERS))
@pytest.mark.parametrize("embed", ["images", "both"])
def test_every_kind_of_source_gives_its_images_or_its_pairs(
    pictures, tmp_path, tiny_checkpoint, kind, embed
):
    uri = WRITERS[kind](pictures)
    plan_in(tmp_path / "out", tiny_checkpoint, uri, shards_of=2, embed=embed)
    inputs = [each for shard in inputs_in(tmp_path / "out") for each in shard]
    assert len({each.id for each in inputs}) == len(inputs)
    texts = sorted(text for _image, _id, text in PAIRS)
    if embed == "both":
        assert sorted(each.text for each in inputs) == texts
    else:
        assert len(inputs) == len({each.image for each in inputs}) == 3
        assert sorted("\n".join(each.text for each in inputs).split("\n")) == texts
    for each in inputs:
        assert each.read()


def test_folders_globs_lists_and_captioned_folders_name_the_same_images(tmp_path, tiny_checkpoint):
    images = write_images(tmp_path / "a", 3)
    (images / "deeper").mkdir()
    (images / "0002.jpg").rename(images / "deeper" / "0002.jpg")
    paths = sorted(images.rglob("*.jpg"))
    for n, path in enumerate(paths):
        path.with_suffix(".txt").write_text(f"一\n{n}")
    names = "\n".join(str(path.relative_to(tmp_path)) for path in paths)
    (tmp_path / "list.txt").write_text(names)
    rows = [{"image": str(path), "image_id": n} for n, path in enumerate(paths)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = (images, tmp_path / "list.txt", tmp_path / "list.jsonl", f"{images}/**/*.jpg")
    for number, source in enumerate((*given, f"folder:{images}")):
        out = tmp_path / f"out{number}"
        plan_in(out, tiny_checkpoint, source)
        (shard,) = inputs_in(out)
        assert sorted(each.label for each in shard) == sorted(map(str, paths)), source
        if number == 4:
            assert [each.text for each in shard] == ["一\n0", "一\n1", "一\n2"]
            assert [each.own_id for each in shard] == ["0000", "0001", "deeper/0002"]
    plan_in(tmp_path / "pairs", tiny_checkpoint, f"folder:{images}", embed="both", shards_of=9)
    (shard,) = inputs_in(tmp_path / "pairs")
    assert [each.text for each in shard] == ["一", "0", "一", "1", "一", "2"]
    assert len({each.id for each in shard}) == 6 and len({each.image for each in shard}) == 3
    with pytest.raises(UsageError, match="without texts"):
        plan_in(tmp_path / "none", tiny_checkpoint, images, embed="both")


def test_more_inputs_are_another_plan_and_the_first_one_stays(tmp_path, tiny_checkpoint):
    images = write_images(tmp_path / "images", 6)
    out = tmp_path / "out"
    first = plan_in(out, tiny_checkpoint, images)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert plan_in(out, tiny_checkpoint, images) is None  # nothing is new
    write_images(images, 9)
    (images / "0000.jpg").touch()  # a changed image is another input
    second = plan_in(out, tiny_checkpoint, images)
    assert (first.shards, first.rows) == (2, 6) and second.first == 2
    assert second.rows == 3 + 6  # write_images wrote all again
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert after.items() >= before.items()
    assert [plan.number for plan in read_plans(open_store(str(out)))] == [0, 1]


def test_an_unchanged_folder_with_one_new_image_is_a_plan_of_one(tmp_path, tiny_checkpoint):
    images = write_images(tmp_path / "images", 3)
    plan_in(tmp_path / "out", tiny_checkpoint, images)
    (images / "new.jpg").write_bytes((images / "0001.jpg").read_bytes())
    assert plan_in(tmp_path / "out", tiny_checkpoint, images).rows == 1


def test_a_plan_of_another_model_or_kind_is_refused(tmp_path, tiny_checkpoint):
    uri = write_shards(tmp_path, 2)
    out = tmp_path / "out"
    plan_in(out, tiny_checkpoint, uri)
    with pytest.raises(UsageError, match="another model"):
        plan_in(out, "mini", uri)
    with pytest.raises(UsageError, match="--embed"):
        plan_in(out, tiny_checkpoint, uri, embed="both")
    with pytest.raises(UsageError, match="--store"):
        plan_in(out, tiny_checkpoint, uri, stored="float16")


def test_a_folder_with_other_files_or_the_input_is_no_output(tmp_path, tiny_checkpoint):
    images = write_images(tmp_path / "images", 2)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for out in (other, images, images / "out", tmp_path):
        with pytest.raises(UsageError):
            claim_output(open_store(str(out)), [str(images)])
    assert sorted(path.name for path in images.iterdir()) == ["0000.jpg", "0001.jpg"]


def test_images_without_texts_of_a_tar_are_planned_if_it_is_said(tmp_path, tiny_checkpoint):
    images = write_images(tmp_path / "images", 5)
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(images, "images")
    uri = f"tar:{tmp_path}/images.tar"
    with pytest.raises(DataError, match="no image with a text"):
        plan_in(tmp_path / "out", tiny_checkpoint, uri)
    plan_in(tmp_path / "out", tiny_checkpoint, f"{uri}?unpaired=yes", shards_of=2)
    inputs = [each for shard in inputs_in(tmp_path / "out") for each in shard]
    assert sorted(each.own_id for each in inputs) == [f"images/{n:04d}" for n in range(5)]
    for each in inputs:
        assert each.read() == (tmp_path / f"{each.own_id}.jpg").read_bytes()


def test_lines_that_share_the_first_half_of_their_digests_are_different_inputs(
    tmp_path, tiny_checkpoint, monkeypatch
):
    class Digest:
        def __init__(self, content=b"", *, digest_size):
            self.whole, self.size = hashlib.sha256(content), digest_size

        def update(self, content):
            self.whole.update(content)

        def digest(self):  # the last byte is often 0 too
            return (bytes(8) + self.whole.digest()[:7] + bytes(1))[: self.size]

    write_images(tmp_path / "a", 3)
    write_images(tmp_path / "a" / "b", 2)
    monkeypatch.setattr(bulk_plan, "hashlib", SimpleNamespace(blake2b=Digest))
    plan_in(tmp_path / "out", tiny_checkpoint, tmp_path / "a" / "b", shards_of=2)
    plan_in(tmp_path / "out", tiny_checkpoint, tmp_path / "a", shards_of=2)
    assert sum(map(len, inputs_in(tmp_path / "out"))) == 5


@pytest.mark.parametrize("sources", [["a", "a"], ["a", "a/0001.jpg"]])
def test_an_input_in_two_sources_is_refused(tmp_path, tiny_checkpoint, sources):
    write_images(tmp_path / "a", 3)
    with pytest.raises(DataError, match=r"000\d.jpg is listed twice"):
        plan_in(tmp_path / "out", tiny_checkpoint, *(tmp_path / each for each in sources))
    assert not list((tmp_path / "out").glob("plan_*.json"))


@pytest.mark.parametrize("damage", ["inputs", "shards.npy", "json"])
def test_a_damaged_plan_is_refused(tmp_path, tiny_checkpoint, damage):
    plan_in(tmp_path / "out", tiny_checkpoint, write_images(tmp_path / "a", 9))
    path = next((tmp_path / "out").glob(f"plan_*{damage}"))
    content = path.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    for bad in (b"", content[: len(content) // 2], flipped):
        path.write_bytes(bad)
        with pytest.raises(CNClipError, match="damaged"):
            inputs_in(tmp_path / "out" if damage == "json" else link(tmp_path))


def link(folder):
    """Return another path of the output, as tables are read once per path."""
    path = folder / f"again{len(list(folder.iterdir()))}"
    path.symlink_to(folder / "out")
    return path


def test_a_planner_loads_the_model_in_a_process_that_ends(tmp_path, tiny_checkpoint):
    write_images(tmp_path / "a", 3)
    words = ["bulk", "plan", str(tmp_path / "a"), "--out", str(tmp_path / "out")]
    words += ["--model", str(tiny_checkpoint), "--device", "cpu"]
    script = (
        "import sys; from cn_clip.cli import run\n"
        f"if __name__ == '__main__': assert run({words}) == 0 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    (plan,) = read_plans(open_store(str(tmp_path / "out")))
    assert plan.rows == 3 and plan.model.dim == 32


def test_a_model_that_the_planner_cannot_load_is_named(tmp_path, capsys):
    write_images(tmp_path / "a", 1)
    words = ["bulk", "plan", str(tmp_path / "a"), "--out", str(tmp_path / "out")]
    assert run([*words, "--model", "vit-b-61"]) == 2
    assert "unknown model 'vit-b-61'; did you mean ViT-B-16" in capsys.readouterr().err


@pytest.mark.parametrize("shards_of", ["0", "-1", "1000001", "x"])
def test_a_size_of_shards_that_cannot_be_is_bad_usage(tmp_path, tiny_checkpoint, shards_of, capsys):
    write_images(tmp_path / "a", 1)
    words = ["bulk", "plan", str(tmp_path / "a"), "--out", str(tmp_path / "out")]
    words += ["--model", str(tiny_checkpoint), "--device", "cpu", "--shards-of", shards_of]
    assert run(words) == 2
    assert not (tmp_path / "out" / "plan_00000.json").exists()


def test_the_lines_of_a_shard_are_read_without_the_others(tmp_path, tiny_checkpoint):
    plan = plan_in(tmp_path / "out", tiny_checkpoint, write_images(tmp_path / "a", 10), shards_of=3)
    planned = Planned(open_store(str(tmp_path / "out")), plan)
    whole = (tmp_path / "out" / f"{plan.stem}.inputs").read_bytes()
    parts = [b"".join(planned.lines(planned.shard(number))) for number in plan.numbers]
    assert b"".join(parts) == whole and len(parts) == 4
    assert len(np.unique([planned.shard(n).key for n in plan.numbers])) == 4
    assert [json.loads(line)[1] for line in parts[0].splitlines()] == [
        str(tmp_path / "a" / f"{n:04}.jpg") for n in range(3)
    ]


def test_only_one_of_two_planners_writes_the_next_plan(tmp_path, tiny_checkpoint):
    images = write_images(tmp_path / "a", 2)
    store = open_store(str(tmp_path / "out"))
    with store.working("planning"), pytest.raises(CNClipError, match="another process"):
        make_plan(store, request_of(tiny_checkpoint, images))


@pytest.mark.parametrize("name", ["inputs", "shards.npy"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_plan_whose_files_are_damaged_is_never_planned_twice(
    tmp_path, tiny_checkpoint, name, damage
):
    out, images = tmp_path / "out", write_images(tmp_path / "a", 3)
    plan_in(out, tiny_checkpoint, images, shards_of=1)
    (file,) = out.glob(f"plan_*.{name}")
    if damage == "missing":
        file.unlink()
    elif name == "inputs":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        np.save(file, np.load(file)[:1])
    with pytest.raises(DataError, match="missing or damaged"):
        plan_in(out, tiny_checkpoint, images, write_images(tmp_path / "b", 1), shards_of=1)


@pytest.mark.parametrize("given", ["", "a\0b", "\ud83d"])
def test_what_is_no_path_is_refused(given):
    with pytest.raises(UsageError, match="--out is "):
        open_store(given)
