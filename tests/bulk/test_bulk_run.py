"""Runs: each input once, in a shard or its quarantine, whatever ends a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import replace

import numpy as np
import pytest
from bulk.runs import (
    command,
    manifests_in,
    plan_in,
    quarantine_in,
    rows_in,
    run_in,
    write_images,
)
from conftest import cosines
from data.formats import WRITERS
from data.test_index import write_shards

import cn_clip
from cn_clip.bulk import shard as module
from cn_clip.bulk.engines.base import Outcome, Task, attempt
from cn_clip.bulk.plan import existing_plans
from cn_clip.bulk.run import Portion, driving, run
from cn_clip.bulk.shard import planned_shards, run_shard
from cn_clip.bulk.status import status_of
from cn_clip.bulk.store import open_store
from cn_clip.bulk.store.base import BusyError
from cn_clip.bulk.store.folder import FolderStore
from cn_clip.bulk.verify import verify
from cn_clip.cli import run as cli
from cn_clip.data.sources.open import open_source
from cn_clip.embeddings.files import read_embeddings
from cn_clip.errors import CNClipError


@pytest.fixture(autouse=True)
def fresh():
    """Forget the plans and models of other tests, as another process would."""
    yield
    planned_shards.cache_clear()
    module._embedder.cache_clear()


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", 10)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_a_run_holds_the_vectors_of_embed_images(images, out, tiny_checkpoint):
    plan_in(out, tiny_checkpoint, images)
    report = run_in(out)
    assert (report.done, report.failures, report.rows) == (3, 0, 10)
    paths = sorted(images.iterdir())
    rows = rows_in(out)
    assert list(rows) == [str(path) for path in paths]
    expected = cn_clip.load(tiny_checkpoint, device="cpu").embed_images(paths)
    np.testing.assert_allclose(list(rows.values()), expected, atol=1e-6)
    stored = read_embeddings(out, "images")  # what `cn-clip library import` opens
    assert stored.ids == list(rows)
    assert verify(open_store(str(out)), checksums=True).complete
    work = [path.name for path in (out / ".work").rglob("*") if path.is_file()]
    assert work == ["driver-0-of-1.lock"]


@pytest.mark.full
def test_worker_processes_write_what_one_process_writes(images, out, tmp_path, tiny_checkpoint):
    for place, workers in ((out, 2), (tmp_path / "alone", 0)):
        plan_in(place, tiny_checkpoint, images, stored="float16")
        assert run_in(place, workers).done == 3
        planned_shards.cache_clear()
    ours, theirs = rows_in(out), rows_in(tmp_path / "alone")
    assert list(ours) == list(theirs)
    assert cosines(list(ours.values()), list(theirs.values())).min() > 0.999


def test_pairs_have_image_and_text_vectors_in_the_same_rows(pictures, out, tiny_checkpoint):
    plan_in(out, tiny_checkpoint, WRITERS["jsonl"](pictures), shards_of=3, embed="both")
    assert run_in(out).rows == 4
    image, text = rows_in(out), rows_in(out, "text_emb")
    source = open_source(f"jsonl:{pictures}/pairs.jsonl")
    embedder = cn_clip.load(tiny_checkpoint, device="cpu")
    rows = range(len(source))
    assert list(image) == list(text)
    np.testing.assert_allclose(
        list(text.values()), embedder.embed_texts([source.row(n).text for n in rows]), atol=1e-6
    )
    np.testing.assert_allclose(
        list(image.values()), embedder.embed_images([source.image(n) for n in rows]), atol=1e-6
    )


def test_a_done_shard_is_never_computed_again(images, out, tiny_checkpoint, monkeypatch):
    plan_in(out, tiny_checkpoint, images)
    run_in(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    monkeypatch.setattr(module, "_compute", None)
    assert run_in(out).earlier == 3
    assert run_shard(str(out), 1).rows_out == 4
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")} == before


def test_unreadable_missing_and_changed_images_are_in_the_quarantine(images, out, tiny_checkpoint):
    plan_in(out, tiny_checkpoint, images)
    (images / "0001.jpg").write_bytes(b"no image")
    (images / "0002.jpg").unlink()
    bad = images / "0005.jpg"
    status = bad.stat()
    bad.write_bytes(b"x" * status.st_size)
    os.utime(bad, ns=(status.st_atime_ns, status.st_mtime_ns))
    report = run_in(out)
    assert (report.rows, report.quarantined, report.failures) == (7, 3, 0)
    reasons = {line["id"][-8:]: line["reason"] for line in quarantine_in(out)}
    assert "has changed" in reasons["0001.jpg"] and "no such file" in reasons["0002.jpg"]
    assert set(reasons) == {"0001.jpg", "0002.jpg", "0005.jpg"}
    assert [line["input"] for line in quarantine_in(out)] == [1, 2, 1]
    for manifest in manifests_in(out).values():
        assert manifest["rows_in"] == manifest["rows_out"] + manifest["quarantined"]
    assert verify(open_store(str(out)), checksums=True).complete


def test_a_shard_without_any_readable_input_fails_unless_that_is_accepted(
    images, out, tiny_checkpoint
):
    plan_in(out, tiny_checkpoint, images)
    gone = images.with_name("gone")
    images.rename(gone)
    report = run_in(out)
    assert report.failures == 3 and "none of the 4 inputs" in report.failed[0]
    assert not manifests_in(out)
    assert run_in(out, accept_missing=True).quarantined == 10
    assert verify(open_store(str(out))).complete


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_a_tar_that_vanished_or_changed_fails_its_shards_alone(
    out, tmp_path, tiny_checkpoint, change
):
    plan_in(out, tiny_checkpoint, write_shards(tmp_path, 3), shards_of=5)
    path = tmp_path / "00001.tar"
    content = path.read_bytes()
    path.unlink() if change == "gone" else path.write_bytes(content + bytes(1024))
    report = run_in(out)
    assert (report.done, list(report.failed)) == (2, [1])
    assert "00001.tar" in report.failed[1]
    assert cli(["bulk", "status", str(out)]) == 1


def test_another_model_in_the_place_of_the_planned_one_is_refused(
    images, out, tmp_path, tiny_checkpoint
):
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    plan_in(out, model, images)
    from conftest import TINY, make_model

    from cn_clip import weights

    shutil.rmtree(model)
    weights.save_folder(make_model(TINY["vit"], seed=1), model)
    with pytest.raises(CNClipError, match="not the planned one"):
        run_in(out)
    assert not manifests_in(out)


def test_another_version_of_the_package_is_refused(images, out, tiny_checkpoint):
    plan_in(out, tiny_checkpoint, images)
    path = out / "plan_00000.json"
    path.write_text(path.read_text().replace(cn_clip.__version__, "0.0.1"))
    with pytest.raises(CNClipError, match=r"planned with cn_clip 0\.0\.1"):
        run_in(out)
    with pytest.raises(CNClipError, match=r"planned with cn_clip 0\.0\.1"):
        run_shard(str(out), 0)


def test_a_second_driver_is_refused_and_told_who_drives(images, out, tiny_checkpoint, capsys):
    plan_in(out, tiny_checkpoint, images)
    with open_store(str(out)).lock("driver-0-of-1.lock"):
        assert cli(["bulk", "run", str(out), "--workers", "0"]) == 1
        assert str(os.getpid()) in capsys.readouterr().err
        assert cli(["bulk", "status", str(out)]) == 0  # anyone may watch
    assert run_in(out).done == 3


def test_a_shard_is_computed_by_one_process_at_a_time(images, out, tiny_checkpoint):
    plan_in(out, tiny_checkpoint, images)
    with open_store(str(out)).working("00000"), pytest.raises(BusyError):
        run_shard(str(out), 0)
    assert run_shard(str(out), 0).attempt == 1


def test_portions_of_an_array_of_jobs_make_the_whole(images, out, tiny_checkpoint):
    plan_in(out, tiny_checkpoint, images, shards_of=1)
    done = []
    for index in range(3):
        words = ["bulk", "run", str(out), "--workers", "0", "--part", f"{index}/3"]
        assert cli(words) == 0
        done.append(len(manifests_in(out)))
    assert done == [4, 7, 10] and len(rows_in(out)) == 10
    for part in ("3/3", "x", "1", "-1/3", "0/0", "1/", "1/²", "1/2/3"):
        assert cli(["bulk", "run", str(out), "--part", part]) == 2, part


def test_a_full_disk_stops_the_run_and_finished_shards_stay(images, out, tiny_checkpoint):
    resource = pytest.importorskip("resource")
    plan_in(out, tiny_checkpoint, images)
    run_shard(str(out), 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        with pytest.raises(CNClipError, match="could not write"):
            run_in(out, retries=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(manifests_in(out)) == [0]
    assert run_in(out).done == 2 and len(rows_in(out)) == 10


def test_leftovers_of_a_killed_process_are_replaced(images, out, tiny_checkpoint):
    plan_in(out, tiny_checkpoint, images)
    for name in ("img_emb/img_emb_00001.npy", "quarantine/00001.jsonl", ".work/00001/x"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"half")
    found = verify(open_store(str(out)))
    assert found.leftovers == 2 and not found.damages
    assert run_in(out).done == 3
    assert verify(open_store(str(out)), checksums=True).complete
    assert not (out / "quarantine/00001.jsonl").exists()


@pytest.mark.full
def test_two_drivers_at_once_compute_each_shard_once(images, out, tiny_checkpoint):
    """As in a network where a driver is believed dead and is not."""
    plan_in(out, tiny_checkpoint, images, shards_of=1)
    code = (
        "import sys; from cn_clip.bulk.engines.base import Task;"
        "from cn_clip.bulk.engines.local import LocalEngine;"
        "print(len(list(LocalEngine(0)(Task(sys.argv[1]), range(10)))))"
    )
    drivers = [subprocess.Popen([sys.executable, "-c", code, str(out)]) for _each in range(3)]
    assert [driver.wait(60) for driver in drivers] == [0, 0, 0]
    assert len(rows_in(out)) == 10
    assert {each["attempt"] for each in manifests_in(out).values()} == {1}


@pytest.mark.parametrize(
    ("first", "second", "are_apart"),
    [
        ((0, 1), (1, 2), False),
        ((1, 2), (0, 1), False),
        ((0, 2), (1, 2), True),
        ((0, 2), (2, 4), False),
        ((1, 2), (2, 4), True),
        ((1, 2), (1, 3), False),
    ],
)
def test_two_drivers_run_at_once_only_if_no_shard_is_in_both_portions(
    out, first, second, are_apart
):
    shards = [set(range(index, 12, of)) for index, of in (first, second)]
    assert shards[0].isdisjoint(shards[1]) == are_apart
    store = open_store(str(out))
    with driving(store, Portion(*first)):
        refused = pytest.raises(BusyError, match=str(os.getpid()))
        with nullcontext() if are_apart else refused, driving(store, Portion(*second)):
            pass
        note = out / ".work/locks/driver-0-of-1.lock.holder"
        assert note.exists() == (first == (0, 1))
    with driving(store, Portion(*second)):
        pass


def test_the_note_of_a_killed_driver_of_a_portion_excludes_nobody(out):
    store = open_store(str(out))
    with driving(store, Portion(1, 2)):
        pass
    note = out / ".work/locks/driver-1-of-2.lock.holder"
    note.write_text("{}")
    with driving(store):
        assert not note.exists()


def test_resume_is_refused_while_a_portion_is_computed(images, out, tiny_checkpoint, capsys):
    plan_in(out, tiny_checkpoint, images)
    run_in(out)
    (out / "img_emb/img_emb_00000.npy").write_bytes(b"x")
    with driving(open_store(str(out)), Portion(2, 3)):
        for words in (["resume", str(out)], ["verify", str(out), "--discard"], ["run", str(out)]):
            assert cli(["bulk", *words]) == 1
            assert "another process runs" in capsys.readouterr().err
    assert list(manifests_in(out)) == [0, 1, 2]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.full),
        pytest.param(signal.SIGKILL, marks=pytest.mark.full),
    ],
)
def test_an_interrupted_driver_leaves_done_shards_and_no_workers(
    images, out, tiny_checkpoint, number
):
    plan_in(out, tiny_checkpoint, images, shards_of=1)
    driver = subprocess.Popen(
        command("run", out, "--workers", 2), stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not manifests_in(out) and time.monotonic() < deadline:
        time.sleep(0.02)
    driver.send_signal(number)
    assert driver.wait(20) == {signal.SIGKILL: -9}.get(number, 128 + number)
    driver.stderr.close()
    assert manifests_in(out)
    deadline = time.monotonic() + 10
    while _group_lives(driver.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _group_lives(driver.pid)
    assert run_in(out).failures == 0
    assert len(rows_in(out)) == 10 and verify(open_store(str(out)), checksums=True).complete


def _group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.full
def test_a_killed_worker_costs_its_shard_one_more_attempt(images, out, tiny_checkpoint):
    plan_in(out, tiny_checkpoint, images, shards_of=1)
    killed = []

    def kill_once(report):
        notes = out / ".work" / "notes"
        if report.done == 2 and not killed and notes.is_dir():
            for note in notes.glob("*.json"):
                pid = json.loads(note.read_text())["pid"]
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    from cn_clip.bulk.engines.base import Task
    from cn_clip.bulk.engines.local import LocalEngine

    store = open_store(str(out))
    report = run(store, LocalEngine(2), Task(str(out)), on_progress=kill_once)
    assert report.failures == 0 and len(rows_in(out)) == 10
    attempts = [each["attempt"] for each in manifests_in(out).values()]
    assert sum(attempts) - 10 <= len(killed)


def test_resume_computes_damaged_and_missing_shards_again(images, out, tiny_checkpoint, capsys):
    plan_in(out, tiny_checkpoint, images)
    run_in(out)
    before = rows_in(out)
    (out / "img_emb/img_emb_00000.npy").write_bytes(b"x")
    (out / "metadata/metadata_00001.parquet").unlink()
    (out / "manifests/00002.json").write_text("{}")
    (out / "img_emb/img_emb_99999.npy").write_bytes(b"x")
    planned_shards.cache_clear()
    assert cli(["bulk", "verify", str(out), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["damages"], found["done"], found["orphans"]) == (
        3, 0, ["img_emb/img_emb_99999.npy"],
    )  # fmt: skip
    assert cli(["bulk", "resume", str(out), "--workers", "0"]) == 0
    (out / "img_emb/img_emb_99999.npy").unlink()
    after = rows_in(out)
    assert list(after) == list(before)
    assert cosines(list(after.values()), list(before.values())).min() > 0.999
    assert cli(["bulk", "verify", str(out), "--checksums"]) == 0


def test_a_flipped_bit_is_seen_by_checksums_alone(images, out, tiny_checkpoint):
    plan_in(out, tiny_checkpoint, images)
    run_in(out)
    path = out / "img_emb/img_emb_00001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    store = open_store(str(out))
    assert verify(store).complete
    found = verify(store, checksums=True)
    assert list(found.damaged) == [1] and "img_emb_00001.npy" in found.damaged[1]


def test_a_shard_that_ends_while_files_are_listed_is_not_damaged(images, out, tiny_checkpoint):
    plan_in(out, tiny_checkpoint, images)
    run_shard(str(out), 0)

    class Busy(FolderStore):
        def entries(self, folder):
            yield from list(super().entries(folder))
            if folder in ("img_emb", "metadata"):
                run_shard(str(out), 1 if folder == "img_emb" else 2)

    found = verify(Busy(out), discard=True)
    assert (found.damages, found.discarded, found.done) == (0, 0, 1)
    assert verify(open_store(str(out))).complete


def test_status_counts_what_is_done_running_and_failed(images, out, tiny_checkpoint, capsys):
    plan_in(out, tiny_checkpoint, images, shards_of=1)
    for number in range(4):
        run_shard(str(out), number)
    notes = out / ".work" / "notes"
    (notes / "00005.json").write_text(json.dumps({"attempt": 1, "error": None}))
    (notes / "00006.json").write_text(json.dumps({"attempt": 3, "error": "no"}))
    (notes / "00007.json").write_text("damaged")
    for number, ended in enumerate((100, 102, 104, 106)):  # of the store, not of this machine
        os.utime(out / f"manifests/{number:05}.json", (ended, ended))
    assert cli(["bulk", "status", str(out), "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert (values["done"], values["running"], values["failures"]) == (4, 1, 1)
    assert values["rate"] == 0.5 and values["seconds_left"] == 12
    assert values["failed"] == {"6": "no"}


@pytest.mark.parametrize("dies", [False, True])
def test_a_shard_that_fails_in_any_way_is_no_running_one(
    images, out, tiny_checkpoint, monkeypatch, dies
):
    def fail(planned, number, *others):
        raise SystemExit if dies else MemoryError("8 GB")

    def attempts(task, shards):
        for number in shards:
            with suppress(SystemExit):
                yield attempt(task, number)
                continue
            yield Outcome(number, error="its worker died")

    plan_in(out, tiny_checkpoint, images)
    monkeypatch.setattr(module, "_compute", fail)
    report = run(open_store(str(out)), attempts, Task(str(out)))
    assert report.failures == 3
    status = status_of(open_store(str(out)))
    assert (status.running, status.failures) == (0, 3)
    assert set(status.failed.values()) == {"its worker died" if dies else "MemoryError: 8 GB"}


def test_clocks_that_are_apart_change_nothing(images, out, tiny_checkpoint, monkeypatch):
    plan_in(out, tiny_checkpoint, images, shards_of=1)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    run_shard(str(out), 0)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert run_in(out).done == 9 and verify(open_store(str(out)), checksums=True).complete


def test_a_second_plan_is_run_with_the_first(images, out, tiny_checkpoint):
    plan_in(out, tiny_checkpoint, images)
    run_in(out)
    write_images(images.with_name("more"), 3)
    plan_in(out, tiny_checkpoint, images.with_name("more"))
    with pytest.raises(CNClipError, match="no shard 4"):
        run_shard(str(out), 4)
    assert len(existing_plans(open_store(str(out)))) == 2
    assert run_shard(str(out), 3).rows_out == 3 and len(rows_in(out)) == 13
    assert len(read_embeddings(out, "images").ids) == 13


def test_texts_that_are_empty_are_put_aside(out, tmp_path, tiny_checkpoint):
    table = tmp_path / "pairs.jsonl"
    lines = [{"image": "x.jpg", "text": text, "text_id": n} for n, text in enumerate("猫 狗")]
    table.write_text("\n".join(json.dumps(line) for line in lines))
    plan_in(out, tiny_checkpoint, f"jsonl:{table}", embed="texts")
    report = run_in(out)
    assert (report.rows, report.quarantined) == (2, 1)
    assert len(rows_in(out, "text_emb")) == 2


def test_portion_is_checked(images, out, tiny_checkpoint):
    plan_in(out, tiny_checkpoint, images)
    from cn_clip.bulk.engines.base import Task
    from cn_clip.bulk.engines.local import LocalEngine

    with pytest.raises(CNClipError, match="portion"):
        run(open_store(str(out)), LocalEngine(0), Task(str(out)), portion=Portion(2, 2))


def test_a_manifest_of_another_plan_is_damage(images, out, tiny_checkpoint):
    plan_in(out, tiny_checkpoint, images)
    run_in(out)
    first = out / "manifests/00000.json"
    first.write_text(first.read_text().replace(manifests_in(out)[0]["key"], "0" * 16))
    found = verify(open_store(str(out)), discard=True)
    assert list(found.damaged) == [0] and found.discarded == 1 and not first.exists()


def test_a_manifest_of_a_newer_version_is_never_discarded(images, out, tiny_checkpoint, capsys):
    plan_in(out, tiny_checkpoint, images)
    run_in(out)
    (out / "img_emb/img_emb_00000.npy").write_bytes(b"x")
    newer = out / "manifests/00002.json"
    newer.write_text(newer.read_text().replace("bulk-manifest 1", "bulk-manifest 2"))
    for words in (["resume"], ["verify", "--discard"], ["verify"], ["status"]):
        assert cli(["bulk", words[0], str(out), *words[1:]]) == 2
        error = capsys.readouterr().err
        assert "'cn-clip bulk-manifest 2', of a newer cn_clip; update cn_clip" in error
    assert list(manifests_in(out)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (f'"{cn_clip.__version__}"', '"99.0.0"', "planned with cn_clip 99.0.0"),
        ("bulk-plan 1", "bulk-plan 2", "of a newer cn_clip; update cn_clip"),
    ],
)
def test_shards_of_a_plan_of_another_version_are_never_discarded(
    images, out, tiny_checkpoint, capsys, before, after, message
):
    plan_in(out, tiny_checkpoint, images)
    run_in(out)
    (out / "img_emb/img_emb_00000.npy").write_bytes(b"x")
    plan = out / "plan_00000.json"
    plan.write_text(plan.read_text().replace(before, after))
    for words in (["resume", str(out)], ["verify", str(out), "--discard"]):
        assert cli(["bulk", *words]) != 0
        assert message in capsys.readouterr().err
    assert list(manifests_in(out)) == [0, 1, 2]


def test_an_output_of_another_kind_is_bad_usage(tmp_path, capsys):
    for word in ("run", "resume", "status", "verify"):
        assert cli(["bulk", word, str(tmp_path)]) == 2
        assert "holds no plan" in capsys.readouterr().err
    assert cli(["bulk", "status", "https://127.0.0.1:9/x"]) == 2


def test_plans_are_told_apart(images, out, tiny_checkpoint):
    plan = plan_in(out, tiny_checkpoint, images)
    assert replace(plan, digest="") != plan and plan.rows_of(2) == 2


@pytest.mark.parametrize("name", ["rows_out", "attempt", "seconds", "files"])
def test_a_manifest_of_wrong_types_is_counted_as_damaged(images, out, tiny_checkpoint, name):
    plan_in(out, tiny_checkpoint, images, shards_of=4)
    run_in(out)
    path = out / "manifests" / "00000.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {name: None}))
    found = status_of(open_store(str(out)))
    assert found.damaged == 1 and found.rows_out == found.rows - values["rows_out"]
