"""The official evaluation's files: the same scores, and errors that name the line."""

import json

import numpy as np
import pytest
from conftest import GOLDEN

from cn_clip.embeddings.files import read_embeddings
from cn_clip.errors import DataError, UsageError
from cn_clip.eval.metrics.recall import Recall, retrieval
from cn_clip.eval.official_files import (
    claim_metrics,
    read_predictions,
    read_truth,
    score_predictions,
    write_metrics,
    write_official_files,
)
from cn_clip.eval.retrieval import RetrievalResult, evaluate_features

EVAL = GOLDEN / "eval"


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("truth", ["texts.jsonl", "texts.tr.jsonl"])
@pytest.mark.parametrize(
    ("predictions", "output"),
    [("predictions.jsonl", "output.json"), ("tr_predictions.jsonl", "tr_output.json")],
)
def test_scores_are_the_official_evaluators(tmp_path, truth, predictions, output):
    scored = score_predictions(read_predictions(EVAL / predictions), read_truth(EVAL / truth))
    write_metrics(scored.recall, tmp_path / "ours.json")
    ours = json.loads((tmp_path / "ours.json").read_text(encoding="utf-8"))
    theirs = json.loads((EVAL / output).read_text(encoding="utf-8"))
    assert ours["success"] is theirs["success"] is True
    assert list(ours["scoreJson"]) == list(theirs["scoreJson"])
    assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
    for name, value in theirs["scoreJson"].items():
        assert ours["scoreJson"][name] == pytest.approx(value, abs=1e-4)


def test_ids_may_be_strings_and_extra_queries_are_ignored(tmp_path):
    def named(line):
        ids = [f"图{each}" for each in line["image_ids"]]
        return line | {"text_id": f"{line['text_id']:05}", "image_ids": ids}

    truth = write(tmp_path / "t.jsonl", map(named, lines_of(EVAL / "texts.jsonl")))
    asked = list(map(named, lines_of(EVAL / "predictions.jsonl")))
    more = {"text_id": "别的", "image_ids": asked[0]["image_ids"]}
    found = read_predictions(write(tmp_path / "p.jsonl", [*asked, more]))
    scored = score_predictions(found, read_truth(truth))
    assert (
        scored.recall
        == score_predictions(
            read_predictions(EVAL / "predictions.jsonl"), read_truth(EVAL / "texts.jsonl")
        ).recall
    )
    assert (scored.queries, scored.extra) == (30, 1)


def test_a_text_without_images_counts_as_missed_as_in_the_official_evaluator(tmp_path):
    ten = list(range(10))
    truth = write(
        tmp_path / "t.jsonl",
        [{"text_id": 1, "image_ids": [3]}, {"text_id": 2, "image_ids": []}],
    )
    found = write(tmp_path / "p.jsonl", [{"text_id": t, "image_ids": ten} for t in (1, 2)])
    assert score_predictions(read_predictions(found), read_truth(truth)).recall.r5 == 0.5


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"text_id": 7, "image_ids": list(range(9))}, "line 2: text_id '7' has 9 image_ids"),
        ({"text_id": 7, "image_ids": [*range(9), 3]}, "line 2: text_id '7' predicts '3' twice"),
        (
            {"text_id": 1, "image_ids": list(range(10))},
            r"line 2: text_id '1' is a repetition of .*1",
        ),
        ({"text_id": None, "image_ids": list(range(10))}, "line 2: None is not an id"),
        ({"text_id": 7, "image_ids": [*range(9), 1.5]}, "line 2: 1.5 is not an id"),
        ({"text_id": 7}, 'line 2: expected {"text_id": 1, "image_ids"'),
        ([7], "line 2 is not a JSON object"),
    ],
)
def test_an_invalid_prediction_is_named_by_its_line(tmp_path, line, said):
    first = {"text_id": 1, "image_ids": list(range(10))}
    with pytest.raises(DataError, match=said):
        read_predictions(write(tmp_path / "p.jsonl", [first, line]))


def test_predictions_for_another_split_are_refused(tmp_path):
    truth = read_truth(EVAL / "texts.jsonl")
    lines = lines_of(EVAL / "predictions.jsonl")
    fewer = read_predictions(write(tmp_path / "p.jsonl", lines[1:]))
    with pytest.raises(DataError, match="1 of 30 texts have no predictions, such as text_id '70'"):
        score_predictions(fewer, truth)
    rows = [line | {"image_ids": list(range(10))} for line in lines]
    other = read_predictions(write(tmp_path / "p.jsonl", rows))
    with pytest.raises(DataError, match="no predicted id is in the annotations, such as '0'"):
        score_predictions(other, truth)


def measured(images=13, texts=17, dim=6):
    rng = np.random.default_rng(3)
    i, t = (rng.normal(size=(n, dim)).astype(np.float32) for n in (images, texts))
    i, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (i, t))
    pairs = np.array([(each % images, each) for each in range(texts - 2)] + [(5, 0)])
    names = [f"{each:03}" for each in range(images)]
    captions = [f"文本{each}" for each in range(texts)]
    ids = list(range(texts))
    return RetrievalResult("tiny", retrieval(i, t, pairs), names, ids, captions, i, t, pairs)


def test_the_written_files_give_the_same_scores(tmp_path):
    whole = measured()
    assert len(write_official_files(whole, tmp_path)) == 8
    pairs = read_truth(tmp_path / "texts.jsonl")
    assert sorted(pairs) == sorted(read_truth(tmp_path / "texts.tr.jsonl"))
    for name, recall in (
        ("", whole.recall.text_to_image),
        ("tr_", whole.recall.image_to_text),
    ):
        found = read_predictions(tmp_path / f"{name}predictions.jsonl")
        scored = score_predictions(found, pairs)
        assert scored.recall == recall
        assert scored.extra == (2 if name == "" else 0)
        metrics = json.loads((tmp_path / f"{name}metrics.json").read_text(encoding="utf-8"))
        assert metrics["scoreJson"]["r5"] == pytest.approx(100 * recall.r5)
    again = evaluate_features(
        read_embeddings(tmp_path / "imgs.img_feat.jsonl", "images"),
        read_embeddings(tmp_path / "texts.txt_feat.jsonl", "texts"),
        pairs,
        truth="texts.jsonl",
    )
    assert again.recall == whole.recall
    assert again.image_ids == whole.image_ids and again.text_ids == whole.text_ids


def test_only_whole_metrics_with_the_official_keys_are_replaced(tmp_path):
    file = tmp_path / "m.json"
    for recall in (measured().recall.text_to_image, Recall(0.0, 1.0, 1e-9)):
        write_metrics(recall, file)
        assert claim_metrics(file) == file
    own = file.read_text()
    values = json.loads(own)
    for other in (
        own[:-1],
        own + "\n\n",
        json.dumps(values | {"notes": "mine"}),
        json.dumps(values | {"score": 7.0}),
        json.dumps(values | {"scoreJson": {"f1": 3}}),
        '{"success": true, "score": 3.5}',
        '{"success": true, "score": 3.5, "scoreJson": "mine, which ends alike}}',
    ):
        file.write_text(other)
        with pytest.raises(UsageError, match="was not written by `cn-clip eval predictions`"):
            claim_metrics(file)
        assert file.read_text() == other


def test_fewer_than_ten_images_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="there are 9 images and 17 texts"):
        write_official_files(measured(images=9), tmp_path / "out")
    assert not (tmp_path / "out").exists()
