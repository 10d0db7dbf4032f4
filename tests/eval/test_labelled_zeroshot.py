"""Zero-shot classification against its definition; the official layout and its errors."""

import json

import numpy as np
import pytest
from conftest import encoded, make_image
from eval.labelled_folder import write_labelled

from cn_clip.embedder import Embedder
from cn_clip.errors import DataError, UnknownNameError, UsageError
from cn_clip.eval.labelled import read_labelled
from cn_clip.eval.metrics.classification import map_11_points
from cn_clip.eval.zeroshot import (
    claim_submission,
    datasets,
    evaluate_zeroshot,
    read_templates,
    submission,
    template_names,
)

TEMPLATES = ["{}", "画面中有{}"]


@pytest.fixture
def embedder(tiny_model):
    return Embedder.from_model(tiny_model)


@pytest.fixture
def root(tmp_path):
    return write_labelled(tmp_path / "set")


def test_scores_follow_the_definition(embedder, root):
    data = read_labelled(root)
    found = evaluate_zeroshot(embedder, data, TEMPLATES, metric="mean-per-class")
    texts = embedder.embed_texts([t.replace("{}", x) for x in "猫狗鸟" for t in TEMPLATES])
    classes = texts.reshape(3, 2, -1).mean(1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    logits = 100 * (embedder.embed_images(data.images) @ classes.T).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-4)
    right = expected.argmax(1) == [0, 0, 1, 1, 2, 2]
    assert found.top1 == found.mean_per_class == found.value == pytest.approx(right.mean())
    assert found.top5 == 1 and found.images == 6
    assert sum(each.count for each in found.confusions) == 6 - right.sum()


def test_the_submission_equals_that_of_the_official_script(embedder, root):
    (root / "index.json").write_text("[5, 0, 1, 2, 3, 4]")
    data = read_labelled(root)
    found = evaluate_zeroshot(embedder, data, ["{}"])
    document = submission(found, data, model="tiny", dataset="x", parameters=7, visual=3)
    (rows,) = document.pop("predictions")
    np.testing.assert_allclose(rows, found.probabilities[[5, 0, 1, 2, 3, 4]], atol=5.1e-7)
    assert document == {
        "model_name": "CN-CLIP-tiny", "dataset_name": "x", "num_trainable_params": 0,
        "num_params": 7, "num_visual_params": 3, "num_backbone_params": 7, "n_shot": 0,
        "rnd_seeds": [123],
    }  # fmt: skip


def test_an_unreadable_image_is_reported_and_prevents_a_submission(embedder, root):
    (root / "test/001/2.jpg").write_bytes(encoded(make_image(), "JPEG")[:300])
    data = read_labelled(root)
    found = evaluate_zeroshot(embedder, data, ["{}"])
    assert found.images == 5 and len(found.probabilities) == 5
    assert "2.jpg is damaged" in found.failed[0]
    with pytest.raises(DataError, match="needs all images"):
        submission(found, data, model="tiny", dataset="x", parameters=7, visual=3)


def test_all_labels_of_an_image_are_read_from_elevaters_list(embedder, root, tmp_path):
    lines = [f"test.zip@images/{n}.jpg {','.join(map(str, {n // 2, n % 3}))}" for n in range(6)]
    (tmp_path / "test_ic.txt").write_text("\n".join(lines))
    data = read_labelled(root, truth=tmp_path / "test_ic.txt")
    assert [set(np.flatnonzero(row)) for row in data.relevant] == [
        {n // 2, n % 3} for n in range(6)
    ]
    found = evaluate_zeroshot(embedder, data, ["{}"], metric="11-point-map")
    assert found.value == map_11_points(found.probabilities, data.relevant)
    assert (
        evaluate_zeroshot(embedder, read_labelled(root), ["{}"], metric="11-point-map").value
        is None
    )


def test_auc_is_of_the_second_class(embedder, tmp_path):
    data = read_labelled(write_labelled(tmp_path / "two", ("好", "坏"), ("0", "1")))
    found = evaluate_zeroshot(embedder, data, ["{}"], metric="roc-auc")
    own, other = found.probabilities[2:, 1], found.probabilities[:2, 1]
    assert found.value == np.mean(own[:, None] > other[None])


def test_folders_are_matched_with_lines_by_number(tmp_path):
    labels, folders = [f"类{n}" for n in range(11)], [str(n) for n in range(11)]
    data = read_labelled(write_labelled(tmp_path / "set", labels, folders))
    assert [int(image.parent.name) for image in data.images] == data.truth.tolist()


def test_duplicate_labels_are_kept_with_a_warning(tmp_path):
    root = write_labelled(tmp_path / "set", ("猫", "狗", "猫"))
    with pytest.warns(UserWarning, match="lines 1 and 3 are both '猫'"):
        assert read_labelled(root).labels == ["猫", "狗", "猫"]


def test_nan_in_an_embedding_is_refused(embedder, root):
    embedder.embed_texts = lambda texts: np.full((len(texts), 32), np.nan, np.float32)
    with pytest.raises(UsageError, match="row 0 of the labels contains NaN"):
        evaluate_zeroshot(embedder, read_labelled(root), ["{}"])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda r: [p.unlink() for p in (r / "test/001").iterdir()], "has no image"),
        (lambda r: (r / "label_cn.txt").write_text("猫\n狗\n", "utf-8"), "folders than labels"),
        (lambda r: (r / "label_cn.txt").write_text("a\nb\nc\nd", "utf-8"), "labels than folders"),
        (lambda r: (r / "label_cn.txt").write_text("猫\n\n狗", "utf-8"), "line 2 is empty"),
        (lambda r: (r / "label_cn.txt").write_text("猫", "utf-8"), "at least two"),
        (lambda r: (r / "label_cn.txt").write_bytes("猫狗".encode("gb18030")), "not UTF-8"),
        (lambda r: (r / "label_cn.txt").unlink(), "label_cn.txt cannot be read"),
        (lambda r: (r / "test").rename(r / "val"), "no folder .*test"),
        (lambda r: (r / "test/002").rename(r / "test/005"), "position of class 2"),
        (lambda r: (r / "index.json").write_text("[0, 1]"), "each of the 6 images once"),
        (lambda r: (r / "index.json").write_text("{"), "index.json is unreadable"),
    ],
)  # fmt: skip
def test_an_invalid_folder_is_refused(root, harm, message):
    harm(root)
    with pytest.raises(DataError, match=message):
        read_labelled(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.jpg 0\n1.jpg x", "line 2"),
        ("0.jpg 7", "class numbers below 3"),
        ("0.jpg 0", "has no line for 1.jpg"),
    ],
)
def test_an_invalid_list_of_labels_is_refused(root, tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_labelled(root, truth=tmp_path / "list.txt")


def test_shipped_templates_are_valid_and_every_dataset_has_some():
    assert 20 <= len(read_templates("general")) <= 40
    for name in template_names():
        templates = read_templates(name)
        assert len(set(templates)) == len(templates)
    known = datasets()
    assert len(known) == 20 and {each.templates for each in known.values()} == {*template_names()}
    metrics = {name: each.metric for name, each in known.items() if each.metric != "accuracy"}
    assert metrics == {
        "caltech-101": "mean-per-class", "oxford-flower-102": "mean-per-class",
        "oxford-iiit-pets": "mean-per-class", "fgvc-aircraft-2013b-variants102": "mean-per-class",
        "voc-2007-classification": "11-point-map", "hateful-memes": "roc-auc",
    }  # fmt: skip


def test_templates_of_a_file_are_read_and_invalid_ones_refused(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("\ufeff一张{}\n\n{}\n", encoding="utf-8")
    assert read_templates(str(file)) == ["一张{}", "{}"]
    for text, message in (("{}\n一张", r"line 2: '一张' has no \{\}"), ("\n", "has no template")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match=message):
            read_templates(str(file))
    with pytest.raises(UnknownNameError, match="did you mean food"):
        read_templates("foods")


def test_the_submission_has_the_official_keys_in_order(embedder, root):
    data = read_labelled(root)
    document = submission(
        evaluate_zeroshot(embedder, data, ["{}"]),
        data,
        model="m",
        dataset="d",
        parameters=1,
        visual=1,
    )
    assert list(json.loads(json.dumps(document))) == [
        "model_name", "dataset_name", "num_trainable_params", "num_params", "num_visual_params",
        "num_backbone_params", "n_shot", "rnd_seeds", "predictions",
    ]  # fmt: skip


def test_only_a_submission_of_this_form_is_replaced(embedder, root, tmp_path):
    data, file = read_labelled(root), tmp_path / "s.json"
    scores = evaluate_zeroshot(embedder, data, ["{}"])
    document = submission(scores, data, model='"猫"', dataset="d", parameters=9, visual=3)
    own = json.dumps(document)
    file.write_text(own)
    assert claim_submission(file) == file
    for other in (
        own[:-1],
        json.dumps(document | {"notes": "mine"}),
        json.dumps({"notes": "mine"} | document),
        json.dumps(document | {"n_shot": 5}),
        json.dumps({"model_name": "CN-CLIP-mine", "predictions": [[[1.0]]]}),
    ):
        file.write_text(other)
        with pytest.raises(UsageError, match="was not written by `cn-clip eval zeroshot`"):
            claim_submission(file)
