"""``cn-clip eval robustness``: the same images, asked for in other ways."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from cn_clip.cli.loading import DEFAULT, Loading
from cn_clip.cli.show import Flag, console, print_json, progress

if TYPE_CHECKING:
    from cn_clip.eval.metrics.recall import Recall
    from cn_clip.eval.robustness.measure import Asked, Robustness

_OPENCC = ("simplified", "traditional", "taiwan")


def robustness(
    *,
    data: Annotated[list[str], Parameter(negative=())],
    loading: Loading = DEFAULT,
    normalize: Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)] = (),
    context_length: int = 52,
    seed: int = 0,
    json: Flag = False,
) -> int:
    """Ask for the same images in other ways, and print the recall that is lost.

    The ways: simplified and traditional characters, half and full width, with and without
    punctuation, synonyms, English and mixed with English, and long texts up to and beyond what the
    model reads. Each is compared, over the texts that it changes, with the plain texts: the mean of
    recall at 1, 5 and 10 from text to image, with the 95 % interval of a paired bootstrap. The exit
    code is 1 if some of the data cannot be read.

    Parameters
    ----------
    data
        KIND:PATH, with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar; repeat it for several.
    normalize
        Also ask with each query normalised: nfkc (Unicode's) or simplified (OpenCC's); repeat it
        to apply both, in this order.
    context_length
        Tokens that the model reads, [CLS] and [SEP] among them.
    seed
        Of the bootstrap.
    json
        Print JSON instead of a table.
    """
    from cn_clip.data.sources.open import open_mix
    from cn_clip.eval.dataset import eval_set_of
    from cn_clip.eval.images import embed_eval_images
    from cn_clip.eval.robustness.measure import robustness
    from cn_clip.eval.robustness.rewrites import have_opencc, normalized, variants

    normalized("", normalize)  # names are checked before the work
    ways = variants(context_length=context_length)
    left_out = () if have_opencc() else _OPENCC
    ways = tuple(way for way in ways if way.name not in left_out)
    pairs = eval_set_of(open_mix(data))
    embedder = loading.load()
    with progress() as bars:
        task = bars.add_task("embedding images", total=len(pairs.images))
        images = embed_eval_images(embedder, pairs, tick=partial(bars.advance, task))
        rounds = len(ways) + (1 + len(ways)) * bool(normalize)
        asking = bars.add_task("asking in other ways", total=rounds)
        found = robustness(
            embedder,
            images.vectors,
            pairs.texts,
            images.pairs,
            ways,
            normalizers=normalize,
            seed=seed,
            tick=partial(bars.advance, asking),
        )
    if json:
        print_json(
            {
                "model": embedder.name,
                "data": data,
                "images": len(images.numbers),
                "queries": found.queries,
                "plain": _recall(found.plain),
                "asked": [_as_json(each) for each in found.asked],
                "normalize": list(found.normalizers),
                "normalized": [_as_json(each) for each in found.normalized],
                "left_out": list(left_out),
                "skipped": pairs.skipped,
            }
        )
    else:
        _print(found, embedder.name, len(images.numbers))
    if left_out:
        print(
            f"cn-clip: left out {', '.join(left_out)}, for which OpenCC is needed: "
            "pip install 'cn-clip[eval]'",
            file=sys.stderr,
        )
    for sentence in pairs.skipped:
        print(f"cn-clip: left out: {sentence}", file=sys.stderr)
    return 1 if pairs.skipped else 0


def _print(found: Robustness, model: str, images: int) -> None:
    out = console()
    out.print(
        f"{model}: {found.queries:,} texts ask for {images:,} images. R@1 "
        f"{found.plain.r1:.1%}, R@5 {found.plain.r5:.1%}, R@10 {found.plain.r10:.1%}, mean recall "
        f"{found.plain.mean:.1%}",
        markup=False,
        soft_wrap=True,
    )
    out.print(_table("asked", found.asked))
    if found.normalized:
        out.print(_table(f"asked, then {' and '.join(found.normalizers)}", found.normalized))
    out.print(
        "Over the texts that each way changes: mean recall of the plain text and as asked, the "
        "points lost, and their 95 % interval.",
        style="dim",
        soft_wrap=True,
    )


def _table(title: str, rows: tuple[Asked, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(title, no_wrap=True)
    for heading in ("texts", "plain", "so asked", "lost", "95 % interval", "over all texts"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("for example", overflow="ellipsis", no_wrap=True, max_width=44, style="dim")
    for row in rows:
        if row.lost is None or row.plain is None or row.asked is None or row.example is None:
            table.add_row(row.name, "0", "", "", "", "", "", "")
            continue
        table.add_row(
            row.name,
            f"{row.changed:,}",
            f"{row.plain.mean:.1%}",
            f"{row.asked.mean:.1%}",
            f"{100 * row.lost.value:+.1f}",
            f"{100 * row.lost.low:+.1f} to {100 * row.lost.high:+.1f}",
            f"{100 * row.lost_overall:+.1f}",
            row.example[1],
            style="red" if row.lost.low > 0 else None,
        )
    return table


def _as_json(row: Asked) -> dict[str, Any]:
    return {
        "name": row.name,
        "meaning": row.meaning,
        "changed": row.changed,
        "plain": None if row.plain is None else _recall(row.plain),
        "asked": None if row.asked is None else _recall(row.asked),
        "lost": None
        if row.lost is None
        else {"value": row.lost.value, "low": row.lost.low, "high": row.lost.high},
        "lost_overall": row.lost_overall,
        "example": None if row.example is None else list(row.example),
    }


def _recall(recall: Recall) -> dict[str, float]:
    return {"r1": recall.r1, "r5": recall.r5, "r10": recall.r10, "mean": recall.mean}
