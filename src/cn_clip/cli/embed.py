"""``cn-clip embed``: pictures or texts to a file of embeddings."""

from __future__ import annotations

import sys
import time
from typing import Literal

from cn_clip.cli.loading import DEFAULT, Loading
from cn_clip.cli.show import Flag, console, print_json, progress
from cn_clip.errors import UsageError


def embed(
    kind: Literal["images", "texts"],
    /,
    *inputs: str,
    out: str,
    loading: Loading = DEFAULT,
    overwrite: Flag = False,
    json: Flag = False,
) -> int:
    """Write the embeddings (unit vectors) of many pictures or texts to a file.

    Interrupted, the same command goes on where it stopped. Damaged pictures are counted and
    listed, and do not stop the rest; the exit code is then 1.

    Parameters
    ----------
    kind
        images or texts.
    inputs
        For images: folders (searched through), globs, picture files, .txt (a path a line), .jsonl
        ({"image": path, "image_id": id}) or the official .tsv (id, tab, base64). For texts: .txt
        (a text a line) or .jsonl ({"text": ..., "text_id": id}).
    out
        X.npz (embeddings, ids, about), X.jsonl (official features), or a folder (clip-retrieval's
        layout: img_emb and metadata).
    overwrite
        Replace what this command wrote at OUT, and begin anew.
    json
        Print JSON instead of a sentence.
    """
    from cn_clip.embeddings.extract import claim_out, extract
    from cn_clip.embeddings.inputs import read_images, read_texts

    if not inputs:
        raise UsageError(f"nothing to embed; give the {kind} after `cn-clip embed {kind}`")
    read = read_images if kind == "images" else read_texts
    listed = list(read(inputs)) if _quick_to_list(inputs) else None
    sources = (*inputs, *loading.paths)
    claim_out(out, inputs=sources, overwrite=overwrite)
    embedder = loading.load()
    with progress() as bars:
        task = bars.add_task(f"embedding {kind}", total=len(listed) if listed else None)
        begin, count = time.perf_counter(), 0

        def tick(more: int) -> None:
            nonlocal count
            count += more
            rate = count / (time.perf_counter() - begin)
            told = f"embedding {kind}, {rate:,.0f} a second, {_memory():,.0f} MB"
            bars.update(task, advance=more, description=told)

        done = extract(
            embedder,
            kind,
            listed or read(inputs),
            out,
            inputs=sources,
            overwrite=overwrite,
            tick=tick,
        )
    for _, reason in done.failed:
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
        resumed = f", {done.resumed:,} of them before" if done.resumed else ""
        console().print(
            f"{done.written:,} unit vectors of {embedder.dim} numbers{resumed} in {done.out}: "
            f"{done.rate:,.1f} {kind} a second, {_memory():,.0f} MB of memory, "
            f"{len(done.failed):,} failed",
            markup=False,
        )
    return 1 if done.failed else 0


def _quick_to_list(inputs: tuple[str, ...]) -> bool:
    """Whether listing the inputs first, for the time left, is cheap; a TSV is all its pictures."""
    return not any(given.lower().endswith(".tsv") for given in inputs)


def _memory() -> float:
    """Return the most memory this process held, in MB; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e6 if sys.platform == "darwin" else 1e3)
