"""``cn-clip embed``: embed images or texts into a file."""

from __future__ import annotations

import sys
from typing import Literal

from cn_clip.cli.loading import DEFAULT, Loading
from cn_clip.cli.show import Flag, Rate, console, print_json, progress
from cn_clip.errors import UsageError
from cn_clip.translation import _, translate


def embed(
    kind: Literal["images", "texts"],
    /,
    *inputs: str,
    out: str,
    loading: Loading = DEFAULT,
    overwrite: Flag = False,
    json: Flag = False,
) -> int:
    """Write the embeddings (unit vectors) of images or texts to a file.

    After an interruption, the same command resumes. Unreadable images are skipped, counted and
    listed; the exit code is then 1.

    Parameters
    ----------
    kind
        images or texts.
    inputs
        For images: folders (recursive), globs, image files, .txt (one path per line), .jsonl
        ({"image": path, "image_id": id}) or the official .tsv (id, tab, base64). For texts: .txt
        (one text per line) or .jsonl ({"text": ..., "text_id": id}). For both: a source of pairs,
        as for `cn-clip train`: csv:products.csv, parquet:pairs.parquet, tar:shards/*.tar, ...
    out
        X.npz (embeddings, ids, about), X.jsonl (official features), or a folder (clip-retrieval's
        layout: img_emb and metadata).
    overwrite
        Replace OUT if this command wrote it, and start over.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.embeddings.extract import claim_out, extract
    from cn_clip.embeddings.inputs import is_quick_to_list, paths_of_inputs, read_images, read_texts

    if not inputs:
        raise UsageError(
            _("nothing to embed; give the {kind} after `cn-clip embed {kind}`", kind=kind)
        )
    read = read_images if kind == "images" else read_texts
    listed = list(read(inputs)) if is_quick_to_list(inputs) else None
    sources = (*paths_of_inputs(kind, inputs), *loading.paths)
    claim_out(out, inputs=sources, overwrite=overwrite)
    embedder = loading.load()
    with progress() as bars:
        task = bars.add_task(
            _("embedding {kind}", kind=translate(kind)), total=len(listed) if listed else None
        )
        rate = Rate()

        def on_progress(done: int, total: int | None) -> None:
            status = _(
                "embedding {kind}, {per_second:,.0f} per second, {memory:,.0f} MB",
                kind=translate(kind),
                per_second=rate.update(done),
                memory=_memory(),
            )
            bars.update(task, completed=done, total=total, description=status)

        done = extract(
            embedder,
            kind,
            listed or read(inputs),
            out,
            inputs=sources,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    for _unused, reason in done.failed:
        print(f"cn-clip: {reason}", file=sys.stderr)
    if json:
        print_json(
            {
                "out": done.out,
                "model": embedder.name,
                "normalized": True,
                "written": done.written,
                "embedded": done.embedded,
                "resumed": done.resumed,
                "seconds": round(done.seconds, 3),
                "rate": round(done.rate, 1),
                "memory_mb": round(_memory()),
                "failed": [{"id": name, "error": reason} for name, reason in done.failed],
            }
        )
    else:
        resumed = _(", {resumed:,} of them reused", resumed=done.resumed) if done.resumed else ""
        console().print(
            _(
                "{written:,} unit vectors of width {dim}{resumed} in {out}: {rate:,.1f} {kind} "
                "per second, {memory:,.0f} MB of memory, {failed_count:,} failed",
                written=done.written,
                dim=embedder.dim,
                resumed=resumed,
                out=done.out,
                rate=done.rate,
                kind=translate(kind),
                memory=_memory(),
                failed_count=len(done.failed),
            ),
            markup=False,
        )
    return 1 if done.failed else 0


def _memory() -> float:
    """Return the peak memory of this process in MB; 0 if unknown."""
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)
