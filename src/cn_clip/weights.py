"""Weights in and out: official ``.pt`` files and our safetensors folders, to and from the model.

A file is data, never a program: pickles open with ``weights_only=True`` and nothing else. What a
file holds is read off its tensors' names and shapes, so no caller needs to say which model it is.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cn_clip.config import (
    EMBED_DIMS,
    MODELS,
    PUBLISHED,
    TEXT_TOWERS,
    VISION_TOWERS,
    ModelConfig,
    TextConfig,
    VisionConfig,
    check_config,
)
from cn_clip.errors import CheckpointError, MissingWeightsError
from cn_clip.model.clip import CLIP
from cn_clip.publish import published, published_folder

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_UNUSED = "bert.pooler."  # in files from the official training; the model has no pooler
_CHUNK = 128 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights under their official names, the model they make, and what was left out."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    dropped: tuple[str, ...] = ()


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read an official ``.pt`` file, our folder, or a ``.safetensors`` file.

    Raises:
        MissingWeightsError: there is nothing at ``path``.
        CheckpointError: it is damaged, not a Chinese-CLIP, or holds more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    kept, dropped = official_names(read_tensors(path))
    return Checkpoint(infer_config(kept, path), kept, dropped)


def build(checkpoint: Checkpoint, *, dtype: torch.dtype | None = torch.float32) -> CLIP:
    """Make the model of a checkpoint, in eval mode; ``dtype`` None keeps the file's precision.

    The model is laid out on the meta device, so no weight is drawn that the file replaces.
    ``checkpoint.tensors`` is emptied on the way, so that memory holds the weights once.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; all are counted and
            the first ones named.
    """
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
        raise CheckpointError(f"the weights do not fit {model}: {'; '.join(problems)}")


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
    path = Path(path)
    if path.is_dir() and {file.name for file in path.iterdir()} - {_CONFIG, _WEIGHTS}:
        raise CheckpointError(f"the folder {path} holds other files too; give a new folder")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with _explained(path), published_folder(path) as folder:
        save_file(state, folder / _WEIGHTS, metadata={"format": "pt"})
        config = json.dumps(model.config.to_dict(), indent=2, ensure_ascii=False)
        (folder / _CONFIG).write_text(config + "\n", encoding="utf-8")


def save_official(model: CLIP, path: str | os.PathLike[str]) -> None:
    """Write a ``.pt`` file that the official package loads, all or nothing.

    Raises:
        CheckpointError: the model has something that such a file cannot tell, as ``mini`` has; or
            the disk is full or the place not writable. ``path`` is as it was before.
    """
    if not _told_by_shapes(model):
        raise CheckpointError(
            f"{model.config.name} cannot be written as an official .pt file: its tensors' shapes "
            "do not tell all of its config; use save_folder"
        )
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    with _explained(path), published(path) as temporary:
        torch.save({"epoch": 0, "name": model.config.name, "state_dict": state}, temporary)


def infer_config(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> ModelConfig:
    """Tell from names and shapes which model the official weights ``tensors`` make.

    Raises:
        CheckpointError: they make none; ``path`` is named in the message.
    """
    try:
        vision, text = _infer_vision(tensors), _infer_text(tensors)
        embed_dim = tensors["text_projection"].shape[1]
    except KeyError as error:
        first = ", ".join(list(tensors)[:3]) or "nothing"
        raise CheckpointError(
            f"{path} is not a Chinese-CLIP checkpoint: it has no {error.args[0]} "
            f"(it begins with {first})"
        ) from None
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path} is not a Chinese-CLIP checkpoint: the shapes of its tensors make no model "
            f"({error})"
        ) from None
    config = ModelConfig(name="", embed_dim=embed_dim, vision=vision, text=text)
    check_config(config, str(path))
    return _named(config)


def resize_positions(positions: Tensor, length: int) -> Tensor:
    """Resize a ViT's position embeddings (1 + n*n, D) to another grid (``length`` = 1 + m*m, D).

    Bicubic with ``align_corners=True``, as the official training; the class token's stays.
    """
    if len(positions) == length:
        return positions
    old, new = math.isqrt(len(positions) - 1), math.isqrt(length - 1)
    grid = positions[1:].float().T.reshape(1, -1, old, old)  # (1, D, n, n)
    grid = torch.nn.functional.interpolate(
        grid, size=(new, new), mode="bicubic", align_corners=True
    )
    return torch.cat([positions[:1], grid[0].flatten(1).T.to(positions.dtype)])


def unfuse_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the joint ``Wqkv`` weights that official training with flash-attention writes."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith("attn.Wqkv"):
            plain[f"{stem.removesuffix('.Wqkv')}.in_proj_{kind}"] = tensor
        elif stem.endswith("attention.self.Wqkv"):
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                plain[f"{stem.removesuffix('.Wqkv')}.{part}.{kind}"] = chunk
        elif stem.endswith("attention.self.out_proj"):
            plain[f"{stem.removesuffix('.self.out_proj')}.output.dense.{kind}"] = tensor
        else:
            plain[name] = tensor
    return plain


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Read the ``config.json`` of a folder that ``save_folder`` wrote.

    Raises:
        MissingWeightsError: there is none.
        CheckpointError: it is damaged, or of another format.
    """
    path = Path(folder) / _CONFIG
    if not path.is_file():
        raise MissingWeightsError(
            f"the folder {folder} has no {_CONFIG}; a model folder holds {_CONFIG} and {_WEIGHTS}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if isinstance(values, dict) and "model_type" in values:
        raise CheckpointError(
            f"{folder} is a Hugging Face folder ({values['model_type']}), which this version does "
            "not read; give the official .pt file instead"
        )
    return ModelConfig.from_dict(values)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read all tensors of a ``.pt`` or ``.safetensors`` file, under the names in the file."""
    path = Path(path)
    if not path.is_file():
        raise MissingWeightsError(f"no such file or folder: {path}")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)


def official_names(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors under their official names, and the names left out (BERT's pooler)."""
    plain = unfuse_attention({str(n).removeprefix("module."): t for n, t in tensors.items()})
    dropped = tuple(name for name in plain if name.startswith(_UNUSED))
    return {name: t for name, t in plain.items() if name not in dropped}, dropped


# Reading


def _read_folder(path: Path) -> Checkpoint:
    config = read_config(path)
    if not (path / _WEIGHTS).is_file():
        raise MissingWeightsError(f"the folder {path} has a {_CONFIG} but no {_WEIGHTS}")
    return Checkpoint(config, *official_names(_read_safetensors(path / _WEIGHTS)))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        while len(tensors) < len(names):
            # A new mapping for every 128 MB: its pages are given back when it closes, so memory
            # holds the weights little more than once, and no tensor depends on the file any more.
            with safe_open(path, framework="pt") as file:
                copied = 0
                for name in names[len(tensors) :]:
                    tensors[name] = file.get_tensor(name).clone()
                    copied += tensors[name].nbytes
                    if copied > _CHUNK:
                        break
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None
    return tensors


def _read_pt(path: Path) -> dict[str, Tensor]:
    # A training checkpoint is three times the weights. It is mapped, so that the optimizer's part
    # is never read, and the weights are copied: a mapping would die with the file, should someone
    # save over it. A file of weights alone is quicker read whole, and held only once.
    mmap = _names_an_optimizer(path)
    state = _state_dict(_load_pickle(path, mmap=mmap), path)
    return {name: tensor.clone() for name, tensor in state.items()} if mmap else state


def _names_an_optimizer(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            return b"optimizer" in archive.read(pickled)
    except Exception:  # the format of torch before 1.6, or damaged: torch will say
        return False


def _state_dict(blob: Any, path: Path) -> dict[str, Tensor]:
    state = blob.get("state_dict", blob) if isinstance(blob, dict) else blob
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path} holds no state dict, but {type(state).__name__}")
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f"{path} is not a state dict: {strange[0]!r} is not a tensor")
    return dict(state)


def _load_pickle(path: Path, *, mmap: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise CheckpointError(f"{path} is not a checkpoint, or a damaged one") from None
        raise CheckpointError(
            f"{path} is refused: its pickle names {named[1]}, and only tensors are read, never "
            "code; re-save it as a state dict where you trust it"
        ) from None
    except Exception as error:  # these bytes may be anything, and so may what they raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "TorchScript" in str(error):
            reason = "it is a TorchScript program; save its state dict instead"
        raise CheckpointError(f"{path} is not a whole .pt file: {reason}") from None


# Inferring


def _infer_vision(tensors: Mapping[str, Tensor]) -> VisionConfig:
    conv = tensors["visual.conv1.weight"].shape
    if "visual.attnpool.positional_embedding" in tensors:
        grid = math.isqrt(tensors["visual.attnpool.positional_embedding"].shape[0] - 1)
        layers = tuple(_count(tensors, rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
        return VisionConfig("resnet", grid * 32, width=conv[0] * 2, layers=layers)
    width, patch = conv[0], conv[-1]
    grid = math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1)
    layers = (_count(tensors, r"visual\.transformer\.resblocks\.(\d+)\."),)
    # Head widths leave no trace in the shapes; 80 is ViT-H-14's, 64 all others'.
    head_width = VISION_TOWERS["ViT-H-14"].head_width if width == 1280 else 64
    return VisionConfig("vit", grid * patch, width, layers, patch, head_width)


def _infer_text(tensors: Mapping[str, Tensor]) -> TextConfig:
    vocab_size, hidden = tensors["bert.embeddings.word_embeddings.weight"].shape
    return TextConfig(
        hidden_size=hidden,
        layers=_count(tensors, r"bert\.encoder\.layer\.(\d+)\."),
        heads=max(1, hidden // 64),
        intermediate_size=tensors["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        vocab_size=vocab_size,
        max_positions=tensors["bert.embeddings.position_embeddings.weight"].shape[0],
        token_types=tensors["bert.embeddings.token_type_embeddings.weight"].shape[0],
    )


def _told_by_shapes(model: CLIP) -> bool:
    try:
        told = infer_config(model.state_dict(), "the model")
    except CheckpointError:
        return False
    own = model.config
    text = replace(told.text, dropout=own.text.dropout)  # matters in training only
    return replace(told, name=own.name, text=text) == own


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1  # 8 bits need scales beside


def _count(tensors: Iterable[str], pattern: str) -> int:
    found = (re.match(pattern, name) for name in tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _named(config: ModelConfig) -> ModelConfig:
    for name, known in MODELS.items():
        if replace(config, name=name) == known:
            return known
    vision = next((n for n, tower in VISION_TOWERS.items() if tower == config.vision), None)
    text = next((n for n, tower in TEXT_TOWERS.items() if tower == config.text), None)
    if vision and text and EMBED_DIMS[vision] == config.embed_dim:
        return replace(config, name=f"{vision}@{text}")
    shape = config.vision
    vision = vision or f"{shape.kind}-{shape.width}x{'-'.join(map(str, shape.layers))}"
    text = text or f"bert-{config.text.hidden_size}x{config.text.layers}"
    return replace(config, name=f"{vision}@{text}")


# Messages


def _listed(what: str, names: list[str], shown: int = 5) -> Iterator[str]:
    if names:
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        yield f"{len(names)} {what} ({', '.join(names[:shown])}{more})"


@contextmanager
def _explained(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"could not write {path}: {error}; nothing was changed. Free some space or choose "
            "another place"
        ) from error
