"""``cn-clip index`` started from the page: a process of its own, and its progress in a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cn_clip.embedder import load
from cn_clip.errors import CNClipError
from cn_clip.outputs import json_object_at
from cn_clip.publish import write_text
from cn_clip.search.folder import LibraryFolder
from cn_clip.search.indexing import Progress
from cn_clip.search.updating import roots_to_update, update

_STATE = "index.json"


@dataclass(frozen=True, slots=True)
class IndexRuns:
    """Index runs of one library, whose state all workers of a server see.

    Attributes:
        library: the folder.
        run_folder: of the server.
    """

    library: Path
    run_folder: Path

    @property
    def _state(self) -> Path:
        return self.run_folder / _STATE

    def state(self) -> dict[str, Any]:
        """Return the state of the last run: ``running`` and its counts; empty before the first."""
        state = json_object_at(self._state)
        if state.get("running") and not _is_alive(state.get("pid")):
            state["running"] = False
        return state

    def start(self) -> subprocess.Popen[bytes]:
        """Start a run; another one that writes to the library makes it fail with a message."""
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, os.fspath(self.library), os.fspath(self._state)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # It takes seconds to start, and running it twice would be an error.
        write_text(self._state, json.dumps({"running": True, "pid": process.pid}))
        return process


def main(library: str, state: str) -> int:
    """Bring a library up to date; write the progress to a file. Returns the exit code."""
    counts: dict[str, Any] = {"running": True, "pid": os.getpid()}

    def show(progress: Progress) -> None:
        counts.update(
            total=progress.total,
            done=progress.done,
            new=progress.new,
            changed=progress.changed,
            deleted=progress.deleted,
            failed=len(progress.failed),
            seconds=round(progress.seconds, 1),
        )
        with suppress(CNClipError):  # a full disk must not end the run
            write_text(state, json.dumps(counts))

    show(Progress())
    try:
        with LibraryFolder(Path(library), writable=True) as folder, folder.writing("index"):
            done = update(folder, roots_to_update(folder, []), load, on_progress=show)
            show(done.progress)
    except CNClipError as error:
        counts["error"] = str(error)
    counts["running"] = False
    with suppress(CNClipError):
        write_text(state, json.dumps(counts))
    return 1 if counts.get("error") else 0


def _is_alive(pid: object) -> bool:
    if not isinstance(pid, int):
        return False
    try:
        # A child of this process that has ended stays until it is waited for.
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                return False
        os.kill(pid, 0)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
