"""``cn-clip bulk dedupe`` and ``bulk filter``: which images of embedding shards are kept."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from cn_clip.cli.engines import DEFAULT_ENGINE, Engine
from cn_clip.cli.show import Flag, console, print_json, progress_bar
from cn_clip.translation import _

Cosine = Annotated[float, Parameter(validator=Number(gt=0, lte=1))]
AnyCosine = Annotated[float | None, Parameter(validator=Number(gte=-1, lte=1))]
Share = Annotated[float | None, Parameter(validator=Number(gt=0, lt=1))]


def dedupe(
    folder: str,
    /,
    *,
    out: str,
    threshold: Cosine = 0.97,
    look: Flag = False,
    within: str | None = None,
    engine: Engine = DEFAULT_ENGINE,
    overwrite: Flag = False,
    json: Flag = False,
) -> int:
    """List the images of embedding shards without near-duplicates.

    An image is left out if one with a lower id is nearly the same. It needs the index of `cn-clip
    bulk index`. The list is a source of pairs, jsonl:OUT, for `cn-clip train`, and a list of images
    for `cn-clip bulk plan`.

    Parameters
    ----------
    folder
        Embedding shards, as `cn-clip bulk` or `cn-clip embed images` wrote them.
    out
        A new .jsonl file: image, text, image_id and id of each image that is kept.
    threshold
        Least cosine of two embeddings of near-duplicates.
    look
        Also read the files of candidates, and compare them by perceptual hashes.
    within
        Consider only the images in this list of an earlier run.
    overwrite
        Replace OUT if this command wrote it.
    json
        Print JSON, with the pairs of removed images, instead of a sentence.
    """
    from cn_clip.files import as_path
    from cn_clip.shards.kept import claim_kept, read_kept
    from cn_clip.shards.near_duplicates import remove_duplicates

    path, inputs = as_path(folder), _inputs(folder, within)
    claimed = claim_kept(out, "bulk dedupe", inputs=inputs, overwrite=overwrite)
    with engine.opened() as workers, progress_bar(_("comparing images")) as on_progress:
        done = remove_duplicates(
            path,
            claimed,
            threshold=threshold,
            look=look,
            within=None if within is None else read_kept(Path(within)),
            workers=workers,
            on_progress=on_progress,
        )
    if json:
        print_json(
            {"out": out, "images": done.images, "kept": done.kept, "removed": done.removed.tolist()}
        )
        return 0
    print(
        _(
            "{kept:,} of {images:,} images are kept, {removed:,} are near-duplicates; see {out}",
            kept=done.kept,
            images=done.images,
            removed=done.images - done.kept,
            out=out,
        )
    )
    return 0


def filter(
    folder: str,
    /,
    *,
    out: str,
    min_cosine: AnyCosine = None,
    share: Share = None,
    within: str | None = None,
    engine: Engine = DEFAULT_ENGINE,
    overwrite: Flag = False,
    json: Flag = False,
) -> int:
    """List the pairs of embedding shards whose image and text belong together.

    The shards need text embeddings beside those of the images. What cosine is high depends on the
    model; the distribution is printed. The list is a source of pairs, jsonl:OUT, for `cn-clip
    train`, and a list of images for `cn-clip bulk plan`.

    Parameters
    ----------
    folder
        Embedding shards with text embeddings, as `cn-clip bulk` wrote them.
    out
        A new .jsonl file: image, text, image_id and id of each pair that is kept.
    min_cosine
        Least cosine of an image and its text.
    share
        Keep this share of the pairs instead, those with the highest cosines: 0.3.
    within
        Consider only the pairs in this list of an earlier run.
    overwrite
        Replace OUT if this command wrote it.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.files import as_path
    from cn_clip.shards.folder import ShardFolder
    from cn_clip.shards.kept import claim_kept, read_kept
    from cn_clip.shards.similarity import filter_pairs

    opened = ShardFolder.open(as_path(folder))
    inputs = _inputs(folder, within)
    claimed = claim_kept(out, "bulk filter", inputs=inputs, overwrite=overwrite)
    with engine.opened() as workers, progress_bar(_("comparing pairs")) as on_progress:
        done = filter_pairs(
            opened,
            claimed,
            min_cosine=min_cosine,
            share=share,
            within=None if within is None else read_kept(Path(within)),
            workers=workers,
            on_progress=on_progress,
        )
    if json:
        print_json({"out": out} | asdict(done))
        return 0
    console().print(
        _(
            "{kept:,} of {pairs:,} pairs have a cosine of {min_cosine:.4f} or more; see {out}",
            kept=done.kept,
            pairs=done.pairs,
            min_cosine=done.min_cosine,
            out=out,
        ),
        markup=False,
    )
    shown = ", ".join(f"{share:.0%} {cosine:.3f}" for share, cosine in done.quantiles.items())
    console().print(_("pairs below a cosine: {shown}", shown=shown), markup=False)
    return 0


def _inputs(folder: str, within: str | None) -> list[str]:
    return [folder] if within is None else [folder, within]
