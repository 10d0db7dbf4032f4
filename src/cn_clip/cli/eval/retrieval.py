"""``cn-clip eval retrieval``: retrieval recall in both directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from cn_clip.cli.loading import DEFAULT, Loading
from cn_clip.cli.show import Flag, console, list_failed, print_json, progress_bar
from cn_clip.errors import UsageError
from cn_clip.translation import N_, _, translate

if TYPE_CHECKING:
    from cn_clip.eval.metrics.recall import Recall
    from cn_clip.eval.retrieval import RetrievalResult


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
    """Measure retrieval recall from texts to images and from images to texts.

    Prints recall at 1, 5 and 10: the fraction of queries with a match among the top 1, 5 and 10
    results. If a query has several matches, one of them counts. Unreadable pairs are counted and
    listed; the exit code is then 1.

    Parameters
    ----------
    data
        Pairs: KIND:PATH, with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar; repeat for
        several.
    split
        Take --data as a folder with SPLIT_imgs.tsv, lmdb/SPLIT, SPLIT.jsonl, .csv, .parquet or
        .tar, or a folder SPLIT.
    images
        Image features instead of a model: .npz, .jsonl, or a clip-retrieval folder, as written by
        `cn-clip embed`.
    texts
        Text features, likewise.
    truth
        With features, instead of --data: the official annotations, a .jsonl with text_id and
        image_ids.
    by_id
        Count one text per text id, as the official evaluation does. Default: equal texts are one
        text.
    out
        Folder for the official files: features, annotations, the top 10 of each text and image,
        metrics.
    json
        Print JSON instead of a table.
    """
    if (images is None) != (texts is None):
        raise UsageError(_("only one kind of features is given; give both --images and --texts"))
    if bool(data) == (truth is not None) or (truth is not None and images is None):
        raise UsageError(
            _("no pairs given; give --data KIND:PATH, or with features --truth TEXTS.jsonl instead")
        )
    if split is not None:
        from cn_clip.data.sources.open import split_source

        data = tuple(split_source(spec, split) for spec in data)
    if out is not None:
        from cn_clip.data.sources.open import paths_of
        from cn_clip.eval.official_files import claim_official_files

        inputs: list[str | Path] = [path for spec in data for path in paths_of(spec)]
        inputs += [path for path in (images, texts, truth) if path is not None]
        inputs += [] if images is not None else loading.paths
        claim_official_files(out, inputs=inputs)
    if images is not None and texts is not None:
        result = _of_features(Path(images), Path(texts), data, truth)
    else:
        from cn_clip.data.sources.open import open_mix
        from cn_clip.eval.retrieval import evaluate_retrieval

        mix = open_mix(data)
        embedder = loading.load()
        with progress_bar(_("embedding")) as tick:
            result = evaluate_retrieval(embedder, mix, merge=not by_id, tick=tick)
        result = replace(result, model=loading.model)
    written = []
    if out is not None:
        from cn_clip.eval.official_files import write_official_files

        written = [str(path) for path in write_official_files(result, Path(out))]
    if json:
        print_json({**as_json(result), "out": written})
    else:
        _print(result)
        if out is not None:
            console().print(
                _("{written_count} official files in {out}", written_count=len(written), out=out),
                markup=False,
            )
    list_failed(result.failed)
    return 1 if result.failed else 0


def as_json(result: RetrievalResult) -> dict[str, Any]:
    """Return the scores in percent, with the model and the counts."""
    return {
        "model": result.model,
        "images": len(result.image_ids),
        "texts": len(result.text_ids),
        "pairs": len(result.pairs),
        "text_to_image": percent(result.recall.text_to_image),
        "image_to_text": percent(result.recall.image_to_text),
        "mean_recall": 100 * result.recall.mean_recall,
        "failed": result.failed,
    }


def percent(recall: Recall) -> dict[str, float]:
    """Return recall in percent, named as in the official metrics."""
    values = {"r1": recall.r1, "r5": recall.r5, "r10": recall.r10, "mean_recall": recall.mean}
    return {name: 100 * value for name, value in values.items()}


def fractions(recall: Recall) -> dict[str, float]:
    """Return recall in [0, 1], for JSON."""
    return {"r1": recall.r1, "r5": recall.r5, "r10": recall.r10, "mean": recall.mean}


DIRECTIONS = {"text_to_image": N_("text to image"), "image_to_text": N_("image to text")}


def recall_table(title: str, rows: dict[str, Recall]) -> Table:
    """Return a table of recall in percent, one row per direction."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(title)
    for name in ("R@1", "R@5", "R@10", N_("mean")):
        table.add_column(translate(name), justify="right")
    for direction, recall in rows.items():
        cells = (f"{value:.1f}" for value in percent(recall).values())
        table.add_row(translate(DIRECTIONS[direction]), *cells)
    return table


def _print(result: RetrievalResult) -> None:
    both = result.recall
    rows = {"text_to_image": both.text_to_image, "image_to_text": both.image_to_text}
    console().print(recall_table(result.model, rows))
    console().print(
        _(
            "{image_count:,} images, {text_count:,} texts, {pair_count:,} pairs; mean recall "
            "{mean_recall:.1f}",
            image_count=len(result.image_ids),
            text_count=len(result.text_ids),
            pair_count=len(result.pairs),
            mean_recall=100 * both.mean_recall,
        ),
        markup=False,
    )


def _of_features(
    images: Path, texts: Path, data: tuple[str, ...], truth: str | None
) -> RetrievalResult:
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
