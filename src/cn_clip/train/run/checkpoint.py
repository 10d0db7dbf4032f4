"""The states of a run on disk: everything that the next step depends on.

A state is a folder ``states/STEP``, written atomically. It has the tensors, which each process
writes with ``torch.distributed.checkpoint``, and ``progress.json``. A state serves to resume its
run; weights for other uses are in safetensors folders.
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
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from cn_clip import distributed
from cn_clip.errors import CheckpointError
from cn_clip.format_version import FIELD, Format
from cn_clip.outputs import STAMP, atomic_folder
from cn_clip.train.early_stopping import EarlyStopping
from cn_clip.train.optim import Average
from cn_clip.translation import _
from cn_clip.weights.pickles import check_pickle

_FORMAT = Format("run state", 1)
_STATES = "states"
_PROGRESS = "progress.json"
_STEP = re.compile(r"[0-9]{9,}")
_TENSORS = "tensors"
_RENAMED = {"course": "early_stopping", "due": "evaluation_pending"}  # in states of old runs
_MAX_PICKLE_BYTES = 1 << 20  # of one tensor; usually about 200
# The classes in the metadata of tensors; paths, because it names the folder.
_METADATA_CLASSES: dict[str, tuple[str, ...]] = {
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
    """The position of a run.

    Attributes:
        stage: index of the stage.
        step: steps done in the stage.
        total: steps done in all stages.
        epoch, batch: indexes of the next batch, within the stage.
        before: score before the first step.
        weights: folder of the stage's initial weights, within the run's folder.
        early_stopping: scores of the stage so far.
        scaler: state of the loss scaler of float16.
        evaluation_pending: a signal came before an evaluation that was due.
        finished: the stage has ended.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    epoch: int = 0
    batch: int = 0
    before: float | None = None
    weights: str = "start"
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    scaler: dict[str, Any] = field(default_factory=dict)
    evaluation_pending: bool = False
    finished: bool = False


def save_state(
    folder: Path,
    progress: Progress,
    tensors: Mapping[str, Any],
    *,
    keep: int,
    group: ProcessGroup | None = None,
) -> Path:
    """Save a state, then remove all but the newest ``keep``.

    Every process calls this. A state of the same step is replaced. ``group`` is that of the thread;
    by default the main one.

    Raises:
        CheckpointError: the state cannot be written; earlier states are unchanged.
    """
    path = folder / _STATES / f"{progress.total:09d}"
    try:
        with ExitStack() as stack:
            temporary = None
            if distributed.is_main():
                temporary = stack.enter_context(atomic_folder(path, "train", check=_objection))
            temporary = distributed.broadcast_object(temporary, group)
            assert temporary is not None
            # Not catch_warnings, which threads must not use.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            save(
                dict(tensors),
                checkpoint_id=temporary / _TENSORS,
                no_dist=distributed.world_size() == 1,
                process_group=group,
            )
            if distributed.is_main():
                text = json.dumps({FIELD: str(_FORMAT), **asdict(progress)}, indent=2)
                (temporary / _PROGRESS).write_text(text + "\n", encoding="utf-8")
            distributed.barrier(group)
    except (OSError, RuntimeError, CheckpointException) as error:
        last = states(folder)
        kept = (
            _("the last state, {name}, is complete", name=last[-1].name)
            if last
            else _("there is no earlier state")
        )
        raise CheckpointError(
            _(
                "the state of step {total} was not saved ({reason}); {kept}. Free some space, "
                "then resume with: --resume auto",
                total=progress.total,
                reason=_root_cause(error),
                kept=kept,
            )
        ) from error
    if distributed.is_main():
        for old in states(folder)[:-keep]:
            if _objection(old) is None:
                shutil.rmtree(old, ignore_errors=True)
    distributed.barrier(group)
    return path


def states(folder: Path) -> list[Path]:
    """Return the complete states of a run, oldest first; a copy under another name is not one."""
    paths = (path for path in (folder / _STATES).glob("[0-9]*") if _STEP.fullmatch(path.name))
    complete = (path for path in paths if (path / _PROGRESS).is_file())
    return sorted(complete, key=lambda path: int(path.name))


def _objection(state: Path) -> str | None:
    """Return why a folder may not be replaced; a state, complete or not, may."""
    other = {path.name for path in state.iterdir()} - {_PROGRESS, _TENSORS, STAMP}
    return _("has {other}, which train did not write", other=sorted(other)[0]) if other else None


def read_progress(state: Path) -> Progress:
    """Read the progress of a state.

    Raises:
        CheckpointError: the file is damaged, or of a newer version.
    """
    path = state / _PROGRESS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        _FORMAT.check(
            values.pop(FIELD, None), path, CheckpointError, _("delete {state}", state=state)
        )
        values = {_RENAMED.get(name, name): value for name, value in values.items()}
        stopping = EarlyStopping(**values["early_stopping"])
        progress = Progress(**values | {"early_stopping": stopping})
        _check_types(progress)
        _check_types(stopping)
        return progress
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            _("{path} is damaged: {error}; delete {state}", path=path, error=error, state=state)
        ) from None


def load_tensors(state: Path, tensors: dict[str, Any]) -> None:
    """Load the tensors of a state in place.

    Raises:
        CheckpointError: the state is damaged, or of another model.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(
                tensors,
                storage_reader=_Reader(state / _TENSORS),
                no_dist=distributed.world_size() == 1,
            )
    # torch parses the files here, and damaged ones make it raise errors of many types.
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            _(
                "the state {state} cannot be read: {reason}; if other parameters are trainable "
                "now, start a new run with --start.checkpoint; if a file is damaged, delete that "
                "folder, and the run resumes from the state before",
                state=state,
                reason=_root_cause(error),
            )
        ) from error


class _Reader(FileSystemReader):
    """Reads a state without running code that its files name; torch's own reader would."""

    def read_metadata(self, *_unused: Any, **__: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        with path.open("rb") as stream:
            size = path.stat().st_size
            check_pickle(stream, size=size)
            stream.seek(0)
            metadata = _Metadata(stream).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError(_(".metadata has no tensors"))
        for location in metadata.storage_data.values():
            name = location.relative_path
            if not isinstance(name, str) or name != Path(name).name:
                raise ValueError(
                    _(".metadata names the file {name!r:.60}, outside its folder", name=name)
                )
            self._check_tensor(location)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def _check_tensor(self, location: Any) -> None:
        """Check the pickle of a tensor before torch unpickles it."""
        with (Path(self.path) / location.relative_path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            part = io.BufferedReader(_Part(file, location.offset, min(size, location.length)))
            with part, zipfile.ZipFile(part) as archive:
                for member in archive.infolist():
                    if member.filename.endswith(".pkl"):
                        if member.file_size > _MAX_PICKLE_BYTES:
                            raise ValueError(_("the pickle of a tensor is too large"))
                        check_pickle(io.BytesIO(archive.read(member)), size=size)


class _Part(io.RawIOBase):
    """A range of a file as a file, which is not read at once, since a tensor may be large."""

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
        content = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


class _Metadata(pickle.Unpickler):
    """Unpickles the metadata of tensors only: torch would unpickle other objects
    (``BytesStorageMetadata``) without a check."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(
                _(".metadata names {name} of {module}", name=name, module=module)
            )
        return super().find_class(module, name)

    def persistent_load(self, reference: Any) -> Any:
        raise pickle.UnpicklingError(
            _(".metadata refers to {reference!r:.60}", reference=reference)
        )


def _check_types(values: Progress | EarlyStopping) -> None:
    """Raise a ``ValueError`` for a value that does not have its field's type."""
    for name, hint in get_type_hints(type(values)).items():
        value = getattr(values, name)
        types = {get_origin(arg) or arg for arg in get_args(hint) or (hint,)}
        if get_origin(hint) is dict:
            types = {dict}
        is_int = isinstance(value, int) and not isinstance(value, bool)
        valid = type(value) in types or (float in types and is_int)
        if not valid or (is_int and not 0 <= value < 1 << 53):
            raise ValueError(_("{name} is {value!r:.60}", name=name, value=value))


def tensors_of(
    model: nn.Module,
    heads: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
) -> dict[str, Any]:
    """Return all tensors of a run; they share memory, so that loading into them restores the run.

    The moments of AdamW are created if it has done no step yet.
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


def _root_cause(error: BaseException) -> str:
    """Return the first line of the error that caused another."""
    failures = getattr(error, "failures", None)
    if failures:
        failure = next(iter(failures.values()))
        return _root_cause(failure[0] if isinstance(failure, tuple) else failure)
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return reason.rpartition("metadata read failed: ")[2]  # torch's prefix
