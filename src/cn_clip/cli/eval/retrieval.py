"""``cn-clip eval retrieval``: recall in both directions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from cn_clip.cli.loading import DEFAULT, Loading
from cn_clip.cli.show import Flag, console, print_json, progress
from cn_clip.errors import UsageError

if TYPE_CHECKING:
    from cn_clip.eval.metrics.recall import Recall
    from cn_clip.eval.retrieval import Measured

_LISTED = 20  # failures that are printed; --json has all


def retrieval(
    *,
    data: Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)] = (),
    split: str | None = None,
    loading: Loading = DEFAULT,
    images: str | None = None,
    texts: str | None = None,
    truth: str | None = None,
    by_id: Flag = False,
    out: str | None = None,
    json: Flag = False,
) -> int:
    """Measure how well texts find their pictures, and pictures their texts.

    Prints recall at 1, 5 and 10: the share of queries with a right one among the first 1, 5 and
    10. A picture may have several texts, and a text several pictures; one of them must be found.
    Pairs that cannot be read are counted and listed; the exit code is then 1.

    Parameters
    ----------
    data
        Pairs: KIND:PATH, with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar; repeat it for
        several.
    split
        With it, --data is a folder: of SPLIT_imgs.tsv, lmdb/SPLIT, SPLIT.jsonl, .csv, .parquet or
        .tar, or of a folder SPLIT.
    images
        Features of pictures instead of a model: .npz, .jsonl, or clip-retrieval's folder, as
        `cn-clip embed` writes them.
    texts
        Features of texts, likewise.
    truth
        With features, instead of --data: the official annotations, a .jsonl with text_id and
        image_ids.
    by_id
        Count a text for each text id, as the official evaluation does. By default texts that say
        the same are one text.
    out
        A folder for the official files: features, annotations, the 10 best for each text and each
        picture, metrics.
    json
        Print JSON instead of a table.
    """
    if (images is None) != (texts is None):
        raise UsageError("features are compared with features; give both --images and --texts")
    if bool(data) == (truth is not None) or (truth is not None and images is None):
        raise UsageError(
            "which pairs? Give --data KIND:PATH, or with features --truth TEXTS.jsonl instead"
        )
    if split is not None:
        from cn_clip.data.sources.open import split_source

        data = tuple(split_source(each, split) for each in data)
    if out is not None:
        from cn_clip.data.sources.open import paths_of
        from cn_clip.eval.official_files import claim_official

        inputs: list[str | Path] = [path for each in data for path in paths_of(each)]
        inputs += [each for each in (images, texts, truth) if each is not None]
        inputs += [] if images is not None else loading.paths
        claim_official(out, inputs=inputs)
    if images is not None and texts is not None:
        measured = _of_features(Path(images), Path(texts), data, truth)
    else:
        from cn_clip.data.sources.open import open_mix
        from cn_clip.eval.retrieval import evaluate_retrieval

        mix = open_mix(data)
        embedder = loading.load()
        with ticking("embedding") as tick:
            measured = evaluate_retrieval(embedder, mix, merge=not by_id, tick=tick)
    written = []
    if out is not None:
        from cn_clip.eval.official_files import write_official

        written = [str(path) for path in write_official(measured, Path(out))]
    if json:
        print_json({**as_json(measured), "out": written})
    else:
        _print(measured)
        if out is not None:
            console().print(f"{len(written)} official files in {out}", markup=False)
    list_failed(measured.failed)
    return 1 if measured.failed else 0


def as_json(measured: Measured) -> dict[str, Any]:
    """Return figures in percent, and what they are of."""
    return {
        "model": measured.model,
        "pictures": len(measured.image_ids),
        "texts": len(measured.text_ids),
        "pairs": len(measured.pairs),
        "text_to_image": percent(measured.recall.text_to_image),
        "image_to_text": percent(measured.recall.image_to_text),
        "mean_recall": 100 * measured.recall.mean_recall,
        "failed": measured.failed,
    }


def percent(recall: Recall) -> dict[str, float]:
    """Return recall in percent, named as in the official metrics."""
    shares = {"r1": recall.r1, "r5": recall.r5, "r10": recall.r10, "mean_recall": recall.mean}
    return {name: 100 * share for name, share in shares.items()}


def recall_table(title: str, rows: dict[str, Recall]) -> Table:
    """Return a table with a row of recalls, in percent, for each direction."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(title)
    for name in ("R@1", "R@5", "R@10", "mean"):
        table.add_column(name, justify="right")
    for direction, recall in rows.items():
        figures = (f"{each:.1f}" for each in percent(recall).values())
        table.add_row(direction.replace("_", " "), *figures)
    return table


@contextmanager
def ticking(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what moves a progress bar to so many of so many."""
    with progress() as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def list_failed(sentences: list[str]) -> None:
    """Print what could not be read on stderr."""
    for sentence in sentences[:_LISTED]:
        print(f"cn-clip: {sentence}", file=sys.stderr)
    if sentences:
        more = "; --json lists all" if len(sentences) > _LISTED else ""
        print(
            f"cn-clip: {len(sentences):,} could not be read, and are in no figure{more}",
            file=sys.stderr,
        )


def _print(measured: Measured) -> None:
    both = measured.recall
    rows = {"text_to_image": both.text_to_image, "image_to_text": both.image_to_text}
    console().print(recall_table(measured.model, rows))
    console().print(
        f"{len(measured.image_ids):,} pictures, {len(measured.text_ids):,} texts, "
        f"{len(measured.pairs):,} pairs; mean recall {100 * both.mean_recall:.1f}",
        markup=False,
    )


def _of_features(images: Path, texts: Path, data: tuple[str, ...], truth: str | None) -> Measured:
    from cn_clip.embeddings.files import read_embeddings
    from cn_clip.eval.official_files import read_truth
    from cn_clip.eval.retrieval import evaluate_features, pairs_of

    if truth is not None:
        pairs, where = read_truth(Path(truth)), truth
    else:
        from cn_clip.data.sources.open import open_mix

        pairs, where = pairs_of(open_mix(data)), ", ".join(data)
    stored = read_embeddings(images, "images"), read_embeddings(texts, "texts")
    return evaluate_features(*stored, pairs, truth=where)
