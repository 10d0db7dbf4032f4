"""Command lines from a grammar over the commands that the application has, run and judged."""

from __future__ import annotations

import collections
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args, get_origin

from fuzz import readers

LIMIT = 30  # seconds of a command
CODES = (0, 1, 2, 130)
_LONG = 300
_RAW = re.compile(r"unexpected [\w.]*(?:Error|Exception|Exit|Iteration|Interrupt)\b")


@dataclass(frozen=True)
class Case:
    """A command line, its environment and what standard input is."""

    number: int
    arguments: tuple[str, ...]
    environment: dict[str, str | None] = field(default_factory=dict)
    stdin: Literal["empty", "text", "closed"] = "empty"


@dataclass(frozen=True)
class Ran:
    """How a command ended, and the faults that it showed, each in a few words."""

    case: Case
    code: int | None
    seconds: float
    faults: tuple[str, ...]
    stderr: str = ""


# The files that commands are given


def build_world(root: Path, seed: int) -> None:
    """Write valid and damaged inputs into ``root/inputs``, and create the other folders."""
    inputs = root / "inputs"
    for place in ("inputs", "work", "home"):
        (root / place).mkdir(parents=True)
    for name in sorted(_HONEST):
        readers.write_valid(name, inputs / name)
    for number, name in enumerate(sorted(readers.FORMATS)):
        if name not in ("folder_shards", "photos", "hub"):
            readers.damage(name, seed, number, inputs / "damaged" / name)
    for path in inputs.rglob("*"):  # a pipe would wait for ever, which the readers' fuzz tries
        if path.is_fifo():
            path.unlink()
    (inputs / "empty").mkdir()
    (inputs / "empty.txt").write_bytes(b"")
    (inputs / "gbk.txt").write_bytes("猫\n狗\n".encode("gbk"))
    (inputs / os.fsdecode(b"odd\xff.jpg")).write_bytes((inputs / "jpeg/image.jpg").read_bytes())
    (inputs / "small.toml").write_text(
        f'[data]\ntrain = ["csv:{inputs}/csv/pairs.csv"]\nworkers = 0\n'
        f'[start]\ncheckpoint = "{inputs}/folder_ours"\n[output]\nfolder = "run"\n'
        '[machine]\nprecision = "fp32"\ndevice = "cpu"\n'
        '[[stages]]\nname = "one"\nsteps = 1\nglobal_batch_size = 2\n'
    )


_HONEST = (
    "pt_zip", "folder_ours", "folder_hf", "csv", "jsonl", "parquet", "tsv", "lmdb", "tar",
    "photos",
    "jpeg", "png_rgba", "webp", "gif", "tiff", "images_jsonl", "texts_txt", "texts_jsonl",
    "features_npz", "features_jsonl", "features_folder", "predictions", "calibration", "labelled",
    "labels", "recipe", "removed",
)  # fmt: skip


def snapshot(folder: Path) -> dict[str, Any]:
    """Return what every path of a tree is: the bytes of a file, the target of a link."""
    found: dict[str, Any] = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(place, name)
            if os.path.islink(path):
                found[path] = ("link", os.readlink(path))
            elif os.path.isfile(path):
                found[path] = Path(path).read_bytes()
            else:
                found[path] = "folder"
    return found


# The grammar


@dataclass(frozen=True)
class Option:
    """An option or positional argument of a command."""

    name: str
    kind: Any
    required: bool

    @property
    def positional(self) -> bool:
        return not self.name.startswith("-")


@cache
def commands() -> dict[tuple[str, ...], tuple[Option, ...]]:
    """Return every command of the application with its options, found by looking into it."""
    from cn_clip.cli import app

    return dict(_commands(app, ()))


def _commands(app: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name in app:
        if name.startswith("-"):
            continue
        if app[name].default_command is not None:
            arguments = app[name].assemble_argument_collection()
            yield (
                (*path, name),
                tuple(
                    Option(each.names[0], each.hint, each.required)
                    for each in arguments
                    if each.names and each.names[0] != "*"
                ),
            )
        yield from _commands(app[name], (*path, name))


_ODD = (
    "", " ", ".", "..", "/", "~", "~nobody/x", "nowhere", "nowhere/x.jsonl", "-", "--", "-1", "0",
    "1e999", "nan", "9" * 400, "x" * 5000, "\udcff\udcfe", "\ud83d", "a\nb", "*", "**/*", "[",
    "{0..",
    "{000..999}", "猫", "😀" * 200, "%s%n", "C:\\photos\\x.csv", "/dev/null", "/proc/x/y",
    "/dev/null/x",
    "http://127.0.0.1:9/x.jpg", "none", "null", "True", "{}", "a,b", "csv:", "tar:", "x:y",
    "0.5@", "?a=b",
)  # fmt: skip
_URIS = (
    "csv:{i}/csv/pairs.csv", "jsonl:{i}/jsonl/pairs.jsonl", "parquet:{i}/parquet/pairs.parquet",
    "tsv:{i}/tsv/train_imgs.tsv", "lmdb:{i}/lmdb/lmdb", "tar:{i}/tar/000.tar",
    "folder:{i}/photos/photos",
    "{i}/csv/pairs.csv", "{i}/photos/photos", "csv:{i}/csv/pairs.csv?text=text&image=image",
    "csv:{i}/csv/pairs.csv?colour=red", "csv:{i}/csv/pairs.csv?image=nothing",
    "csv:{i}/damaged/csv/pairs.csv", "jsonl:{i}/damaged/jsonl/pairs.jsonl",
    "parquet:{i}/damaged/parquet/pairs.parquet", "tsv:{i}/damaged/tsv/train_imgs.tsv",
    "lmdb:{i}/damaged/lmdb/lmdb", "tar:{i}/damaged/tar/000.tar", "folder:{i}/empty",
    "tar:{i}/tar/*.tar",
    "folder:{i}/photos", "csv:{i}/empty.txt", "tsv:{i}/tsv/train_imgs.tsv?unpaired=yes",
    "csv:{i}/gbk.txt?encoding=gbk", "csv:{i}/csv/pairs.csv?root={i}/empty", "{i}/tsv", "{i}",
)  # fmt: skip
_OUTS = (
    "new", "new.npz", "new.jsonl", "new.json", "new.html", "new.pt", "deep/er/new.jsonl", "old",
    "old.npz",
    "old.json", "{i}/photos/photos", "{i}", "{i}/csv/pairs.csv", "{i}/jpeg/image.jpg",
    "{i}/empty", ".",
    "/proc/x", "/dev/full", "/dev/null", "x" * 300, "", "{i}/new.jsonl",
    "{i}/calibration/calibration.json",
)  # fmt: skip
_MODELS = (
    "mini", "mini", "mini", "mini", "{i}/folder_ours", "{i}/folder_hf", "{i}/pt_zip/model.pt",
    "{i}/damaged/folder_ours", "{i}/damaged/folder_hf", "{i}/damaged/pt_zip/model.pt",
    "{i}/damaged/pt_legacy/model.pt", "{i}/damaged/torchscript/model.pt", "ViT-B-61",
    "{i}/jpeg/image.jpg",
    "{i}/empty", "{i}/damaged/safetensors/model.safetensors",
)  # fmt: skip
_OWN: dict[str, tuple[str, ...]] = {
    "IMAGES": ("{i}/jpeg/image.jpg", "{i}/photos/photos", "{i}/png_rgba/*.png",
               "{i}/tiff/image.tif",
               "{i}/damaged/png/image.png", "{i}/damaged/jpeg", "{i}/damaged/webp/image.webp",
               "{i}/odd\udcff.jpg",
               "{i}/gif/image.gif", "{i}/empty", "{i}/damaged/*/image.*"),
    "INPUTS": ("{i}/photos/photos", "{i}/jpeg/image.jpg", "{i}/images_jsonl/list.jsonl",
               "{i}/texts_txt/list.txt",
               "{i}/texts_jsonl/list.jsonl", "{i}/tsv/train_imgs.tsv", "{i}/lmdb/lmdb/imgs",
               "{i}/damaged/lmdb/lmdb/imgs",
               "{i}/damaged/images_txt/list.txt",
               "{i}/damaged/texts_txt/list.txt", "{i}/damaged/texts_jsonl/list.jsonl",
               "{i}/gbk.txt",
               "{i}/damaged/images_tsv/train_imgs.tsv", "{i}/empty.txt", "{i}/odd\udcff.jpg",
               "{i}/empty"),
    "KIND": ("images", "texts"),
    "SOURCE": _URIS, "--against": _URIS,
    "--data": (*_URIS, "{i}/labelled", "{i}/labelled", "{i}/damaged/labelled", "{i}/photos"),
    "OUT": _OUTS, "--out": _OUTS, "--submission": _OUTS, "--report": _OUTS,
    "--model": _MODELS, "--compare": _MODELS,
    "--device": ("cpu", "auto", "cuda", "cuda:99", "tpu", ""),
    "--labels": ("猫,狗", "猫", "", ",", "猫,猫", "\udcff,a"),
    "--labels-file": ("{i}/labels/labels.txt", "{i}/damaged/labels/labels.txt", "-",
                      "{i}/gbk.txt", "{i}/empty.txt"),
    "--template": ("一张{}的照片", "{}", "x", ""),
    "--templates": ("general", "food", "{i}/labelled/templates.txt",
                    "{i}/damaged/labelled/templates.txt"),
    "--calibration": ("{i}/calibration/calibration.json",
                      "{i}/damaged/calibration/calibration.json"),
    "--images": ("{i}/features_npz/features.npz", "{i}/damaged/features_npz/features.npz",
                 "{i}/features_folder/features"),
    "--texts": ("{i}/features_jsonl/features.jsonl", "{i}/damaged/features_jsonl/features.jsonl",
                "{i}/damaged/captions/features"),
    "--truth": ("{i}/predictions/texts.jsonl", "{i}/damaged/predictions/texts.jsonl",
                "{i}/labelled/test_ic.txt",
                "{i}/damaged/labelled/test_ic.txt"),
    "PREDICTIONS": ("{i}/predictions/predictions.jsonl",
                    "{i}/damaged/predictions/predictions.jsonl",
                    "{i}/damaged/tr_predictions/tr_predictions.jsonl"),
    "FOLDER": ("{i}/features_folder/features", "{i}/features_folder/features",
               "{i}/damaged/features_folder/features", "{i}/empty", "{i}/photos/photos"),
    "--keep": ("{i}/jsonl/pairs.jsonl", "{i}/empty.txt", "{i}/removed/removed.jsonl"),
    "--within": ("{i}/removed/removed.jsonl", "{i}/jsonl/pairs.jsonl", "{i}/empty.txt"),
    "--shards": ("0:1", "0:250", "1:2", "1:0", "x", "0:99999999999"),
    "--parts": ("http://127.0.0.1:9", "x", "http://"),
    "--without": ("{i}/removed/removed.jsonl", "{i}/damaged/removed/removed.jsonl"),
    "--split": ("train", "test", "val", ""),
    "--dataset": ("cifar-10", "voc-2007-classification", "x"),
    "--recipe": ("finetune-small", "mini", "{i}/recipe/recipe.toml",
                 "{i}/damaged/recipe/recipe.toml", "{i}/small.toml"),
    "--resume": ("auto", "{i}/folder_ours", "nowhere"),
    "--normalize": ("nfkc", "simplified", "x"),
    "--download-root": ("{i}/empty", "{i}", "nowhere", "/dev/null"),
    "NAME": ("muge", "flickr30k-cn-test", "x", ""),
}  # fmt: skip
_INTEGERS = (
    "1",
    "2",
    "3",
    "8",
    "10",
    "52",
    "0",
    "-1",
    "1000000",
    "2147483648",
    "9" * 30,
    "1.5",
    "x",
    "",
)
_FLOATS = ("0.5", "0.9", "0.1", "0", "1", "-1", "nan", "inf", "1e999", "1e-300", "x", "")


def case_of(number: int, seed: int, root: Path, *, process: bool) -> Case:
    """Return the case of a number: a function of its arguments."""
    rng = Random(f"command {seed} {number} {process}")
    known = commands()
    path = sorted(known)[number % len(known)]
    arguments = [*path, *_arguments(rng, path, known[path])]
    outs = [each for each in arguments if each.startswith("{i}") and each in _OUTS]
    if outs and rng.random() < 0.6 and any(each.name == "--overwrite" for each in known[path]):
        arguments.append("--overwrite")  # of an input, which no command may
    if rng.random() < 0.02:
        arguments = [rng.choice(_ODD) for _ in range(rng.randrange(4))]
    arguments += _quick(path, arguments, rng, process)
    arguments = [each.replace("{i}", str(root / "inputs")) for each in arguments]
    environment: dict[str, str | None] = {
        "HOME": str(root / "home"),
        "CN_CLIP_CACHE": str(root / "home" / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "MODELSCOPE_DOMAIN": "127.0.0.1:9",
        "CN_CLIP_HUB": None,
        "COLUMNS": None,
    }
    if rng.random() < 0.4:
        environment |= dict(rng.sample(_ENVIRONMENT, rng.randrange(1, 4)))
    if process:
        arguments = [
            each.replace("\0", "").replace("\ud83d", "\udced\udca0\udcbd") for each in arguments
        ]
    return Case(
        number, tuple(arguments), environment, rng.choice(("empty", "empty", "text", "closed"))
    )


_ENVIRONMENT: list[tuple[str, str | None]] = [
    ("HOME", None), ("HOME", "/proc/x"), ("HOME", ""), ("HOME", "/dev/null"), ("COLUMNS", "1"),
    ("COLUMNS", "x"), ("COLUMNS", "100000"), ("TERM", "dumb"), ("TERM", ""), ("NO_COLOR", "1"),
    ("FORCE_COLOR", "1"),
    ("LC_ALL", "C"), ("LC_ALL", "xx_YY.ZZ"), ("PYTHONIOENCODING", "ascii"), ("CN_CLIP_CACHE",
    "/dev/null/x"),
    ("CN_CLIP_CACHE", ""), ("CN_CLIP_CACHE", "/proc/x"), ("CN_CLIP_CACHE", "relative"),
    ("CN_CLIP_HUB", "x"),
    ("TMPDIR", "/nowhere"), ("WORLD_SIZE", "x"), ("RANK", "-1"), ("XDG_CACHE_HOME", "/dev/null"),
]  # fmt: skip


def _arguments(rng: Random, path: tuple[str, ...], options: tuple[Option, ...]) -> list[str]:
    found: list[list[str]] = []
    optional = rng.choice((0.1, 0.25, 0.5))
    odd = rng.choice((0.0, 0.05, 0.2))  # a case without odd values goes far
    for option in options:
        needed = option.name in _NEEDED.get(path[-1], ())
        wanted = 0.95 if option.required else 0.9 if needed else optional
        while rng.random() < wanted:
            found.append(_given(rng, path, option, odd))
            wanted = 0.3 if _several(option) else 0.03
    if path == ("train",):
        found += [_recipe_flag(rng) for _ in range(rng.randrange(3))]
    if rng.random() < odd / 2:
        found.append([rng.choice(("--unknown", "--jso", "-x", "--out=", "--json=maybe", "--help"))])
    if rng.random() < odd / 4:
        found.append([rng.choice(_ODD)])
    if rng.random() < 0.3:
        rng.shuffle(found)
    return [each for piece in found for each in piece]


_NEEDED = {
    "retrieval": ("--data",), "classify": ("--labels",), "embed": ("INPUTS",),
                  "train": ("--recipe",),
    "protocol": ("NAME", "--data"),
}  # fmt: skip


def _several(option: Option) -> bool:
    return get_origin(option.kind) in (list, tuple) or option.name in ("IMAGES", "INPUTS")


def _given(rng: Random, path: tuple[str, ...], option: Option, odd: float) -> list[str]:
    """Return an option with a value; without ``odd`` ones, mostly one that makes sense."""

    def of(values: tuple[str, ...]) -> str:  # those that make sense stand in front
        return rng.choice(
            values if odd or rng.random() < 0.2 else values[: max(1, len(values) // 2)]
        )

    kinds = [option.kind, *get_args(option.kind)]
    choices = [x for kind in kinds if get_origin(kind) is Literal for x in get_args(kind)]
    if bool in kinds:
        return [option.name]
    if rng.random() < odd:
        value = rng.choice(_ODD)
    elif choices:
        value = str(rng.choice(choices))
    elif int in kinds:
        value = of(_INTEGERS)
    elif float in kinds:
        value = of(_FLOATS)
    elif path == ("convert",) and option.name == "SOURCE":
        value = of(_MODELS)
    else:
        value = of(_OWN.get(option.name, _ODD))
    if option.positional:
        return [value]
    return [f"{option.name}={value}"] if rng.random() < 0.2 else [option.name, value]


def _recipe_flag(rng: Random) -> list[str]:
    from cn_clip.train.recipe.flags import OFFICIAL
    from cn_clip.train.recipe.schema import options

    names = [name for name, *_ in options()] + [*OFFICIAL]
    name = rng.choice(names).replace("NAME", rng.choice(("one", "x", "0")))
    values = (*_INTEGERS, *_FLOATS, *_ODD, "[]", "true", "visual.*", "cpu", "bf16")
    return [f"--{name}", rng.choice(values)] if rng.random() < 0.9 else [f"--{name}"]


def _quick(path: tuple[str, ...], arguments: list[str], rng: Random, process: bool) -> list[str]:
    """Return what keeps a case quick: no network, no workers, and no training to the end."""
    if path == ("doctor",):
        return ["--offline"]
    if path == ("bulk", "index"):  # it writes into its input, as it should
        return rng.choice((["--shards", "7:7"], ["--no-such-option", "1"]))
    if path == ("serve",):  # it would go on for ever
        return rng.choice((["--port", "-1"], ["--no-such-option", "1"]))
    if path == ("train",) and not (process and any("small.toml" in each for each in arguments)):
        return rng.choice((["--show", "recipe"], ["--no-such-option", "1"], ["--show", "x"]))
    if path == ("eval", "calibrate") and not process:
        return ["--prior", "2"]
    if path == ("bench",) and not process:
        return ["--rounds", "0"]
    if path == ("export",) and not process:
        return rng.choice((["--precision", "x"], ["--no-such-option", "1"], ["--to", "x"]))
    endless = ("--watch", "--open")  # it would go on for ever, or open a browser
    if any(each.startswith(endless) for each in arguments):
        return ["--no-such-option", "1"]
    names = {option.name for option in commands().get(path, ())}
    for at, each in enumerate(arguments):  # no pool of a million processes
        if each == "--workers" and arguments[at + 1 : at + 2]:
            arguments[at + 1] = rng.choice(("0", "1" if process else "0", "-1", "x"))
        elif each.startswith("--workers="):
            arguments[at] = "--workers=0"
    return ["--workers", "0"] if "--workers" in names and "--workers" not in arguments else []


# Running and judging


def run_here(case: Case, root: Path) -> Ran:
    """Run a case within this process, as ``cn_clip.cli.run`` does."""
    from cn_clip.cli import run

    out, err = _stream(), _stream()
    code: int | None = None
    raised = ""
    begin = time.monotonic()
    with _environment(case.environment), _stdin(case.stdin), _clock(), _within(root / "work"):
        try:
            with redirect_stdout(out), redirect_stderr(err):
                code = run(list(case.arguments))
        except _Late:
            raised = f"hang over {LIMIT} s"
        except SystemExit as error:
            raised = f"SystemExit {error.code!r}"
        except BaseException as error:
            raised = f"Traceback: {_last(traceback.format_exc(), error)}"
    out.flush()
    err.flush()
    shown, text = (each.buffer.getvalue().decode("utf-8", "replace") for each in (out, err))
    return _judged(case, code, shown, text, time.monotonic() - begin, raised)


def run_process(case: Case, root: Path) -> Ran:
    """Run a case as a process of its own, as a shell does."""
    environment = {**os.environ, **{k: v for k, v in case.environment.items() if v is not None}}
    for name, value in case.environment.items():
        if value is None:
            environment.pop(name, None)
    stdin: Any = {"empty": subprocess.DEVNULL, "text": subprocess.PIPE, "closed": None}[case.stdin]
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "cn_clip", *case.arguments],
        cwd=root / "work",
        env=environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=(lambda: os.close(0)) if case.stdin == "closed" else None,
    )
    raised = ""
    try:
        shown, raw = process.communicate(
            "猫\n狗\n".encode() if stdin == subprocess.PIPE else None, LIMIT
        )
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        shown, raw = process.communicate()
        raised = f"hang over {LIMIT} s"
    text = raw.decode("utf-8", "replace")
    code: int | None = process.returncode
    if code is not None and code < 0 and not raised:
        raised, code = f"crash by signal {-code}", None
    out = shown.decode("utf-8", "replace")
    return _judged(case, code, out, text, time.monotonic() - begin, raised)


def _judged(
    case: Case, code: int | None, stdout: str, stderr: str, seconds: float, raised: str
) -> Ran:
    faults = [raised] if raised else []
    if not raised and code not in CODES:
        faults.append(f"exit code {code}")
    if "Traceback" in stderr:
        faults.append(f"Traceback: {_last(stderr)}")
    named = _RAW.search(stderr)
    if named:
        faults.append(f"{named[0]}: {stderr[named.start() - 40 :][:200]}".replace("\n", " "))
    for line in stderr.splitlines():
        message = re.sub(r"^cn-clip: (warning: )?", "", line)
        if len(message) > _LONG:
            faults.append(f"a line of {len(message):,} characters: {message[:60]}")
            break
    if code in (1, 2) and not (stderr + stdout).strip():  # a report says what is wrong with data
        faults.append(f"exit code {code} without a word")
    return Ran(case, code, seconds, tuple(faults), stderr[-3000:])


def _last(text: str, error: BaseException | None = None) -> str:
    """Return the class of an error and our innermost line, out of a traceback."""
    ours = re.findall(r'cn_clip/((?!cli/__init__)[^"]+\.py)", line (\d+)', text)
    lines = [
        line
        for line in text.strip().splitlines()
        if re.match(r"[\w.]+(Error|Exception|Interrupt)", line)
    ]
    kind = type(error).__name__ if error is not None else (lines or ["?"])[-1].partition(":")[0]
    return f"{kind} at {':'.join(ours[-1]) if ours else '?'}"


class _Late(BaseException):
    pass


@contextmanager
def _clock() -> Iterator[None]:
    def late(*_: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _environment(changes: dict[str, str | None]) -> Iterator[None]:
    before = dict(os.environ)
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _stdin(kind: str) -> Iterator[None]:
    before = sys.stdin
    text = io.TextIOWrapper(io.BytesIO("猫\n狗\n".encode() if kind == "text" else b""))
    if kind == "closed":
        text.close()
    sys.stdin = text
    try:
        yield
    finally:
        sys.stdin = before


@contextmanager
def _within(folder: Path) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _stream() -> Any:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")


class World:
    """Inputs that no command may change, and a place for what they write; renewed when spoiled."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self._seed = root, seed
        self._make()

    def _make(self) -> None:
        build_world(self.root, self._seed)
        self._before = snapshot(self.root / "inputs")

    def run(self, case: Case, *, process: bool) -> Ran:
        """Run a case; what it did to the inputs is a fault too."""
        self._tidy()
        ran = (run_process if process else run_here)(case, self.root)
        lost = self._lost(case)
        if lost:
            shutil.rmtree(self.root)
            self._make()
        return Ran(ran.case, ran.code, ran.seconds, (*ran.faults, *lost), ran.stderr)

    def _lost(self, case: Case) -> list[str]:
        after = snapshot(self.root / "inputs")
        if after == self._before:
            return []
        inputs, faults = str(self.root / "inputs"), []
        for path, content in self._before.items():
            if after.get(path) != content:
                verb = "changed" if path in after else "deleted"
                faults.append(f"{verb} an input: {path.removeprefix(inputs)!a}")
                break
        # What is new may stand where an argument says so; the next command does not find it.
        wanted = tuple(each.partition("=")[2] or each for each in case.arguments if inputs in each)
        for path in after:
            if path not in self._before and not any(path.startswith(each) for each in wanted):
                faults.append(f"left in the inputs: {path.removeprefix(inputs)!a}")
                break
        for path in sorted(after.keys() - self._before.keys(), reverse=True):
            Path(path).rmdir() if after[path] == "folder" else Path(path).unlink()
        return faults

    def _tidy(self) -> None:
        for name in ("work", "home"):
            shutil.rmtree(self.root / name, ignore_errors=True)
            (self.root / name).mkdir()
        (self.root / "work" / "old").mkdir()
        for name in ("old/mine.txt", "old.npz", "old.json"):
            (self.root / "work" / name).write_text("mine")


def kind_of(fault: str) -> str:
    """Return what a fault is grouped by."""
    return re.sub(r"\d{3,}[\d,]*|'.*'", "…", fault)[:90]


def table(runs: list[Ran]) -> list[str]:
    """Return lines of the faults by kind, the most first, each with an example."""
    groups: dict[str, list[tuple[str, Case]]] = collections.defaultdict(list)
    for ran in runs:
        for fault in ran.faults:
            groups[kind_of(fault)].append((fault, ran.case))
    rows = sorted(groups.values(), key=len, reverse=True)
    return [
        f"{len(some):5} {some[0][0]!a:.200} #{some[0][1].number} "
        f"{json.dumps(list(some[0][1].arguments))[:260]}"
        for some in rows
    ]
