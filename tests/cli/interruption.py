"""End commands by signals at random moments, and check that they leave nothing behind."""

import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tomli_w
from filelock import FileLock, Timeout
from PIL import Image
from train.runs import recipe_values, write_pairs, write_start

MARK_VARIABLE = "CN_CLIP_TEST_MARK"
CATCHABLE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNALS = (*CATCHABLE, signal.SIGKILL)
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}")  # as publish and tempfile name them
_MULTIPLES = {".json", ".jsonl", ".tsv", ".tar", ".mdb", ".html", ".safetensors", ".toml"}


@dataclass(frozen=True)
class EndedCommand:
    """A command ended by a signal; ``code`` is the exit code of a shell."""

    code: int
    stderr: str
    stdout: str
    alive: list[str]


class Workplace:
    """A folder with inputs, and commands that write to ``out`` in it."""

    def __init__(self, root, pairs=120, side=160):
        self.root, self.out, self.tmp = root, root / "out", root / "tmp"
        self.tmp.mkdir()
        data = root / "data"
        data.mkdir()
        for n in range(pairs):
            rng = np.random.default_rng(n)
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / f"{n}.png", compress_level=0)
        train, val = (write_pairs(data, "train", range(pairs)), write_pairs(data, "val", range(16)))
        texts = data / "texts.txt"
        texts.write_text("".join(f"{n} 只猫\n" for n in range(2000)), encoding="utf-8")
        start = write_start(root / "start")
        recipe = recipe_values(
            (train, val), start, self.out / "run", {"epochs": 3}, data={"workers": 2}
        )
        (root / "recipe.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
        pack = ["data", "pack", train, "--workers", "2", "--format", "jpeg", "--out"]
        model = ["--model", str(start), "--device", "cpu"]
        out = str(self.out)
        self.commands = {
            "pack tar": [*pack, out, "--images-per-shard", "16"],
            "pack tsv": [*pack, out, "--to", "tsv"],
            "pack lmdb": [*pack, out, "--to", "lmdb"],
            "check": ["data", "check", train, "--workers", "2", "--json"],
            "decontaminate": [
                *["data", "decontaminate", train, "--against", val, "--workers", "2"],
                *["--out", f"{out}/removed.jsonl", "--overwrite"],
            ],
            "embed images": ["embed", "images", str(data), "--out", f"{out}/images.npz", *model],
            "embed texts": ["embed", "texts", str(texts), "--out", f"{out}/texts.npz", *model],
            "eval retrieval": ["eval", "retrieval", "--data", train, "--json", *model],
            "train": ["train", "--recipe", str(root / "recipe.toml"), "--resume", "auto"],
        }

    def begin(self, name, mark):
        return subprocess.Popen(
            [sys.executable, "-m", "cn_clip", *self.commands[name]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.tmp), MARK_VARIABLE: mark},
            start_new_session=True,
            # SIGINT is ignored in background jobs of a shell, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def finished(self, name):
        """Run a command to its end; return its exit code, stderr and results."""
        with self.begin(name, uuid.uuid4().hex) as process:
            printed, stderr_text = process.communicate(timeout=300)
        return process.returncode, stderr_text, self.results() | {"printed": printed}

    def results(self):
        """Return the contents of the files in ``out``, without times."""
        found = {}
        for path in sorted(self.out.rglob("*")):
            name = str(path.relative_to(self.out))
            if "run/" in name:  # of a run, the weights: logs and reports hold times
                if path.suffix == ".safetensors" and "final" in name:
                    found[name] = path.read_bytes()
            elif path.suffix == ".npz":
                with np.load(path) as stored:
                    found[name] = {key: stored[key].tobytes() for key in ("embeddings", "ids")}
            elif path.is_file() and path.suffix in _MULTIPLES and path.name[0] != ".":
                found[name] = path.read_bytes()
        return found

    def killed(self, name, number, delay, *, group):
        """Run a command, and signal it or its process group ``delay`` seconds after it is ready."""
        mark = uuid.uuid4().hex
        process = self.begin(name, mark)
        until_ready(process)
        time.sleep(delay)
        if process.poll() is None:
            (os.killpg if group else os.kill)(process.pid, number)
        # Not communicate(): surviving processes would keep the pipes open.
        since = time.monotonic()
        os.set_blocking(process.stdout.fileno(), False)
        os.set_blocking(process.stderr.fileno(), False)
        printed, stderr_text = io.StringIO(), io.StringIO()
        while process.poll() is None and time.monotonic() - since < 120:
            read_available(process, printed, stderr_text)
            time.sleep(0.02)
        assert process.poll() is not None, f"{name} does not end by {number}"
        alive = wait_for_none(mark)
        read_available(process, printed, stderr_text)
        process.stdout.close()
        process.stderr.close()
        code = process.returncode
        return EndedCommand(
            128 - code if code < 0 else code, stderr_text.getvalue(), printed.getvalue(), alive
        )

    def temporaries(self):
        """Return remaining temporary files."""
        return [
            *(p for p in self.root.rglob("*") if _TEMPORARY.fullmatch(p.name)),
            # torch keeps one folder for compiled code.
            *(p for p in self.tmp.iterdir() if not p.name.startswith("torchinductor")),
        ]

    def locks(self):
        """Return the locked lock files."""
        found = []
        for path in self.root.rglob("*.lock"):
            try:
                with FileLock(path, timeout=0):
                    pass
            except Timeout:
                found.append(path)
        return found

    def clear(self):
        for folder in (self.out, self.tmp):
            shutil.rmtree(folder, ignore_errors=True)
        for path in self.root.rglob(".*"):
            if _TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        self.tmp.mkdir()
        self.out.mkdir()


def read_available(process, printed, stderr_text):
    for stream, into in ((process.stdout, printed), (process.stderr, stderr_text)):
        try:
            into.write(stream.read() or "")
        except (BlockingIOError, TypeError):  # no output
            continue


def until_ready(process):
    """Wait until a process handles SIGTERM: before that, the interpreter is starting."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        caught = re.search(r"SigCgt:\s*(\w+)", status.read_text())
        if caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.005)


def alive_with(mark):
    """Return the command lines of the processes with a mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"{MARK_VARIABLE}={mark}".encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


def wait_for_none(mark, seconds=5.0):
    """Wait for the processes of a command to end; return those that do not."""
    deadline = time.monotonic() + seconds
    while (alive := alive_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def run_campaign(place, names, kills, seed, report=lambda line: None):
    """End commands at random moments; return a message for each problem.

    Every command receives every signal, at moments spread over its run time.
    """
    rng = random.Random(seed)
    complete, seconds = {}, {}
    for name in names:
        place.clear()
        start = time.monotonic()
        complete[name] = place.finished(name)
        seconds[name] = time.monotonic() - start
        assert complete[name][0] == 0, f"{name}: {complete[name][1]}"
    wrong = []
    for number in range(kills):
        name, signal_sent = names[number % len(names)], SIGNALS[number // len(names) % len(SIGNALS)]
        delay, group = rng.uniform(0, 0.9 * seconds[name]), rng.random() < 0.5
        what = (
            f"{number}: {name}, {signal_sent.name}{' to all' if group else ''} after {delay:.2f} s"
        )
        place.clear()
        ended = place.killed(name, signal_sent, delay, group=group)
        problems = [f"left alive: {command}" for command in ended.alive]
        problems += [f"locked: {path}" for path in place.locks()]
        if ended.code not in (0, 128 + signal_sent):
            problems.append(f"exit code {ended.code}: {ended.stderr}")
        if signal_sent in CATCHABLE:
            problems += [f"left behind: {path}" for path in place.temporaries()]
            if "Traceback" in ended.stderr or len(ended.stderr.splitlines()) > 2:
                problems.append(f"printed: {ended.stderr}")
        if ended.code == 0:
            results = place.results() | {"printed": ended.stdout}
        else:
            code, stderr_text, results = place.finished(name)
            if code != 0 and "; give another place" not in stderr_text:  # already complete
                problems.append(f"the same command again: {code}: {stderr_text}")
        wanted = dict(complete[name][2])
        if name not in ("check", "eval retrieval"):  # other commands print times
            results.pop("printed")
            wanted.pop("printed")
        if results != wanted:
            different = {
                k for k in results.keys() | wanted.keys() if results.get(k) != wanted.get(k)
            }
            problems.append(f"another result: {sorted(different)}")
        report(f"{what}: code {ended.code} {' | '.join(problems)}")
        wrong += [f"{what}: {problem}" for problem in problems]
    return wrong
