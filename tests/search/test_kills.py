"""kill -9 at random moments of indexing, migrating and removing: nothing acknowledged is lost."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback

import pytest
from conftest import TINY, make_model
from search.libraries import embedder, index, opened, photos, problems, same, vectors_of

from cn_clip import weights
from cn_clip.errors import CNClipError
from cn_clip.search.purge import remove_images

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fork")

IMAGES, COPIES, REMOVED = 160, 40, 40


def in_child(function, delay):
    """Run a function in a forked process and kill it after ``delay`` seconds.

    Returns:
        Whether it ended before, and the last number that it reported.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(read)
            function(lambda number: os.write(write, b"%d\n" % number))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read, "rb") as stream:
        reports = stream.read().split()
    _pid, status = os.waitpid(child, 0)
    ended = not os.WIFSIGNALED(status)
    assert not ended or os.waitstatus_to_exitcode(status) == 0
    return ended, int(reports[-1]) if reports else 0


class Campaign:
    """One library after the other: indexed, embedded with another model, and partly emptied."""

    def __init__(self, tmp_path, images=IMAGES):
        self.library, self.album = tmp_path / "library", photos(tmp_path / "album", range(images))
        self.images = images
        for number in range(COPIES):
            shutil.copy(self.album / f"{number}.jpg", self.album / f"copy-{number}.jpg")
        self.expected = {}
        for model in ("tiny", "new"):
            index(tmp_path / model, self.album, model=model)
            self.expected[model] = vectors_of(tmp_path / model)

    def index(self, model, report):
        before = 0 if not (self.library / "library.json").exists() else self.stored()
        index(
            self.library, self.album, model=model,
            on_progress=lambda state: report(before + state.embedded),
            on_migration=lambda state: report(state.done),
        )  # fmt: skip

    def remove(self, report):
        with opened(self.library, writable=True) as folder, folder.writing("library remove"):
            left = {image for (image,) in folder.query("SELECT id FROM images")}
            remove_images(folder, [n for n in range(1, REMOVED + 1) if n in left])

    def stored(self, state="active"):
        with opened(self.library) as folder:
            rows = folder.query("SELECT rows FROM models WHERE state = ?", (state,))
        return rows[0][0] if rows else 0

    def check(self, phase, acknowledged):
        """After a kill: the library opens, and has what was acknowledged, once."""
        try:
            found = vectors_of(self.library)
        except CNClipError:  # killed before the first commit
            assert phase == "tiny" and not acknowledged
            return
        model = "tiny" if phase == "new" and self.stored("building") else None
        if phase == "tiny":
            assert self.stored() >= acknowledged and len(found) == self.stored()
        elif phase == "new":
            assert max(self.stored("building"), self.stored()) >= acknowledged
            assert len(found) == self.images
        for name in (model,) if model else ("tiny", "new"):
            wanted = self.expected[name]
            if same(found, {key: wanted[key] for key in found}):
                break
        else:
            raise AssertionError(f"{phase}: vectors of two models")
        rest = [text for text in problems(self.library) if "not erased yet" not in text]
        assert phase == "remove" or rest in ([], ["vectors-2.f16 belongs to no model"])


def campaign(tmp_path, kills, seed, monkeypatch):
    for module in ("indexing", "migration"):
        monkeypatch.setattr(f"cn_clip.search.{module}.COMMIT_IMAGES", 16)
    assert embedder("tiny").fingerprint != embedder("new").fingerprint  # before the fork
    moments, place, done = random.Random(seed), Campaign(tmp_path), 0
    duration = dict.fromkeys(("tiny", "new", "remove"), 3.0)
    killed_in = dict.fromkeys(duration, 0)
    while done < kills:
        shutil.rmtree(place.library, ignore_errors=True)
        for phase in duration:
            acknowledged = 0
            while True:

                def run(report, phase=phase):
                    place.remove(report) if phase == "remove" else place.index(phase, report)

                since = time.perf_counter()
                ended, reported = in_child(run, moments.uniform(0, duration[phase]))
                acknowledged = max(acknowledged, reported)
                if ended:
                    duration[phase] = 0.8 * min(duration[phase], time.perf_counter() - since)
                    break
                done += 1
                killed_in[phase] += 1
                place.check(phase, acknowledged)
                if killed_in[phase] > kills:  # the machine has become slower
                    duration[phase] *= 1.5
            if phase != "remove":
                assert same(vectors_of(place.library), place.expected[phase])
            assert problems(place.library) == []
        assert len(vectors_of(place.library)) == IMAGES - REMOVED
    return killed_in


def test_a_few_kills(tmp_path, monkeypatch):
    assert sum(campaign(tmp_path, 4, 0, monkeypatch).values()) >= 4


@pytest.mark.full
def test_a_hundred_kills(tmp_path, monkeypatch):
    killed = campaign(tmp_path, 150, 1, monkeypatch)
    print(killed)
    assert killed["tiny"] + killed["new"] >= 100


class CommandCampaign(Campaign):
    """The same by the command ``cn-clip index``, killed from outside."""

    def __init__(self, tmp_path, images):
        super().__init__(tmp_path, images)
        self.models = {name: tmp_path / f"model-{name}" for name in self.expected}
        for name, path in self.models.items():
            path.mkdir()
            weights.save_folder(make_model(TINY["vit"], sum(name.encode())), path)

    def run(self, model, moment):
        """Start the command and kill it ``moment`` seconds later.

        Returns:
            Whether it ended before, and the images that a reader saw right before the kill.
        """
        words = ["index", self.album, "--library", self.library, "--model", self.models[model]]
        with subprocess.Popen(
            [sys.executable, "-m", "cn_clip", *map(str, words), "--device", "cpu", "--json"],
            stdout=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            try:
                output, _unused = process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                acknowledged = self.seen(model)
                os.killpg(process.pid, signal.SIGKILL)
                return False, acknowledged
        assert process.returncode == 0 and json.loads(output)["failed"] == []
        return True, self.seen(model)

    def seen(self, phase):
        """The committed rows of the model that is written."""
        try:
            return max(self.stored("building"), self.stored() if phase == "tiny" else 0)
        except CNClipError:  # not made yet
            return 0


def kill_commands(tmp_path, kills, seed):
    """Kill the command at random moments; return the kills, and those after the first commit."""
    moments, place = random.Random(seed), CommandCampaign(tmp_path, 1500)
    done, writing, duration = 0, 0, dict.fromkeys(place.expected, 30.0)
    while done < kills:
        shutil.rmtree(place.library, ignore_errors=True)
        for phase in place.expected:
            acknowledged = 0
            while True:
                since = time.perf_counter()
                ended, seen = place.run(phase, moments.uniform(0.3, 1) * duration[phase])
                acknowledged = max(acknowledged, seen)
                if ended:
                    duration[phase] = min(duration[phase], time.perf_counter() - since)
                    break
                done, writing = done + 1, writing + (seen > 0)
                place.check(phase, acknowledged)
                duration[phase] *= 1.05  # the machine may have become slower
            assert same(vectors_of(place.library), place.expected[phase])
            assert problems(place.library) == []
    return done, writing


@pytest.mark.full
def test_a_hundred_kills_of_the_command(tmp_path):
    done, writing = kill_commands(tmp_path, 100, 2)
    print(f"{done} kills, {writing} of them after the first commit")
    assert writing >= 20
