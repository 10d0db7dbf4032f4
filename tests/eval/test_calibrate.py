"""Calibrations against known probabilities and other computations; invalid files are refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cn_clip.calibration import (
    Calibration,
    Isotonic,
    Logistic,
    check_model,
    probability,
    read_calibration,
    write_calibration,
)
from cn_clip.errors import UsageError
from cn_clip.eval.calibration.fit import (
    PairCosines,
    fit_calibration,
    fit_isotonic,
    fit_logistic,
    halves,
    pair_cosines,
    score_probabilities,
)
from cn_clip.eval.calibration.report import write_report
from cn_clip.eval.calibration.thresholds import (
    TopMatches,
    fit_threshold,
    label_matches,
    search_matches,
    threshold_effect,
)


def drawn(count=20_000, slope=8.0, intercept=-2.0, seed=0):
    """Pairs that match with a known probability."""
    rng = np.random.default_rng(seed)
    cosines = rng.uniform(-0.5, 0.9, count)
    match = rng.random(count) < probability(Logistic(slope, intercept), cosines)
    return PairCosines(cosines, match, np.full(count, 1 / count))


def units(rng, count, dim=16):
    rows = rng.standard_normal((count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def matching(count=200, noise=0.6, seed=0):
    """Images and texts near each other."""
    rng = np.random.default_rng(seed)
    images = units(rng, count)
    texts = images + noise * units(rng, count)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    return images, texts, np.stack([np.arange(count)] * 2, axis=1)


def fitted(**options):
    names = {"model": "tiny", "fingerprint": "f" * 32, "data": "d"}
    return fit_calibration(*matching(), **names, **options)


def test_the_logistic_fit_recovers_the_generating_curve():
    curve = fit_logistic(drawn())
    assert curve.slope == pytest.approx(8, rel=0.05)
    assert curve.intercept == pytest.approx(-2, rel=0.05)


def test_newton_converges_to_zero_gradient():
    scored = drawn(500)
    weights = np.random.default_rng(1).random(500)
    scored = replace(scored, weights=weights / weights.sum())
    curve = fit_logistic(scored)
    some, others = scored.match.sum(), (~scored.match).sum()
    targets = np.where(scored.match, (some + 1) / (some + 2), 1 / (others + 2))  # Platt's
    off = scored.weights * (probability(curve, scored.cosines) - targets)
    assert abs(off.sum()) < 1e-9 and abs((off * scored.cosines).sum()) < 1e-9


def test_separable_data_give_finite_coefficients():
    cosines = np.concatenate([np.linspace(0.5, 0.9, 50), np.linspace(-0.2, 0.2, 50)])
    scored = PairCosines(cosines, cosines > 0.4, np.full(100, 0.01))
    for curve in (fit_logistic(scored), fit_isotonic(scored)):
        shares = probability(curve, cosines)
        assert 0 < shares.min() < 0.05 and 0.95 < shares.max() < 1


def test_pairs_below_non_pairs_are_refused():
    scored = drawn(500)
    scored = replace(scored, match=~scored.match)
    with pytest.raises(UsageError, match="no higher cosines"):
        fit_logistic(scored)


def test_isotonic_is_the_pool_of_adjacent_violators():
    scored = drawn(300, seed=3)
    order = np.argsort(scored.cosines)
    some, others = scored.match.sum(), (~scored.match).sum()
    blocks = []  # one at a time, from the left: value, weight
    for match in scored.match[order]:
        blocks.append([(some + 1) / (some + 2) if match else 1 / (others + 2), 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    expected = np.concatenate([[value] * count for value, count in blocks])
    found = probability(fit_isotonic(scored), scored.cosines[order])
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_the_prior_shifts_the_logit():
    scored, curves = drawn(), []
    for prior in (0.5, 0.1):
        share = np.where(
            scored.match, prior / scored.match.sum(), (1 - prior) / (~scored.match).sum()
        )
        curves.append(fit_logistic(replace(scored, weights=share)))
    assert curves[1].slope == pytest.approx(curves[0].slope, rel=0.05)
    moved = curves[1].intercept - curves[0].intercept
    assert moved == pytest.approx(np.log(0.1 / 0.9), abs=0.1)


def test_calibration_error_of_true_and_of_constant_probabilities():
    scored = drawn()
    true = probability(Logistic(8, -2), scored.cosines)
    assert score_probabilities(true, scored).ece < 0.02
    share = scored.match.mean()
    constant = score_probabilities(np.full(len(true), 0.9), scored)
    assert constant.ece == pytest.approx(0.9 - share)
    assert constant.brier == pytest.approx(np.mean((0.9 - scored.match) ** 2))
    assert len(score_probabilities(true, scored).bins) == 15 and len(constant.bins) == 1


def test_halves_have_no_common_image_or_text():
    rng = np.random.default_rng(0)
    pairs = np.stack([rng.integers(0, 50, 300), rng.integers(0, 40, 300)], axis=1)
    first, second = halves(pairs, seed=1)
    for column in (0, 1):
        assert not set(first[:, column]) & set(second[:, column])
    assert len(set(first[:, 0])) == (len(set(pairs[:, 0])) + 1) // 2
    assert not np.array_equal(first, halves(pairs, seed=2)[0])


def test_non_pairs_are_all_other_combinations():
    images, texts, pairs = matching(30)
    scored = pair_cosines(images, texts, pairs, prior=0.3, seed=0)
    every = images @ texts.T
    np.testing.assert_allclose(np.sort(scored.cosines), np.sort(every.ravel()))
    np.testing.assert_allclose(scored.cosines[scored.match], np.diag(every))
    assert scored.weights[scored.match].sum() == pytest.approx(0.3)


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_search_matches_are_those_of_the_full_matrix(block):
    rng = np.random.default_rng(0)
    queries, gallery = units(rng, 20), units(rng, 30)
    positives = np.unique(rng.integers(0, [18, 30], (40, 2)), axis=0)
    scores = queries @ gallery.T
    true = np.zeros(scores.shape, bool)
    true[tuple(positives.T)] = True
    asking = np.unique(positives[:, 0])
    found = search_matches(queries, gallery, positives, block=block)
    there, without = scores[asking], np.where(true, -np.inf, scores)[asking]
    expected = np.concatenate([there.max(1), without.max(1)])
    np.testing.assert_allclose(found.cosines, expected)
    right = true[asking, there.argmax(1)]
    assert found.correct.tolist() == right.tolist() + [False] * len(asking)
    assert found.has_match.sum() == len(asking)


def test_a_matching_label_is_never_a_wrong_result():
    images, texts, _ = matching(20)
    everything = np.stack(np.divmod(np.arange(400), 20), axis=1)  # each text fits each image
    found = label_matches(images, texts, everything, seed=0)
    assert found.correct.all() and len(found.cosines) == 400


def test_the_threshold_is_the_lowest_that_reaches_the_precision():
    rng = np.random.default_rng(0)
    cosines = np.round(rng.random(200), 2)  # with ties
    right = rng.random(200) < cosines
    matches = TopMatches(cosines, right, np.ones(200, bool))
    found = fit_threshold(matches, 0.8)
    fine = [c for c in np.unique(cosines)
            if right[cosines >= c].mean() >= 0.8 and (cosines >= c).sum() >= 10]  # fmt: skip
    assert found == min(fine)
    assert threshold_effect(matches, found).precision == right[cosines >= found].mean() >= 0.8


def test_there_is_no_threshold_if_none_reaches_the_precision():
    matches = TopMatches(np.linspace(0, 1, 50), np.zeros(50, bool), np.arange(50) < 25)
    assert fit_threshold(matches, 0.5) is None
    effect = threshold_effect(matches, None)
    assert (effect.precision, effect.acceptance, effect.rejection) == (None, 0, 1)


@pytest.mark.parametrize("kind", ["logistic", "isotonic"])
def test_a_calibration_round_trips_through_its_file(tmp_path, kind):
    calibration, held_out = fitted(kind=kind)
    write_calibration(calibration, tmp_path / "c.json")
    assert read_calibration(tmp_path / "c.json") == calibration
    assert held_out.calibrated.ece < 0.1 and calibration.counts["pairs"] == 200
    write_report(calibration, held_out, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<circle") == len(held_out.calibrated.bins) and "http" not in page


def test_the_fit_is_deterministic():
    assert fitted(seed=3) == fitted(seed=3)


def test_a_calibration_of_another_model_is_refused():
    calibration, _ = fitted()
    other = SimpleNamespace(name="other", fingerprint="0" * 32, derived_from=None)
    with pytest.raises(UsageError, match=r"'tiny' .* 'other' .* eval calibrate"):
        check_model(calibration, other)
    check_model(calibration, SimpleNamespace(name="tiny", fingerprint="f" * 32))


def test_a_calibration_of_the_float32_model_is_accepted_for_its_variant_with_a_warning():
    calibration, _ = fitted()
    variant = SimpleNamespace(name="tiny", fingerprint="0" * 32, derived_from="f" * 32)
    with pytest.warns(UserWarning, match="fitted on the float32 model; verify with cn-clip eval"):
        check_model(calibration, variant)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior": 1}, "prior is 1, not between"),
        ({"prior": None}, "prior is None, not a finite number"),
        ({"extra": 1}, "unknown 'extra'"),
        ({"format": "x"}, "format is 'x'"),
        ({"kind": "spline"}, "kind is 'spline'"),
        ({"coefficients": {"slope": -1, "intercept": 0}}, "must be positive"),
        ({"coefficients": {"slope": True, "intercept": 0}}, "slope is True"),
        ({"thresholds": {"search": 0.5}}, "thresholds has no 'labels'"),
        ({"counts": []}, "counts is list"),
        ({"fingerprint": ""}, "fingerprint is ''"),
        (
            {"kind": "isotonic", "coefficients": {"cosines": [0, 0], "probabilities": [0, 1]}},
            "incr",
        ),
        ({"kind": "isotonic", "coefficients": {"cosines": [0], "probabilities": [2]}}, "0 and 1"),
    ],
)
def test_an_invalid_calibration_file_is_refused(tmp_path, change, message):
    path = tmp_path / "c.json"
    write_calibration(fitted()[0], path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=message):
        read_calibration(path)


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"none\.json cannot be read"):
        read_calibration(tmp_path / "none.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(UsageError, match="is not a calibration"):
        read_calibration(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"precision": 1.5}, "precision 1.5"), ({"prior": 0.0}, "prior 0.0")],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        fitted(**options)


def test_nan_and_too_few_pairs_are_named():
    images, texts, pairs = matching(30)
    names = {"model": "tiny", "fingerprint": "f", "data": "d"}
    with pytest.raises(UsageError, match="too few"):
        fit_calibration(images, texts, pairs, **names)
    images[3] = np.nan
    with pytest.raises(UsageError, match="row 3 of the images contains NaN"):
        fit_calibration(images, texts, pairs, **names)


def test_an_isotonic_curve_is_constant_beyond_its_ends():
    curve = Isotonic((0.0, 1.0), (0.2, 0.8))
    np.testing.assert_allclose(probability(curve, [-1, 0, 0.5, 1, 2]), [0.2, 0.2, 0.5, 0.8, 0.8])
    assert isinstance(fitted()[0], Calibration)
