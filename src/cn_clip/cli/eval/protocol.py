"""``cn-clip eval protocol``: reproduce a published score."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.table import Table

from cn_clip.cli.loading import DEFAULT, Loading
from cn_clip.cli.show import Flag, console, print_json, progress_bar
from cn_clip.errors import UsageError
from cn_clip.translation import N_, _, translate

if TYPE_CHECKING:
    from cn_clip.eval.protocols import Protocol, ScoreComparison


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
    """Reproduce the conditions of a published score and compare with it.

    Scores are published for RN50, ViT-B-16, ViT-L-14, ViT-L-14-336 and ViT-H-14. Data with other
    counts than the split are refused. docs/evaluation.md lists where to get each dataset.

    Parameters
    ----------
    name
        A name from `cn-clip eval protocol --list`, such as flickr30k-cn-test.
    data
        Folder with the official TSV of the split, or KIND:PATH.
    setup
        Published score to compare with.
    list_all
        Print all protocols with their published scores, and exit.
    json
        Print JSON instead of a table.
    """
    from cn_clip.eval import protocols

    if list_all:
        _print_list(list(protocols.protocols().values()), json)
        return 0
    if name is None:
        raise UsageError(_("no protocol given; see: cn-clip eval protocol --list"))
    spec = protocols.protocol(name)
    if spec.task == "classification":
        raise UsageError(
            _(
                "{name} is zero-shot classification, by {metric}; run: cn-clip eval zeroshot",
                name=name,
                metric=translate(spec.metric),
            )
        )
    if data is None:
        raise UsageError(
            _(
                "no data for {title}; give --data FOLDER with {split}_imgs.tsv and "
                "{split}_texts.jsonl, or KIND:PATH",
                title=translate(spec.title),
                split=spec.split,
            )
        )

    dataset = protocols.open_split(spec, data)
    embedder = loading.load()
    with progress_bar(_("embedding")) as tick:
        result = protocols.run_protocol(embedder, dataset, tick=tick)
    rows = protocols.compare_with_published(spec, result, setup=setup)
    if json:
        print_json(
            {
                "protocol": name,
                "setup": setup,
                "model": loading.model,
                "images": len(result.image_ids),
                "texts": len(result.text_ids),
                "source": spec.source,
                "figures": [{**asdict(row), "difference": row.difference} for row in rows],
            }
        )
    else:
        _print_comparison(spec, loading.model, setup, rows)
    return 0


def _print_comparison(spec: Protocol, model: str, setup: str, rows: list[ScoreComparison]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(f"{translate(spec.title)}: {model}")
    for column in (N_("ours"), _("published, {setup}", setup=setup), N_("difference")):
        table.add_column(translate(column), justify="right")
    for row in rows:
        table.add_row(
            f"{row.direction.replace('_', ' ')} {row.measure}",
            f"{row.ours:.1f}",
            "-" if row.published is None else f"{row.published:.1f}",
            "-" if row.difference is None else f"{row.difference:+.1f}",
        )
    console().print(table)
    unchecked = "" if spec.images else _("; no source states the counts of this split: not checked")
    console().print(
        _("published: {source}{unchecked}", source=spec.source, unchecked=unchecked), markup=False
    )


def _print_list(specs: list[Protocol], json: bool) -> None:
    if json:
        print_json({"protocols": [asdict(spec) for spec in specs]})
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(_("protocol"))
    table.add_column(_("dataset"))
    table.add_column(_("images"), justify="right")
    table.add_column(_("texts"), justify="right")
    table.add_column(_("metric"))
    table.add_column(_("published, zero-shot"))
    for spec in specs:
        counts = (f"{count:,}" if count else "-" for count in (spec.images, spec.texts))
        table.add_row(
            spec.name, translate(spec.title), *counts, translate(spec.metric), _published(spec)
        )
    console().print(table)


def _published(spec: Protocol) -> str:
    """Return the published R@1 text to image of each model, or the best score of five models."""
    if spec.best_of_five is not None:
        return _("{best_of_five:.1f}, best of five models", best_of_five=spec.best_of_five)
    scores = spec.published.get("zero-shot", {}).get("text_to_image", {})
    listed = ", ".join(f"{model} {recall[0]:.1f}" for model, recall in scores.items())
    return _("R@1 text to image: {listed}", listed=listed) if listed else _("none found")
