"""``cn-clip eval protocol``: a published figure, measured again."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.table import Table

from cn_clip.cli.eval.retrieval import ticking
from cn_clip.cli.loading import DEFAULT, Loading
from cn_clip.cli.show import Flag, console, print_json
from cn_clip.errors import UsageError

if TYPE_CHECKING:
    from cn_clip.eval.protocols import Compared, Protocol


def protocol(
    name: str | None = None,
    /,
    *,
    data: str | None = None,
    loading: Loading = DEFAULT,
    setup: Literal["zero-shot", "fine-tuned"] = "zero-shot",
    list_all: Annotated[bool, Parameter(name="--list", negative=(), show_default=False)] = False,
    json: Flag = False,
) -> int:
    """Measure as a published figure was measured, and print ours beside it.

    Figures are published for RN50, ViT-B-16, ViT-L-14, ViT-L-14-336 and ViT-H-14. Data whose counts
    are not those of the split are refused. docs/evaluation.md tells where to get each set.

    Parameters
    ----------
    name
        One of `cn-clip eval protocol --list`, such as flickr30k-cn-test.
    data
        A folder with the official TSV of the split, or KIND:PATH.
    setup
        Which published figure to compare with.
    list_all
        Print all protocols with what was published for them, and stop.
    json
        Print JSON instead of a table.
    """
    from cn_clip.eval import protocols

    if list_all:
        _print_list(list(protocols.protocols().values()), json)
        return 0
    if name is None:
        raise UsageError("which protocol? See: cn-clip eval protocol --list")
    wanted = protocols.protocol(name)
    if wanted.task == "classification":
        raise UsageError(
            f"{name} is zero-shot classification, in {wanted.metric}; run: cn-clip eval zeroshot"
        )
    if data is None:
        raise UsageError(
            f"where is {wanted.title}? Give --data FOLDER with {wanted.split}_imgs.tsv and "
            f"{wanted.split}_texts.jsonl, or KIND:PATH"
        )

    found = protocols.open_split(wanted, data)
    embedder = loading.load()
    with ticking("embedding") as tick:
        measured = protocols.run_protocol(embedder, found, tick=tick)
    rows = protocols.compare(wanted, measured, setup=setup)
    if json:
        print_json(
            {
                "protocol": name,
                "setup": setup,
                "model": measured.model,
                "pictures": len(measured.image_ids),
                "texts": len(measured.text_ids),
                "source": wanted.source,
                "figures": [{**asdict(row), "difference": row.difference} for row in rows],
            }
        )
    else:
        _print_compared(wanted, measured.model, setup, rows)
    return 0


def _print_compared(wanted: Protocol, model: str, setup: str, rows: list[Compared]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(f"{wanted.title}: {model}")
    for column in ("ours", f"published, {setup}", "difference"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row.direction.replace('_', ' ')} {row.measure}",
            f"{row.ours:.1f}",
            "-" if row.published is None else f"{row.published:.1f}",
            "-" if row.difference is None else f"{row.difference:+.1f}",
        )
    console().print(table)
    unchecked = "" if wanted.images else "; no source tells the counts of this split: not checked"
    console().print(f"published: {wanted.source}{unchecked}", markup=False)


def _print_list(every: list[Protocol], json: bool) -> None:
    if json:
        print_json([asdict(each) for each in every])
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("protocol", "set", "pictures", "texts", "metric", "published, zero-shot"):
        table.add_column(column)
    for each in every:
        counts = (f"{count:,}" if count else "-" for count in (each.images, each.texts))
        table.add_row(each.name, each.title, *counts, each.metric, _published(each))
    console().print(table)


def _published(each: Protocol) -> str:
    """Say what was published: R@1 text to image of each model, or the best of five."""
    if each.best_of_five is not None:
        return f"{each.best_of_five:.1f}, the best of five"
    figures = each.published.get("zero-shot", {}).get("text_to_image", {})
    told = ", ".join(f"{model} {recall[0]:.1f}" for model, recall in figures.items())
    return f"R@1 text to image: {told}" if told else "none found"
