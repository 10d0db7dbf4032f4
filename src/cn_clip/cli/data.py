"""``cn-clip data``: pack, check and decontaminate training data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import App
from rich.table import Table

from cn_clip.cli.show import (
    Amount,
    ContextLength,
    Flag,
    Workers,
    check_different_paths,
    console,
    print_json,
    progress,
)
from cn_clip.errors import one_line

if TYPE_CHECKING:
    from cn_clip.data.sources.base import Source

data = App(name="data", help="Pack, check and decontaminate training data.")

_LISTED = 20  # problems that are printed; --json and --report have more


@data.command
def pack(
    source: str,
    /,
    *,
    out: str,
    to: Literal["tar", "tsv", "lmdb"] = "tar",
    max_side: int | None = None,
    format: Literal["jpeg", "webp"] | None = None,
    quality: int = 92,
    without: str | None = None,
    images_per_shard: int = 5000,
    split: str = "train",
    workers: Workers = None,
    overwrite: Flag = False,
    json: Flag = False,
) -> int:
    """Write any source of pairs as tar shards, or as the official TSV or LMDB.

    Each picture is written once, with all its texts. Interrupted, the same command goes on after
    the last finished shard. Pairs that cannot be read are counted and listed; the exit code is
    then 1.

    Parameters
    ----------
    source
        KIND:PATH, with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar.
    out
        A folder, new or begun by the same command.
    to
        tar shards, as WebDataset reads them; the official tsv with jsonl; the official lmdb.
    max_side
        Make larger pictures smaller, to so many pixels of their longer side.
    format
        Encode all pictures anew.
    quality
        Of JPEG and WebP.
    without
        Leave out the pairs that `cn-clip data decontaminate` listed in this file.
    images_per_shard
        Pictures in a tar.
    split
        The name in the files of a tsv.
    workers
        Processes; by default one for each processor. 0 works in this one.
    overwrite
        Replace what this command wrote at OUT.
    json
        Print JSON instead of a sentence.
    """
    from dataclasses import asdict

    from cn_clip.data.curate.decontaminate import read_removed
    from cn_clip.data.encode import Encoding
    from cn_clip.data.pack import claim_pack, pack
    from cn_clip.data.sources.open import open_source, paths_of

    encodings = {None: None, "jpeg": "JPEG", "webp": "WEBP"}
    inputs = paths_of(source)
    inputs += [] if without is None else [Path(without)]
    claim_pack(out, to=to, inputs=inputs, overwrite=overwrite)
    opened = open_source(source)
    _note_unmatched(opened)
    with _ticking("packing pictures") as tick:
        done = pack(
            opened,
            out,
            to=to,
            encoding=Encoding(max_side, encodings[format], quality),  # type: ignore[arg-type]
            without=None if without is None else read_removed(Path(without), opened),
            images_per_shard=images_per_shard,
            split=split,
            workers=_processes(workers),
            inputs=inputs,
            overwrite=overwrite,
            tick=tick,
        )
    _list(done.skipped, out)
    if json:
        print_json(asdict(done))
    else:
        shards = f" in {done.shards:,} shards" if to == "tar" else ""
        console().print(
            f"{done.pairs:,} pairs of {done.images:,} pictures, {done.bytes / 1e6:,.1f} MB"
            f"{shards}, at {done.out}; {len(done.skipped):,} left out",
            markup=False,
        )
    return 1 if done.skipped else 0


@data.command
def check(
    source: str,
    /,
    *,
    report: str | None = None,
    context_length: ContextLength = 52,
    threshold: int = 19,
    workers: Workers = None,
    json: Flag = False,
) -> int:
    """Read every row and every picture of a source, and tell what is wrong with it.

    The exit code is 1 if rows or pictures cannot be read, captions are empty, or a text id stands
    for two texts; what else is found is only told.

    Parameters
    ----------
    source
        KIND:PATH, with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar.
    report
        Write a page with histograms and pictures to this .html file.
    context_length
        Captions with more tokens are named.
    threshold
        How many bits of a perceptual hash near-duplicates may differ in; 0 does not look for them.
    workers
        Processes; by default one for each processor. 0 works in this one.
    json
        Print JSON instead of a table.
    """
    from cn_clip.data.curate.check import KINDS, check
    from cn_clip.data.curate.check_report import write_report
    from cn_clip.data.sources.open import open_source, paths_of
    from cn_clip.html.page import claim_page

    if report is not None:
        claim_page(report, "data check", inputs=paths_of(source))
    opened = open_source(source)
    with _ticking("checking") as tick:
        found = check(
            opened,
            context_length=context_length,
            threshold=threshold,
            workers=_processes(workers),
            tick=tick,
        )
    if report is not None:
        write_report(found, opened, Path(report))
    if json:
        print_json(
            {
                "source": found.source,
                "fit": found.fit,
                "pairs": found.pairs,
                "images": found.images,
                "captions": found.captions,
                "languages": dict(found.languages),
                "problems": {kind: found.counts[kind] for kind in KINDS},
                "listed": [
                    {"kind": p.kind, "row": p.index, "text": p.text} for p in found.problems
                ],
            }
        )
        return 0 if found.fit else 1
    table = Table(box=None, pad_edge=False)
    table.add_column(found.source, no_wrap=True)
    table.add_column("", justify="right")
    table.add_column("the first", overflow="fold")
    for label, count in (
        ("pairs", found.pairs),
        ("pictures", found.images),
        ("different captions", found.captions),
        *((f"captions in {name}", count) for name, count in found.languages.most_common()),
    ):
        table.add_row(label, f"{count:,}", "")
    for kind, (unfit, meaning) in KINDS.items():
        count = found.counts[kind]
        first = next((p.text for p in found.problems if p.kind == kind), "")
        style = "red" if unfit and count else None
        table.add_row(meaning, f"{count:,}", first, style=style)
    console().print(table, markup=False)
    return 0 if found.fit else 1


@data.command
def decontaminate(
    source: str,
    /,
    *,
    against: str,
    out: str,
    report: str | None = None,
    threshold: int = 52,
    min_caption: Amount = 5,
    workers: Workers = None,
    overwrite: Flag = False,
    json: Flag = False,
) -> int:
    """Find the training pairs whose picture or caption a test set holds too.

    OUT lists them, for `cn-clip data pack SOURCE --without OUT`. Pictures count as the same when
    they are resized, recompressed, mirrored, shifted in colour, cropped by up to 5 %, or have other
    margins of one colour.

    Parameters
    ----------
    source
        The training pairs: KIND:PATH, with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar.
    against
        The test pairs, likewise.
    out
        A new .jsonl file.
    report
        Write a page with both pictures side by side to this .html file.
    threshold
        How many of 256 bits of a perceptual hash may differ; 0 compares no pictures.
    min_caption
        Captions with fewer characters are not compared; 0 compares none.
    workers
        Processes; by default one for each processor. 0 works in this one.
    overwrite
        Replace what this command wrote at OUT.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.data.curate.decontaminate import (
        claim_removed,
        decontaminate,
        write_page,
        write_removed,
    )
    from cn_clip.data.sources.open import open_source, paths_of
    from cn_clip.html.page import claim_page

    inputs = [*paths_of(source), *paths_of(against)]
    claim_removed(out, inputs=inputs, overwrite=overwrite)
    if report is not None:
        claim_page(report, "data decontaminate", inputs=inputs)
        check_different_paths(out, report)
    train, test = open_source(source), open_source(against)
    for opened in (train, test):
        _note_unmatched(opened)
    with _ticking("comparing pictures") as tick:
        found = decontaminate(
            train,
            test,
            threshold=threshold,
            min_caption=min_caption,
            workers=_processes(workers),
            tick=tick,
        )
    write_removed(found, train, test, Path(out))
    if report is not None:
        write_page(found, train, test, Path(report))
    _list(found.unreadable, report or "--report")
    if json:
        print_json(
            {
                "out": out,
                "pairs": found.pairs,
                "removed": len(found.removed),
                "for_picture": found.by_picture,
                "for_caption": found.by_caption,
                "unreadable": found.unreadable,
            }
        )
    else:
        console().print(
            f"{len(found.removed):,} of {found.pairs:,} pairs are in {found.against} too: "
            f"{found.by_picture:,} by their picture, {found.by_caption:,} by their caption "
            f"alone; listed in {out}",
            markup=False,
        )
    return 1 if found.unreadable else 0


def _processes(given: int | None) -> int:
    return (os.cpu_count() or 1) if given is None else given


@contextmanager
def _ticking(what: str) -> Iterator[Callable[[int, int], None]]:
    with progress() as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _note_unmatched(source: Source) -> None:
    if alone := source.unmatched():
        print(
            f"cn-clip: warning: {len(alone):,} of {source.name} make no pair (the first: "
            f"{one_line(alone[0])}); cn-clip data check lists them",
            file=sys.stderr,
        )


def _list(sentences: list[str], out: str) -> None:
    for sentence in sentences[:_LISTED]:
        print(f"cn-clip: {sentence}", file=sys.stderr)
    if len(sentences) > _LISTED:
        print(f"cn-clip: and {len(sentences) - _LISTED:,} more; see {out}", file=sys.stderr)
