"""The tensors of a file under the names in the file, whatever wrote it; nothing in it is run."""

from __future__ import annotations

import json
import math
import mmap
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cn_clip.errors import CheckpointError, MissingWeightsError

_CHUNK = 16 << 20
_READERS = 2  # memory is touched for the first time while it fills, which is worth sharing


def read_tensors(path: str | os.PathLike[str], *, mapped: bool = False) -> dict[str, Tensor]:
    """Read all tensors of a file: ``.safetensors``, a ``.pt`` or ``.bin`` state dict (alone or in
    a training checkpoint), a TorchScript archive, or the ``.index.json`` of a file in shards.

    With ``mapped``, they may lie in the file itself: quicker, but whoever saves over the file while
    they are used ends the process.

    Raises:
        MissingWeightsError: there is no such file, or a shard is missing.
        CheckpointError: it is damaged, or holds something else than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingWeightsError(f"no such file or folder: {path}")
    if path.name.endswith(".index.json"):
        return _read_shards(path, mapped)
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pt
    return read(path, mapped)


def other_parts(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Name what a training checkpoint holds beside its state dict, such as ``optimizer``."""
    path = Path(path)
    if path.is_dir() or path.suffix not in (".pt", ".pth", ".bin") or _is_torchscript(path):
        return ()
    blob = _load_pickle(path)
    if not isinstance(blob, dict) or "state_dict" not in blob:
        return ()
    return tuple(str(key) for key in blob if key not in ("state_dict", "epoch", "name"))


def _read_shards(index: Path, mapped: bool) -> dict[str, Tensor]:
    try:
        names = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{index} is not an index of shards: no weight_map in it") from None
    shards = sorted({str(shard) for shard in names.values()})
    strange = [shard for shard in shards if Path(shard).name != shard]
    if strange:
        raise CheckpointError(f"{index} names {strange[0]!r}, which is not a file beside it")
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise MissingWeightsError(
            f"{len(absent)} of the {len(shards)} shards in {index} are missing: "
            f"{', '.join(absent)}; download them into {index.parent}"
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= read_tensors(index.parent / shard, mapped=mapped)
    lost = [name for name in names if name not in tensors]
    if lost:
        raise CheckpointError(f"{index} promises {lost[0]}, which no shard holds")
    return tensors


def _read_safetensors(path: Path, mapped: bool) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:  # checks the header against the file
            views = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if mapped:
                return views
            with path.open("rb") as stream:
                start = 8 + int.from_bytes(stream.read(8), "little")
                stream.seek(8)
                header = json.loads(stream.read(start - 8))
                places = {name: start + header[name]["data_offsets"][0] for name in views}
                return _read_at(stream, views, places)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None


def _read_pt(path: Path, mapped: bool) -> dict[str, Tensor]:
    if _is_torchscript(path):
        return _read_torchscript(path)
    # Mapped, so that of a training checkpoint, three times the weights, the optimizer's part is
    # never read. What is kept is copied: a mapping would die with the file, should someone save
    # over it.
    views = _state_dict(_load_pickle(path), path)
    if mapped:
        return views
    places = _places(path, views)
    if places is None:
        return {name: tensor.clone() for name, tensor in views.items()}
    try:
        with path.open("rb") as stream:
            return _read_at(stream, views, places)
    except OSError as error:
        raise CheckpointError(f"{path} is not a whole .pt file: {error}") from None


def _read_at(
    stream: BinaryIO, views: Mapping[str, Tensor], places: Mapping[str, int]
) -> dict[str, Tensor]:
    """Read the tensors that start at ``places`` in a file; the views tell their layout.

    Several times faster than copying a mapping page by page, and memory holds the file once.
    """
    ends = [places[name] + t.untyped_storage().nbytes() for name, t in views.items() if t.numel()]
    if not ends or not hasattr(os, "preadv"):  # nothing to read, or Windows
        return {name: tensor.clone() for name, tensor in views.items()}
    first, last = min(places.values()), max(ends)
    block = mmap.mmap(-1, last - first)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # 2 MB at a first touch instead of 4 KB: 3 times quicker
        with suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(block)

    def fill(start: int) -> None:
        end = min(last - first, start + _CHUNK)
        while start < end:
            got = os.preadv(stream.fileno(), [view[start:end]], first + start)
            if not got:
                raise OSError("it ends too early")
            start += got

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(fill, range(0, last - first, _CHUNK)))
    tensors = {}
    for name, tensor in views.items():
        if not tensor.numel():
            tensors[name] = tensor.clone()
            continue
        count = tensor.untyped_storage().nbytes() // tensor.itemsize
        flat = torch.frombuffer(block, dtype=tensor.dtype, count=count, offset=places[name] - first)
        tensors[name] = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return tensors


def _places(path: Path, views: Mapping[str, Tensor]) -> dict[str, int] | None:
    """Tell where in a ``.pt`` archive the tensors' storages lie, if they are all that it holds."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in views.values()
    }
    with path.open("rb") as stream:
        if not zipfile.is_zipfile(stream):
            return None
        records = list(_records(stream))
    pointers = sorted(storages)
    if [storages[pointer] for pointer in pointers] != [size for _, size in records]:
        return None
    start = {p: offset for p, (offset, _) in zip(pointers, records, strict=True)}
    if len({pointer - offset for pointer, offset in start.items()}) != 1:
        return None
    return {name: start[t.untyped_storage().data_ptr()] for name, t in views.items()}


def _records(stream: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield (offset, size) of an archive's storages, in the order of the file."""
    with zipfile.ZipFile(stream) as archive:
        infos = [i for i in archive.infolist() if re.search(r"/data/\d+$", i.filename)]
    for info in sorted(infos, key=lambda info: info.header_offset):
        stream.seek(info.header_offset + 26)  # the lengths of the name and of the extra field
        name, extra = (int.from_bytes(stream.read(2), "little") for _ in range(2))
        yield info.header_offset + 30 + name + extra, info.file_size


def _state_dict(blob: Any, path: Path) -> dict[str, Tensor]:
    state = blob.get("state_dict", blob) if isinstance(blob, dict) else blob
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path} holds no state dict, but {type(state).__name__}")
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f"{path} is not a state dict: {strange[0]!r} is not a tensor")
    return dict(state)


def _load_pickle(path: Path) -> Any:
    if not path.is_file():
        raise MissingWeightsError(f"no such file or folder: {path}")
    with path.open("rb") as stream:
        zipped = zipfile.is_zipfile(stream)  # the format of torch before 1.6 cannot be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
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
        raise CheckpointError(f"{path} is not a whole .pt file: {reason}") from None


# TorchScript: OpenAI published CLIP as programs. Their tensors are attributes of pickled modules;
# the modules become plain namespaces here, and the code beside them is not looked at.

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
    """Stands for a pickled module: holds its attributes, and can do nothing."""


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n))
            with archive.open(pickled) as stream:
                root = _Unpickler(stream, archive, pickled.removesuffix(".pkl")).load()
            return dict(_tensors_of(root, ""))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except Exception as error:  # these bytes may be anything, and so may what they raise
        raise CheckpointError(f"{path} is not a whole TorchScript archive: {error}") from None


class _Unpickler(pickle.Unpickler):
    """Builds tensors and empty namespaces, and nothing else."""

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
            f"its pickle names {module}.{name}, and only tensors are read, never code"
        )

    def persistent_load(self, reference: Any) -> Tensor:
        _, dtype, key, _, _ = reference
        if key not in self._storages:
            raw = bytearray(self._archive.read(f"{self._folder}/{int(key)}"))
            self._storages[key] = torch.frombuffer(raw, dtype=dtype)
        return self._storages[key]


def _strided(storage: Tensor, offset: int, shape: Any, stride: Any, *_: Any) -> Tensor:
    needed = offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if math.prod(shape) and not 0 <= offset < needed <= len(storage):
        raise ValueError("a tensor reaches beyond its data")
    return storage.as_strided(tuple(shape), tuple(stride), offset)


def _tensors_of(module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors_of(value, f"{prefix}{name}.")
