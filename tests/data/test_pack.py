import base64
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data.formats import IMAGES, PAIRS, WRITERS, jpeg, read_pair, write_csv, write_tsv
from filelock import FileLock
from PIL import Image

from cn_clip.data import pack as module
from cn_clip.data.encode import Encoding
from cn_clip.data.pack import pack
from cn_clip.data.sources.open import open_source
from cn_clip.errors import CNClipError, DataError, UsageError


def pairs_of(uri):
    source = open_source(uri)
    read = [read_pair(source, index) for index in range(len(source))]
    return [(pair.image_id, pair.text_id, pair.text, pair.image) for pair in read]


EXPECTED = [(image_id, text_id, text, IMAGES[image_id]) for image_id, text_id, text in PAIRS]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("to", ["tar", "tsv", "lmdb"])
def test_every_target_gives_the_pairs_back(pictures, tmp_path, to, workers):
    done = pack(
        open_source(write_csv(pictures)),
        tmp_path / "out",
        to=to,
        images_per_shard=2,
        workers=workers,
    )
    assert (done.images, done.pairs, done.skipped) == (3, 4, [])
    place = {"tar": "tar:{}/*.tar", "tsv": "tsv:{}/train_imgs.tsv", "lmdb": "lmdb:{}"}[to]
    assert pairs_of(place.format(tmp_path / "out")) == EXPECTED


@pytest.mark.parametrize("kind", WRITERS)
def test_every_source_gives_the_same_pack(pictures, tmp_path, kind):
    pack(open_source(WRITERS[kind](pictures)), tmp_path / "out")
    held = hashlib.sha256((tmp_path / "out" / "00000.tar").read_bytes()).hexdigest()
    pack(open_source(write_csv(pictures)), tmp_path / "again")
    assert hashlib.sha256((tmp_path / "again" / "00000.tar").read_bytes()).hexdigest() == held


def test_the_manifest_counts_and_checks(pictures, tmp_path):
    pack(open_source(write_csv(pictures)), tmp_path / "out", images_per_shard=2)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["images"], manifest["pairs"]) == (3, 4)
    assert [(shard["images"], shard["pairs"]) for shard in manifest["shards"]] == [(2, 3), (1, 1)]
    for shard in manifest["shards"]:
        content = (tmp_path / "out" / shard["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (
            shard["bytes"],
            shard["sha256"],
        )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "00000.tar", "00001.tar", "manifest.json"
    }  # fmt: skip


def test_a_shard_is_what_webdataset_expects(pictures, tmp_path):
    pack(open_source(write_csv(pictures)), tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        names = archive.getnames()
        assert names[:3] == ["00000000.jpg", "00000000.txt", "00000000.json"]
        assert archive.extractfile("00000000.txt").read().decode() == PAIRS[0][2]
        assert archive.extractfile("00000000.jpg").read() == IMAGES["007"]


def test_large_images_are_resized_and_small_ones_kept(pictures, tmp_path):
    (pictures / "008.jpg").write_bytes(jpeg(8, (400, 200)))
    Image.new("RGBA", (300, 300), (9, 9, 9, 90)).save(pictures / "猫.jpg", "PNG")
    pack(open_source(write_csv(pictures)), tmp_path / "out", encoding=Encoding(max_side=100))
    images = {pair[0]: pair[3] for pair in pairs_of(f"{tmp_path}/out/00000.tar")}
    assert images["007"] == IMAGES["007"]
    opened = {name: Image.open(io.BytesIO(content)) for name, content in images.items()}
    assert (opened["008"].size, opened["008"].format) == ((100, 50), "JPEG")
    assert (opened["猫"].size, opened["猫"].format, opened["猫"].mode) == (
        (100, 100),
        "PNG",
        "RGBA",
    )


def test_a_jpeg_of_a_camera_that_holds_a_second_image_is_kept_as_it_is(pictures, tmp_path):
    one, other = (Image.new("RGB", (80, 60), color) for color in ("red", "blue"))
    one.save(pictures / "007.jpg", "MPO", save_all=True, append_images=[other])
    packed = pack(open_source(write_csv(pictures)), tmp_path / "out")
    assert packed.skipped == []
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        kept = archive.extractfile("00000000.jpg").read()
    assert kept == (pictures / "007.jpg").read_bytes()


def test_all_images_can_be_re_encoded(pictures, tmp_path):
    pack(open_source(write_csv(pictures)), tmp_path / "out", encoding=Encoding(format="WEBP"))
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        assert [name for name in archive.getnames() if name.endswith(".webp")] == [
            "00000000.webp", "00000001.webp", "00000002.webp"
        ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_pairs_are_skipped_and_listed(pictures, tmp_path, workers):
    uri = write_csv(pictures)
    (pictures / "007.jpg").write_bytes(b"no picture")
    with (pictures / "pairs.csv").open("a", encoding="utf-8") as stream:
        stream.write("none.jpg,文,010,010\n008.jpg,  ,008,011\n008.jpg,a,b,c,d\n")
    done = pack(open_source(uri), tmp_path / "out", workers=workers)
    assert (done.images, done.pairs) == (2, 2)
    told = "\n".join(done.skipped)
    for sentence in (
        "line 2: its 10 bytes are not an image in a known format",
        "(and 1 more texts of this image)",
        "line 6: no image",
        "line 7: its text is empty",
        "line 8 has 5 fields, its header 4",
    ):
        assert sentence in told
    assert len(done.skipped) == 4
    assert [pair[:3] for pair in pairs_of(f"{tmp_path}/out/00000.tar")] == PAIRS[2:]


def test_pairs_named_for_removal_are_left_out(pictures, tmp_path):
    pack(open_source(write_csv(pictures)), tmp_path / "out", without=np.array([0, 3]))
    assert pairs_of(f"{tmp_path}/out/00000.tar") == EXPECTED[1:3]


@pytest.mark.parametrize("to", ["tsv", "lmdb"])
def test_a_stopped_tsv_or_lmdb_says_that_it_starts_anew(pictures, tmp_path, monkeypatch, to):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, f"write_{to}", full)
    with pytest.raises(CNClipError, match=r"No space left on device; nothing of it stays"):
        pack(open_source(write_csv(pictures)), tmp_path / "out" / "packed", to=to)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_stopped_run_resumes_after_the_last_shard(pictures, tmp_path, monkeypatch):
    source, out = open_source(write_csv(pictures)), tmp_path / "out"
    written = []
    real = module.write_shard

    def failing(path, samples):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path.name)
        real(path, samples)

    monkeypatch.setattr(module, "write_shard", failing)
    with pytest.raises(CNClipError, match=r"No space left on device; finished shards stay"):
        pack(source, out, images_per_shard=1)
    assert sorted(p.name for p in out.glob("*.tar")) == ["00000.tar", "00001.tar"]
    with pytest.raises(UsageError, match="was started from other data or options"):
        pack(source, out, images_per_shard=2)
    monkeypatch.setattr(module, "write_shard", real)
    calls = []
    done = pack(
        source, out, images_per_shard=1, on_progress=lambda *progress: calls.append(progress)
    )
    assert calls == [(2, 3), (3, 3)]
    assert (done.shards, done.pairs) == (3, 4)
    assert pairs_of(f"tar:{out}/*.tar") == EXPECTED


def test_a_run_that_was_stopped_while_it_tidied_up_is_finished(pictures, tmp_path, monkeypatch):
    source, out = open_source(write_csv(pictures)), tmp_path / "out"
    pack(source, tmp_path / "whole", images_per_shard=1)
    real = module.remove

    def stopped(_, names):
        if list(names):
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "remove", stopped)
    with pytest.raises(KeyboardInterrupt):
        pack(source, out, images_per_shard=1)
    monkeypatch.setattr(module, "remove", real)
    (out / "00001.json").unlink()
    calls = []
    pack(source, out, images_per_shard=1, on_progress=lambda *progress: calls.append(progress))
    assert calls == [(3, 3)]  # nothing is packed again
    assert sorted(p.name for p in out.iterdir()) == [
        "00000.tar", "00001.tar", "00002.tar", "manifest.json"
    ]  # fmt: skip
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


def test_existing_files_are_kept_unless_overwrite(pictures, tmp_path):
    source, out = open_source(write_csv(pictures)), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        pack(source, out)
    with pytest.raises(UsageError, match=r"holds mine.txt, not written by pack"):
        pack(source, out, overwrite=True)
    assert (out / "mine.txt").read_text() == "mine"
    (out / "mine.txt").unlink()
    pack(source, out, images_per_shard=1)
    with pytest.raises(UsageError, match="is not empty"):
        pack(source, out, images_per_shard=1)
    pack(source, out, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["00000.tar", "manifest.json"]


def test_a_second_process_is_refused(pictures, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(CNClipError, match="another process"):
        pack(open_source(write_csv(pictures)), tmp_path / "out")


def test_a_source_without_usable_pairs_is_refused(pictures, tmp_path):
    (pictures / "p.csv").write_text("image,text\n007.jpg,\n")
    with pytest.raises(DataError, match=r"has no usable pair; the first: .*line 2"):
        pack(open_source(f"{pictures}/p.csv"), tmp_path / "out")


def test_an_lmdb_grows_with_its_content(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(40):
        Image.effect_noise((800, 800), 90).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("噪声", encoding="utf-8")
    assert pack(open_source(str(folder)), tmp_path / "out", to="lmdb").bytes > 1 << 24
    assert len(pairs_of(f"lmdb:{tmp_path}/out")) == 40


def test_a_killed_worker_is_reported(pictures, tmp_path):
    """In a process of its own: its workers import its main module."""
    script = tmp_path / "kill.py"
    script.write_text(
        "import os, signal\n"
        "from cn_clip.data.sources.folder import Folder\n"
        "from cn_clip.data.pack import pack\n"
        "from pathlib import Path\n"
        "class Deadly(Folder):\n"
        "    def image(self, index):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        f"    pack(Deadly('x', Path({str(pictures)!r})), {str(tmp_path / 'out')!r}, workers=1)\n"
    )
    for image_id in IMAGES:
        (pictures / f"{image_id}.txt").write_text("文", encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert "DataError: a worker died, possibly out of memory" in done.stderr


def test_the_lock_is_released_at_the_end(pictures, tmp_path):
    write_tsv(pictures)
    pack(open_source(f"{pictures}/train_imgs.tsv"), tmp_path / "out")
    assert not Path(tmp_path, "out", ".lock").exists()
    assert os.listdir(tmp_path / "out")


def test_two_files_may_use_the_same_image_ids(pictures, tmp_path):
    """As img2dataset does in every folder: a text must not come to another folder's image."""
    for name, content in (("a", jpeg(1)), ("b", jpeg(2))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(content)
        (tmp_path / name / "0.txt").write_text(f"图片{name}", encoding="utf-8")
    source = open_source(f"folder:{tmp_path}/{{a,b}}")
    done = pack(source, tmp_path / "out")
    assert (done.images, done.pairs) == (2, 2)
    told = [(text, image) for _, _, text, image in pairs_of(f"tar:{tmp_path}/out/*.tar")]
    assert told == [("图片a", jpeg(1)), ("图片b", jpeg(2))]
    for to in ("tsv", "lmdb"):
        with pytest.raises(DataError, match=r"'0' names one image in .*a/0.txt.* and another in"):
            pack(source, tmp_path / to, to=to)


@pytest.mark.parametrize("to", ["tar", "tsv"])
def test_an_image_without_texts_is_kept_where_the_format_can_say_so(tmp_path, to):
    image = base64.urlsafe_b64encode(jpeg(3)).decode()
    (tmp_path / "a_imgs.tsv").write_text(f"1\t{image}\n2\t{image}\n", encoding="utf-8")
    row = {"text_id": 7, "text": "一只猫", "image_ids": [1]}
    (tmp_path / "a_texts.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    source = open_source(f"tsv:{tmp_path / 'a_imgs.tsv'}?unpaired=yes")
    result = pack(source, tmp_path / "out", to=to)
    assert (result.images, result.pairs) == ((1, 1) if to == "tar" else (2, 1))
    assert len(result.skipped) == (1 if to == "tar" else 0)
