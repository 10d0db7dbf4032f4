"""What a run tells: JSON lines in its folder, and other places that are asked for."""

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

Event = dict[str, Any]
_FILE = "log.jsonl"


class Log:
    """Writes events to all places; each is a mapping with its ``kind``, ``total`` and ``time``.

    Only the main process has one that writes.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, *, tell: Callable[[Event], None], writes: bool
    ) -> None:
        """Open the places that a recipe asks for.

        Raises:
            UsageError: a library for one of them is missing.
        """
        self._tell, self._writes = tell, writes
        self._places: list[Callable[[str, float, int], None]] = []
        self._open = ExitStack()
        self._stream = None
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opening:
            self._stream = opening.enter_context((folder / _FILE).open("a", encoding="utf-8"))
            if _is_cut(folder / _FILE):
                self._stream.write("\n")
            self._add_places(folder, recipe.output, opening)
            self._open = opening.pop_all()

    def _add_places(self, folder: Path, output: Output, opening: ExitStack) -> None:
        if output.tensorboard:
            module = _library("torch.utils.tensorboard", "tensorboard")
            board = module.SummaryWriter(str(folder / "tensorboard"))
            opening.callback(board.close)  # it writes every two minutes, and then
            self._places.append(board.add_scalar)
        if output.swanlab:
            swanlab = _library("swanlab", "swanlab")
            swanlab.init(project="cn-clip", experiment_name=folder.name, logdir=str(folder))
            self._places.append(lambda name, value, step: swanlab.log({name: value}, step=step))
        if output.wandb:
            wandb = _library("wandb", "wandb")
            name = f"{folder.name}-{digest(str(folder.resolve())):016x}"  # the same when resumed
            wandb.init(project="cn-clip", id=name, dir=str(folder), resume="allow")
            self._places.append(lambda name, value, step: wandb.log({name: value}, step=step))

    def write(self, kind: str, total: int, **values: Any) -> None:
        """Write one event."""
        event = {"kind": kind, "total": total, "time": round(time.time(), 3), **values}
        if not self._writes:
            return
        if self._stream is not None:
            self._stream.write(json.dumps(_finite(event), ensure_ascii=False) + "\n")
            self._stream.flush()
        for place in self._places:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    place(f"{kind}/{name}", value, total)
        self._tell(event)

    def tick(self, what: str, done: int, of: int) -> None:
        """Tell how far something long is; this is not kept."""
        if self._writes:
            self._tell({"kind": "tick", "what": what, "done": done, "of": of})

    def close(self) -> None:
        self._open.close()


def read_log(folder: Path) -> list[Event]:
    """Read a run's events; where it was resumed, the later of two that stand for one step.

    A line that is damaged is left out.
    """
    events: dict[tuple[str, int, str], Event] = {}
    for event in _lines(folder / _FILE):
        kind, total = event.get("kind"), event.get("total")
        if isinstance(kind, str) and isinstance(total, int):
            events[kind, total, str(event.get("stage", event.get("text")))] = event
    return list(events.values())


def _lines(path: Path) -> Iterator[Event]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as stream:  # a character may be cut, too
        for line in stream:
            with suppress(ValueError, RecursionError):  # the last line of a run that was killed
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event


def _is_cut(path: Path) -> bool:
    """Tell whether the last line has no end: the run was killed while it wrote."""
    return path.read_bytes()[-1:] not in (b"", b"\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _library(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise UsageError(
            f"output.{package} needs {package}: pip install {package}, or leave it off"
        ) from None
