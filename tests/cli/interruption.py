"""Commands that are ended by a signal at some moment, and what must be left of them: nothing."""

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

MARK = "CN_CLIP_TEST_MARK"
CATCHABLE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNALS = (*CATCHABLE, signal.SIGKILL)
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}")  # as publish and tempfile name them
_MULTIPLES = {".json", ".jsonl", ".tsv", ".tar", ".mdb", ".html", ".safetensors", ".toml"}


@dataclass(frozen=True)
class Ended:
    """A command that was sent a signal; ``code`` is what a shell sees."""

    code: int
    said: str
    printed: str
    alive: list[str]


class Workplace:
    """A folder with inputs, and commands that write into ``out`` there."""

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
            env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.tmp), MARK: mark},
            start_new_session=True,
            # Where the tests are a background job of a shell, it would be ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def finished(self, name):
        """Run a command to its end; return its exit code and errors, and what came of it."""
        with self.begin(name, uuid.uuid4().hex) as process:
            printed, said = process.communicate(timeout=300)
        return process.returncode, said, self.results() | {"printed": printed}

    def results(self):
        """Return the contents of what is in ``out``, without what tells of times."""
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
        """Run a command, and send it or its whole group a signal some time after it is ready."""
        mark = uuid.uuid4().hex
        process = self.begin(name, mark)
        until_ready(process)
        time.sleep(delay)
        if process.poll() is None:
            (os.killpg if group else os.kill)(process.pid, number)
        # Not communicate: what is left alive would hold the pipes open.
        since = time.monotonic()
        os.set_blocking(process.stdout.fileno(), False)
        os.set_blocking(process.stderr.fileno(), False)
        printed, said = io.StringIO(), io.StringIO()
        while process.poll() is None and time.monotonic() - since < 120:
            drain(process, printed, said)
            time.sleep(0.02)
        assert process.poll() is not None, f"{name} does not end by {number}"
        alive = wait_for_none(mark)
        drain(process, printed, said)
        process.stdout.close()
        process.stderr.close()
        code = process.returncode
        return Ended(128 - code if code < 0 else code, said.getvalue(), printed.getvalue(), alive)

    def temporaries(self):
        """Return what is left of half-written files."""
        return [
            *(p for p in self.root.rglob("*") if _TEMPORARY.fullmatch(p.name)),
            # torch keeps one folder for compiled code.
            *(p for p in self.tmp.iterdir() if not p.name.startswith("torchinductor")),
        ]

    def locks(self):
        """Return the lock files that somebody holds."""
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


def drain(process, printed, said):
    for stream, into in ((process.stdout, printed), (process.stderr, said)):
        try:
            into.write(stream.read() or "")
        except (BlockingIOError, TypeError):  # nothing is there
            continue


def until_ready(process):
    """Wait until a process answers SIGTERM itself: what is earlier is the interpreter's start."""
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
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


def wait_for_none(mark, seconds=5.0):
    """Wait for a command's processes to end; return those that do not."""
    until = time.monotonic() + seconds
    while (alive := alive_with(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    return alive


def campaign(place, names, kills, seed, tell=lambda line: None):
    """Kill commands at random moments; return what was wrong, a sentence each.

    Every command meets every signal, and moments are spread over the time that it takes.
    """
    rng = random.Random(seed)
    whole, seconds = {}, {}
    for name in names:
        place.clear()
        begun = time.monotonic()
        whole[name] = place.finished(name)
        seconds[name] = time.monotonic() - begun
        assert whole[name][0] == 0, f"{name}: {whole[name][1]}"
    wrong = []
    for number in range(kills):
        name, sent = names[number % len(names)], SIGNALS[number // len(names) % len(SIGNALS)]
        delay, group = rng.uniform(0, 0.9 * seconds[name]), rng.random() < 0.5
        what = f"{number}: {name}, {sent.name}{' to all' if group else ''} after {delay:.2f} s"
        place.clear()
        ended = place.killed(name, sent, delay, group=group)
        problems = [f"left alive: {each}" for each in ended.alive]
        problems += [f"locked: {path}" for path in place.locks()]
        if ended.code not in (0, 128 + sent):
            problems.append(f"exit code {ended.code}: {ended.said}")
        if sent in CATCHABLE:
            problems += [f"left behind: {path}" for path in place.temporaries()]
            if "Traceback" in ended.said or len(ended.said.splitlines()) > 2:
                problems.append(f"said: {ended.said}")
        if ended.code == 0:
            results = place.results() | {"printed": ended.printed}
        else:
            code, said, results = place.finished(name)
            if code != 0 and "; give another place" not in said:  # it was done already
                problems.append(f"the same command again: {code}: {said}")
        wanted = dict(whole[name][2])
        if name not in ("check", "eval retrieval"):  # others print how long it took
            results.pop("printed")
            wanted.pop("printed")
        if results != wanted:
            different = {
                k for k in results.keys() | wanted.keys() if results.get(k) != wanted.get(k)
            }
            problems.append(f"another result: {sorted(different)}")
        tell(f"{what}: code {ended.code} {' | '.join(problems)}")
        wrong += [f"{what}: {problem}" for problem in problems]
    return wrong
