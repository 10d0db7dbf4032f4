"""Read damaged files in child processes with a deadline, and report the outcomes."""

from __future__ import annotations

import collections
import faulthandler
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuzz.readers import Format

TESTS = Path(__file__).parents[1]
GOOD = ("ok", "refused")
_ROOM = 4 << 30  # of address space, above which even a lazy allocation fails
_MEMORY = 1 << 30  # resident, above what the process held before
_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")


@dataclass(frozen=True)
class Outcome:
    """The outcome of reading a damaged file.

    ``kind`` is ok, refused (a documented error), raw (another exception), message (a documented
    error that is not one short line), hang, crash, memory, execution, or harness (a fault of the
    tests). ``what`` is the class of the error and ``where`` our innermost line.
    """

    name: str
    seed: int
    number: int
    kind: str
    what: str = ""
    where: str = ""
    message: str = ""
    seconds: float = 0.0


def outcomes(
    jobs: Iterable[tuple[str, int, int]],
    *,
    workers: int = 2,
    deadline: float = 10.0,
    save: Path | None = None,
    also: Mapping[str, Format] | None = None,
) -> Iterator[Outcome]:
    """Yield the outcome of each (format, seed, number), as they end; the bad ones' files are saved.
    ``also`` adds formats.

    A process counts as hanging if it used the deadline in time of a processor, or twice in time.
    """
    jobs = iter(jobs)
    paths = [str(TESTS), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fuzz.preload"])
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="cn-clip-fuzz-", dir=base) as place:
        places = [Path(place) / str(n) for n in range(workers)]
        pool = [_Worker(context, each, deadline, also or {}) for each in places]
        try:
            busy = [worker for worker in pool if worker.take(next(jobs, None))]
            while busy:
                ready = wait([worker.pipe for worker in busy], timeout=0.2)
                for worker in list(busy):
                    found = worker.ended(worker.pipe in ready)
                    if found is None:
                        continue
                    if save is not None and found.kind not in GOOD:
                        _keep(worker.folder, found, save)
                    yield found
                    if not worker.take(next(jobs, None)):
                        busy.remove(worker)
        finally:
            for worker in pool:
                worker.stop()


class _Worker:
    def __init__(
        self, context: Any, base: Path, deadline: float, also: Mapping[str, Format]
    ) -> None:
        self.base, self._context, self._deadline, self._also = base, context, deadline, also
        self._count = 0
        base.mkdir(parents=True)
        self._start()

    @property
    def folder(self) -> Path:
        return self.base / f"job{self._count}" / "files"

    def _start(self) -> None:
        self.pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=_serve, args=(theirs, str(self.base), self._also), daemon=True
        )
        self._process.start()
        theirs.close()
        self.pipe.recv()  # it is ready

    def take(self, job: tuple[str, int, int] | None) -> bool:
        if job is None:
            return False
        self._job, self._since, self._cpu = job, time.monotonic(), _cpu(self._process.pid)
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        self._count += 1  # a folder of its own: readers remember what they have read by its path
        self.pipe.send((*job, self.folder.parent))
        return True

    def ended(self, ready: bool) -> Outcome | None:
        if ready:
            try:
                found: Outcome | None = self.pipe.recv()
                if found is None:  # a step is done, the next one begins
                    self._since, self._cpu = time.monotonic(), _cpu(self._process.pid)
                return found
            except (EOFError, ConnectionResetError):
                self._process.join()
                return self._restarted("crash", f"signal {-(self._process.exitcode or 0)}")
        waited = time.monotonic() - self._since
        if waited < self._deadline:
            return None
        if waited < 2 * self._deadline and _cpu(self._process.pid) - self._cpu < self._deadline:
            return None
        self._process.kill()
        self._process.join()
        return self._restarted("hang", f"over {self._deadline:g} s")

    def _restarted(self, kind: str, what: str) -> Outcome:
        trace = (self.base / "trace").read_text(errors="replace")
        ours = re.findall(r'File "(?!.*/tests/fuzz/)[^"]*/(cn_clip/[^"]+)", line (\d+)', trace)
        where = f"{ours[0][0].removeprefix('cn_clip/')}:{ours[0][1]}" if ours else ""
        found = Outcome(
            *self._job, kind, what, where, trace[-2000:], time.monotonic() - self._since
        )
        self.pipe.close()
        self._start()
        return found

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def _cpu(process: int | None) -> float:
    """Return the processor time that a process has used, in seconds; endless where unknown."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf") if process is None else 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _serve(pipe: Connection, base: str, also: Mapping[str, Format]) -> None:
    """Read one damaged file after another; a parent that is gone ends this too."""
    from fuzz import readers

    os.chdir(base)
    with open("output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    trace = open("trace", "w+")  # noqa: SIM115  # it stays open for as long as the process lives
    faulthandler.enable(trace)
    limit_memory()
    watched: list[str] = []
    sys.addaudithook(lambda event, _: watched.append(event) if event in _EVENTS else None)
    pipe.send("ready")

    def begin() -> None:
        trace.seek(0)
        trace.truncate()
        faulthandler.dump_traceback_later(8, file=trace)

    def step() -> None:
        pipe.send(None)
        begin()

    readers.step = step
    readers.FORMATS.update(also)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        begin()
        found = attempt(*job, watched)
        faulthandler.cancel_dump_traceback_later()
        pipe.send(found)


def limit_memory(room: int = _ROOM) -> None:
    """Let this process have so many bytes of address space more than it has."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def attempt(name: str, seed: int, number: int, job: Path, watched: list[str]) -> Outcome:
    """Damage the files of a format and read them, in this process."""
    from fuzz import mutants, readers

    job.mkdir()
    canary = job / "canary"
    mutants.canary = str(canary)
    for variable in ("CN_CLIP_CACHE", "HOME"):
        os.environ[variable] = str(job / variable)
    try:
        readers.damage(name, seed, number, job / "files")
    except Exception:
        return Outcome(name, seed, number, "harness", message=traceback.format_exc()[-2000:])
    watched.clear()
    begin, before = time.monotonic(), _reset_peak()
    found = judged(lambda: readers.FORMATS[name].read(job / "files"))
    if canary.exists() or watched:
        found = ("execution", ", ".join(watched) or "canary", "", "")
    elif found[0] in GOOD and _peak() - before > _MEMORY:
        found = ("memory", f"{(_peak() - before) >> 20} MB", found[2], found[3])
    return Outcome(name, seed, number, *found, seconds=time.monotonic() - begin)


def judged(read: Callable[[], Any]) -> tuple[str, str, str, str]:
    """Return how a reader ended: the kind, the class of its error, our innermost line, the text."""
    from cn_clip.errors import CNClipError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except CNClipError as error:
        text = str(error)
        short = 0 < len(text) <= 300 and text.isprintable()
        return "refused" if short else "message", type(error).__name__, _innermost(error), text
    except BaseException as error:
        text = "".join(traceback.format_exception(error))[-4000:]
        where = _innermost(error)
        kind = "raw" if where else "harness"
        return "memory" if isinstance(error, MemoryError) else kind, _class(error), where, text
    return "ok", "", "", ""


def _class(error: BaseException) -> str:
    kind = type(error)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _innermost(error: BaseException) -> str:
    """Return our innermost line, such as ``data/manifest.py:86``."""
    where, frame = "", error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename.replace(os.sep, "/")
        if "/src/cn_clip/" in file or "/site-packages/cn_clip/" in file:
            where = f"{file.rpartition('/cn_clip/')[2]}:{frame.tb_lineno}"
        frame = frame.tb_next
    return where


def _reset_peak() -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return sys.maxsize  # memory is not measured here
    return _peak()


def _peak() -> int:
    """Return the most memory that was resident since the last reset, in bytes."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", text)[1])  # type: ignore[index]


def _keep(files: Path, found: Outcome, save: Path) -> None:
    """Copy the files of a bad outcome to ``save/KIND-WHAT-WHERE/FORMAT-SEED-NUMBER``, the first
    five of each."""
    group = re.sub(r"[^\w.]+", "-", f"{found.kind} {found.what} {found.where}").strip("-")
    target = save / group / f"{found.name}-{found.seed}-{found.number}"
    if target.exists() or (target.parent.is_dir() and len(list(target.parent.iterdir())) >= 5):
        return
    target.mkdir(parents=True)
    (target / "format").write_text(found.name)
    (target / "outcome.txt").write_text(
        f"{found.kind} {found.what} {found.where}\n{found.message}\n"
    )
    # Links and pipes stay what they are.
    os.system(f"cp -a {files!s} {target!s}/files")


def table(found: Iterable[Outcome]) -> list[tuple[int, str, str, str, str]]:
    """Return rows of (count, kind, class, place, formats) of the bad outcomes, the most first."""
    groups: dict[tuple[str, str, str], list[Outcome]] = collections.defaultdict(list)
    for each in found:
        if each.kind not in GOOD:
            what = "" if each.kind == "memory" and each.what[:1].isdigit() else each.what
            groups[each.kind, what, each.where].append(each)
    rows = []
    for (kind, what, where), some in groups.items():
        names = collections.Counter(each.name for each in some)
        listed = ", ".join(f"{name} {some_of}" for name, some_of in names.most_common(4))
        rows.append(
            (len(some), kind, what, where, f"{listed}; e.g. {some[0].name} #{some[0].number}")
        )
    return sorted(rows, key=lambda row: (row[1], -row[0]))
