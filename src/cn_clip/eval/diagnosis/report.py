"""A diagnosis, or two side by side, as one page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

import numpy as np

from cn_clip.errors import CNClipError
from cn_clip.eval.dataset import EvalSet
from cn_clip.eval.diagnosis.measure import BINS, Diagnosis, Difference, Numbers
from cn_clip.eval.images import Pictures
from cn_clip.html.page import data_uri, image_grid, overlaid_histograms, page, thumbnail
from cn_clip.publish import write_text

_HUBS = 12  # pictures of each list
_MISSES = 20
_ALIKE = 30  # pairs of captions
_FOUND = 3  # answers shown beside a miss
# Beside data.page's: rows of a miss, two models side by side, small pictures of a hub's queries.
_STYLE = """<style>
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 2rem; }
.miss { display: grid; grid-template-columns: 14rem 8.5rem 1fr; gap: 1rem; align-items: start;
  border-top: 1px solid var(--line); padding: .75rem 0; }
.miss .found { display: flex; gap: .75rem; flex-wrap: wrap; } .miss figure { width: 8.5rem; }
.small { font-size: .85rem; opacity: .75; } .scroll { overflow-x: auto; }
</style>"""


@dataclass(frozen=True, slots=True)
class _Shown:
    """What the pieces of the page need of the set."""

    picture: Callable[[int], str]
    captions: Sequence[str]
    of_image: Callable[[int], Numbers]
    of_text: Callable[[int], Numbers]


def write_diagnosis(
    path: Path,
    name: str,
    data: EvalSet,
    pictures: Pictures,
    diagnoses: Sequence[Diagnosis],
    differences: Sequence[Difference] = (),
) -> None:
    """Write the page.

    Args:
        path: of the page; it appears whole.
        name: of the data, for people.
        data: where the pictures and captions are.
        pictures: those that were measured.
        diagnoses: of one model, or of two.
        differences: between the two, from ``compare``.
    """
    shown = _shown(data, pictures)
    models = " and ".join(escape(each.model) for each in diagnoses)
    parts = [
        _STYLE,
        f"<h1>{models} on {escape(name)}</h1>",
        f"<p>{len(pictures.numbers):,} pictures, {len(diagnoses[0].texts):,} texts, "
        f"{len(pictures.pairs):,} pairs. Recall is exact; a text or a picture may have several "
        "right answers, of which one must be found.</p>",
        _recalls(diagnoses),
        *([_differences(diagnoses, differences)] if differences else []),
        "<h2>Recall by length of the caption</h2>",
        "<p>From text to image; characters of the text as it is.</p>",
        _side_by_side(diagnoses, _lengths),
        "<h2>Cosines</h2>",
        _side_by_side(diagnoses, _cosines),
        "<h2>Hubs: pictures found too often</h2>",
        "<p>How often a picture is among the first answers of all texts. If all were found alike, "
        "the skewness would be 0; above 1, a few pictures crowd the answers of many texts.</p>",
        _side_by_side(diagnoses, lambda each: _hubs(each, shown)),
        "<h2>Captions hardly told apart</h2>",
        _side_by_side(diagnoses, lambda each: _alike(each, shown)),
    ]
    if len(diagnoses) == 2:
        first, second = diagnoses
        parts += [
            f"<h2>Found by {escape(first.model)}, missed by {escape(second.model)}</h2>",
            _apart(first, second, shown),
            f"<h2>Found by {escape(second.model)}, missed by {escape(first.model)}</h2>",
            _apart(second, first, shown),
        ]
    for each in diagnoses:
        parts += [f"<h2>The worst misses of {escape(each.model)}</h2>", _misses(each, shown)]
        parts += [
            f"<h2>Pictures whose text {escape(each.model)} misses</h2>",
            _missed_pictures(each, shown),
        ]
    if data.skipped:
        listed = "".join(f"<li>{escape(each)}</li>" for each in data.skipped[:50])
        parts.append(f"<h2>Left out</h2><p>{len(data.skipped):,} rows</p><ul>{listed}</ul>")
    write_text(path, page(f"{models} on {name}", parts, "eval diagnose"))


def _shown(data: EvalSet, pictures: Pictures) -> _Shown:
    by_image = pictures.pairs[np.argsort(pictures.pairs[:, 0], kind="stable")]
    by_text = pictures.pairs[np.argsort(pictures.pairs[:, 1], kind="stable")]

    @cache  # a hub is on the page many times, and decoded once
    def picture(place: int) -> str:
        try:
            return data_uri(thumbnail(data.image_bytes(int(pictures.numbers[place]))))
        except CNClipError:  # gone since it was embedded
            return ""

    def of_image(place: int) -> Numbers:
        start, end = np.searchsorted(by_image[:, 0], [place, place + 1])
        return by_image[start:end, 1]

    def of_text(place: int) -> Numbers:
        start, end = np.searchsorted(by_text[:, 1], [place, place + 1])
        return by_text[start:end, 0]

    return _Shown(picture, data.texts, of_image, of_text)


def _side_by_side(diagnoses: Sequence[Diagnosis], piece: Callable[[Diagnosis], str]) -> str:
    if len(diagnoses) == 1:
        return piece(diagnoses[0])
    halves = "".join(f"<div><h3>{escape(each.model)}</h3>{piece(each)}</div>" for each in diagnoses)
    return f'<div class="two">{halves}</div>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "".join(
        f"<tr><td>{row[0]}</td>"
        + "".join(f'<td class="number">{each}</td>' for each in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _recalls(diagnoses: Sequence[Diagnosis]) -> str:
    rows = []
    for each in diagnoses:
        for way, recall in (
            ("text to image", each.text_to_image),
            ("image to text", each.image_to_text),
        ):
            figures = (recall.r1, recall.r5, recall.r10, recall.mean)
            name = f"{escape(each.model)}, {way}"
            rows.append([name, *(f"{100 * figure:.1f}" for figure in figures)])
    return _table(["", "R@1", "R@5", "R@10", "mean recall"], rows)


def _differences(diagnoses: Sequence[Diagnosis], differences: Sequence[Difference]) -> str:
    first, second = (escape(each.model) for each in diagnoses)
    rows = []
    for each in differences:
        low, high = 100 * each.lead.low, 100 * each.lead.high
        sure = "" if each.lead.sure else " (may be chance)"
        rows.append(
            [
                each.measure,
                f"{100 * each.first:.1f}",
                f"{100 * each.second:.1f}",
                f"{100 * each.lead.value:+.1f}",
                f"{low:+.1f} to {high:+.1f}{sure}",
            ]
        )
    return (
        f"<h2>{first} less {second}</h2><p>In points, with the 95 % interval of a paired bootstrap "
        "over the queries. Where it holds 0, the difference may be chance.</p>"
        + _table(["", first, second, "difference", "95 % interval"], rows)
    )


def _lengths(each: Diagnosis) -> str:
    rows = []
    for length in each.lengths:
        name = f"{length.low}" if length.low == length.high else f"{length.low} to {length.high}"
        recall = length.recall
        figures = (f"{100 * value:.1f}" for value in (recall.r1, recall.r10, recall.mean))
        rows.append([name, f"{length.texts:,}", *figures])
    return _table(["characters", "texts", "R@1", "R@10", "mean recall"], rows)


def _cosines(each: Diagnosis) -> str:
    found = each.cosines
    together, apart, right, wrong = (f"{median:.3f}" for median in found.medians)
    return (
        f"<p>Of pairs that belong together (blue, median {together}) and that do not (grey, "
        f"{apart}), each as shares of its own.</p>"
        f"{overlaid_histograms(found.matching, found.others, BINS)}"
        f"<p>Of each text's first answer, where it is right (blue, median {right}) and wrong "
        f"(grey, {wrong}): what a fixed cutoff would have to tell apart.</p>"
        f"{overlaid_histograms(found.first_right, found.first_wrong, BINS)}"
    )


def _hubs(each: Diagnosis, shown: _Shown) -> str:
    hubs = each.hubs
    figures = []
    for place in hubs.most(_HUBS).tolist():
        own = _own(place, shown)
        told = f"{hubs.counts[place]:,} times, {hubs.right[place]:,} rightly<br>{own}"
        figures.append((shown.picture(place), told))
    mean = hubs.counts.mean()
    return (
        f"<p>Skewness of N<sub>{hubs.k}</sub>: {hubs.skewness:.2f}. A picture is among the first "
        f"{hubs.k} of {mean:.1f} texts on average, the first hub of {hubs.counts.max():,}; "
        f"{hubs.never:.1%} of the pictures are among none.</p>{image_grid(figures)}"
    )


def _alike(each: Diagnosis, shown: _Shown) -> str:
    found = each.alike
    count = f"{len(found.pairs):,}" if found.complete else f"at least {len(found.pairs):,}"
    said = (
        f"<p>Pairs of captions of different pictures with a cosine of {found.threshold:g} or more: "
        f"{count}, of {found.texts:,} captions. A text that names another picture as well is no "
        "fair question. Captions equal but for width, case and punctuation are one text "
        "already.</p>"
    )
    rows = (
        [f"{escape(shown.captions[a])}<br>{escape(shown.captions[b])}", f"{cosine:.3f}"]
        for (a, b), cosine in zip(
            found.pairs[:_ALIKE].tolist(), found.cosines[:_ALIKE].tolist(), strict=True
        )
    )
    return said + (_table(["captions", "cosine"], rows) if len(found.pairs) else "")


def _misses(each: Diagnosis, shown: _Shown) -> str:
    order = np.argsort(-each.to_image, kind="stable")[:_MISSES]
    return _rows(each, order[each.to_image[order] > 0], shown)


def _apart(finder: Diagnosis, misser: Diagnosis, shown: _Shown) -> str:
    """Show what one finds at once, and the other ranks worst."""
    score = np.where(finder.to_image == 0, misser.to_image, 0)
    order = np.argsort(-score, kind="stable")[:_MISSES]
    return _rows(misser, order[score[order] > 0], shown)


def _rows(each: Diagnosis, queries: Numbers, shown: _Shown) -> str:
    if not len(queries):
        return "<p>none</p>"
    rows = [
        '<div class="miss small"><div>asked</div><div>should have been</div>'
        f"<div>what {escape(each.model)} found instead, its cosine and own caption</div></div>"
    ]
    for query in queries.tolist():
        text, answers = int(each.texts[query]), each.images_found
        found = "".join(
            _figure(shown.picture(place), f"{score:.3f}<br>{_own(place, shown)}")
            for place, score in zip(
                answers.indexes[query, :_FOUND].tolist(),
                answers.scores[query, :_FOUND].tolist(),
                strict=True,
            )
        )
        right = shown.picture(int(shown.of_text(text)[0]))
        rows.append(
            f'<div class="miss"><div>{escape(shown.captions[text])}<br><span class="small">first '
            f"right answer at place {each.to_image[query] + 1:,}</span></div>"
            f'{_figure(right, "")}<div class="found">{found}</div></div>'
        )
    return "".join(rows)


def _missed_pictures(each: Diagnosis, shown: _Shown) -> str:
    order = np.argsort(-each.to_text, kind="stable")[:_HUBS]
    figures = []
    for query in order[each.to_text[order] > 0].tolist():
        place = int(each.images[query])
        said = shown.captions[int(each.texts_found.indexes[query, 0])]
        told = (
            f"called {escape(said)}<br>is {_own(place, shown)}<br>"
            f'<span class="small">at place {each.to_text[query] + 1:,}</span>'
        )
        figures.append((shown.picture(place), told))
    return image_grid(figures) if figures else "<p>none</p>"


def _own(place: int, shown: _Shown) -> str:
    own = (shown.captions[n] for n in shown.of_image(place)[:2].tolist())
    return escape(" / ".join(own)) or "(without a caption)"


def _figure(address: str, caption: str) -> str:
    return f'<figure><img src="{address}" alt=""><figcaption>{caption}</figcaption></figure>'
