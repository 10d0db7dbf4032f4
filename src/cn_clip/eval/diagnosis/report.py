"""HTML report of a diagnosis, or of two side by side; images are embedded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

import numpy as np

from cn_clip.errors import CNClipError
from cn_clip.eval.dataset import EvalSet
from cn_clip.eval.diagnosis.measure import BINS, Diagnosis, Difference, Indexes
from cn_clip.eval.images import EmbeddedImages
from cn_clip.html.charts import table
from cn_clip.html.page import data_uri, image_grid, overlaid_histograms, page, thumbnail
from cn_clip.publish import write_text

_MAX_IMAGES = 12  # in a grid
_MAX_MISSES = 20
_MAX_CAPTIONS = 30  # pairs of similar captions
_TOP = 3  # results shown of a missed query
# In addition to the style of html.page.
_STYLE = """<style>
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 2rem; }
.miss { display: grid; grid-template-columns: 14rem 8.5rem 1fr; gap: 1rem; align-items: start;
  border-top: 1px solid var(--line); padding: .75rem 0; }
.miss .found { display: flex; gap: .75rem; flex-wrap: wrap; } .miss figure { width: 8.5rem; }
.small { font-size: .85rem; opacity: .75; }
</style>"""


@dataclass(frozen=True, slots=True)
class _Content:
    """The set's thumbnails, by row of the embedded images, its captions, and its pairs by image and
    by text."""

    thumbnail: Callable[[int], str]
    captions: Sequence[str]
    texts_of: Callable[[int], Indexes]
    images_of: Callable[[int], Indexes]


def write_diagnosis(
    path: Path,
    name: str,
    dataset: EvalSet,
    images: EmbeddedImages,
    diagnoses: Sequence[Diagnosis],
    differences: Sequence[Difference] = (),
) -> None:
    """Write the report atomically.

    Args:
        path: of the report.
        name: of the data, for display.
        dataset: source of the images and captions.
        images: the embedded images.
        diagnoses: of one or two models.
        differences: of the two, from ``compare_models``.
    """
    content = _content(dataset, images)
    models = " and ".join(escape(diagnosis.model) for diagnosis in diagnoses)
    parts = [
        _STYLE,
        f"<h1>{models} on {escape(name)}</h1>",
        f"<p>{len(images.indexes):,} images, {len(diagnoses[0].texts):,} texts, "
        f"{len(images.pairs):,} pairs. Recall is exact; if a query has several matches, one of "
        "them counts.</p>",
        _recalls(diagnoses),
        *([_differences(diagnoses, differences)] if differences else []),
        "<h2>Recall by length of the caption</h2>",
        "<p>Text to image; length in characters.</p>",
        _side_by_side(diagnoses, _lengths),
        "<h2>Cosines</h2>",
        _side_by_side(diagnoses, _cosines),
        "<h2>Hubs: images retrieved too often</h2>",
        "<p>How often an image is in the top results of all texts. A skewness of 0 is a symmetric "
        "distribution; above 1, a few images are in the top results of many texts.</p>",
        _side_by_side(diagnoses, lambda diagnosis: _hubs(diagnosis, content)),
        "<h2>Similar captions of different images</h2>",
        _side_by_side(diagnoses, lambda diagnosis: _similar_captions(diagnosis, content)),
    ]
    if len(diagnoses) == 2:
        first, second = diagnoses
        parts += [
            f"<h2>Found by {escape(first.model)}, missed by {escape(second.model)}</h2>",
            _only_found_by(first, second, content),
            f"<h2>Found by {escape(second.model)}, missed by {escape(first.model)}</h2>",
            _only_found_by(second, first, content),
        ]
    for diagnosis in diagnoses:
        parts += [
            f"<h2>Worst misses of {escape(diagnosis.model)}</h2>",
            _misses(diagnosis, content),
        ]
        parts += [
            f"<h2>Images whose captions {escape(diagnosis.model)} misses</h2>",
            _missed_images(diagnosis, content),
        ]
    if dataset.skipped:
        items = "".join(f"<li>{escape(message)}</li>" for message in dataset.skipped[:50])
        parts.append(f"<h2>Skipped</h2><p>{len(dataset.skipped):,} rows</p><ul>{items}</ul>")
    write_text(path, page(f"{models} on {name}", parts, "eval diagnose"))


def _content(dataset: EvalSet, images: EmbeddedImages) -> _Content:
    by_image = images.pairs[np.argsort(images.pairs[:, 0], kind="stable")]
    by_text = images.pairs[np.argsort(images.pairs[:, 1], kind="stable")]

    @cache  # hubs are on the page many times
    def thumbnail_uri(row: int) -> str:
        try:
            return data_uri(thumbnail(dataset.image_bytes(int(images.indexes[row]))))
        except CNClipError:  # deleted since it was embedded
            return ""

    def texts_of(image: int) -> Indexes:
        start, end = np.searchsorted(by_image[:, 0], [image, image + 1])
        return by_image[start:end, 1]

    def images_of(text: int) -> Indexes:
        start, end = np.searchsorted(by_text[:, 1], [text, text + 1])
        return by_text[start:end, 0]

    return _Content(thumbnail_uri, dataset.texts, texts_of, images_of)


def _side_by_side(diagnoses: Sequence[Diagnosis], section: Callable[[Diagnosis], str]) -> str:
    if len(diagnoses) == 1:
        return section(diagnoses[0])
    halves = "".join(
        f"<div><h3>{escape(diagnosis.model)}</h3>{section(diagnosis)}</div>"
        for diagnosis in diagnoses
    )
    return f'<div class="two">{halves}</div>'


def _recalls(diagnoses: Sequence[Diagnosis]) -> str:
    rows = []
    for diagnosis in diagnoses:
        for direction, recall in (
            ("text to image", diagnosis.text_to_image),
            ("image to text", diagnosis.image_to_text),
        ):
            values = (recall.r1, recall.r5, recall.r10, recall.mean)
            name = f"{escape(diagnosis.model)}, {direction}"
            rows.append([name, *(f"{100 * value:.1f}" for value in values)])
    return table(["", "R@1", "R@5", "R@10", "mean recall"], rows)


def _differences(diagnoses: Sequence[Diagnosis], differences: Sequence[Difference]) -> str:
    first, second = (diagnosis.model for diagnosis in diagnoses)
    rows = []
    for row in differences:
        low, high = 100 * row.interval.low, 100 * row.interval.high
        note = "" if row.interval.excludes_zero else " (not significant)"
        rows.append(
            [
                row.metric,
                f"{100 * row.first:.1f}",
                f"{100 * row.second:.1f}",
                f"{100 * row.interval.value:+.1f}",
                f"{low:+.1f} to {high:+.1f}{note}",
            ]
        )
    return (
        f"<h2>{escape(first)} minus {escape(second)}</h2><p>In points, with the 95 % interval of a "
        "paired bootstrap over the queries. An interval with 0 is not significant.</p>"
        + table(["", first, second, "difference", "95 % interval"], rows)
    )


def _lengths(diagnosis: Diagnosis) -> str:
    rows = []
    for length in diagnosis.lengths:
        name = f"{length.low}" if length.low == length.high else f"{length.low} to {length.high}"
        recall = length.recall
        cells = (f"{100 * value:.1f}" for value in (recall.r1, recall.r10, recall.mean))
        rows.append([name, f"{length.texts:,}", *cells])
    return table(["characters", "texts", "R@1", "R@10", "mean recall"], rows)


def _cosines(diagnosis: Diagnosis) -> str:
    cosines = diagnosis.cosines
    pairs, non_pairs, correct, wrong = (
        "none" if np.isnan(median) else f"{median:.3f}" for median in cosines.medians
    )
    return (
        f"<p>Pairs (blue, median {pairs}) and non-pairs (grey, {non_pairs}), scaled separately.</p>"
        f"{overlaid_histograms(cosines.pairs, cosines.non_pairs, BINS)}"
        f"<p>Top result of each text, correct (blue, median {correct}) and wrong (grey, {wrong}): "
        "a threshold for no match has to separate the two.</p>"
        f"{overlaid_histograms(cosines.top_correct, cosines.top_wrong, BINS)}"
    )


def _hubs(diagnosis: Diagnosis, content: _Content) -> str:
    hubs = diagnosis.hubs
    figures = []
    for image in hubs.largest(_MAX_IMAGES).tolist():
        counts = f"{hubs.counts[image]:,} times, {hubs.correct[image]:,} correct"
        figures.append((content.thumbnail(image), f"{counts}<br>{_captions_of(image, content)}"))
    return (
        f"<p>Skewness of N<sub>{hubs.k}</sub>: {hubs.skewness:.2f}. An image is in the top "
        f"{hubs.k} of {hubs.counts.mean():.1f} texts on average, the largest hub of "
        f"{hubs.counts.max():,}; {hubs.never_retrieved:.1%} of the images are never retrieved.</p>"
        f"{image_grid(figures)}"
    )


def _similar_captions(diagnosis: Diagnosis, content: _Content) -> str:
    similar = diagnosis.similar
    count = f"{len(similar.pairs):,}" if similar.complete else f"at least {len(similar.pairs):,}"
    summary = (
        f"<p>{count} pairs of captions of different images with a cosine of at least "
        f"{similar.threshold:g}, of {similar.texts:,} captions. Such a query is ambiguous. "
        "Captions that differ only in width, case and punctuation are already one text.</p>"
    )
    rows = (
        [f"{escape(content.captions[a])}<br>{escape(content.captions[b])}", f"{cosine:.3f}"]
        for (a, b), cosine in zip(
            similar.pairs[:_MAX_CAPTIONS].tolist(),
            similar.cosines[:_MAX_CAPTIONS].tolist(),
            strict=True,
        )
    )
    return summary + (table(["captions", "cosine"], rows) if len(similar.pairs) else "")


def _misses(diagnosis: Diagnosis, content: _Content) -> str:
    order = np.argsort(-diagnosis.image_ranks, kind="stable")[:_MAX_MISSES]
    return _miss_rows(diagnosis, order[diagnosis.image_ranks[order] > 0], content)


def _only_found_by(finder: Diagnosis, other: Diagnosis, content: _Content) -> str:
    """List the queries that ``finder`` ranks first and ``other`` ranks lowest."""
    rank = np.where(finder.image_ranks == 0, other.image_ranks, 0)
    order = np.argsort(-rank, kind="stable")[:_MAX_MISSES]
    return _miss_rows(other, order[rank[order] > 0], content)


def _miss_rows(diagnosis: Diagnosis, queries: Indexes, content: _Content) -> str:
    if not len(queries):
        return "<p>none</p>"
    rows = [
        '<div class="miss small"><div>query</div><div>expected image</div>'
        f"<div>top results of {escape(diagnosis.model)}, with cosine and caption</div></div>"
    ]
    for query in queries.tolist():
        text = int(diagnosis.texts[query])
        results = "".join(
            _figure(content.thumbnail(image), f"{score:.3f}<br>{_captions_of(image, content)}")
            for image, score in zip(
                diagnosis.top_images.indexes[query, :_TOP].tolist(),
                diagnosis.top_images.scores[query, :_TOP].tolist(),
                strict=True,
            )
        )
        expected = content.thumbnail(int(content.images_of(text)[0]))
        rows.append(
            f'<div class="miss"><div>{escape(content.captions[text])}<br><span class="small">rank '
            f"{diagnosis.image_ranks[query] + 1:,}</span></div>"
            f'{_figure(expected, "")}<div class="found">{results}</div></div>'
        )
    return "".join(rows)


def _missed_images(diagnosis: Diagnosis, content: _Content) -> str:
    order = np.argsort(-diagnosis.text_ranks, kind="stable")[:_MAX_IMAGES]
    figures = []
    for query in order[diagnosis.text_ranks[order] > 0].tolist():
        image = int(diagnosis.images[query])
        predicted = content.captions[int(diagnosis.top_texts.indexes[query, 0])]
        caption = (
            f"top result: {escape(predicted)}<br>caption: {_captions_of(image, content)}<br>"
            f'<span class="small">rank {diagnosis.text_ranks[query] + 1:,}</span>'
        )
        figures.append((content.thumbnail(image), caption))
    return image_grid(figures) if figures else "<p>none</p>"


def _captions_of(image: int, content: _Content) -> str:
    captions = (content.captions[n] for n in content.texts_of(image)[:2].tolist())
    return escape(" / ".join(captions)) or "(without a caption)"


def _figure(address: str, caption: str) -> str:
    return f'<figure><img src="{address}" alt=""><figcaption>{caption}</figcaption></figure>'
