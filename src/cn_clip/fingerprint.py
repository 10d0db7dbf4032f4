"""A model's fingerprint: it changes whenever its embeddings may.

Made of the weights in float32, the config, the vocabulary and the version of the preparation. The
model's name and the file's format and precision do not count. Needs no torch for a folder with
``model.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cn_clip.config import ModelConfig

_PREPARATION = 1  # counts changes of preprocessing or tokenization that change embeddings


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """``value`` names one model in one precision on one runtime; ``derived_from`` is the
    fingerprint of the float32 model that it was made from, None for that model itself."""

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
    """Return 32 hexadecimal digits; the tensors' order does not count."""
    digest = hashlib.sha256()
    values = config.to_dict() | {"name": None, "fast_decode": False}
    values |= {"vocab": dict(vocab), "preparation": _PREPARATION}
    digest.update(json.dumps(values, sort_keys=True).encode())
    for tensor in sorted(tensors, key=lambda each: each.name):
        head = f"{tensor.name} torch.{tensor.precision} {list(tensor.shape)}"
        digest.update(head.encode())
        digest.update(tensor.data)
    return digest.hexdigest()[:32]


def derived(original: str, variants: Sequence[str]) -> Fingerprint:
    """Return the fingerprint of a variant, such as ``["bfloat16", "fast_decode"]``."""
    if not variants:
        return Fingerprint(original)
    name = "\0".join([original, *sorted(variants)])
    return Fingerprint(hashlib.sha256(name.encode()).hexdigest()[:32], original)
