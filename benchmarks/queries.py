"""How a query is embedded: normalisers and templates, on the 468 things.

    python benchmarks/queries.py                       # fetches the stamps
    python benchmarks/queries.py --stamps DIR --model mini

Each row is a form of the 426 captions: as they are, in traditional characters, with full-width
signs, with English words, in English. Each column is a treatment before embedding (``letters`` is
NFKC of letters and digits alone). The number is the mean of recall at 1, 5 and 10 from text to
image over the queries that the form changes, or over all original captions, and in brackets the
95 % interval of the paired bootstrap for the gain over no treatment.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from things468 import fetch, on_white, things

import cn_clip
from cn_clip.embedder import Embedder
from cn_clip.eval.metrics.bootstrap import paired_interval
from cn_clip.eval.metrics.recall import mean_recall_by_query, ranks_of_best
from cn_clip.eval.robustness import rewrites
from cn_clip.normalize import nfkc, simplified

FORMS: dict[str, Callable[[str], str]] = {
    "captions": lambda text: text,
    "traditional": rewrites.traditional,
    "taiwan": rewrites.taiwan,
    "full-width": rewrites.full_width,
    "mixed": rewrites.mixed,
    "mixed, full-width": lambda text: rewrites.full_width(rewrites.mixed(text)),
    "english": rewrites.english,
    "english, full-width": lambda text: rewrites.full_width(rewrites.english(text)),
    "mixed, traditional": lambda text: rewrites.traditional(rewrites.mixed(text)),
}
NORMALIZERS: dict[str, Callable[[str], str]] = {
    "nfkc": nfkc,
    "letters": lambda text: re.sub("[０-９Ａ-Ｚａ-ｚ]+", lambda match: nfkc(match[0]), text),
    "simplified": simplified,
    "both": lambda text: simplified(nfkc(text)),
}
TEMPLATES: dict[str, Sequence[str]] = {
    "一张{}的照片": ["一张{}的照片"],
    "{}的图片": ["{}的图片"],
    "{}。": ["{}。"],
    "mean of 4": ["{}", "一张{}的照片", "{}的图片", "一幅{}的画"],
}


def embed(embedder: Embedder, texts: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """Return the unit embeddings (N, D) of texts, each a mean over the templates."""
    sentences = [template.replace("{}", text) for text in texts for template in templates]
    mean = embedder.embed_texts(sentences).reshape(len(texts), len(templates), -1).mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stamps", type=Path, help="folder of the stamps; default: download them")
    parser.add_argument("--model", default="mini", help="anything that cn_clip.load takes")
    options = parser.parse_args()
    embedder = cn_clip.load(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = things(options.stamps or fetch(Path(scratch)))
        images = embedder.embed_images(on_white(path) for path, _ in pairs)
    captions = list(dict.fromkeys(caption for _, caption in pairs))
    positives = [np.flatnonzero([caption == own for _, own in pairs]) for caption in captions]

    def recall(texts: Sequence[str], rows: np.ndarray, templates: Sequence[str]) -> np.ndarray:
        own = [(n, image) for n, row in enumerate(rows) for image in positives[row]]
        ranks = ranks_of_best(embed(embedder, texts, templates), images, np.array(own))
        return 100 * mean_recall_by_query(ranks)

    def table(columns: dict[str, Callable[[list[str], np.ndarray], np.ndarray]]) -> None:
        print("| form | queries | untreated | " + " | ".join(columns) + " |")
        print("|---|---:|---:|" + "---|" * len(columns))
        for name, form in FORMS.items():
            texts = [form(caption) for caption in captions]
            changed = [name == "captions" or a != b for a, b in zip(texts, captions, strict=True)]
            rows = np.flatnonzero(changed)
            texts = [texts[row] for row in rows]
            before = recall(texts, rows, ["{}"])
            cells = []
            for treat in columns.values():
                after = treat(texts, rows)
                gain = paired_interval(after, before)
                cells.append(f"{after.mean():.1f} ({gain.low:+.1f} to {gain.high:+.1f})")
            print(f"| {name} | {len(rows)} | {before.mean():.1f} | " + " | ".join(cells) + " |")

    print(f"{embedder.name}: {len(images)} images, {len(captions)} captions\n")
    table(
        {
            name: lambda texts, rows, treat=treat: recall(list(map(treat, texts)), rows, ["{}"])
            for name, treat in NORMALIZERS.items()
        }
    )
    print()
    table(
        {
            name: lambda texts, rows, templates=templates: recall(texts, rows, templates)
            for name, templates in TEMPLATES.items()
        }
    )


if __name__ == "__main__":
    main()
