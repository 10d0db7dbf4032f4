"""Reading and writing whole models: official ``.pt`` files, Hugging Face folders, our folders.

No code in a file is run. The model is detected from the config, or from the names and shapes of
the tensors.
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

from cn_clip.config import PUBLISHED, ModelConfig, estimate_parameters
from cn_clip.errors import CheckpointError, MissingWeightsError
from cn_clip.model.clip import CLIP
from cn_clip.outputs import STAMP, atomic_folder
from cn_clip.publish import atomic_file
from cn_clip.translation import N_, _
from cn_clip.weights.folder_config import (
    CONFIG,
    WEIGHTS,
    config_to_hugging_face,
    read_config_format,
    suggest_weights,
)
from cn_clip.weights.huggingface import from_hugging_face, to_hugging_face
from cn_clip.weights.official import (
    infer_config,
    inferable_from_shapes,
    official_names,
    plain_names,
)
from cn_clip.weights.tensorfile import read_tensors
from cn_clip.weights.towers import FILES, find_weights_file

_WRITE_BYTES = 256 << 10
_MAX_MISSING_PARAMETERS = 10_000_000  # more missing ones mean that the config is another model's
_PARTS = ("visual", "bert", "text_projection", "logit_scale")
_SIDE_FILES = {"preprocessor_config.json", "tokenizer_config.json", "vocab.txt"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights under official names, their config, the names that were dropped, and the format."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    dropped: tuple[str, ...] = ()
    format: str = N_("weights")


def read(path: str | os.PathLike[str], *, mapped: bool = False) -> Checkpoint:
    """Read an official ``.pt`` file, our folder, a ``ChineseCLIPModel`` folder of Hugging Face, or
    a weights file of one of them. ``mapped`` is that of ``read_tensors``.

    Raises:
        MissingWeightsError: ``path`` does not exist, or a shard is missing.
        CheckpointError: the file is damaged, not a Chinese-CLIP, or has more than tensors.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _read_folder(path, mapped)
    return _read_file(path, mapped)


def _read_file(path: Path, mapped: bool) -> Checkpoint:
    tensors = plain_names(read_tensors(path, mapped=mapped))
    if any(name.startswith("vision_model.") for name in tensors):
        tensors, dropped = from_hugging_face(tensors)
        return Checkpoint(infer_config(tensors, path), tensors, dropped, N_("Hugging Face weights"))
    kept, dropped = official_names(tensors)
    return Checkpoint(infer_config(kept, path), kept, dropped, N_("official weights"))


def build(checkpoint: Checkpoint, *, dtype: torch.dtype | None = torch.float32) -> CLIP:
    """Build the model of a checkpoint, in eval mode; ``dtype`` None keeps the file's precision.

    The model is created on the meta device, so no weights are initialized in vain.
    ``checkpoint.tensors`` is emptied, so that memory has the weights only once.

    Raises:
        CheckpointError: tensors are missing, unexpected or have another shape; the message counts
            all and names the first ones.
    """
    described = estimate_parameters(checkpoint.config)
    actual = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    if described > 2 * actual + _MAX_MISSING_PARAMETERS:  # do not create a model that large
        raise CheckpointError(
            _(
                "the config describes about {described:,} parameters and the weights have "
                "{actual:,}; give the two files that belong together",
                described=described,
                actual=actual,
            )
        )
    with torch.device("meta"):
        model = CLIP(checkpoint.config)
    check_fit(checkpoint.tensors, model.state_dict(), checkpoint.config.name)
    state = {}
    for name in list(checkpoint.tensors):
        tensor = checkpoint.tensors.pop(name)
        # In the usual order: what was saved transposed could be neither viewed nor saved again.
        state[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_fit(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: str) -> None:
    """Raise a ``CheckpointError`` that lists all differences of ``actual`` from ``expected``."""
    problems = [
        *_listed(_("missing"), [name for name in expected if name not in actual]),
        *_listed(_("unexpected"), [name for name in actual if name not in expected]),
        *_listed(
            _("wrongly shaped"),
            [
                _(
                    "{name} {shape} instead of {expected_shape}",
                    name=name,
                    shape=list(actual[name].shape),
                    expected_shape=list(expected[name].shape),
                )
                for name in expected
                if name in actual and actual[name].shape != expected[name].shape
            ],
        ),
        *_listed(
            _("not of floating point"),
            [
                f"{name} {actual[name].dtype}"
                for name in expected
                if name in actual
                and expected[name].is_floating_point()
                and not _is_float(actual[name])
            ],
        ),
    ]
    if problems:
        foreign = [n for n in actual if n not in expected and n.split(".")[0] not in _PARTS]
        remedy = (
            _(
                "; {foreign} belongs to no tower: if the model works without it, remove it and "
                "save the rest",
                foreign=foreign[0],
            )
            if foreign
            else ""
        )
        raise CheckpointError(
            _(
                "the weights do not fit {model}: {problems}{remedy}",
                model=model,
                problems="; ".join(problems),
                remedy=remedy,
            )
        )


def check_model(actual: ModelConfig, expected: ModelConfig, path: str | os.PathLike[str]) -> None:
    """Raise a ``CheckpointError`` unless the config of ``path`` is the expected one."""
    if replace(actual, name="") != replace(expected, name=""):
        struct = PUBLISHED[actual.name].struct if actual.name in PUBLISHED else actual.name
        raise CheckpointError(
            _(
                "{path} holds {struct} for {resolution} pixels, not {name} for "
                "{expected_resolution}; load it by its path, or replace the file",
                path=path,
                struct=struct,
                resolution=actual.vision.resolution,
                name=expected.name,
                expected_resolution=expected.vision.resolution,
            )
        )


def save_folder(model: CLIP, path: str | os.PathLike[str]) -> None:
    """Write ``config.json`` and ``model.safetensors`` to the folder ``path``; atomic.

    Raises:
        CheckpointError: the disk is full or ``path`` is not writable; ``path`` is unchanged.
    """
    refuse_foreign_folder(Path(path))
    save_weights(model.config, model.state_dict(), path)


def save_weights(
    config: ModelConfig, state: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Write the folder of ``save_folder`` from a config and an official state dict."""
    path = Path(path)
    with (
        describe_write_errors(path),
        atomic_folder(path, "model", check=_objection) as folder,
    ):
        _write_state(config, state, folder)


def save_official(model: CLIP, path: str | os.PathLike[str]) -> None:
    """Write a ``.pt`` file that the official package loads; atomic.

    Raises:
        CheckpointError: the format cannot represent the model, as with ``mini``; or the disk is
            full or ``path`` is not writable. ``path`` is unchanged.
    """
    with describe_write_errors(path), atomic_file(path) as temporary:
        write_official_checkpoint(model, temporary)


def save_hugging_face(model: CLIP, path: str | os.PathLike[str]) -> None:
    """Write a folder that ``transformers.ChineseCLIPModel`` loads; atomic.

    It has ``config.json``, ``model.safetensors``, ``preprocessor_config.json`` and the tokenizer's
    files.

    Raises:
        CheckpointError: the image tower is not a ViT, the only one that the format supports; or
            the disk is full or ``path`` is not writable. ``path`` is unchanged.
    """
    path = Path(path)
    refuse_foreign_folder(path)
    with (
        describe_write_errors(path),
        atomic_folder(path, "model", check=_objection) as folder,
    ):
        write_hugging_face(model, folder)


# The three formats without atomic publishing, which is up to the caller.


def write_folder(model: CLIP, folder: Path) -> None:
    """Write the files of ``save_folder`` to an empty folder."""
    _write_state(model.config, model.state_dict(), folder)


def _write_state(config: ModelConfig, state: Mapping[str, Tensor], folder: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / CONFIG, config.to_dict())


def write_official_checkpoint(model: CLIP, path: Path) -> None:
    """Write the file of ``save_official``, with the same errors."""
    if not inferable_from_shapes(model.config, model.state_dict()):
        raise CheckpointError(
            _(
                "{name} cannot be written as an official .pt file: its config cannot be inferred "
                "from the shapes of its tensors; write a folder instead (--to safetensors)",
                name=model.config.name,
            )
        )
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    with _SmallWrites(path, "wb") as stream:
        torch.save({"epoch": 0, "name": model.config.name, "state_dict": state}, stream)


def write_hugging_face(model: CLIP, folder: Path) -> None:
    """Write the files of ``save_hugging_face`` to an empty folder, with the same errors."""
    json_files = config_to_hugging_face(model.config, str(model.dtype).removeprefix("torch."))
    save_file(to_hugging_face(model.state_dict()), folder / WEIGHTS, metadata={"format": "pt"})
    for name, values in json_files.items():
        _write_json(folder / name, values)
    vocab = files("cn_clip").joinpath("assets", "vocab.txt").read_bytes()
    (folder / "vocab.txt").write_bytes(vocab)


def _read_folder(path: Path, mapped: bool) -> Checkpoint:
    has_weights = any(os.path.isfile(path / name) for name in FILES)
    if has_weights and not os.path.isfile(path / CONFIG):  # as accelerate saves a model
        return _read_file(find_weights_file(path), mapped)
    config, is_hugging_face = read_config_format(path)
    if not has_weights:
        raise MissingWeightsError(
            _(
                "the folder {path} has a {config} but no {weights}{suggestion}",
                path=path,
                config=CONFIG,
                weights=WEIGHTS,
                suggestion=suggest_weights(path),
            )
        )
    tensors = plain_names(read_tensors(find_weights_file(path), mapped=mapped))
    if is_hugging_face:
        return Checkpoint(config, *from_hugging_face(tensors), N_("Hugging Face folder"))
    return Checkpoint(config, *official_names(tensors), N_("safetensors folder"))


class _SmallWrites(io.FileIO):
    """A file that splits large writes, and writes all bytes.

    Linux caches a large write in pages of 2 MB. On a virtual machine whose host reclaims free
    pages of that size, this takes up to seven times as long. Errors name their cause, unlike those
    of torch's own writer.
    """

    def write(self, data: Any) -> int:
        remaining = memoryview(data).cast("B")
        size = len(remaining)
        while remaining:
            remaining = remaining[super().write(remaining[:_WRITE_BYTES]) :]
        return size


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order, copied to the CPU if needed."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def add_to_digest(digest: hashlib._Hash, state: Mapping[str, Tensor]) -> None:
    """Add names, shapes, precision and bytes of tensors to a digest."""
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def refuse_foreign_folder(path: Path) -> None:
    """Raise a ``CheckpointError`` for a folder that has files other than a model's."""
    if os.path.isdir(path) and _objection(path):
        raise CheckpointError(
            _(
                "the folder {path} {objection}; give a new folder",
                path=path,
                objection=_objection(path),
            )
        )


def _objection(path: Path) -> str | None:
    own = {CONFIG, WEIGHTS, STAMP, *_SIDE_FILES}
    return _("has other files too") if {file.name for file in path.iterdir()} - own else None


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1  # 8-bit floats need scales


def _listed(problem: str, names: list[str], shown: int = 2) -> Iterator[str]:
    if names:
        more = _(" and {count} more", count=len(names) - shown) if len(names) > shown else ""
        yield f"{len(names)} {problem} ({', '.join(names[:shown])}{more})"


@contextmanager
def describe_write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of writing ``path`` into a ``CheckpointError`` of one sentence."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        # torch's writer fails again when it is closed, with an error about its own source.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(
            _(
                "could not write {path}: {reason}; nothing was changed. Free some space or choose "
                "another path",
                path=path,
                reason=reason,
            )
        ) from error
