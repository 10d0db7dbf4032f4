"""docs/evaluation.md, run from top to bottom on small files of the schemas it names."""

import base64
import contextlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import encoded, make_image

from cn_clip.cli import run

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COUNT = 12  # images: at least ten predictions


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A folder with photos, a small Flickr30k-CN and a small Crossmodal-3600."""
    for folder in ("photos", "Flickr30k-CN", "MUGE", "xm3600/images"):
        (tmp_path / folder).mkdir(parents=True)
    jpegs = [encoded(make_image(seed), "JPEG") for seed in range(COUNT)]
    rows, tsv, texts, captions = [], [], [], []
    for number, content in enumerate(jpegs):
        text = f"第{number}张图片"
        rows.append({"image": f"{number}.jpg", "text": text, "image_id": number, "text_id": number})
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(content)
        (tmp_path / "xm3600" / "images" / f"k{number}.jpg").write_bytes(content)
        tsv.append(f"{number}\t{base64.b64encode(content).decode()}\n")
        texts.append({"text_id": 100 + number, "text": text, "image_ids": [number]})
        captions.append({"image/key": f"k{number}", "zh": {"caption": [text, "又" + text]}})
    for name, lines in (
        ("photos/pairs.jsonl", rows),
        ("Flickr30k-CN/test_texts.jsonl", texts),
        ("xm3600/captions.jsonl", captions),
    ):
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "Flickr30k-CN" / "test_imgs.tsv").write_text("".join(tsv), encoding="utf-8")
    for kind in ("imgs.tsv", "texts.jsonl"):
        copied = tmp_path / "MUGE" / f"valid_{kind}"
        shutil.copy(tmp_path / "Flickr30k-CN" / f"test_{kind}", copied)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("tiny_vit_b_16")
def test_the_page_runs_and_small_splits_are_refused(downloads, capsys):
    scope, ran, refused = {}, 0, []
    for language, block in FENCE.findall((DOCS / "evaluation.md").read_text(encoding="utf-8")):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block, "docs/evaluation.md", "exec"), scope)
        elif language == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line)
                assert words[0] == "cn-clip"
                code = run(words[1:])
                if {"flickr30k-cn-test", "xm3600-zh"} & set(words):
                    refused.append((code, capsys.readouterr().err))
                else:
                    assert code == 0, line
                ran += 1
    assert ran == 12
    assert scope["recall"].mean_recall == 1 and scope["best"].indexes.shape == (20, 10)
    (first, flickr), (second, crossmodal) = refused
    assert first == second == 1
    assert "1,000 images and 5,000 texts" in flickr and "has 12 images and 12" in flickr
    assert "3,600 images and 7,174 texts" in crossmodal and "has 12 images and 24" in crossmodal


def test_both_languages_hold_the_same_code():
    def code_in(page):
        found = FENCE.findall((DOCS / page).read_text(encoding="utf-8"))
        return [(kind, re.sub(r"(^|[ ]+)# .*$", "", text, flags=re.M)) for kind, text in found]

    assert code_in("evaluation.md") == code_in("zh/evaluation.md")
