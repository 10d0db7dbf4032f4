"""One checkpoint format to another, proven by running both on a photo and a few sentences."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from cn_clip import weights
from cn_clip.backends.torch import pick_precision
from cn_clip.embedder import Embedder
from cn_clip.errors import CheckpointError, UsageError
from cn_clip.model.clip import CLIP
from cn_clip.outputs import atomic_folder, claim, own_file, own_folder
from cn_clip.publish import atomic_file, flush

Format = Literal["official", "hf", "safetensors"]

_WRITERS: dict[str, Callable[[CLIP, Path], None]] = {
    "official": weights.write_official,
    "hf": weights.write_hugging_face,
    "safetensors": weights.write_folder,
}
# How the pickle in an official file of ours begins: {"epoch": 0, "name": ..., "state_dict": ...}
_PICKLED = b"epochq\x01K\x00X\x04\x00\x00\x00nameq\x02X"
_TEXTS = ["一只坐着的猫", "a photo of 火箭发射"]
# How far unit vectors may move by rounding the weights; the same weights give the same vectors.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did; sizes in bytes."""

    source: str
    source_format: str
    out: str
    to: Format
    model: str
    dtype: str
    kept: int
    dropped: tuple[str, ...]
    size_before: int
    size_after: int
    largest_difference: float
    """Largest difference of any number in the unit vectors that both gave."""


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: Format,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Read any known checkpoint and write it in another format, whole or not at all.

    Both are run on a photo and two sentences; ``out`` appears only if they agree. Optimizer
    state and whatever else is not the model is left out.

    Args:
        source: an official ``.pt``, a Hugging Face ``ChineseCLIPModel`` folder, our folder.
        out: a ``.pt`` file for ``"official"``, a folder for ``"hf"`` and ``"safetensors"``.
        to: the format to write.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; by default that of ``source``.
        overwrite: replace what this function wrote to ``out``.

    Raises:
        UsageError: ``out`` exists, is an input or holds other files; see ``outputs.claim``.
        CheckpointError: ``source`` is no Chinese-CLIP, the format has no place for it, or the two
            disagree. ``out`` is as it was before.
    """
    if to not in get_args(Format):
        raise UsageError(f"unknown format {to!r}; available: {', '.join(get_args(Format))}")
    wanted = None if dtype is None else pick_precision(dtype, torch.device("cpu"))
    source = Path(source)
    out = _claimed(out, to, source, overwrite)
    parts = weights.other_parts(source)
    checkpoint = weights.read(source, mapped=True)
    before = _size(source)
    kept = len(checkpoint.tensors)
    model = weights.build(checkpoint, dtype=None)
    if len({parameter.dtype for parameter in model.parameters()}) > 1:
        model.float()  # such as the official package has on a GPU; nothing runs them as they are
    if wanted == torch.float32:
        model.float()  # exact; and a half-precision run would not be
    given = model.dtype
    with (
        weights.explained(out),
        ThreadPoolExecutor(1) as beside,  # the disk works while the model runs
        atomic_file(out) if to == "official" else atomic_folder(out, "convert") as target,
    ):
        running = beside.submit(_run, model)
        if wanted is not None:  # rounds the weights, so the run comes first
            running.result()
            model.to(wanted)
        name, written = model.config.name, model.dtype
        _WRITERS[to](model, target)
        reference = running.result()
        del model, running
        flushing = beside.submit(flush, target)
        again = _run(weights.build(weights.read(target, mapped=True), dtype=None))
        difference = max(float(np.abs(a - b).max()) for a, b in zip(reference, again, strict=True))
        tolerance = max(_TOLERANCE[given], _TOLERANCE[written])
        if not difference <= tolerance:
            raise CheckpointError(
                f"{out} was not written: it would give vectors that differ by {difference:.1e} "
                f"from those of {source}, above {tolerance:.0e}"
            )
        flushing.result()
        after = _size(target)
    return Conversion(
        source=str(source),
        source_format=checkpoint.format,
        out=str(out),
        to=to,
        model=name,
        dtype=str(written).removeprefix("torch."),
        kept=kept,
        dropped=(*parts, *checkpoint.dropped),
        size_before=before,
        size_after=after,
        largest_difference=difference,
    )


def _claimed(out: str | os.PathLike[str], to: Format, source: Path, overwrite: bool) -> Path:
    if to == "official":
        own = own_file("convert", _is_official)
        return claim(out, own, option="OUT", inputs=[source], overwrite=overwrite)
    own = own_folder("convert")
    return claim(out, own, kind="folder", option="OUT", inputs=[source], overwrite=overwrite)


def _is_official(path: Path) -> bool:
    """Tell whether a file begins as what ``weights.write_official`` writes; checkpoints of a
    training have an epoch above 0, or more than a name and weights."""
    with path.open("rb") as stream:
        head = stream.read(4096)
    return head.startswith(b"PK") and _PICKLED in head


def _run(model: CLIP) -> tuple[np.ndarray, np.ndarray]:
    embedder = Embedder.from_model(model)
    photo = files("cn_clip").joinpath("assets", "probe.jpg").read_bytes()
    threads = torch.get_num_threads()
    # A core for the disk's work beside: threads of the run that must wait for theirs are waited
    # for by the others, spinning, which takes several times longer than one thread less.
    torch.set_num_threads(max(1, threads - 1))
    try:
        return embedder.embed_images([photo]), embedder.embed_texts(_TEXTS)
    finally:
        torch.set_num_threads(threads)


def _size(path: Path) -> int:
    every = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in every if file.is_file())
