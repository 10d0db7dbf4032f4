"""``cn-clip eval robustness``: recall on rewritten queries."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from cn_clip.cli.eval.retrieval import fractions
from cn_clip.cli.loading import DEFAULT, Loading
from cn_clip.cli.show import Amount, ContextLength, Flag, console, print_json, progress
from cn_clip.install import install_command
from cn_clip.translation import N_, _, translate

if TYPE_CHECKING:
    from cn_clip.eval.robustness.measure import RewriteResult, Robustness

_NEEDS_OPENCC = ("simplified", "traditional", "taiwan")


def robustness(
    *,
    data: Annotated[list[str], Parameter(negative=())],
    loading: Loading = DEFAULT,
    normalize: Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)] = (),
    context_length: ContextLength = 52,
    seed: Amount = 0,
    json: Flag = False,
) -> int:
    """Measure the recall lost on rewritten queries.

    The rewrites: simplified and traditional characters, half and full width, with and without
    punctuation, synonyms, English and mixed English, and long texts up to and beyond the context
    limit. Each is compared with the original texts over the texts that it changes: the mean of
    recall at 1, 5 and 10 from text to image, with the 95 % interval of a paired bootstrap. The exit
    code is 1 if some of the data are unreadable.

    Parameters
    ----------
    data
        KIND:PATH, with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar; repeat for several.
    normalize
        Also measure with each query normalised: nfkc (Unicode) or simplified (OpenCC); repeat to
        apply both, in this order.
    context_length
        Context length of the model in tokens, [CLS] and [SEP] included.
    seed
        Seed of the bootstrap.
    json
        Print JSON instead of a table.
    """
    from cn_clip.data.sources.open import open_mix
    from cn_clip.eval.dataset import eval_set_of
    from cn_clip.eval.images import embed_eval_images
    from cn_clip.eval.robustness.measure import robustness
    from cn_clip.eval.robustness.rewrites import all_rewrites
    from cn_clip.normalize import have_opencc, normalized

    normalized("", normalize)  # checks the names before the work
    omitted = () if have_opencc() else _NEEDS_OPENCC
    rewrites = [
        rewrite
        for rewrite in all_rewrites(context_length=context_length)
        if rewrite.name not in omitted
    ]
    dataset = eval_set_of(open_mix(data))
    embedder = loading.load()
    with progress() as bars:
        task = bars.add_task(_("embedding images"), total=len(dataset.images))
        images = embed_eval_images(embedder, dataset, tick=partial(bars.advance, task))
        rounds = len(rewrites) + (1 + len(rewrites)) * bool(normalize)
        task = bars.add_task(_("rewriting queries"), total=rounds)
        result = robustness(
            embedder,
            images.vectors,
            dataset.texts,
            images.pairs,
            rewrites,
            normalizers=normalize,
            seed=seed,
            tick=partial(bars.advance, task),
        )
    if json:
        print_json(
            {
                "model": loading.model,
                "data": data,
                "images": len(images.indexes),
                "queries": result.queries,
                "plain": fractions(result.original),
                "rewrites": [_as_json(row) for row in result.results],
                "normalize": list(result.normalizers),
                "normalized": [_as_json(row) for row in result.normalized],
                "left_out": list(omitted),
                "skipped": dataset.skipped,
            }
        )
    else:
        _print(result, loading.model, len(images.indexes))
    if omitted:
        print(
            _(
                "cn-clip: omitted {omitted}, which need OpenCC: {command}",
                omitted=", ".join(omitted),
                command=install_command("eval"),
            ),
            file=sys.stderr,
        )
    for message in dataset.skipped:
        print(_("cn-clip: skipped: {message}", message=message), file=sys.stderr)
    return 1 if dataset.skipped else 0


def _print(result: Robustness, model: str, images: int) -> None:
    out, recall = console(), result.original
    out.print(
        _(
            "{model}: {queries:,} queries, {images:,} images. R@1 {r1:.1%}, R@5 {r5:.1%}, R@10 "
            "{r10:.1%}, mean recall {mean:.1%}",
            model=model,
            queries=result.queries,
            images=images,
            r1=recall.r1,
            r5=recall.r5,
            r10=recall.r10,
            mean=recall.mean,
        ),
        markup=False,
        soft_wrap=True,
    )
    out.print(_table(_("rewrite"), result.results))
    if result.normalized:
        out.print(
            _table(
                _("rewrite, then {normalizers}", normalizers=_(" and ").join(result.normalizers)),
                result.normalized,
            )
        )
    out.print(
        _(
            "Over the queries that each rewrite changes: mean recall before and after, the loss "
            "in points, and its 95 % interval."
        ),
        style="dim",
        soft_wrap=True,
    )


def _table(title: str, rows: tuple[RewriteResult, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(title, no_wrap=True)
    for heading in (
        N_("queries"),
        N_("before"),
        N_("after"),
        N_("loss"),
        N_("95 % interval"),
        N_("over all queries"),
    ):
        table.add_column(translate(heading), justify="right", no_wrap=True)
    table.add_column(_("example"), overflow="ellipsis", no_wrap=True, max_width=44, style="dim")
    for row in rows:
        if not (row.loss and row.original and row.rewritten and row.example):
            table.add_row(translate(row.name), "0", "", "", "", "", "", "")
            continue
        table.add_row(
            translate(row.name),
            f"{row.changed:,}",
            f"{row.original.mean:.1%}",
            f"{row.rewritten.mean:.1%}",
            f"{100 * row.loss.value:+.1f}",
            _("{low:+.1f} to {high:+.1f}", low=100 * row.loss.low, high=100 * row.loss.high),
            f"{100 * row.loss_overall:+.1f}",
            row.example[1],
            style="red" if row.loss.low > 0 else None,
        )
    return table


def _as_json(row: RewriteResult) -> dict[str, Any]:
    return {
        "name": row.name,
        "meaning": row.description,
        "changed": row.changed,
        "plain": None if row.original is None else fractions(row.original),
        "rewritten": None if row.rewritten is None else fractions(row.rewritten),
        "lost": None
        if row.loss is None
        else {"value": row.loss.value, "low": row.loss.low, "high": row.loss.high},
        "lost_overall": row.loss_overall,
        "example": None if row.example is None else list(row.example),
    }
