"""``cn-clip convert``: checkpoint conversion."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from rich.markup import escape
from rich.table import Table

from cn_clip.cli.show import Flag, console, print_json
from cn_clip.translation import _, translate


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

    The format of the input is detected. Both models are run on a photo and two sentences, and the
    output is written only if they agree.

    Parameters
    ----------
    source
        An official .pt file, a training checkpoint, a Hugging Face ChineseCLIPModel folder, or
        our folder.
    out
        A .pt file for --to official; a folder for hf and safetensors.
    to
        The format to write: official (.pt), hf (transformers' ChineseCLIPModel) or safetensors
        (ours, for every model).
    dtype
        The precision to write. The default is that of the input.
    overwrite
        Replace OUT if this command wrote it.
    json
        Print JSON instead of a table.
    """
    from cn_clip.convert import convert as run

    result = run(source, out, to, dtype=dtype, overwrite=overwrite)
    if json:
        print_json(asdict(result))
        return
    table = Table(box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    dropped = ", ".join(result.dropped[:8]) + (" ..." if len(result.dropped) > 8 else "")
    for key, value in {
        _("read"): f"{result.source} ({translate(result.source_format)}, "
        f"{result.size_before / 1e6:,.1f} MB)",
        _(
            "wrote"
        ): f"{result.out} ({result.to}, {result.dtype}, {result.size_after / 1e6:,.1f} MB)",
        _("model"): result.model,
        _("kept"): _("{kept} tensors", kept=result.kept),
        _("dropped"): dropped or _("nothing"),
        _("verified"): _(
            "embeddings of both differ by {largest_difference:.1e} at most",
            largest_difference=result.largest_difference,
        ),
    }.items():
        table.add_row(key, escape(value))
    console().print(table)
