"""``cn-clip data split``: training, validation and test pairs without leaks between them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from rich.table import Table

from cn_clip.cli.show import Amount, Flag, Workers, console, print_json, print_some, progress_bar
from cn_clip.processes import usable_cpus
from cn_clip.translation import _


def split(
    source: str,
    /,
    *,
    out: str,
    val: float = 0.1,
    test: float = 0.0,
    to: Literal["csv", "tar"] | None = None,
    seed: Amount = 0,
    threshold: int = 19,
    min_caption: Amount = 5,
    workers: Workers = None,
    overwrite: Flag = False,
    json: Flag = False,
) -> int:
    """Split a source of pairs into train, val and test, without leaks between them.

    An image with all its texts is on one side, and so are near-duplicate images, and images with an
    equal caption. The same data and seed give the same split. Pairs without a readable image or
    caption are left out, counted and listed; the exit code is then 1.

    Example: cn-clip data split products.csv --out shop --val 0.1 --test 0.1

    Parameters
    ----------
    source
        KIND:PATH, with KIND folder, csv, jsonl, parquet, tsv, lmdb or tar.
    out
        A new folder: of train.csv, val.csv and test.csv, or of folders of tar shards.
    val
        What validation gets: a fraction of the images, or a number of them from 1 on.
    test
        What the test gets, in the same form; 0 makes no test part.
    to
        csv names the images where they are, tar copies them. Default: csv if all images are files
        of their own.
    seed
        Chooses the images that are held out.
    threshold
        Maximum differing bits of the perceptual hashes of near-duplicates, of 256; 0 skips them.
    min_caption
        Minimum length of compared captions, in characters; 0 compares none.
    workers
        Number of worker processes, by default one per CPU; 0 uses the main process.
    overwrite
        Replace OUT if this command wrote it.
    json
        Print JSON instead of a table.
    """
    from cn_clip.data.sources.open import open_source, paths_of
    from cn_clip.data.split import Sizes, claim_split, split

    inputs = paths_of(source)
    claim_split(out, inputs=inputs, overwrite=overwrite)
    worker_count = usable_cpus() if workers is None else workers
    opened = open_source(source, workers=worker_count)
    with progress_bar(_("comparing images")) as on_progress:
        result = split(
            opened,
            out,
            sizes=Sizes(val, test),
            to=to,
            seed=seed,
            threshold=threshold,
            min_caption=min_caption,
            workers=worker_count,
            inputs=inputs,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    print_some(result.skipped, _("cn-clip data check lists them"))
    if json:
        print_json(asdict(result))
        return 1 if result.skipped else 0
    total = sum(part.images for part in result.parts.values())
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in (_("images"), _("share"), _("pairs")):
        table.add_column(column, justify="right")
    table.add_column(_("source"), overflow="fold")
    for name, part in result.parts.items():
        share = f"{part.images / total:.1%}"
        table.add_row(name, f"{part.images:,}", share, f"{part.pairs:,}", part.source)
    out_console = console()
    out_console.print(table, markup=False)
    out_console.print(
        _(
            "kept on one side: {near_duplicates:,} near-duplicate images, and the images of "
            "{equal_captions:,} captions that several have; {skipped_count:,} pairs left out",
            near_duplicates=result.near_duplicates,
            equal_captions=result.equal_captions,
            skipped_count=len(result.skipped),
        ),
        markup=False,
    )
    return 1 if result.skipped else 0
