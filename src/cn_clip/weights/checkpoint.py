"""Whole models in and out: official ``.pt`` files, Hugging Face folders, ours.

A file is data, never a program. What it holds is read off its tensors' names and shapes, or its
config, so no caller needs to say which model it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cn_clip.config import PUBLISHED, ModelConfig, about_parameters
from cn_clip.errors import CheckpointError, MissingWeightsError
from cn_clip.model.clip import CLIP
from cn_clip.outputs import STAMP, atomic_folder
from cn_clip.publish import atomic_file
from cn_clip.weights.folder_config import (
    CONFIG,
    WEIGHTS,
    config_to,
    read_config_format,
    weights_in,
)
from cn_clip.weights.huggingface import from_hugging_face, to_hugging_face
from cn_clip.weights.official import (
    infer_config,
    official_names,
    plain_names,
    told_by_shapes,
)
from cn_clip.weights.tensorfile import read_tensors
from cn_clip.weights.towers import FILES, weights_file

_PIECE = 256 << 10
_SLACK = 10_000_000  # parameters that may be missing before a config is another model's
_PARTS = ("visual", "bert", "text_projection", "logit_scale")
_SIDE_FILES = {"preprocessor_config.json", "tokenizer_config.json", "vocab.txt"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights under their official names, the model they make, what was left out, and its format
    in words."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    dropped: tuple[str, ...] = ()
    format: str = "weights"


def read(path: str | os.PathLike[str], *, mapped: bool = False) -> Checkpoint:
    """Read an official ``.pt`` file, our folder, a ``ChineseCLIPModel`` folder of Hugging Face, or
    a file of weights out of one of them. ``mapped`` is as for ``read_tensors``.

    Raises:
        MissingWeightsError: there is nothing at ``path``, or a shard is missing.
        CheckpointError: it is damaged, not a Chinese-CLIP, or holds more than tensors.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _read_folder(path, mapped)
    return _read_file(path, mapped)


def _read_file(path: Path, mapped: bool) -> Checkpoint:
    tensors = plain_names(read_tensors(path, mapped=mapped))
    if any(name.startswith("vision_model.") for name in tensors):
        tensors, dropped = from_hugging_face(tensors)
        return Checkpoint(infer_config(tensors, path), tensors, dropped, "Hugging Face weights")
    kept, dropped = official_names(tensors)
    return Checkpoint(infer_config(kept, path), kept, dropped, "official weights")


def build(checkpoint: Checkpoint, *, dtype: torch.dtype | None = torch.float32) -> CLIP:
    """Make the model of a checkpoint, in eval mode; ``dtype`` None keeps the file's precision.

    The model is laid out on the meta device, so no weight is drawn that the file replaces.
    ``checkpoint.tensors`` is emptied on the way, so that memory holds the weights once.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; all are counted and
            the first ones named.
    """
    described = about_parameters(checkpoint.config)
    held = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    if described > 2 * held + _SLACK:  # far off: not even laid out
        raise CheckpointError(
            f"the config describes about {described:,} parameters and the weights hold {held:,}; "
            "give the two files that belong together"
        )
    with torch.device("meta"):
        model = CLIP(checkpoint.config)
    check_fit(checkpoint.tensors, model.state_dict(), checkpoint.config.name)
    state = {}
    for name in list(checkpoint.tensors):
        tensor = checkpoint.tensors.pop(name)
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_fit(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: str) -> None:
    """Raise a ``CheckpointError`` that lists every way in which ``given`` is not ``wanted``."""
    problems = [
        *_listed("missing", [name for name in wanted if name not in given]),
        *_listed("unexpected", [name for name in given if name not in wanted]),
        *_listed(
            "wrongly shaped",
            [
                f"{name} {list(given[name].shape)} instead of {list(wanted[name].shape)}"
                for name in wanted
                if name in given and given[name].shape != wanted[name].shape
            ],
        ),
        *_listed(
            "not of floating point",
            [
                f"{name} {given[name].dtype}"
                for name in wanted
                if name in given and wanted[name].is_floating_point() and not _is_float(given[name])
            ],
        ),
    ]
    if problems:
        foreign = [n for n in given if n not in wanted and n.split(".")[0] not in _PARTS]
        remedy = (
            f"; {foreign[0]} is of no tower: if the model is whole without it, remove it and save "
            "the rest"
            if foreign
            else ""
        )
        raise CheckpointError(f"the weights do not fit {model}: {'; '.join(problems)}{remedy}")


def check_model(found: ModelConfig, wanted: ModelConfig, path: str | os.PathLike[str]) -> None:
    """Raise a ``CheckpointError`` unless ``found``, which is in ``path``, is ``wanted``."""
    if replace(found, name="") != replace(wanted, name=""):
        struct = PUBLISHED[found.name].struct if found.name in PUBLISHED else found.name
        raise CheckpointError(
            f"{path} holds {struct} for {found.vision.resolution} pixels, not {wanted.name} for "
            f"{wanted.vision.resolution}; load it by its path, or put the right file there"
        )


def save_folder(model: CLIP, path: str | os.PathLike[str]) -> None:
    """Write ``config.json`` and ``model.safetensors`` into the folder ``path``, all or nothing.

    Raises:
        CheckpointError: the disk is full or the place not writable; ``path`` is as it was before.
    """
    check_own(Path(path))
    save_state(model.config, model.state_dict(), path)


def save_state(
    config: ModelConfig, state: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Write what ``save_folder`` does, from a config and a state dict under official names."""
    path = Path(path)
    with explained(path), atomic_folder(path, "model", check=_objection) as folder:
        _write_state(config, state, folder)


def save_official(model: CLIP, path: str | os.PathLike[str]) -> None:
    """Write a ``.pt`` file that the official package loads, all or nothing.

    Raises:
        CheckpointError: the model has something that such a file cannot tell, as ``mini`` has; or
            the disk is full or the place not writable. ``path`` is as it was before.
    """
    with explained(path), atomic_file(path) as temporary:
        write_official(model, temporary)


def save_hugging_face(model: CLIP, path: str | os.PathLike[str]) -> None:
    """Write a folder that ``transformers.ChineseCLIPModel`` loads, all or nothing.

    It holds ``config.json``, ``model.safetensors``, ``preprocessor_config.json`` and the
    tokenizer's files.

    Raises:
        CheckpointError: the image tower is no ViT, for which alone the format has a place; or the
            disk is full or the place not writable. ``path`` is as it was before.
    """
    path = Path(path)
    check_own(path)
    with explained(path), atomic_folder(path, "model", check=_objection) as folder:
        write_hugging_face(model, folder)


# The three formats themselves, into a place that somebody else publishes.


def write_folder(model: CLIP, folder: Path) -> None:
    """Write what ``save_folder`` publishes into an empty folder."""
    _write_state(model.config, model.state_dict(), folder)


def _write_state(config: ModelConfig, state: Mapping[str, Tensor], folder: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / CONFIG, config.to_dict())


def write_official(model: CLIP, path: Path) -> None:
    """Write what ``save_official`` publishes; raises as it does."""
    if not told_by_shapes(model.config, model.state_dict()):
        raise CheckpointError(
            f"{model.config.name} cannot be written as an official .pt file: its tensors' shapes "
            "do not tell all of its config; use save_folder"
        )
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    with _InPieces(path, "wb") as stream:
        torch.save({"epoch": 0, "name": model.config.name, "state_dict": state}, stream)


def write_hugging_face(model: CLIP, folder: Path) -> None:
    """Write what ``save_hugging_face`` publishes into an empty folder; raises as it does."""
    texts = config_to(model.config, str(model.dtype).removeprefix("torch."))
    save_file(to_hugging_face(model.state_dict()), folder / WEIGHTS, metadata={"format": "pt"})
    for name, values in texts.items():
        _write_json(folder / name, values)
    vocab = files("cn_clip").joinpath("assets", "vocab.txt").read_bytes()
    (folder / "vocab.txt").write_bytes(vocab)


def _read_folder(path: Path, mapped: bool) -> Checkpoint:
    has_weights = any(os.path.isfile(path / name) for name in FILES)
    if has_weights and not os.path.isfile(path / CONFIG):  # as accelerate saves a model
        return _read_file(weights_file(path), mapped)
    config, of_hugging_face = read_config_format(path)
    if not has_weights:
        raise MissingWeightsError(
            f"the folder {path} has a {CONFIG} but no {WEIGHTS}{weights_in(path)}"
        )
    tensors = plain_names(read_tensors(weights_file(path), mapped=mapped))
    if of_hugging_face:
        return Checkpoint(config, *from_hugging_face(tensors), "Hugging Face folder")
    return Checkpoint(config, *official_names(tensors), "safetensors folder")


class _InPieces(io.FileIO):
    """A file that writes megabytes in small pieces, and all of them.

    Linux keeps a large write in pages of 2 MB. Those are what a virtual machine's host takes back
    while they are free, and then such a write takes up to seven times as long. And an error here
    tells its cause, as torch's own writing to a path does not.
    """

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            rest = rest[super().write(rest[:_PIECE]) :]
        return size


def add_to_digest(digest: hashlib._Hash, state: Mapping[str, Tensor]) -> None:
    """Add names, shapes, precision and bytes of tensors to a digest."""
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_own(path: Path) -> None:
    """Raise a ``CheckpointError`` for a folder that holds anything but a model written here."""
    if os.path.isdir(path) and _objection(path):
        raise CheckpointError(f"the folder {path} {_objection(path)}; give a new folder")


def _objection(path: Path) -> str | None:
    own = {CONFIG, WEIGHTS, STAMP, *_SIDE_FILES}
    return "holds other files too" if {file.name for file in path.iterdir()} - own else None


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1  # 8 bits need scales beside


def _listed(what: str, names: list[str], shown: int = 2) -> Iterator[str]:
    if names:
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        yield f"{len(names)} {what} ({', '.join(names[:shown])}{more})"


@contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what fails while ``path`` is written into a ``CheckpointError`` of one sentence."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        # torch's writer fails once more when it is closed, by a line of its own source.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(
            f"could not write {path}: {reason}; nothing was changed. Free some space or choose "
            "another place"
        ) from error
