"""Tensors of a TorchScript archive, the format of OpenAI's CLIP.

They are attributes of pickled modules, which become empty namespaces here. The code in the archive
is ignored.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cn_clip.errors import CheckpointError
from cn_clip.translation import _
from cn_clip.weights.pickled_file import check_pickles

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


class _Module:
    """A pickled module: only its attributes, without code."""


def is_torchscript(members: Iterable[zipfile.ZipInfo]) -> bool:
    """Return whether an archive of these members is TorchScript."""
    return any(member.orig_filename.endswith("/constants.pkl") for member in members)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module, by name.

    Raises:
        CheckpointError: the file is damaged or refused.
    """
    check_pickles(path, True)
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n))
            with archive.open(pickled) as stream:
                root = _Unpickler(stream, archive, pickled.removesuffix(".pkl")).load()
            return dict(_tensors_of(root, ""))
    except pickle.UnpicklingError as error:
        raise CheckpointError(_("{path} is refused: {error}", path=path, error=error)) from None
    except Exception as error:  # the parser raises many kinds on damaged files
        raise CheckpointError(
            _("{path} is not a valid TorchScript archive: {error}", path=path, error=error)
        ) from None


class _Unpickler(pickle.Unpickler):
    """Builds only tensors and namespaces."""

    def __init__(self, stream: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(stream)
        self._archive, self._folder = archive, folder
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _strided
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(
            _(
                "its pickle names {module}.{name}; only tensors are read, never code",
                module=module,
                name=name,
            )
        )

    def persistent_load(self, reference: Any) -> Tensor:
        _, dtype, key, _, _ = reference
        if key not in self._storages:
            raw = bytearray(self._archive.read(f"{self._folder}/{int(key)}"))
            empty = torch.empty(0, dtype=dtype)
            self._storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else empty
        return self._storages[key]


def _strided(storage: Tensor, offset: int, shape: Any, stride: Any, *_unused: Any) -> Tensor:
    end = offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if math.prod(shape) and not 0 <= offset < end <= len(storage):
        raise ValueError(_("a tensor exceeds its storage"))
    return storage.as_strided(tuple(shape), tuple(stride), offset)


def _tensors_of(module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors_of(value, f"{prefix}{name}.")
