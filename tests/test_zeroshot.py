"""Classification against its definition; invalid labels are refused."""

import numpy as np
import pytest
from conftest import make_image

import cn_clip
from cn_clip.calibration import Calibration, Logistic, write_calibration
from cn_clip.embedder import Embedder
from cn_clip.errors import UsageError


@pytest.fixture
def embedder(tiny_model):
    return Embedder.from_model(tiny_model)


IMAGES = [make_image(seed) for seed in range(3)]


def test_probabilities_are_the_softmax_of_scaled_cosines(embedder):
    result = cn_clip.classify(embedder, IMAGES, ["猫", "狗", "火箭"])
    cosines = embedder.embed_images(IMAGES) @ embedder.embed_texts(["猫", "狗", "火箭"]).T
    np.testing.assert_allclose(result.cosines, cosines, atol=1e-6)
    expected = np.exp(embedder.logit_scale * cosines.astype(float))
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-5)
    assert result.probabilities.dtype == result.cosines.dtype == np.float32


def test_templates_are_averaged_as_unit_vectors(embedder):
    result = cn_clip.classify(embedder, IMAGES, ["猫", "狗"], templates=["{}", "一张{}的照片"])
    texts = embedder.embed_texts(["猫", "一张猫的照片", "狗", "一张狗的照片"]).reshape(2, 2, -1)
    mean = texts.mean(1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(result.cosines, embedder.embed_images(IMAGES) @ mean.T, atol=1e-6)


def test_top_is_sorted_and_no_longer_than_the_labels(embedder):
    result = cn_clip.classify(embedder, IMAGES, ["猫", "狗", "火箭"])
    for row, probabilities in zip(result.top(9), result.probabilities, strict=True):
        assert [p for _, p, _ in row] == pytest.approx(sorted(probabilities, reverse=True))
        assert row[0][0] == result.labels[int(probabilities.argmax())]


def test_no_images_give_no_rows(embedder):
    result = cn_clip.classify(embedder, [], ["猫", "狗"])
    assert result.probabilities.shape == (0, 2) and result.top(1) == []


def test_a_repeated_label_is_counted_once_with_a_warning(embedder):
    with pytest.warns(UserWarning, match="'猫' is given more than once"):
        result = cn_clip.classify(embedder, IMAGES, ["猫", " 猫", "狗"])
    assert result.labels == ("猫", "狗")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["猫"], "only the label '猫' given; give at least two"),
        (["猫", "猫 "], "only the label '猫' given; give at least two"),
        ([], "no labels given"),
        (["猫", " "], "label 2 of 2 is empty"),
        ("猫,狗", "give a list"),
        (["猫", 3], "label 3 is not a string"),
    ],
)
def test_invalid_labels_are_refused(embedder, labels, message):
    with pytest.raises(UsageError, match=message):
        cn_clip.classify(embedder, IMAGES, labels)


@pytest.mark.parametrize("templates", [["照片"], [], "一张{}的照片"])
def test_a_template_needs_a_place_for_the_label(embedder, templates):
    with pytest.raises(UsageError, match="template"):
        cn_clip.classify(embedder, IMAGES, ["猫", "狗"], templates=templates)


def calibration_of(fingerprint, threshold):
    counts = dict.fromkeys(("images", "texts", "pairs", "non_pairs"), 100)
    thresholds = {"search": None, "labels": threshold}
    return Calibration(
        "tiny", fingerprint, Logistic(5.0, -1.0), 0.5, 0.9, thresholds, counts, "d", "2025-01-01"
    )


def test_a_calibration_adds_match_probabilities_and_the_no_match_flag(embedder, tmp_path):
    labels = ["猫", "狗", "火箭"]
    best = cn_clip.classify(embedder, IMAGES, labels).cosines.max(axis=1).astype(float)
    threshold = float(np.median(best))  # the middle image is accepted: not below it
    calibration = calibration_of(embedder.fingerprint, threshold)
    write_calibration(calibration, tmp_path / "c.json")
    for given in (calibration, tmp_path / "c.json", str(tmp_path / "c.json")):
        result = cn_clip.classify(embedder, IMAGES, labels, calibration=given)
        expected = 1 / (1 + np.exp(-(5 * result.cosines.astype(float) - 1)))
        np.testing.assert_allclose(result.match_probabilities, expected, rtol=1e-9)
        assert result.none_of_these.tolist() == (best < threshold).tolist()
        assert result.none_of_these.sum() == 1
    without = calibration_of(embedder.fingerprint, None)
    assert cn_clip.classify(embedder, IMAGES, labels, calibration=without).none_of_these is None
    plain = cn_clip.classify(embedder, IMAGES, labels)
    assert plain.match_probabilities is None and plain.none_of_these is None


def test_a_calibration_of_another_model_is_refused(embedder):
    with pytest.raises(UsageError, match="eval calibrate"):
        cn_clip.classify(embedder, IMAGES, ["猫", "狗"], calibration=calibration_of("0" * 32, 0.5))
