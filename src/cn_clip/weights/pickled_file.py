"""Unpickle a ``.pt`` file: every pickle in it is checked first, and no code is run."""

from __future__ import annotations

import io
import mmap
import pickle
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from cn_clip.errors import CheckpointError
from cn_clip.translation import _
from cn_clip.weights.content import checked_members, detect_format
from cn_clip.weights.pickles import RefusedPickle, check_pickle

_MAX_PICKLE_BYTES = 64 << 20  # without the data of the tensors, which is in other members
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file of torch before 1.6
_LEGACY_PICKLES = 5  # pickles in such a file, before the data


def load_pickle(path: Path) -> Any:
    """Return what a ``.pt`` file has: tensors and plain values, memory-mapped if possible.

    Raises:
        CheckpointError: the file is damaged or refused.
    """
    zipped = detect_format(path) == "archive"  # the format of torch before 1.6 cannot be mapped
    check_pickles(path, zipped)
    try:
        if path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        with path.open("rb") as stream:  # torch would read a .safetensors path as safetensors
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        if match is None:
            raise CheckpointError(
                _("{path} is not a checkpoint, or is damaged", path=path)
            ) from None
        raise CheckpointError(
            _(
                "{path} is refused: its pickle names {name}; only tensors are read, never code. "
                "If you trust the file, re-save it as a state dict",
                path=path,
                name=match[1],
            )
        ) from None
    except Exception as error:  # the parser raises many kinds on damaged files
        raise CheckpointError(
            _(
                "{path} is not a valid .pt file: {reason_of}; download or copy it again",
                path=path,
                reason_of=reason_of(error),
            )
        ) from None


def check_pickles(path: Path, zipped: bool) -> None:
    """Check every pickle in a file before it is unpickled.

    Raises:
        CheckpointError: one is refused, or the file is damaged.
    """
    size = path.stat().st_size
    try:
        if zipped:
            pickled = [m for m in checked_members(path) if m.orig_filename.lower().endswith(".pkl")]
            if sum(member.file_size for member in pickled) > _MAX_PICKLE_BYTES:
                raise RefusedPickle(_("its pickle is too large for a state dict"))
            with zipfile.ZipFile(path) as archive:
                for member in pickled:
                    check_pickle(io.BytesIO(archive.read(member)), size=size)
        else:
            with (
                path.open("rb") as stream,
                mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m,
            ):
                if tarfile.is_tarfile(path):
                    raise RefusedPickle(_("it is a tar archive, as torch wrote before 0.1.10"))
                pickles = cast(BinaryIO, m)  # its reads return at most the rest of the file
                if check_pickle(pickles, size=size) == _LEGACY_MAGIC:
                    for _unused in range(_LEGACY_PICKLES - 1):
                        check_pickle(pickles, size=size)
    except RefusedPickle as error:
        raise CheckpointError(_("{path} is refused: {error}", path=path, error=error)) from None
    except CheckpointError:
        raise
    except Exception as error:  # the parser raises many kinds on damaged files
        raise CheckpointError(
            _(
                "{path} is not a valid .pt file: {reason_of}; download or copy it again",
                path=path,
                reason_of=reason_of(error),
            )
        ) from None


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
