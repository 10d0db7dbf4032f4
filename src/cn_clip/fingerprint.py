"""A model's fingerprint: it changes whenever the embeddings may change.

It is a hash of the float32 weights, the config, the vocabulary and the version of the
preprocessing. The model's name and the file's format and precision are not part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from cn_clip.config import ModelConfig
from cn_clip.errors import CheckpointError
from cn_clip.tokenizer import default_tokenizer
from cn_clip.translation import _
from cn_clip.weights.folder_config import WEIGHTS, read_config_format

# Raise it when preprocessing or tokenization changes embeddings of ordinary images or texts.
# It was not raised when 16-bit grey and float images began to be scaled by their range: before,
# nearly all of them were one white or black square. A raise refuses every stored embedding, cached
# feature and calibration, whose 8-bit images embed bit for bit as before; only embeddings of those
# rare files have to be made again, and the changelog says so.
_PREPROCESSING_VERSION = 1


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """``value`` identifies a model in one precision on one runtime.

    ``derived_from`` is the fingerprint of the float32 original, None for the original itself.
    """

    value: str
    derived_from: str | None = None


class TensorBytes(NamedTuple):
    """One tensor: name, precision such as ``"float32"``, shape and contiguous bytes."""

    name: str
    precision: str
    shape: Sequence[int]
    data: Any


def fingerprint_of(
    config: ModelConfig, vocab: Mapping[str, int], tensors: Iterable[TensorBytes]
) -> str:
    """Return 32 hexadecimal digits, independent of the order of the tensors."""
    digest = hashlib.sha256()
    values = config.to_dict() | {"name": None, "fast_decode": False}
    values |= {"vocab": dict(vocab), "preparation": _PREPROCESSING_VERSION}
    digest.update(json.dumps(values, sort_keys=True).encode())
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        header = f"{tensor.name} torch.{tensor.precision} {list(tensor.shape)}"
        digest.update(header.encode())
        digest.update(tensor.data)
    return digest.hexdigest()[:32]


def folder_fingerprint(folder: str | os.PathLike[str]) -> str:
    """Return the fingerprint of our folder (``config.json``, ``model.safetensors``) without torch.

    It equals that of ``cn_clip.load(folder, precision="float32")``.

    Raises:
        CheckpointError: the folder has another format, or its weights are damaged or in a
            precision that numpy does not support.
    """
    config, is_hugging_face = read_config_format(Path(folder))
    path = Path(folder) / WEIGHTS
    if is_hugging_face:
        raise CheckpointError(
            _("{folder} is a Hugging Face folder; load it to get its fingerprint", folder=folder)
        )
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = [_as_float32(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(
            _("{path} cannot be read without torch: {error}", path=path, error=error)
        ) from None
    return fingerprint_of(config, default_tokenizer().vocab, tensors)


def _as_float32(name: str, array: npt.NDArray[Any]) -> TensorBytes:
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    return TensorBytes(name, str(array.dtype), array.shape, array.tobytes())


def derived(original: str, variants: Sequence[str]) -> Fingerprint:
    """Return the fingerprint of a variant, such as ``["bfloat16", "fast_decode"]``."""
    if not variants:
        return Fingerprint(original)
    name = "\0".join([original, *sorted(variants)])
    return Fingerprint(hashlib.sha256(name.encode()).hexdigest()[:32], original)
