"""Checkpoint conversion, verified by running both models on a photo and two sentences."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from cn_clip.translation import _

Format = Literal["official", "hf", "safetensors"]

_WRITERS: dict[str, Callable[[CLIP, Path], None]] = {
    "official": weights.write_official_checkpoint,
    "hf": weights.write_hugging_face,
    "safetensors": weights.write_folder,
}
# First bytes of the pickle that we write: {"epoch": 0, "name": ..., "state_dict": ...}
_PICKLE_START = b"epochq\x01K\x00X\x04\x00\x00\x00nameq\x02X"
_TEXTS = ["一只坐着的猫", "a photo of 火箭发射"]
# Maximum difference of an embedding after rounding the weights to a precision.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class Conversion:
    """Result of a conversion; sizes in bytes."""

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
    """Largest absolute difference of any value in the embeddings of both models."""


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: Format,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Read a checkpoint of any known format and write it in another; the write is atomic.

    Both are run on a photo and two sentences, and ``out`` is written only if they agree. Only the
    model is kept, not the optimizer state.

    Args:
        source: an official ``.pt``, a Hugging Face ``ChineseCLIPModel`` folder, our folder.
        out: a ``.pt`` file for ``"official"``, a folder for ``"hf"`` and ``"safetensors"``.
        to: the format to write.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; the default is that of ``source``.
        overwrite: replace ``out`` if this function wrote it.

    Raises:
        UsageError: ``out`` exists, is an input or has other files; see ``outputs.claim``.
        CheckpointError: ``source`` is not a Chinese-CLIP, the format cannot represent it, or the
            embeddings differ. ``out`` is unchanged.
    """
    if to not in get_args(Format):
        raise UsageError(
            _(
                "unknown format {to!r}; available: {formats}",
                to=to,
                formats=", ".join(get_args(Format)),
            )
        )
    target_dtype = None if dtype is None else pick_precision(dtype, torch.device("cpu"))
    source = Path(source)
    out = _claimed(out, to, source, overwrite)
    other_keys = weights.other_checkpoint_keys(source)
    checkpoint = weights.read(source, mapped=True)
    size_before = _size(source)
    kept = len(checkpoint.tensors)
    model = weights.build(checkpoint, dtype=None)
    if len({parameter.dtype for parameter in model.parameters()}) > 1:
        model.float()  # mixed dtypes, as the official package has on a GPU, cannot run
    if target_dtype == torch.float32:
        model.float()  # exact, and so is the comparison
    source_dtype = model.dtype
    with (
        weights.describe_write_errors(out),
        _one_thread_less(),
        ThreadPoolExecutor(1) as worker,  # run the model while the disk writes
        atomic_file(out) if to == "official" else atomic_folder(out, "convert") as target,
    ):
        running = worker.submit(_run, model)
        if target_dtype is not None:  # rounding changes the weights: run the model first
            running.result()
            model.to(target_dtype)
        name, written_dtype = model.config.name, model.dtype
        _WRITERS[to](model, target)
        expected = running.result()
        del model, running
        flushing = worker.submit(flush, target)
        actual = _run(weights.build(weights.read(target, mapped=True), dtype=None))
        difference = max(float(np.abs(a - b).max()) for a, b in zip(expected, actual, strict=True))
        tolerance = max(_TOLERANCE[source_dtype], _TOLERANCE[written_dtype])
        if not difference <= tolerance:
            raise CheckpointError(
                _(
                    "{out} was not written: its embeddings would differ by {difference:.1e} from "
                    "those of {source}, above {tolerance:.0e}",
                    out=out,
                    difference=difference,
                    source=source,
                    tolerance=tolerance,
                )
            )
        flushing.result()
        size_after = _size(target)
    return Conversion(
        source=str(source),
        source_format=checkpoint.format,
        out=str(out),
        to=to,
        model=name,
        dtype=str(written_dtype).removeprefix("torch."),
        kept=kept,
        dropped=(*other_keys, *checkpoint.dropped),
        size_before=size_before,
        size_after=size_after,
        largest_difference=difference,
    )


def _claimed(out: str | os.PathLike[str], to: Format, source: Path, overwrite: bool) -> Path:
    if to == "official":
        own = own_file("convert", _is_own_official)
        return claim(out, own, option="OUT", inputs=[source], overwrite=overwrite)
    own = own_folder("convert")
    return claim(out, own, kind="folder", option="OUT", inputs=[source], overwrite=overwrite)


def _is_own_official(path: Path) -> bool:
    """Whether ``weights.write_official_checkpoint`` wrote a file.

    Training checkpoints have an epoch above 0, or more than a name and weights.
    """
    with path.open("rb") as stream:
        head = stream.read(4096)
    return head.startswith(b"PK") and _PICKLE_START in head


def _run(model: CLIP) -> tuple[np.ndarray, np.ndarray]:
    embedder = Embedder.from_model(model)
    photo = files("cn_clip").joinpath("assets", "probe.jpg").read_bytes()
    return embedder.embed_images([photo]), embedder.embed_texts(_TEXTS)


@contextmanager
def _one_thread_less() -> Iterator[None]:
    """Leave a core to the thread that writes.

    Torch threads without a core make the others spin, which is several times slower than running
    with one thread less.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _size(path: Path) -> int:
    files_in_path = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files_in_path if file.is_file())
