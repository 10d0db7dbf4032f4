"""Tensors of a weights file of any format, under the names in the file; no code in it is run."""

from __future__ import annotations

import json
import mmap
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from cn_clip.config import read_config_json, shard_names
from cn_clip.errors import CheckpointError, MissingWeightsError
from cn_clip.translation import _
from cn_clip.weights.content import checked_members, detect_format
from cn_clip.weights.pickled_file import load_pickle, reason_of
from cn_clip.weights.torchscript import is_torchscript, read_torchscript

_READ_BYTES = 16 << 20
_READERS = 2  # threads: the page faults of fresh memory are worth sharing


def read_tensors(path: str | os.PathLike[str], *, mapped: bool = False) -> dict[str, Tensor]:
    """Read all tensors of a file: ``.safetensors``, a ``.pt`` or ``.bin`` state dict (alone or in
    a training checkpoint), a TorchScript archive, or the ``.index.json`` of shards.

    With ``mapped``, tensors may be memory-mapped. This is faster, but the process crashes if the
    file is overwritten while they are used.

    Raises:
        MissingWeightsError: the file or a shard is missing.
        CheckpointError: the file is damaged, or has something other than tensors.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise MissingWeightsError(_("{path} is a folder; give the weights file in it", path=path))
    if not os.path.isfile(path):
        raise MissingWeightsError(_("no such file or folder: {path}", path=path))
    if path.name.endswith(".index.json"):
        return _read_shards(path, mapped)
    read = _read_safetensors if detect_format(path) == "safetensors" else _read_pt
    return read(path, mapped)


def other_checkpoint_keys(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the keys of a training checkpoint other than its state dict, such as ``optimizer``."""
    path = Path(path)
    if (
        not os.path.isfile(path)
        or path.name.endswith(".json")
        or detect_format(path) == "safetensors"
    ):
        return ()
    if detect_format(path) == "archive" and is_torchscript(checked_members(path)):
        return ()
    blob = load_pickle(path)
    others: list[str] = []
    for state_dict_key in _state_dict_keys(blob):
        others += [str(key) for key in blob if key not in (state_dict_key, "epoch", "name")]
        blob = blob[state_dict_key]
    return tuple(others)


def _read_shards(index: Path, mapped: bool) -> dict[str, Tensor]:
    shards = shard_names(index)
    missing = [shard for shard in shards if not os.path.isfile(index.parent / shard)]
    if missing:
        raise MissingWeightsError(
            _(
                "{missing_count} of the {shard_count} shards in {index} are missing: {missing}; "
                "download them into {folder}",
                missing_count=len(missing),
                shard_count=len(shards),
                index=index,
                missing=", ".join(missing),
                folder=index.parent,
            )
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= read_tensors(index.parent / shard, mapped=mapped)
    missing = [name for name in read_config_json(index)["weight_map"] if name not in tensors]
    if missing:
        raise CheckpointError(
            _("{index} lists {missing}, which is in no shard", index=index, missing=missing[0])
        )
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
                offsets = {name: start + header[name]["data_offsets"][0] for name in views}
                return _read_at(stream, views, offsets)
    except Exception as error:  # the parser raises many kinds on damaged files
        raise CheckpointError(
            _(
                "{path} is not a valid safetensors file: {reason_of}; download or copy it again",
                path=path,
                reason_of=reason_of(error),
            )
        ) from None


def _read_pt(path: Path, mapped: bool) -> dict[str, Tensor]:
    if detect_format(path) == "archive" and is_torchscript(checked_members(path)):
        return _checked(read_torchscript(path), path)
    # Memory-mapped, so the optimizer state of a training checkpoint is never read. The weights are
    # then copied, since a mapping is lost when the file is overwritten.
    views = _checked(state_dict_in(load_pickle(path), path), path)
    if mapped:
        return views
    offsets = _storage_offsets(path, views)
    if offsets is None:
        return {name: tensor.clone() for name, tensor in views.items()}
    try:
        with path.open("rb") as stream:
            return _read_at(stream, views, offsets)
    except OSError as error:
        raise CheckpointError(
            _("{path} is not a valid .pt file: {error}", path=path, error=error)
        ) from None


def _checked(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors; raise a ``CheckpointError`` if one exceeds its storage or the file."""
    size = path.stat().st_size
    bytes_used, storages = 0, {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = _("quantized") if tensor.is_quantized else str(tensor.layout)
            kind = (
                kind
                if tensor.device.type == "cpu"
                else _("on the {device} device", device=tensor.device)
            )
            raise CheckpointError(
                _(
                    "{path}: {name} is {kind}, not a plain tensor; save it after .dequantize(), "
                    ".to_dense() or .cpu()",
                    path=path,
                    name=name,
                    kind=kind,
                )
            )
        storage, bytes_needed = tensor.untyped_storage(), tensor.numel() * tensor.itemsize
        if bytes_needed > storage.nbytes():
            raise CheckpointError(
                _(
                    "{path}: {name} {shape} needs {bytes_needed:,} bytes and has {nbytes:,}; save "
                    "it after .contiguous(), or download it again",
                    path=path,
                    name=name,
                    shape=list(tensor.shape),
                    bytes_needed=bytes_needed,
                    nbytes=storage.nbytes(),
                )
            )
        storages[storage.data_ptr()] = storage.nbytes()
        bytes_used += bytes_needed
    if sum(storages.values()) > size or bytes_used > 2 * size:  # tied weights count twice
        raise CheckpointError(
            _(
                "{path} is not a valid .pt file: its tensors need {bytes_used:,} bytes, and it "
                "has {size:,}",
                path=path,
                bytes_used=bytes_used,
                size=size,
            )
        )
    return tensors


def _read_at(
    stream: BinaryIO, views: Mapping[str, Tensor], offsets: Mapping[str, int]
) -> dict[str, Tensor]:
    """Read the tensors at these offsets of a file, with the layout of the views.

    This is several times faster than copying a mapping page by page.
    """
    ends = [offsets[name] + t.untyped_storage().nbytes() for name, t in views.items() if t.numel()]
    if not ends or not hasattr(os, "preadv"):  # nothing to read, or Windows
        return {name: tensor.clone() for name, tensor in views.items()}
    first, last = min(offsets.values()), max(ends)
    buffer = mmap.mmap(-1, last - first)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # page faults of 2 MB instead of 4 KB: 3 times faster
        with suppress(OSError):  # a kernel without huge pages
            buffer.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(buffer)

    def fill(start: int) -> None:
        end = min(last - first, start + _READ_BYTES)
        while start < end:
            count = os.preadv(stream.fileno(), [view[start:end]], first + start)
            if not count:
                raise OSError(_("it ends too early"))
            start += count

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(fill, range(0, last - first, _READ_BYTES)))
    tensors = {}
    for name, tensor in views.items():
        if not tensor.numel():
            tensors[name] = tensor.clone()
            continue
        count = tensor.untyped_storage().nbytes() // tensor.itemsize
        offset = offsets[name] - first
        flat = torch.frombuffer(buffer, dtype=tensor.dtype, count=count, offset=offset)
        tensors[name] = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return tensors


def _storage_offsets(path: Path, views: Mapping[str, Tensor]) -> dict[str, int] | None:
    """Return the offsets of the tensors' storages in a ``.pt`` archive.

    None if the archive has other storages too.
    """
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
    """Yield (offset, size) of an archive's storages, in file order."""
    with zipfile.ZipFile(stream) as archive:
        infos = [i for i in archive.infolist() if re.search(r"/data/\d+$", i.filename)]
    for info in sorted(infos, key=lambda info: info.header_offset):
        stream.seek(info.header_offset + 26)  # lengths of the name and of the extra field
        name_length, extra_length = (int.from_bytes(stream.read(2), "little") for _ in range(2))
        yield info.header_offset + 30 + name_length + extra_length, info.file_size


# Keys of the state dict in checkpoints of the official training and Lightning, of scripts, and of
# DeepSpeed.
_STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "module")


_MAX_NESTED = 3  # ``{"model": {"state_dict": {"module": ...}}}``


def _state_dict_keys(blob: Any) -> list[str]:
    """Return the keys that lead to the state dict in a training checkpoint, none if ``blob`` is not
    one."""
    keys: list[str] = []
    while isinstance(blob, dict) and len(keys) < _MAX_NESTED:
        key = next((k for k in _STATE_DICT_KEYS if isinstance(blob.get(k), Mapping)), None)
        if key is None:
            break
        keys.append(key)
        blob = blob[key]
    return keys


def state_dict_in(blob: Any, where: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the state dict of a training checkpoint, or ``blob`` if it is a state dict itself.

    Raises:
        CheckpointError: there is no state dict, or it has something other than tensors.
    """
    keys = _state_dict_keys(blob)
    state = blob
    for key in keys:
        state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(
            _(
                "{where} has no state dict, but {state_type}",
                where=where,
                state_type=type(state).__name__,
            )
        )
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if not others:
        return {str(name): tensor for name, tensor in state.items()}
    dicts = [str(k) for k, v in state.items() if isinstance(v, Mapping)]
    remedy = (
        _(
            '; if the weights are under {name!r}: torch.save(torch.load(f)["{name}"], g)',
            name=dicts[0],
        )
        if dicts and not keys
        else _("; it has {names}", names=", ".join(str(name) for name in list(state)[:4]))
    )
    raise CheckpointError(
        _(
            "{where} is not a state dict: {other!r} is not a tensor{remedy}",
            where=where,
            other=others[0],
            remedy=remedy,
        )
    )
