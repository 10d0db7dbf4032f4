"""The official script that writes LMDBs: ``python -m cn_clip.preprocess.build_lmdb_dataset``.

All images of a split are written, with or without a text, as the official evaluation needs them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cn_clip.cli.official import parser_of, run_script
from cn_clip.errors import UsageError
from cn_clip.translation import _

_SMALL = 1000  # rows, for which starting processes takes longer than the work


def main(arguments: Sequence[str]) -> int:
    """Write the LMDBs of all splits; return the exit code."""
    parser = parser_of("build_lmdb_dataset", "cn-clip data pack SOURCE --to lmdb --out FOLDER")
    parser.add_argument("--data_dir", "--data-dir", required=True)
    parser.add_argument("--splits", required=True)
    parser.add_argument("--lmdb_dir", "--lmdb-dir")
    options = parser.parse_args(arguments)
    data = Path(options.data_dir)
    if not data.is_dir():
        raise UsageError(_("--data_dir {folder} is not a folder; give one", folder=data))
    out = Path(options.lmdb_dir or data / "lmdb")
    splits = [split.strip() for split in options.splits.split(",") if split.strip()]
    if not splits:
        raise UsageError(_("--splits names no split; give some, such as train,valid,test"))
    return max([_write_split(data, split, out / split) for split in dict.fromkeys(splits)])


def _write_split(data: Path, split: str, out: Path) -> int:
    import numpy as np

    from cn_clip.cli.show import print_some, progress_bar
    from cn_clip.data.pack import pack
    from cn_clip.data.sources.official import Tsv
    from cn_clip.processes import usable_cpus

    images = data / f"{split}_imgs.tsv"
    if not images.is_file():
        raise UsageError(_("--splits {split}: no such file: {images}", split=split, images=images))
    source = Tsv(str(images), images, unpaired=True)
    without = [row for row in range(len(source)) if not source.row(row).image_id]
    with progress_bar(_("packing images")) as on_progress:
        done = pack(
            source,
            out,
            to="lmdb",
            without=np.array(without, np.int64),
            workers=usable_cpus() if len(source) > _SMALL else 0,
            inputs=[images, data / f"{split}_texts.jsonl"],
            overwrite=True,
            on_progress=on_progress,
        )
    print_some(done.skipped, _("see {out}", out=os.fspath(out)))
    print(
        _(
            "{pairs:,} pairs and {images:,} images of {split} are in {out}",
            pairs=done.pairs,
            images=done.images,
            split=split,
            out=out,
        )
    )
    return 1 if done.skipped else 0


if __name__ == "__main__":
    run_script(main)
