"""``cn-clip eval robustness`` and ``diagnose``, as a user runs them."""

import json
import re
import sys

import pytest
from conftest import make_image
from train.runs import write_start

from cn_clip.cli import run
from cn_clip.install import install_command

CAPTIONS = [
    "一只猫。",
    "一只狗。",
    "自行车",
    "红苹果",
    "蝴蝶",
    "猫头鹰",
    "卡车",
    "吉他",
    "太阳",
    "蜜蜂",
]


@pytest.fixture
def data(tmp_path):
    rows = []
    for n, caption in enumerate(CAPTIONS):
        make_image(n, (40, 40)).save(tmp_path / f"{n}.png")
        rows.append({"image": f"{n}.png", "text": caption})
    rows.append({"image": "0.png", "text": "一只貓"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def cn_clip(capsys, start):
    def command(name, *arguments):
        given = ["eval", name, "--model", str(start), *map(str, arguments)]
        code = run(given)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_robustness_prints_the_loss_of_each_rewrite(cn_clip, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "opencc", None)
    code, out, err = cn_clip("robustness", "--data", f"jsonl:{data}", "--normalize", "nfkc")
    assert code == 0
    assert "11 queries, 10 images" in out
    assert out.count("full-width") == 2  # without and with normalisation
    assert "omitted simplified, traditional, taiwan" in err
    assert install_command("eval") in err


def test_robustness_json_has_every_rewrite(cn_clip, data):
    pytest.importorskip("opencc")
    code, out, err = cn_clip(
        "robustness", "--data", f"jsonl:{data}", "--normalize", "simplified", "--json"
    )
    assert (code, err) == (0, "")
    document = json.loads(out)
    rows = {row["name"]: row for row in document["rewrites"]}
    assert document["queries"] == 11 and document["skipped"] == []
    assert rows["simplified"]["changed"] == 1  # 貓
    assert rows["synonyms"]["changed"] == 4
    assert rows["english"]["rewritten"].keys() == {"r1", "r5", "r10", "mean"}
    normalized = {row["name"]: row for row in document["normalized"]}
    assert normalized["plain"]["changed"] == 1
    assert normalized["traditional"]["changed"] == 1  # the others are restored


def test_diagnose_writes_a_self_contained_report(cn_clip, data, tmp_path):
    page = tmp_path / "out.html"
    code, out, err = cn_clip("diagnose", "--data", f"jsonl:{data}", "--report", page)
    assert (code, err) == (0, "")
    assert str(page) in out
    html = page.read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert addresses and all(each.startswith("data:image/jpeg;base64,") for each in addresses)
    for heading in ("length of the caption", "Hubs", "Similar captions", "Worst misses"):
        assert heading in html
    assert "一只猫。" in html and "<svg" in html


def test_diagnose_compares_two_models_with_intervals(cn_clip, data, start, tmp_path):
    other = write_start(tmp_path / "other", kind="resnet")
    page = tmp_path / "out.html"
    code, out, _ = cn_clip(
        "diagnose", "--data", f"jsonl:{data}", "--compare", other, "--report", page, "--json"
    )
    assert code == 0
    document = json.loads(out)
    first, second = document["models"]
    assert [first["model"], second["model"]] == [str(start), str(other)]
    assert len(document["differences"]) == 8
    for row in document["differences"]:
        assert row["low"] <= row["lead"] <= row["high"]
        assert row["lead"] == pytest.approx(row["first"] - row["second"])
    html = page.read_text(encoding="utf-8")
    assert f"Found by {start}, missed by {other}" in html and f"{start} minus {other}" in html


def test_a_model_compared_with_itself_has_no_lead(cn_clip, data, start):
    code, out, _ = cn_clip("diagnose", "--data", f"jsonl:{data}", "--compare", start, "--json")
    assert code == 0
    document = json.loads(out)
    assert [each["model"] for each in document["models"]] == [str(start)] * 2
    assert all(row["lead"] == row["low"] == row["high"] == 0 for row in document["differences"])


def test_captions_are_escaped(cn_clip, data, tmp_path):
    make_image(99).save(tmp_path / "99.png")
    evil = {"image": "99.png", "text": "<script>alert(1)</script>"}
    with data.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(evil) + "\n")
    page = tmp_path / "out.html"
    assert cn_clip("diagnose", "--data", f"jsonl:{data}", "--report", page)[0] == 0
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html and "&lt;script&gt;" in html


def test_unreadable_images_are_skipped_and_reported(cn_clip, data, tmp_path):
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "4.png").unlink()
    page = tmp_path / "out.html"
    code, out, err = cn_clip("diagnose", "--data", f"jsonl:{data}", "--report", page, "--json")
    assert code == 1
    document = json.loads(out)
    assert (document["images"], document["texts"]) == (8, 9)
    assert len(document["skipped"]) == err.count("cn-clip: skipped:") == 2
    assert "line 4" in err and "line 5" in err and "4.png" in err
    assert "Skipped" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["robustness", "--data", "DATA", "--normalize", "nfkd"], "did you mean nfkc"),
        (["diagnose", "--data", "DATA", "--report", "out.pdf"], "ends in .html"),
        (["diagnose", "--data", "DATA", "--threshold", "2"], "not a cosine"),
        (["diagnose", "--data", "jsonl:nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_usage_is_one_sentence(cn_clip, data, arguments, message):
    given = [f"jsonl:{data}" if each == "DATA" else each for each in arguments]
    code, _, err = cn_clip(*given)
    assert code in (1, 2)
    assert message in err and err.count("\n") == 1


def test_no_readable_image_is_an_error(cn_clip, data, tmp_path):
    for n in range(10):
        (tmp_path / f"{n}.png").write_bytes(b"")
    code, _, err = cn_clip("robustness", "--data", f"jsonl:{data}")
    assert code == 1
    assert "none of the 10 images is readable" in err
