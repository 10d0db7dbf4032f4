"""Whether anything matches: against simulated libraries whose answer is known."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, make_model

import cn_clip
from cn_clip.calibration import Calibration, Logistic, probability, write_calibration
from cn_clip.embedder import Embedder
from cn_clip.errors import UsageError
from cn_clip.search.confidence import (
    Confidence,
    Tail,
    background_words,
    calibration_of,
    fit_tail,
    tail_of,
)
from cn_clip.search.query import parse_query

DIM = 16


def units(rng, count, dim=DIM):
    vectors = rng.standard_normal((count, dim))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def calibration(**changes):
    fitted = Calibration(
        "tiny", "f", Logistic(20.0, -8.0), 0.5, 0.9, {"search": None, "labels": None},
        {"images": 500, "texts": 400, "pairs": 500, "non_pairs": 1000}, "d", "2026-01-31",
    )  # fmt: skip
    return replace(fitted, **changes)


@pytest.fixture(scope="module")
def tail():
    rng = np.random.default_rng(0)
    return fit_tail(units(rng, 500), units(rng, 2000))


def test_mini_has_a_calibration_and_so_have_its_other_precisions(tmp_path):
    mini, other = cn_clip.load(), Embedder.from_model(make_model(TINY["vit"]))
    shipped = calibration_of(mini)
    assert shipped is not None and shipped.fingerprint == mini.fingerprint
    derived = SimpleNamespace(name="mini", fingerprint="x", derived_from=mini.fingerprint)
    assert calibration_of(derived) == shipped
    assert calibration_of(other) is None
    write_calibration(calibration(fingerprint=other.fingerprint), tmp_path / "c.json")
    fitted = calibration_of(other, tmp_path / "c.json")
    assert fitted == calibration(fingerprint=other.fingerprint)
    with pytest.raises(UsageError, match="calibration is for"):
        calibration_of(mini, tmp_path / "c.json")


@pytest.mark.parametrize("images", [20, 1_000, 20_000])
def test_a_tenth_of_unrelated_queries_is_accepted_at_any_size_of_the_library(tail, images):
    # The sample of 2,000 predicts a library ten times as large.
    rng = np.random.default_rng(images)
    best = (units(rng, 400) @ units(rng, images).T).max(axis=1)
    confidence = Confidence(tail, images)
    accepted = np.mean([confidence.accepts(cosine) for cosine in best])
    assert abs(accepted - 0.1) < 0.05
    assert abs(np.mean(confidence.chance(best) <= 0.5) - 0.5) < 0.1


def test_the_threshold_rises_with_the_number_of_images_but_stays_below_one(tail):
    sizes = [1, 10, 468, 10_000, 1_000_000, 10**9]
    thresholds = [Confidence(tail, size).threshold for size in sizes]
    assert thresholds == sorted(thresholds) and len(set(thresholds)) == len(sizes)
    assert thresholds[-1] < 1
    chances = [float(Confidence(tail, size).chance(thresholds[2])) for size in sizes]
    assert chances == sorted(chances)


def test_the_chance_at_the_threshold_is_the_fraction_of_false_accepts(tail):
    for images in (1, 30, 10**6):
        for false_accepts in (0.01, 0.1, 0.9):
            confidence = Confidence(tail, images, false_accepts=false_accepts)
            np.testing.assert_allclose(
                confidence.chance(confidence.threshold), false_accepts, rtol=1e-6
            )


def test_the_tail_is_the_fraction_of_the_sample():
    rng = np.random.default_rng(1)
    queries, sample = units(rng, 300), units(rng, 400)
    tail, scores = fit_tail(queries, sample), queries @ sample.T
    for cosine in (-0.4, 0.0, 0.3, 0.5):
        np.testing.assert_allclose(tail.above(cosine), (scores >= cosine).mean(), rtol=0.05)
    np.testing.assert_allclose(tail.above(0.75), (scores >= 0.75).mean(), rtol=0.5)  # few
    for fraction in (0.9, 0.3, 0.01, 1e-4, 1e-9):
        np.testing.assert_allclose(tail.above(tail.cosine(fraction)), fraction, rtol=1e-6)


def test_the_estimate_is_zero_by_chance_and_near_one_beyond_it(tail):
    confidence = Confidence(tail, 1000)
    probabilities = confidence.probability(np.linspace(-1, 1, 201))
    assert np.all(np.diff(probabilities) >= -1e-12)
    assert probabilities[0] == pytest.approx(0, abs=1e-6) and probabilities[-1] > 0.999
    assert confidence.estimated
    assert confidence.probability(np.zeros((2, 3))).shape == (2, 3)


def test_a_calibrated_probability_is_the_posterior_of_one_match_among_the_images(tail):
    fitted = calibration()
    cosines = np.array([0.1, 0.4, 0.7, 1.0])
    pair = probability(fitted.curve, cosines)
    for images in (1, 10, 1000):
        prior = 0.5 / images
        odds = pair / (1 - pair) * prior / (1 - prior)
        confidence = Confidence(tail, images, fitted)
        np.testing.assert_allclose(confidence.probability(cosines), odds / (1 + odds))
        assert not confidence.estimated


def test_simulated_probabilities_are_the_fractions_of_matching_images(tail):
    # Cosines of pairs and non-pairs are normal with one variance: the odds are exactly logistic.
    rng, images, searches = np.random.default_rng(2), 50, 20_000
    deviation, gap = 0.1, 0.4
    scores = rng.normal(0, deviation, (searches, images))
    match = np.zeros(scores.shape, bool)
    match[:, 0] = rng.random(searches) < 0.5
    scores += gap * match
    curve = Logistic(gap / deviation**2, -(gap**2) / 2 / deviation**2)
    predicted = Confidence(tail, images, calibration(curve=curve)).probability(scores)
    for low, high in ((0, 0.05), (0.05, 0.3), (0.3, 0.7), (0.7, 0.95), (0.95, 1)):
        rows = (predicted >= low) & (predicted <= high)
        assert rows.sum() > 100
        assert abs(predicted[rows].mean() - match[rows].mean()) < 0.05


def test_the_threshold_of_a_calibration_moves_with_the_number_of_images(tail):
    fitted = calibration(thresholds={"search": 0.7, "labels": None})
    assert Confidence(tail, 500, fitted).threshold == pytest.approx(0.7)
    smaller, larger = (Confidence(tail, images, fitted) for images in (50, 5000))
    assert smaller.threshold < 0.7 < larger.threshold
    # The chance stays the same while it is small.
    np.testing.assert_allclose(larger.chance(larger.threshold), smaller.chance(smaller.threshold),
                               rtol=0.1)  # fmt: skip
    without = Confidence(tail, 50, calibration())
    assert without.threshold == Confidence(tail, 50).threshold


def test_images_in_a_query_are_compared_with_other_images():
    # Images lie close together and far from texts, as in models with a gap between modalities.
    rng = np.random.default_rng(3)
    images = units(rng, 400) + 3 * np.eye(DIM)[0]
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    words = units(rng, 200)
    text, image, both = (
        Confidence(tail_of(query, words, images), 400).threshold
        for query in (
            parse_query("猫"),
            parse_query(images=["a.jpg"]),
            parse_query("猫 -狗", images=["a.jpg"]),
        )
    )
    others = images[::2] @ images[1::2].T
    assert image > np.quantile(others, 0.99) > text
    assert image != both


def test_a_query_of_several_terms_has_the_null_distribution_of_its_form():
    rng = np.random.default_rng(4)
    words, images = units(rng, 300), units(rng, 1000)
    images += 2 * words.mean(axis=0)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    tail = tail_of(parse_query("2:猫 -狗"), words, images)
    queries = 2 * words[rng.integers(0, 300, 2000)] - words[rng.integers(0, 300, 2000)]
    scores = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ images.T
    np.testing.assert_allclose(tail.cosine(0.01), np.quantile(scores, 0.99), atol=0.02)
    assert tail == tail_of(parse_query("2:红车 -蓝天"), words, images)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_library_of_few_or_equal_images_has_a_threshold(images):
    rng = np.random.default_rng(5)
    words = units(rng, 50)
    for sample in (units(rng, images), np.repeat(words[:1], images, axis=0)):
        for query in (parse_query("猫"), parse_query("猫 -狗"), parse_query(images=["a.jpg"])):
            confidence = Confidence(tail_of(query, words, sample), images)
            assert -1 <= confidence.threshold <= 1
            assert np.isfinite(confidence.probability([-1.0, 0.0, 1.0])).all()


def test_rows_of_missing_images_do_not_count():
    rng = np.random.default_rng(6)
    words, sample = units(rng, 50), units(rng, 40).astype(np.float16)
    gaps = np.zeros((80, DIM), np.float16)
    gaps[::2] = sample
    for query in (parse_query("猫"), parse_query("猫 -狗", images=["a.jpg"])):
        assert tail_of(query, words, gaps) == tail_of(query, words, sample)


def test_an_empty_library_and_a_fraction_out_of_range_are_refused(tail):
    with pytest.raises(UsageError, match="no images"):
        fit_tail(units(np.random.default_rng(0), 5), np.empty((0, DIM)))
    with pytest.raises(UsageError, match="no images"):
        tail_of(parse_query("猫"), units(np.random.default_rng(0), 5), np.zeros((3, DIM)))
    assert Confidence(tail, 0).threshold == Confidence(tail, 1).threshold
    for value in (0, 1, -0.1, float("nan")):
        with pytest.raises(UsageError, match="false_accepts"):
            Confidence(tail, 10, false_accepts=value)


def test_the_tail_can_be_kept_as_numbers(tail):
    again = Tail(tuple(tail.cosines), tuple(tail.fractions), float(tail.exponent))
    assert again == tail and len(tail.cosines) == len(tail.fractions)


def test_the_background_words_are_a_thousand_different_ones():
    words = background_words()
    assert len(words) == len(set(words)) == 1000
    assert all(word == word.strip() and not word.startswith("#") for word in words)
