"""Recall lost by a rewrite, against recall measured separately."""

import numpy as np
import pytest

from cn_clip.eval.metrics.recall import retrieval
from cn_clip.eval.robustness.measure import robustness
from cn_clip.eval.robustness.rewrites import Rewrite


class Letters:
    """Embeds a text as its letter counts."""

    name, dim, logit_scale, fingerprint = "letters", 26, 1.0, "letters"

    def embed_texts(self, texts):
        rows = np.zeros((len(texts), 26), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for letter in text:
                row[ord(letter) - ord("a")] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


TEXTS = ["ab", "abc", "xyz", "xy", "mno", "opq"]


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    noisy = Letters().embed_texts(TEXTS) + rng.normal(0, 0.1, (6, 26)).astype(np.float32)
    return noisy / np.linalg.norm(noisy, axis=1, keepdims=True)


PAIRS = np.array([[0, 0], [1, 1], [2, 2], [3, 3], [4, 4], [5, 5], [0, 1]])


def recall(images, texts):
    return retrieval(images, Letters().embed_texts(texts), PAIRS).text_to_image


def test_the_loss_is_the_difference_of_two_measurements(images):
    def spoiled(text):
        return "zzzzzz" if text.startswith("a") else text

    found = robustness(Letters(), images, TEXTS, PAIRS, [Rewrite("z", "spoiled", spoiled)])
    original, rewritten = recall(images, TEXTS), recall(images, [spoiled(text) for text in TEXTS])
    (row,) = found.results
    assert found.original == original
    assert row.changed == 2
    assert row.loss_overall == pytest.approx(original.mean - rewritten.mean)
    assert row.loss.value == pytest.approx(row.original.mean - row.rewritten.mean)
    assert row.loss.low <= row.loss.value <= row.loss.high
    assert row.example == ("ab", "zzzzzz")
    assert found.normalized == ()


def test_texts_without_an_image_are_not_queries(images):
    rewrite = Rewrite("z", "spoiled", lambda text: "z" + text)
    apart = np.concatenate([PAIRS[:4], PAIRS[5:]])
    found = robustness(Letters(), images, TEXTS, apart, [rewrite])
    whole = retrieval(images, Letters().embed_texts(TEXTS), apart)
    assert found.original == whole.text_to_image
    assert (found.queries, found.results[0].changed) == (5, 5)


def test_a_rewrite_that_changes_nothing_measures_nothing(images):
    (row,) = robustness(Letters(), images, TEXTS, PAIRS, [Rewrite("s", "same", str)]).results
    assert (row.changed, row.loss, row.rewritten, row.loss_overall) == (0, None, None, 0)


def test_a_normalizer_recovers_the_loss_of_full_width(images):
    class Narrow(Letters):
        def embed_texts(self, texts):
            return super().embed_texts([t if t.isascii() else "q" for t in texts])

    wide = Rewrite(
        "wide", "in full width", lambda text: "".join(chr(ord(c) + 0xFEE0) for c in text)
    )
    found = robustness(Narrow(), images, TEXTS, PAIRS, [wide], normalizers=["nfkc"])
    assert found.results[0].loss.value > 0.3
    plain, again = found.normalized
    assert plain.changed == 0  # the original texts are in form NFKC
    assert again.changed == 0  # and so are the wide ones after normalisation
    assert found.normalizers == ("nfkc",)
