"""The tensors of a file under the names in the file, whatever wrote it; nothing in it is run."""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import safe_open
from torch import Tensor

from cn_clip.config import read_json, shards_of
from cn_clip.errors import CheckpointError, MissingWeightsError
from cn_clip.weights.content import content_of, members_of
from cn_clip.weights.pickles import Refused, check_pickle

_LARGEST_PICKLE = 64 << 20  # bytes, without the tensors' numbers, which lie beside it
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # how a file of torch before 1.6 begins: five pickles,
_LEGACY_PICKLES = 5  # and the numbers behind them
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
    if os.path.isdir(path):
        raise MissingWeightsError(f"{path} is a folder; give the file of weights in it")
    if not os.path.isfile(path):
        raise MissingWeightsError(f"no such file or folder: {path}")
    if path.name.endswith(".index.json"):
        return _read_shards(path, mapped)
    read = _read_safetensors if content_of(path) == "safetensors" else _read_pt
    return read(path, mapped)


def other_parts(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Name what a training checkpoint holds beside its state dict, such as ``optimizer``."""
    path = Path(path)
    if not os.path.isfile(path) or path.name.endswith(".json") or content_of(path) == "safetensors":
        return ()
    if content_of(path) == "archive" and _is_torchscript(members_of(path)):
        return ()
    blob = _load_pickle(path)
    place = _state_dict_key(blob)
    if place is None:
        return ()
    return tuple(str(key) for key in blob if key not in (place, "epoch", "name"))


def _read_shards(index: Path, mapped: bool) -> dict[str, Tensor]:
    shards = shards_of(index)
    absent = [shard for shard in shards if not os.path.isfile(index.parent / shard)]
    if absent:
        raise MissingWeightsError(
            f"{len(absent)} of the {len(shards)} shards in {index} are missing: "
            f"{', '.join(absent)}; download them into {index.parent}"
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= read_tensors(index.parent / shard, mapped=mapped)
    lost = [name for name in read_json(index)["weight_map"] if name not in tensors]
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
    except Exception as error:  # these bytes may be anything, and so may what they raise
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {_reason(error)}; download or copy it again"
        ) from None


def _read_pt(path: Path, mapped: bool) -> dict[str, Tensor]:
    if content_of(path) == "archive" and _is_torchscript(members_of(path)):
        return _checked(_read_torchscript(path), path)
    # Mapped, so that of a training checkpoint, three times the weights, the optimizer's part is
    # never read. What is kept is copied: a mapping would die with the file, should someone save
    # over it.
    views = _checked(state_dict_in(_load_pickle(path), path), path)
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


def _checked(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors if each lies in numbers that the file holds."""
    size = path.stat().st_size
    used, storages = 0, {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = "quantized" if tensor.is_quantized else str(tensor.layout)
            kind = kind if tensor.device.type == "cpu" else f"on the {tensor.device} device"
            raise CheckpointError(
                f"{path}: {name} is {kind}, not a plain tensor; save it after .dequantize(), "
                ".to_dense() or .cpu()"
            )
        storage, bytes_needed = tensor.untyped_storage(), tensor.numel() * tensor.itemsize
        if bytes_needed > storage.nbytes():
            raise CheckpointError(
                f"{path}: {name} {list(tensor.shape)} needs {bytes_needed:,} bytes and has "
                f"{storage.nbytes():,}; save it after .contiguous(), or download it again"
            )
        storages[storage.data_ptr()] = storage.nbytes()
        used += bytes_needed
    if sum(storages.values()) > size or used > 2 * size:  # weights that are tied count twice
        raise CheckpointError(
            f"{path} is not a whole .pt file: its tensors need {used:,} bytes, and it has {size:,}"
        )
    return tensors


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


# Where training programs keep the state dict: the official one and Lightning, many a script,
# DeepSpeed.
_STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "module")


def _state_dict_key(blob: Any) -> str | None:
    """Return the key of a training checkpoint that its state dict is under, if it is one."""
    if not isinstance(blob, dict):
        return None
    under = (key for key in _STATE_DICT_KEYS if isinstance(blob.get(key), Mapping))
    return next(under, None)


def state_dict_in(blob: Any, where: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the state dict of a training checkpoint, or the one that ``blob`` is itself.

    Raises:
        CheckpointError: there is none, or it holds something else than tensors.
    """
    place = _state_dict_key(blob)
    state = blob if place is None else blob[place]
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{where} holds no state dict, but {type(state).__name__}")
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if not strange:
        return {str(name): tensor for name, tensor in state.items()}
    dicts = [str(k) for k, v in state.items() if isinstance(v, Mapping)]
    remedy = (
        f'; if the weights are under {dicts[0]!r}: torch.save(torch.load(f)["{dicts[0]}"], g)'
        if dicts and place is None
        else f"; it holds {', '.join(str(name) for name in list(state)[:4])}"
    )
    raise CheckpointError(f"{where} is not a state dict: {strange[0]!r} is not a tensor{remedy}")


def _load_pickle(path: Path) -> Any:
    zipped = content_of(path) == "archive"  # the format of torch before 1.6 cannot be mapped
    _check_pickles(path, zipped)
    try:
        if path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        with path.open("rb") as stream:  # by that name torch would take it for safetensors
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise CheckpointError(f"{path} is not a checkpoint, or a damaged one") from None
        raise CheckpointError(
            f"{path} is refused: its pickle names {named[1]}, and only tensors are read, never "
            "code; re-save it as a state dict where you trust it"
        ) from None
    except Exception as error:  # these bytes may be anything, and so may what they raise
        raise CheckpointError(
            f"{path} is not a whole .pt file: {_reason(error)}; download or copy it again"
        ) from None


def _check_pickles(path: Path, zipped: bool) -> None:
    """Bound every pickle in a file before it is unpickled."""
    size = path.stat().st_size
    try:
        if zipped:
            pickled = [m for m in members_of(path) if m.orig_filename.lower().endswith(".pkl")]
            if sum(member.file_size for member in pickled) > _LARGEST_PICKLE:
                raise Refused("its pickle is too large for a state dict")
            with zipfile.ZipFile(path) as archive:
                for member in pickled:
                    check_pickle(io.BytesIO(archive.read(member)), size=size)
        else:
            with (
                path.open("rb") as stream,
                mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m,
            ):
                if tarfile.is_tarfile(path):
                    raise Refused("it is a tar archive, as torch wrote before 0.1.10")
                pickles = cast(BinaryIO, m)  # its reads end where the file does
                if check_pickle(pickles, size=size) == _LEGACY_MAGIC:
                    for _ in range(_LEGACY_PICKLES - 1):
                        check_pickle(pickles, size=size)
    except Refused as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except CheckpointError:
        raise
    except Exception as error:  # these bytes may be anything, and so may what they raise
        raise CheckpointError(
            f"{path} is not a whole .pt file: {_reason(error)}; download or copy it again"
        ) from None


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


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


def _is_torchscript(members: Iterable[zipfile.ZipInfo]) -> bool:
    return any(member.orig_filename.endswith("/constants.pkl") for member in members)


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    _check_pickles(path, True)
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
            empty = torch.empty(0, dtype=dtype)
            self._storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else empty
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
