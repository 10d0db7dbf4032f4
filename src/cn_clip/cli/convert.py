"""``cn-clip convert``: a checkpoint from one format to another."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from rich.markup import escape
from rich.table import Table

from cn_clip.cli.show import Flag, console, print_json


def convert(
    source: str,
    out: str,
    /,
    *,
    to: Literal["official", "hf", "safetensors"],
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Write a checkpoint in another format, without optimizer state.

    The format of the input is detected. Both files are run on a photo and two sentences, and the
    output appears only if they agree.

    Parameters
    ----------
    source
        An official .pt file, a training checkpoint, a Hugging Face ChineseCLIPModel folder, or a
        folder of ours.
    out
        A .pt file for --to official; a folder for hf and safetensors.
    to
        The format to write: official (.pt), hf (transformers' ChineseCLIPModel) or safetensors
        (ours, for every model).
    dtype
        The precision to write; by default that of the input.
    overwrite
        Replace what this command wrote at OUT.
    json
        Print JSON instead of a table.
    """
    from cn_clip.convert import convert as run

    done = run(source, out, to, dtype=dtype, overwrite=overwrite)
    if json:
        print_json(asdict(done))
        return
    table = Table(box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    dropped = ", ".join(done.dropped[:8]) + (" ..." if len(done.dropped) > 8 else "")
    for key, value in {
        "read": f"{done.source} ({done.source_format}, {done.size_before / 1e6:,.1f} MB)",
        "wrote": f"{done.out} ({done.to}, {done.dtype}, {done.size_after / 1e6:,.1f} MB)",
        "model": done.model,
        "kept": f"{done.kept} tensors",
        "dropped": dropped or "nothing",
        "verified": f"unit vectors of both differ by {done.largest_difference:.1e} at most",
    }.items():
        table.add_row(key, escape(value))
    console().print(table)
