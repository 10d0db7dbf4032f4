"""Is there a match at all? Statistics of a query against a fixed cutoff, on the 468 things.

    python benchmarks/no_match.py                          # fetches the stamps
    python benchmarks/no_match.py --stamps DIR --splits 20 --seed 0
    python benchmarks/no_match.py --stamps DIR --seed 1000 # the splits that choices were made on

Each split draws half of the 426 captions, with their images. Library: the images of one half.
Queries: the captions of that half, which are present, and as many of the other half, which are
absent. *answered* is the share of present queries whose best result is accepted where exactly 10 %
of the absent ones are; the gain over the cutoff has the 95 % interval of the paired bootstrap over
captions, each with its mean over the splits. *fitted* and *false* are the shares of present and
absent queries accepted with the threshold of the fitting half: its captions searched in its images,
with their own images and without.

Then, for libraries of several sizes: the thresholds of the cutoff, which knows one size, and of
``cn_clip.search.confidence``, which corrects for the size, and the calibration error of its
probability that the best result is correct.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from things468 import fetch, on_white, things

import cn_clip
from cn_clip.calibration import Calibration
from cn_clip.eval.calibration.fit import fit_curve, pair_cosines
from cn_clip.eval.metrics.bootstrap import paired_interval
from cn_clip.search.confidence import FALSE_ACCEPTS, Confidence, background_words, fit_tail

RECIPE = Path(__file__).parent.parent / "recipes" / "mini" / "data"
Array = np.ndarray


class Search:
    """Queries (Q, D) in a gallery, and what may be known of it: the background words (B, D)."""

    def __init__(self, queries: Array, gallery: Array, words: Array, hidden: Array | None = None):
        self.scores = queries @ gallery.T
        if hidden is not None:
            self.scores[hidden] = np.nan
        self.words = words @ gallery.T  # (B, G)
        self.nearest = np.sort(queries @ words.T, axis=1)[:, ::-1]  # (Q, B)
        filled = np.where(np.isnan(self.scores), -np.inf, self.scores)
        self.order = np.argsort(-filled, axis=1)
        self.sorted = np.take_along_axis(filled, self.order, axis=1)

    @property
    def top(self) -> Array:
        return self.sorted[:, 0]

    def z(self) -> Array:
        return (self.top - np.nanmean(self.scores, 1)) / np.nanstd(self.scores, 1)

    def robust_z(self) -> Array:
        middle = np.nanmedian(self.scores, 1)
        return (self.top - middle) / np.nanmedian(np.abs(self.scores - middle[:, None]), 1)

    def gap(self, count: int) -> Array:
        return self.top - self.sorted[:, 1 : count + 1].mean(axis=1)

    def hubness(self) -> Array:
        """Each image's cosine in units of its cosines with the words."""
        return np.nanmax((self.scores - self.words.mean(0)) / self.words.std(0), axis=1)

    def reverse(self, count: int = 20) -> Array:
        """The best image's mean cosine with the words that fit it best."""
        best = np.sort(self.words, axis=0)[::-1][:count].mean(axis=0)
        return best[self.order[:, 0]]

    def density(self, count: int) -> Array:
        """The query's mean cosine with the words nearest to it."""
        return self.nearest[:, :count].mean(axis=1)

    def corrected(self, count: int, text: float, image: float) -> Array:
        return self.top - text * self.density(count) - image * self.reverse()


STATISTICS: dict[str, Callable[[Search], Array]] = {
    "cutoff on the cosine": lambda s: s.top,
    "z-score in the library": Search.z,
    "z-score, from median and MAD": Search.robust_z,
    "gap to the second": lambda s: s.gap(1),
    "gap to the next ten": lambda s: s.gap(10),
    "hubness of the image": Search.hubness,
    "reverse: words that fit the image": lambda s: s.top - s.reverse(),
    "density of the query among words": lambda s: s.top - 0.5 * s.density(20),
    "reverse and density": lambda s: s.corrected(10, 0.5, 0.8),
}
CHOICES = [(k, a, b) for k in (5, 10, 20) for a in (0, 0.3, 0.5, 0.7) for b in (0, 0.5, 0.8)]


def threshold(absent: Array) -> float:
    """Return the value that 10 % of the absent queries exceed."""
    return float(np.sort(absent)[int(np.ceil(len(absent) * (1 - FALSE_ACCEPTS))) - 1])


def with_length(search: Search, fit: tuple[Search, Search], lengths: tuple[Array, Array]) -> Array:
    """Return the top less what the text's length explains among the fit's absent queries."""
    own, fitted = lengths
    slope, intercept = np.polyfit(np.log(fitted), fit[1].top, 1)
    return search.top - slope * np.log(own) - intercept


def names(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[0].split(",")[0] for line in lines if line and line[0] != "#"]


def compare(
    images: Array, texts: Array, own: Array, words: Array, lengths: Array, seeds: Sequence[int]
) -> None:
    """Print the table of statistics."""
    accepted: dict[str, Array] = {}
    fitted: dict[str, list[tuple[float, float]]] = {}
    count = np.zeros(len(texts))
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(texts))
        one, two = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
        first, second = np.isin(own, one), np.isin(own, two)
        fit_present = Search(texts[one], images[first], words)
        fit_absent = Search(texts[one], images[first], words, one[:, None] == own[first])
        present = Search(texts[two], images[second], words)
        absent = Search(texts[one], images[second], words)
        count[two] += 1
        scores = {
            name: tuple(map(statistic, (fit_absent, present, absent)))
            for name, statistic in STATISTICS.items()
        }
        fit = (fit_present, fit_absent)
        scores["length of the text"] = tuple(
            with_length(search, fit, (lengths[rows], lengths[one]))
            for search, rows in ((fit_absent, one), (present, two), (absent, one))
        )
        chosen = max(
            CHOICES,
            key=lambda c: np.mean(fit_present.corrected(*c) > threshold(fit_absent.corrected(*c))),
        )
        scores["reverse and density, chosen on the fitting half"] = tuple(
            search.corrected(*chosen) for search in (fit_absent, present, absent)
        )
        for name, (none, yes, no) in scores.items():
            hits = accepted.setdefault(name, np.zeros(len(texts)))
            hits[two] += yes > threshold(no)
            limit = threshold(none)
            fitted.setdefault(name, []).append((np.mean(yes > limit), np.mean(no > limit)))
    used = count > 0
    base = accepted["cutoff on the cosine"][used] / count[used]
    print("| statistic | answered | gain | 95 % interval | fitted | false |")
    print("|---|---:|---:|---|---:|---:|")
    for name, hits in accepted.items():
        ours = hits[used] / count[used]
        gain = paired_interval(ours, base)
        yes, no = np.mean(fitted[name], axis=0)
        print(
            f"| {name} | {ours.mean():.1%} | {100 * gain.value:+.1f} | "
            f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f} | {yes:.1%} | {no:.1%} |"
        )


def sizes(images: Array, texts: Array, own: Array, words: Array, seeds: Sequence[int]) -> None:
    """Print the effect of the library's size on thresholds and probabilities."""
    print("| images | cutoff: answered | false | estimate: answered | false | moved cutoff: "
          "answered | false | error of the calibrated probability | of the estimate |")  # fmt: skip
    print("|---:|" + "---:|" * 8)
    for size in (15, 58, 234):
        rows, errors = [], ([], [])
        for seed in seeds:
            rng = np.random.default_rng(seed)
            order = rng.permutation(len(texts))
            one, two = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
            fit_images = np.flatnonzero(np.isin(own, one))
            hidden = one[:, None] == own[fit_images]
            absent_in_fit = np.where(hidden, -np.inf, texts[one] @ images[fit_images].T).max(axis=1)
            cutoff = threshold(absent_in_fit)
            calibration = calibrated(images[fit_images], texts[one], hidden, cutoff)
            library = rng.permutation(np.flatnonzero(np.isin(own, two)))[:size]
            queries = np.unique(own[library])
            tail = fit_tail(words, images[library])
            estimate = Confidence(tail, len(library))
            fitted = Confidence(tail, len(library), calibration)
            yes, no = texts[queries] @ images[library].T, texts[one] @ images[library].T
            row = []
            for limit in (cutoff, estimate.threshold, fitted.threshold):
                row += [np.mean(yes.max(1) > limit), np.mean(no.max(1) > limit)]
            rows.append(row)
            equal = rng.permutation(len(no))[: len(yes)]
            tops = np.concatenate([yes.max(1), no[equal].max(1)])
            right = np.concatenate([own[library][yes.argmax(1)] == queries, [False] * len(equal)])
            for kept, confidence in zip(errors, (fitted, estimate), strict=True):
                kept.append(np.stack([confidence.probability(tops), right], axis=1))
        cells = [f"{value:.1%}" for value in np.mean(rows, axis=0)]
        cells += [f"{calibration_error(np.concatenate(kept)):.3f}" for kept in errors]
        print(f"| {size} | " + " | ".join(cells) + " |")
    print("\n| images in the sample | in the library | estimate: answered | false |")
    print("|---:|---:|---:|---:|")
    for sampled in (15, 58, 234):
        rows = []
        for seed in seeds:
            rng = np.random.default_rng(seed)
            order = rng.permutation(len(texts))
            one, two = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
            library = images[rng.permutation(np.flatnonzero(np.isin(own, two)))]
            limit = Confidence(fit_tail(words, library[:sampled]), len(library)).threshold
            rows.append([np.mean((texts[row] @ library.T).max(1) > limit) for row in (two, one)])
        yes, no = np.mean(rows, axis=0)
        print(f"| {sampled} | 234 | {yes:.1%} | {no:.1%} |")
    tail = fit_tail(words, images)
    print("\n| images | threshold of the estimate for all things |\n|---:|---:|")
    for size in (100, 468, 1_000, 10_000, 100_000, 1_000_000):
        print(f"| {size:,} | {Confidence(tail, size).threshold:.3f} |")


def calibrated(images: Array, texts: Array, match: Array, cutoff: float) -> Calibration:
    """Return a calibration on pairs, with the cutoff as its threshold for search."""
    pairs = np.argwhere(match)[:, ::-1]
    curve = fit_curve(pair_cosines(images, texts, pairs, prior=0.5, seed=0), "logistic")
    counts = {"images": len(images), "texts": len(texts), "pairs": len(pairs), "non_pairs": 1}
    thresholds = {"search": cutoff, "labels": None}
    day = datetime.date.today().isoformat()
    return Calibration("", "-", curve, 0.5, 0.9, thresholds, counts, "-", day)


def calibration_error(rows: Array, bins: int = 10) -> float:
    """Return the expected calibration error of (R, 2) probabilities and outcomes, in equal bins."""
    parts = np.array_split(rows[np.argsort(rows[:, 0], kind="stable")], bins)
    return sum(len(part) * abs(part[:, 0].mean() - part[:, 1].mean()) for part in parts) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stamps", type=Path, help="folder of the stamps; default: download them")
    parser.add_argument("--model", default="mini", help="anything that cn_clip.load takes")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first split")
    options = parser.parse_args()
    embedder = cn_clip.load(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = things(options.stamps or fetch(Path(scratch)))
        images = embedder.embed_images(on_white(path) for path, _ in pairs).astype(np.float64)
    captions = list(dict.fromkeys(caption for _, caption in pairs))
    own = np.array([captions.index(caption) for _, caption in pairs])
    texts = embedder.embed_texts(captions).astype(np.float64)
    lengths = np.array([len(caption) for caption in captions], np.float64)
    seeds = range(options.seed, options.seed + options.splits)
    vocabulary = list(dict.fromkeys(names(RECIPE / "imagenet.tsv") + names(RECIPE / "things.tsv")))
    backgrounds = {
        "words in the package": list(background_words()),
        "all names that mini was trained on": vocabulary,
    }
    print(f"{embedder.name}: {len(images)} images, {len(captions)} captions, "
          f"splits {seeds[0]} to {seeds[-1]}")  # fmt: skip
    for title, words in backgrounds.items():
        print(f"\nBackground: {len(words)} {title}\n")
        compare(images, texts, own, embedder.embed_texts(words).astype(float), lengths, seeds)
    print("\nSizes of the library, background: words in the package\n")
    background = embedder.embed_texts(background_words()).astype(np.float64)
    sizes(images, texts, own, background, seeds)


if __name__ == "__main__":
    main()
