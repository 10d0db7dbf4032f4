"""``cn-clip data``: pack, check and decontaminate training data; the split is in its own file."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import App
from rich.table import Table

from cn_clip.cli.data_split import split
from cn_clip.cli.engines import DEFAULT_ENGINE, Engine
from cn_clip.cli.show import (
    Amount,
    ContextLength,
    Flag,
    Workers,
    check_different_paths,
    console,
    print_json,
    print_some,
    progress_bar,
)
from cn_clip.errors import one_line
from cn_clip.processes import usable_cpus
from cn_clip.translation import _, translate

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cn_clip.data.sources.base import Source

data = App(name="data", help="Pack, check, split and decontaminate training data.")
data.command(split)


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
    keep: str | None = None,
    images_per_shard: int = 5000,
    split: str = "train",
    engine: Engine = DEFAULT_ENGINE,
    overwrite: Flag = False,
    json: Flag = False,
) -> int:
    """Write a source of pairs as tar shards, or as the official TSV or LMDB.

    Every image is written once, with all its texts. After an interruption, the same command resumes
    after the last finished shard; a tsv or lmdb starts anew. Unreadable pairs are skipped, counted
    and listed; the exit code is then 1.

    Parameters
    ----------
    source
        KIND:PATH, with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar.
    out
        Output folder: new, or started by the same command.
    to
        Format: tar shards (WebDataset), the official tsv with jsonl, or the official lmdb.
    max_side
        Resize larger images to this longer side, in pixels.
    format
        Re-encode all images in this format.
    quality
        Of JPEG and WebP.
    without
        Leave out the pairs listed in this file by `cn-clip data decontaminate`.
    keep
        Keep only the images listed in this file by `cn-clip bulk dedupe` or `bulk filter`, of
        shards that were embedded from SOURCE.
    images_per_shard
        Images per tar.
    split
        Name of the split, in the file names of a tsv.
    overwrite
        Replace OUT if this command wrote it.
    json
        Print JSON instead of a sentence.
    """
    from dataclasses import asdict

    from cn_clip.data.encode import Encoding
    from cn_clip.data.pack import claim_pack, pack
    from cn_clip.data.sources.open import paths_of

    encodings = {None: None, "jpeg": "JPEG", "webp": "WEBP"}
    inputs = paths_of(source)
    inputs += [Path(given) for given in (without, keep) if given is not None]
    claim_pack(out, to=to, inputs=inputs, overwrite=overwrite)
    opened = _open(source, engine)
    with engine.opened() as workers, progress_bar(_("packing images")) as on_progress:
        done = pack(
            opened,
            out,
            to=to,
            encoding=Encoding(max_side, encodings[format], quality),  # type: ignore[arg-type]
            without=_left_out(opened, without, keep),
            images_per_shard=images_per_shard,
            split=split,
            workers=workers,
            inputs=inputs,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    print_some(done.skipped, _("see {out}", out=out))
    if json:
        print_json(asdict(done))
    else:
        shards = _(" in {shards:,} shards", shards=done.shards) if to == "tar" else ""
        left_out = (
            ""
            if without is None
            else _(", {count:,} left out by {file}", count=done.left_out, file=without)
        )
        console().print(
            _(
                "{pairs:,} pairs of {images:,} images, {megabytes:,.1f} MB{shards}, in {out}; "
                "{skipped_count:,} skipped{left_out}",
                pairs=done.pairs,
                images=done.images,
                megabytes=done.bytes / 1e6,
                shards=shards,
                out=done.out,
                skipped_count=len(done.skipped),
                left_out=left_out,
            ),
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
    engine: Engine = DEFAULT_ENGINE,
    json: Flag = False,
) -> int:
    """Read every row and image of a source, and list the problems.

    The exit code is 1 if rows or images are unreadable, captions are empty, or two texts share a
    text id. Other problems do not change it.

    Parameters
    ----------
    source
        KIND:PATH, with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar.
    report
        Write an HTML report with histograms and images to this file.
    context_length
        List captions with more tokens.
    threshold
        Maximum differing bits of the perceptual hashes of near-duplicates, of 256; 0 skips them.
    json
        Print JSON instead of a table.
    """
    from cn_clip.data.curate.check import check
    from cn_clip.data.curate.check_report import write_report
    from cn_clip.data.curate.check_result import PROBLEM_KINDS
    from cn_clip.data.sources.open import open_source, paths_of
    from cn_clip.html.page import claim_page

    if report is not None:
        claim_page(report, "data check", inputs=paths_of(source))
    opened = open_source(source, workers=engine.processes)
    with engine.opened() as workers, progress_bar(_("checking")) as on_progress:
        result = check(
            opened,
            context_length=context_length,
            threshold=threshold,
            workers=workers,
            on_progress=on_progress,
        )
    if report is not None:
        write_report(result, opened, Path(report))
    if json:
        print_json(
            {
                "source": result.source,
                "fit": result.fit,
                "pairs": result.pairs,
                "images": result.images,
                "captions": result.captions,
                "languages": dict(result.languages),
                "problems": {kind: result.counts[kind] for kind in PROBLEM_KINDS},
                "listed": [
                    {"kind": p.kind, "row": p.index, "text": p.text} for p in result.problems
                ],
            }
        )
        return 0 if result.fit else 1
    table = Table(box=None, pad_edge=False)
    table.add_column(result.source, no_wrap=True)
    table.add_column("", justify="right")
    table.add_column(_("first"), overflow="fold")
    for label, count in (
        (_("pairs"), result.pairs),
        (_("images"), result.images),
        (_("distinct captions"), result.captions),
        *(
            (_("captions in {language}", language=translate(name)), count)
            for name, count in result.languages.most_common()
        ),
    ):
        table.add_row(label, f"{count:,}", "")
    for kind, (unfit, meaning) in PROBLEM_KINDS.items():
        count = result.counts[kind]
        first = next((p.text for p in result.problems if p.kind == kind), "")
        style = "red" if unfit and count else None
        table.add_row(translate(meaning), f"{count:,}", first, style=style)
    console().print(table, markup=False)
    return 0 if result.fit else 1


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
    engine: Engine = DEFAULT_ENGINE,
    overwrite: Flag = False,
    json: Flag = False,
) -> int:
    """Find training pairs whose image or caption is also in a test set.

    OUT lists them, for `cn-clip data pack SOURCE --without OUT`. Resized, recompressed, mirrored or
    colour-shifted copies match too, as do crops by up to 5 % and other one-colour margins.

    Parameters
    ----------
    source
        The training pairs: KIND:PATH, with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar.
    against
        The test pairs, in the same form.
    out
        A new .jsonl file.
    report
        Write an HTML report with both images side by side to this file.
    threshold
        Maximum differing bits of two perceptual hashes, of 256; 0 compares no images.
    min_caption
        Minimum length of compared captions, in characters; 0 compares none.
    overwrite
        Replace OUT if this command wrote it.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.data.curate.decontaminate import (
        claim_removed,
        decontaminate,
        write_removed,
        write_removed_report,
    )
    from cn_clip.data.sources.open import paths_of
    from cn_clip.html.page import claim_page

    inputs = [*paths_of(source), *paths_of(against)]
    claim_removed(out, inputs=inputs, overwrite=overwrite)
    if report is not None:
        claim_page(report, "data decontaminate", inputs=inputs)
        check_different_paths(out, report)
    train, test = _open(source, engine), _open(against, engine)
    with engine.opened() as workers, progress_bar(_("comparing images")) as on_progress:
        result = decontaminate(
            train,
            test,
            threshold=threshold,
            min_caption=min_caption,
            workers=workers,
            on_progress=on_progress,
        )
    write_removed(result, train, test, Path(out))
    if report is not None:
        write_removed_report(result, train, test, Path(report))
    print_some(result.unreadable, _("see {report}", report=report or "--report"))
    if json:
        print_json(
            {
                "out": out,
                "pairs": result.pairs,
                "removed": len(result.removed),
                "by_image": result.by_image,
                "by_caption": result.by_caption,
                "unreadable": result.unreadable,
            }
        )
    else:
        console().print(
            _(
                "{removed_count:,} of {pairs:,} pairs are in {against} too: {by_image:,} by their "
                "image, {by_caption:,} by their caption alone; see {out}",
                removed_count=len(result.removed),
                pairs=result.pairs,
                against=result.against,
                by_image=result.by_image,
                by_caption=result.by_caption,
                out=out,
            ),
            markup=False,
        )
    return 1 if result.unreadable else 0


@data.command
def features(folder: str, /, *, workers: Workers = None, json: Flag = False) -> int:
    """Read the cached image features of a training run, and compare them with their checksums.

    Changes nothing. The exit code is 1 if a file is damaged. Training itself compares sizes only.

    Parameters
    ----------
    folder
        `features/STAGE` in the folder of a run, or the folder given with `--output.features`.
    workers
        Number of worker processes, by default one per CPU; 0 uses the main process.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.train.batches.feature_sums import check_features

    with progress_bar(_("checking shards")) as on_progress:
        worker_count = usable_cpus() if workers is None else workers
        found = check_features(folder, workers=worker_count, on_progress=on_progress)
    if json:
        print_json({"shards": found.shards, "bytes": found.bytes, "damaged": found.damaged})
        return 1 if found.damaged else 0
    print_some(found.damaged, "--json")
    print(
        _(
            "{shards:,} files of {bytes:,} bytes checked, {damaged:,} damaged",
            shards=found.shards,
            bytes=found.bytes,
            damaged=len(found.damaged),
        )
    )
    return 1 if found.damaged else 0


def _left_out(
    source: Source, without: str | None, keep: str | None
) -> npt.NDArray[np.int64] | None:
    """Return the indexes of the pairs that are not packed."""
    import numpy as np

    from cn_clip.data.curate.decontaminate import read_removed
    from cn_clip.shards.kept import rows_left_out

    found = [] if without is None else [read_removed(Path(without), source)]
    found += [] if keep is None else [rows_left_out(Path(keep), source)]
    return np.unique(np.concatenate(found)) if found else None


def _open(uri: str, engine: Engine) -> Source:
    """Open a source; warn of what is not in a pair, without repeating warnings of the opening."""
    from cn_clip.data.sources.open import open_source

    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", UserWarning)
        source = open_source(uri, workers=engine.processes)
    for warning in raised:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    known = {str(warning.message) for warning in raised}
    unmatched = [message for message in source.unmatched() if message not in known]
    if unmatched:
        print(
            _(
                "cn-clip: warning: {unmatched_count:,} items of {name} are not in a pair (the "
                "first: {unmatched}); cn-clip data check lists them",
                unmatched_count=len(unmatched),
                name=source.name,
                unmatched=one_line(unmatched[0]),
            ),
            file=sys.stderr,
        )
    return source
