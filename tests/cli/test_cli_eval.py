"""``cn-clip eval retrieval``, ``predictions`` and ``protocol`` as a user runs them."""

import json

import pytest
from conftest import GOLDEN
from data.formats import write_jsonl, write_tsv

from cn_clip import weights
from cn_clip.cli import run

EVAL = GOLDEN / "eval"


@pytest.fixture
def cn_clip(capsys, tiny_model, tmp_path):
    """Run a command with a tiny model; return its exit code, stdout and stderr."""
    weights.save_folder(tiny_model, tmp_path / "model")

    def command(*arguments):
        words = [str(argument) for argument in arguments]
        if words[0] != "predictions" and "--images" not in words:
            words += ["--model", str(tmp_path / "model")]
        code = run(["eval", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_retrieval_prints_both_directions_and_json_has_the_same_scores(cn_clip, pictures):
    data = write_jsonl(pictures)
    code, out, err = cn_clip("retrieval", "--data", data)
    assert code == 0 and err == ""
    assert "3 images, 4 texts, 4 pairs" in out
    code, document, _ = cn_clip("retrieval", "--data", data, "--json")
    found = json.loads(document)
    assert code == 0 and found["failed"] == [] and found["out"] == []
    for direction in ("text_to_image", "image_to_text"):
        row = next(x for x in out.splitlines() if x.startswith(direction.replace("_", " ")))
        names = ("r1", "r5", "r10", "mean_recall")
        assert row.split()[3:] == [f"{found[direction][name]:.1f}" for name in names]


def test_retrieval_lists_unreadable_rows_and_fails(cn_clip, pictures):
    data = write_jsonl(pictures)
    (pictures / "008.jpg").unlink()
    code, out, err = cn_clip("retrieval", "--data", data)
    assert code == 1 and "2 images" in out
    assert "pairs.jsonl, line 3" in err and "1 unreadable and excluded from the scores" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no pairs given; give --data"),
        (["--data", "jsonl:a.jsonl", "--truth", "t.jsonl"], "no pairs given; give --data"),
        (["--truth", "t.jsonl"], "no pairs given; give --data"),
        (["--texts", "t.npz", "--data", "jsonl:a.jsonl"], "give both --images and --texts"),
    ],
)
def test_retrieval_names_missing_options(cn_clip, arguments, message):
    code, _, err = cn_clip("retrieval", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


def test_official_files_of_fewer_than_ten_images_are_refused(cn_clip, pictures, tmp_path):
    out = tmp_path / "out"
    code, _, err = cn_clip("retrieval", "--data", write_jsonl(pictures), "--out", out)
    assert code == 2 and "there are 3 images and 4 texts" in err
    assert not out.exists()


def test_predictions_print_the_official_scores(cn_clip, tmp_path):
    official = json.loads((EVAL / "tr_output.json").read_text(encoding="utf-8"))["scoreJson"]
    truth, metrics = EVAL / "texts.jsonl", tmp_path / "m.json"
    words = ("predictions", EVAL / "tr_predictions.jsonl", "--truth", truth)
    code, out, _ = cn_clip(*words, "--out", metrics)
    assert code == 0 and f"{official['r5']:.1f}" in out and "31 queries" in out
    written = json.loads(metrics.read_text(encoding="utf-8"))
    assert written["scoreJson"]["r10"] == pytest.approx(official["r10"])
    code, out, _ = cn_clip(*words, "--json")
    found = json.loads(out)
    assert found["direction"] == "image_to_text" and found["queries"] == 31
    assert found["mean_recall"] == pytest.approx(official["mean_recall"], abs=1e-4)


def test_invalid_predictions_fail_with_one_sentence(cn_clip, tmp_path):
    bad = tmp_path / "p.jsonl"
    bad.write_text('{"text_id": 1, "image_ids": [1]}\n', encoding="utf-8")
    code, _, err = cn_clip("predictions", bad, "--truth", EVAL / "texts.jsonl")
    assert code == 1 and "line 1: text_id '1' has 1 image_ids" in err and err.count("\n") == 1
    code, _, err = cn_clip("predictions", tmp_path / "none.jsonl", "--truth", bad)
    assert code == 1 and "cannot be read" in err


def test_the_list_of_protocols_shows_published_scores(cn_clip):
    code, out, _ = cn_clip("protocol", "--list")
    assert code == 0 and "flickr30k-cn-test" in out and "ViT-H-14 71.2" in out
    assert "none found" in out and "84.9, best of five models" in out
    code, out, _ = cn_clip("protocol", "--list", "--json")
    assert len(json.loads(out)["protocols"]) == 14


def test_a_protocol_prints_measured_and_published_scores(cn_clip, pictures):
    write_tsv(pictures)
    for part in ("imgs.tsv", "texts.jsonl"):
        (pictures / f"train_{part}").rename(pictures / f"valid_{part}")
    code, out, err = cn_clip("protocol", "muge-valid", "--data", pictures)
    assert code == 0 and err == ""
    assert "text to image R@10" in out and "not checked" in out and "image to text" not in out
    code, out, _ = cn_clip("protocol", "muge-valid", "--data", pictures, "--json")
    figures = json.loads(out)["figures"]
    assert [each["measure"] for each in figures] == ["R@1", "R@5", "R@10"]
    assert all(each["published"] is None for each in figures)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no protocol given; see: cn-clip eval protocol --list"),
        (["mnist"], 2, "run: cn-clip eval zeroshot"),
        (["coco-cn-test"], 2, "give --data FOLDER with test_imgs.tsv"),
        (["muge-val"], 2, "did you mean muge-valid"),
    ],
)
def test_a_protocol_names_missing_options(cn_clip, arguments, code, message):
    for word in ("protocol", "--protocol"):
        given, _, err = cn_clip(word, *arguments)
        assert given == code and message in err


def test_retrieval_takes_a_split_of_a_folder(cn_clip, pictures):
    data = write_tsv(pictures)
    _, whole, _ = cn_clip("retrieval", "--data", data, "--json")
    code, split, _ = cn_clip("retrieval", "--data", pictures, "--split", "train", "--json")
    assert code == 0 and json.loads(split) == json.loads(whole)
    code, _, err = cn_clip("retrieval", "--data", pictures, "--split", "test")
    assert code == 1 and "has no split 'test'" in err
