"""The log of a run: JSON lines in its folder, and the trackers that the recipe enables."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from cn_clip.data.captions import digest
from cn_clip.errors import UsageError
from cn_clip.train.recipe.schema import Output, Recipe
from cn_clip.train.run.events import RunEvent, parse
from cn_clip.translation import _

Event = dict[str, Any]  # an event as JSON, with "kind" and "total"; see ``events``
_FILE = "log.jsonl"


class Log:
    """Writes events to the file, the trackers and a callback.

    An event is a mapping with its ``kind``, ``total`` and ``time``. Only the main process's log
    writes.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, *, on_event: Callable[[Event], None], writes: bool
    ) -> None:
        """Open the file and the trackers of a recipe.

        Raises:
            UsageError: the library of a tracker is missing.
        """
        self._on_event, self._writes = on_event, writes
        self._trackers: list[Callable[[str, float, int], None]] = []
        self._open = ExitStack()
        self._stream = None
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opening:
            self._stream = opening.enter_context((folder / _FILE).open("a", encoding="utf-8"))
            if _is_cut(folder / _FILE):
                self._stream.write("\n")
            self._add_trackers(folder, recipe.output, opening)
            self._open = opening.pop_all()

    def _add_trackers(self, folder: Path, output: Output, opening: ExitStack) -> None:
        if output.tensorboard:
            module = _library("torch.utils.tensorboard", "tensorboard")
            board = module.SummaryWriter(str(folder / "tensorboard"))
            opening.callback(board.close)  # otherwise it writes every two minutes
            self._trackers.append(board.add_scalar)
        if output.swanlab:
            swanlab = _library("swanlab", "swanlab")
            swanlab.init(project="cn-clip", experiment_name=folder.name, logdir=str(folder))
            self._trackers.append(lambda name, value, step: swanlab.log({name: value}, step=step))
        if output.wandb:
            wandb = _library("wandb", "wandb")
            name = f"{folder.name}-{digest(str(folder.resolve())):016x}"  # the same after a resume
            wandb.init(project="cn-clip", id=name, dir=str(folder), resume="allow")
            self._trackers.append(lambda name, value, step: wandb.log({name: value}, step=step))

    def write(self, kind: str, total: int, **values: Any) -> None:
        """Write an event."""
        event = {"kind": kind, "total": total, "time": round(time.time(), 3), **values}
        if not self._writes:
            return
        if self._stream is not None:
            self._stream.write(json.dumps(_finite(event), ensure_ascii=False) + "\n")
            self._stream.flush()
        for track in self._trackers:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    track(f"{kind}/{name}", value, total)
        self._on_event(event)

    def record(self, event: RunEvent) -> None:
        """Write a typed event."""
        self.write(event.kind, event.total, **event.values())

    def tick(self, what: str, done: int, of: int) -> None:
        """Report progress to the callback; it is not written."""
        if self._writes:
            self._on_event({"kind": "tick", "what": what, "done": done, "of": of})

    def close(self) -> None:
        self._open.close()


def read_log(folder: Path) -> list[Event]:
    """Read the events of a run, without damaged lines.

    A resumed run repeats steps; the later event of a step replaces the earlier one.
    """
    events: dict[tuple[str, int, str], Event] = {}
    for event in _lines(folder / _FILE):
        kind, total = event.get("kind"), event.get("total")
        if isinstance(kind, str) and isinstance(total, int):
            events[kind, total, str(event.get("stage", event.get("text")))] = event
    return list(events.values())


def read_events(folder: Path) -> list[RunEvent]:
    """Read the events of a run as typed values; see ``read_log``."""
    return parse(read_log(folder))


def _lines(path: Path) -> Iterator[Event]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as stream:  # a character may be cut
        for line in stream:
            with suppress(ValueError, RecursionError):  # the last line of a run that was killed
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event


def _is_cut(path: Path) -> bool:
    """Return whether the last line is incomplete, since the run was killed."""
    return path.read_bytes()[-1:] not in (b"", b"\n")


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by text."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _library(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise UsageError(
            _(
                "output.{package} needs {package}: pip install {package}, or leave it off",
                package=package,
            )
        ) from None
