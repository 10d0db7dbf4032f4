import base64
import errno
import json
import os

import pytest
from conftest import make_image
from data.formats import jpeg, write_csv, write_tsv
from PIL import Image

from cn_clip.cache import cache_folder
from cn_clip.cli import run
from cn_clip.data.captions import language_of
from cn_clip.data.curate import check as module
from cn_clip.data.curate.check import check
from cn_clip.data.curate.check_result import PROBLEM_KINDS
from cn_clip.data.shard import write_shard
from cn_clip.data.sources.open import open_source
from cn_clip.data.sources.tar import Sample
from cn_clip.errors import CNClipError


def bad(pictures):
    """Every kind of problem, in a TSV and its texts."""
    write_tsv(pictures)

    def coded(content):
        return base64.b64encode(content).decode()

    like, big = make_image(3, (200, 150)), make_image(3, (400, 300))
    like.save(pictures / "like.png")
    big.save(pictures / "big.png")
    with (pictures / "train_imgs.tsv").open("a", encoding="utf-8") as stream:
        for name in ("like", "big"):
            stream.write(f"{name}\t{coded((pictures / f'{name}.png').read_bytes())}\n")
        stream.write(f"broken\t{coded(jpeg(1)[:200])}\nalone\t{coded(jpeg(1))}\n")
    rows = [
        {"text_id": "001", "text": "同一个编号\ufffd", "image_ids": ["like"]},
        {"text_id": "a", "text": "一只坐着的猫！", "image_ids": ["big"]},
        {"text_id": "b", "text": "一只坐着的猫", "image_ids": ["007"]},
        {"text_id": "c", "text": " ", "image_ids": ["008"]},
        {"text_id": "d", "text": "长" * 60, "image_ids": ["008"]},
        {"text_id": "e", "text": "坏图", "image_ids": ["broken", "none"]},
        {"text_id": "f", "image_ids": ["008"]},
    ]
    with (pictures / "train_texts.jsonl").open("a", encoding="utf-8") as stream:
        stream.write("".join("\n" + json.dumps(row, ensure_ascii=False) for row in rows))
    return open_source(f"{pictures}/train_imgs.tsv")


@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_problem_is_counted_and_named(pictures, workers):
    found = check(bad(pictures), workers=workers)
    assert dict(found.counts) == {
        "row": 1,
        "image": 2,
        "empty": 1,
        "text id": 1,
        "unmatched": 1,
        "long": 1,
        "pair": 1,
        "same caption": 2,
        "same image": 1,
        "small": 3,
        "character": 1,
    }
    assert set(found.counts) == set(PROBLEM_KINDS)
    assert not found.fit
    told = {problem.kind: problem.text for problem in found.problems}
    texts = f"{pictures}/train_texts.jsonl, line"
    assert told["row"].startswith(f"{texts} 11: expected")
    assert told["empty"] == f"{texts} 8: its text is empty"
    assert told["long"] == f"{texts} 9: 62 tokens, 10 are cut"
    assert told["text id"] == f"{texts} 5: its text id is also that of {texts} 1"
    assert told["pair"] == f"{texts} 7: repeats an earlier pair of the same image and text"
    assert told["same image"].startswith((f"{texts} 6: looks like", f"{texts} 5: looks like"))
    assert sum(found.languages.values()) == sum(found.lengths.values()) == 11


def test_a_clean_source_is_fit(pictures, tmp_path):
    found = check(open_source(write_csv(pictures)), threshold=0)
    assert found.fit
    assert (found.pairs, found.images, found.captions) == (4, 3, 4)
    assert len(found.samples) == 3


def test_every_repetition_of_an_image_is_reported(tmp_path):
    """Under ids of their own; plain ones too, by their pixels, and none is compared twice."""
    photo, white = make_image(5, (200, 150)), Image.new("RGB", (90, 90), "white")
    for number in range(6):
        (photo if number % 2 else white).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"第{number}个", encoding="utf-8")
    photo.resize((100, 75)).save(tmp_path / "6.png")
    (tmp_path / "6.txt").write_text("缩小的", encoding="utf-8")
    found = check(open_source(str(tmp_path)))
    told = [p.text for p in found.problems if p.kind == "same image"]
    like = [text.replace(f"{tmp_path}/", "").replace(".txt, line 1", "") for text in told]
    assert like == [f"{n}: looks like {n % 2}" for n in range(2, 6)] + ["6: looks like 1"]
    assert found.counts["same image"] == 5 and found.fit


def test_a_full_disk_is_reported_with_the_remedy(pictures, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "TemporaryFile", full)
    with pytest.raises(CNClipError, match=r"hashes of 3 images in .* with --threshold 0$"):
        check(open_source(write_csv(pictures)))


def test_two_files_may_use_the_same_text_ids(pictures, tmp_path):
    """Rows without a text id go by their number, which starts anew in each file."""
    for name in ("a", "b"):
        row = f"007.jpg,文件{name}里的一句话"
        (pictures / f"{name}.csv").write_text(f"image,text\n{row}\n", encoding="utf-8")
    found = check(open_source(f"csv:{pictures}/{{a,b}}.csv"))
    assert (found.counts["text id"], found.images, found.fit) == (0, 2, True)


@pytest.mark.parametrize(
    ("text", "language"),
    [("一只猫", "Chinese"), ("a cat", "English"), ("iPhone 手机", "mixed"), ("123 😀", "other")],
)
def test_languages_are_detected_by_letters(text, language):
    assert language_of(text) == language


def test_the_command_reports_and_sets_its_exit_code(pictures, tmp_path, capsys):
    bad(pictures)
    page = tmp_path / "page.html"
    source = f"{pictures}/train_imgs.tsv"
    assert run(["data", "check", source, "--report", str(page), "--workers", "0"]) == 1
    assert "images missing or damaged" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text and "data:image/jpeg;base64," in text and 'src="http' not in text
    assert run(["data", "check", source, "--json", "--workers", "0"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["fit"], told["problems"]["image"]) == (False, 2)
    assert run(["data", "check", write_csv(pictures), "--workers", "0"]) == 0
    assert run(["data", "check", "nothing/here"]) == 2


def shards(tmp_path):
    """Two shards with a damaged image, an empty caption and repeated ones."""
    for number in range(2):
        samples = [
            Sample(jpeg(n), ".jpg", f"{number}{n}", [(f"t{n}", f"第{n % 4}句话")]) for n in range(6)
        ]
        samples[2] = Sample(jpeg(2)[:200], ".jpg", "broken", [("t", "坏图")])
        write_shard(tmp_path / f"{number}.tar", samples)
    return f"tar:{tmp_path}/*.tar"


def interrupted_check(source, at):
    """Check until so many rows and images are done."""

    def interrupt(done, total):
        if done >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(open_source(source), on_progress=interrupt)


@pytest.mark.parametrize("at", [6, 12, 18])
def test_an_interrupted_check_does_not_read_finished_shards_again(tmp_path, at):
    source = shards(tmp_path)
    whole = check(open_source(source))
    interrupted_check(source, at)
    first = tmp_path / "0.tar"
    state = first.stat()
    content = first.read_bytes()
    first.write_bytes(content.replace(jpeg(3), bytes(len(jpeg(3)))).replace(
        "第".encode(), "弟".encode()
    ))  # fmt: skip
    os.utime(first, ns=(state.st_atime_ns, state.st_mtime_ns))  # as if it had not changed
    resumed = check(open_source(source))
    assert resumed.captions == whole.captions and resumed.lengths == whole.lengths
    images = [problem.text for problem in resumed.problems if problem.kind == "image"]
    assert len(images) == (2 if at == 18 else 3)  # after 18, the images of the first are done too
    assert not any((cache_folder() / "checks").iterdir())


def test_a_shard_that_changed_after_an_interruption_is_read_again(tmp_path):
    source = shards(tmp_path)
    interrupted_check(source, 18)
    shards(tmp_path)
    os.utime(tmp_path / "0.tar", ns=(1, 1))
    write_shard(tmp_path / "1.tar", [Sample(jpeg(50), ".jpg", "new", [("n", "别的")])])
    changed = check(open_source(source))
    assert changed.pairs == 7 and changed.counts["image"] == 1
