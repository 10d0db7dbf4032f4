"""The state of a run on disk: everything that the next step depends on.

A state is a folder ``states/STEP`` that appears whole: written beside its place, flushed, renamed.
It holds the tensors as ``torch.distributed.checkpoint`` writes them, each process its own, and
``progress.json``. It is for going on with this run; what is shared with others is the folder of
weights (safetensors).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from cn_clip import distributed
from cn_clip.errors import CheckpointError
from cn_clip.outputs import STAMP, atomic_folder
from cn_clip.train.model.freeze import Course
from cn_clip.train.optim import Average
from cn_clip.weights.pickles import check_pickle

_STATES = "states"
_PROGRESS = "progress.json"
_STEP = re.compile(r"[0-9]{9,}")
_TENSORS = "tensors"
_LARGEST_PICKLE = 1 << 20  # of one tensor; some 200 bytes
# What tensors are described with; a path, because the folder that was saved to is named.
_DESCRIPTIONS: dict[str, tuple[str, ...]] = {
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
}  # fmt: skip


@dataclass(slots=True)
class Progress:
    """Where a run is.

    Attributes:
        stage: number of the stage, from 0.
        step: steps done in the stage.
        total: steps done in all.
        epoch, batch: the next batch, of the stage's passes over the data.
        before: the score before the first step.
        weights: the folder, within the run's, that the stage started from.
        course: how its scores have gone.
        scaler: of float16.
        due: whether a score was due when the run was stopped.
        finished: whether the stage is over.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    epoch: int = 0
    batch: int = 0
    before: float | None = None
    weights: str = "start"
    course: Course = field(default_factory=Course)
    scaler: dict[str, Any] = field(default_factory=dict)
    due: bool = False
    finished: bool = False


def save_state(folder: Path, progress: Progress, tensors: Mapping[str, Any], *, keep: int) -> Path:
    """Write a state, then remove all but the newest ``keep``.

    Every process calls this. A state of the same step is replaced.

    Raises:
        CheckpointError: it cannot be written; the states before it are as they were.
    """
    path = folder / _STATES / f"{progress.total:09d}"
    try:
        with ExitStack() as stack:
            made = None
            if distributed.is_main():
                made = stack.enter_context(atomic_folder(path, "train", check=_objection))
            place = distributed.broadcast_object(made)
            assert place is not None
            with warnings.catch_warnings():  # it says what it was told: one process
                warnings.simplefilter("ignore")
                save(
                    dict(tensors),
                    checkpoint_id=place / _TENSORS,
                    no_dist=distributed.world_size() == 1,
                )
            if distributed.is_main():
                text = json.dumps(asdict(progress), indent=2)
                (place / _PROGRESS).write_text(text + "\n", encoding="utf-8")
            distributed.barrier()
    except (OSError, RuntimeError, CheckpointException) as error:
        last = states(folder)
        kept = (
            f"the last state, {last[-1].name}, is whole" if last else "there is no state before it"
        )
        raise CheckpointError(
            f"the state of step {progress.total} could not be saved ({_first(error)}); {kept}. "
            "Free some space, then go on with: --resume auto"
        ) from error
    if distributed.is_main():
        for old in states(folder)[:-keep]:
            if _objection(old) is None:
                shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()
    return path


def states(folder: Path) -> list[Path]:
    """Return the whole states of a run, oldest first; a copy that somebody keeps under another name
    is none."""
    found = (path for path in (folder / _STATES).glob("[0-9]*") if _STEP.fullmatch(path.name))
    whole = (path for path in found if (path / _PROGRESS).is_file())
    return sorted(whole, key=lambda path: int(path.name))


def _objection(state: Path) -> str | None:
    """A state of this step, whole or not, may be replaced, and nothing else."""
    other = {path.name for path in state.iterdir()} - {_PROGRESS, _TENSORS, STAMP}
    return f"holds {sorted(other)[0]}, which no train wrote" if other else None


def read_progress(state: Path) -> Progress:
    """Read where a state is.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        values = json.loads((state / _PROGRESS).read_text(encoding="utf-8"))
        progress = Progress(**values | {"course": Course(**values["course"])})
        _check_kinds(progress)
        _check_kinds(progress.course)
        return progress
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{state / _PROGRESS} is damaged: {error}; delete {state}") from None


def load_tensors(state: Path, tensors: dict[str, Any]) -> None:
    """Fill tensors in place with those of a state.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(
                tensors,
                storage_reader=_Reader(state / _TENSORS),
                no_dist=distributed.world_size() == 1,
            )
    # torch reads bytes here that may be anything, and what they make it raise is of many kinds.
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"the state {state} cannot be read: {_first(error)}; if the recipe has changed in what "
            "learns, begin a new run with --start.checkpoint; if a file is damaged, delete that "
            "folder, and the run goes on from the one before"
        ) from error


class _Reader(FileSystemReader):
    """Reads a state without running anything that its files name, as torch's own reader would."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        with path.open("rb") as stream:
            size = path.stat().st_size
            check_pickle(stream, size=size)
            stream.seek(0)
            metadata = _Metadata(stream).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError(".metadata describes no tensors")
        for place in metadata.storage_data.values():
            name = place.relative_path
            if not isinstance(name, str) or name != Path(name).name:
                raise ValueError(f".metadata names the file {name!r:.60}, outside its folder")
            self._check_tensor(place)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def _check_tensor(self, place: Any) -> None:
        """Bound the pickle of a tensor before torch unpickles it."""
        with (Path(self.path) / place.relative_path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            part = io.BufferedReader(_Part(file, place.offset, min(size, place.length)))
            with part, zipfile.ZipFile(part) as archive:
                for member in archive.infolist():
                    if member.filename.endswith(".pkl"):
                        if member.file_size > _LARGEST_PICKLE:
                            raise ValueError("the pickle of a tensor is too large")
                        check_pickle(io.BytesIO(archive.read(member)), size=size)


class _Part(io.RawIOBase):
    """A part of a file as a file; it is not read whole, because a tensor may be large."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        found = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


class _Metadata(pickle.Unpickler):
    """Makes what torch describes tensors with, and nothing else: what it would take for objects
    other than tensors (``BytesStorageMetadata``), it would unpickle without a check."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _DESCRIPTIONS.get(module, ()):
            raise pickle.UnpicklingError(f".metadata names {name} of {module}")
        return super().find_class(module, name)

    def persistent_load(self, reference: Any) -> Any:
        raise pickle.UnpicklingError(f".metadata refers to {reference!r:.60}")


def _check_kinds(values: Progress | Course) -> None:
    """Raise a ``ValueError`` for a value that is not of its field's type."""
    for name, kind in get_type_hints(type(values)).items():
        value = getattr(values, name)
        kinds = {get_origin(each) or each for each in get_args(kind) or (kind,)}
        if get_origin(kind) is dict:
            kinds = {dict}
        number = isinstance(value, int) and not isinstance(value, bool)
        fits = type(value) in kinds or (float in kinds and number)
        if not fits or (number and not 0 <= value < 1 << 53):
            raise ValueError(f"{name} is {value!r:.60}")


def tensors_of(
    model: nn.Module,
    heads: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
) -> dict[str, Any]:
    """Return all tensors of a run, sharing memory with it, so that loading fills it.

    AdamW's moments are made if it has done no step yet.
    """
    moments: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros(
                    (), device=parameter.device if parameter.device.type == "cuda" else "cpu"
                )
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            moments |= {f"{name}.{key}": value for key, value in state.items()}
    return {
        "model": model.state_dict(),
        "heads": heads.state_dict(),
        "optimizer": moments,
        "average": {} if average is None else average.state_dict(),
    }


def _first(error: BaseException) -> str:
    """Return the root of an error in one line."""
    failures = getattr(error, "failures", None)
    if failures:
        each = next(iter(failures.values()))
        return _first(each[0] if isinstance(each, tuple) else each)
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return reason.rpartition("metadata read failed: ")[2]  # what torch puts in front says nothing
