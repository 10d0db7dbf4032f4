"""Every error of a command gives one sentence and an exit code, never a traceback."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_image

import cn_clip
from cn_clip import cli
from cn_clip.cli import run
from cn_clip.cli.crash import report_crash
from cn_clip.cli.show import print_json
from cn_clip.data.sources.open import open_source
from cn_clip.errors import DataError, ImageError, UsageError
from cn_clip.image.decode import find_images, read_image


@pytest.fixture
def failing(monkeypatch, tmp_path, capsys):
    """Run a command that raises an error; return its exit code and stderr."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("CN_CLIP_DEBUG", raising=False)

    def command(error, *arguments):
        def raises(*_, **__):
            raise error

        monkeypatch.setattr(cli, "app", raises)
        code = run(arguments or ["models"])
        captured = capsys.readouterr()
        assert captured.out == ""
        return code, captured.err

    return command


def details_of(message):
    return Path(re.search(r"\S+\.txt", message)[0]).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        ValueError(),
        RecursionError("maximum recursion depth exceeded"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        OSError(71, "Protocol error"),
        UnicodeDecodeError("utf-8", b"\xff" * 1000, 0, 1, "invalid start byte"),
        AssertionError("a\nb" * 5000),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_unexpected_error_is_one_sentence_that_names_a_file_with_details(failing, error):
    code, message = failing(error, "models", "--json")
    assert code == 1 and message.count("\n") == 1 and len(message) <= 310
    assert message.startswith(f"cn-clip: unexpected {type(error).__name__}")
    assert "please report it with the details in " in message
    details = details_of(message)
    assert "Traceback" in details and "['models', '--json']" in details
    assert cn_clip.__version__ in details and "Python 3" in details


def test_every_error_has_its_own_file(failing):
    first, second = (failing(KeyError("x"))[1] for _ in range(2))
    assert first != second and details_of(first) and details_of(second)


def test_unwritable_details_suggest_the_debug_variable(failing, monkeypatch):
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(OSError("full")))
    assert failing(KeyError("x")) == (
        1,
        "cn-clip: unexpected KeyError: 'x'; please report it. CN_CLIP_DEBUG=1 shows the details\n",
    )


def test_the_debug_variable_shows_the_traceback(failing, monkeypatch):
    monkeypatch.setenv("CN_CLIP_DEBUG", "1")
    with pytest.raises(KeyError):
        failing(KeyError("x"))
    monkeypatch.setenv("CN_CLIP_DEBUG", "0")
    assert failing(KeyError("x"))[0] == 1
    monkeypatch.setenv("CN_CLIP_DEBUG", "1")
    assert failing(DataError("no row")) == (1, "cn-clip: no row\n")


def test_secrets_are_in_neither_the_sentence_nor_the_file(failing, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hush-hush")
    monkeypatch.setenv("MY_PASSWORD", "sesame9")
    monkeypatch.setenv("USE_AUTH", "1")  # too short for a secret
    error = ValueError(
        "GET https://me:pw123@host/x?access_token=qwerty&size=1 with hush-hush: hf_abcdefghij1"
    )
    arguments = ["models", "--token", "argtok", "--api-key=argkey", "--json", "sesame9"]
    _, message = failing(error, *arguments)
    for text in (message, details_of(message)):
        for secret in (
            *("hush-hush", "sesame9", "pw123", "qwerty", "hf_abcdefghij1", "argtok", "argkey"),
        ):
            assert secret not in text
    assert "https://***@host/x?access_token=***&size=1" in message
    assert "'--token', '***'" in details_of(message)


def test_a_switch_in_the_environment_is_no_secret(failing, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    _, said = failing(ValueError("a false alarm"), "models")
    assert "a false alarm" in said and "a false alarm" in details_of(said)


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (OSError(28, "No space left on device", "x.npz"), 1, "x.npz cannot be read or written: No"),
        (PermissionError(13, "Permission denied", "x"), 1, "x cannot be read or written: Perm"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (UsageError("give two labels"), 2, "give two labels"),
    ],
)
def test_an_error_with_a_remedy_needs_no_report(failing, error, code, sentence):
    exit_code, message = failing(error)
    assert exit_code == code
    assert message.startswith(f"cn-clip: {sentence}") and "report" not in message


def test_a_very_long_message_keeps_the_path_of_the_details(failing):
    _, message = failing(ValueError("x" * 100_000), "models", "y" * 100_000)
    assert details_of(message)


def test_report_crash_handles_surrogates(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    error = ValueError("\udcff 猫")
    assert r"\udcff 猫" in details_of(report_crash(error, ["\udcff"]))


def shell(line, **environment):
    """Run a shell command in which $CN is cn-clip; return its exit code, stdout and stderr."""
    values = os.environ | {"CN": f"{sys.executable} -m cn_clip"} | environment
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=values)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    return done.returncode, done.stdout, done.stderr.decode()


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a shell and /dev/full")


@linux
@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("$CN --version > /dev/full", 1, "No space left on device"),
        ("$CN modles 2> /dev/full", 2, ""),
        ("$CN --version | true; exit ${PIPESTATUS[0]}", 1, ""),
        ("$CN --version >&- 2>&- <&-", 0, ""),
        ("$CN classify x --labels-file - <&-", 2, "at least two different labels"),
    ],
)
def test_unwritable_output_gives_an_exit_code(line, code, message):
    exit_code, _, err = shell(line)
    assert exit_code == code and message in err and err.count("\n") == bool(message)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "gb18030", "utf-8"])
def test_json_is_valid_on_every_console(monkeypatch, encoding):
    written = io.BytesIO()
    console = io.TextIOWrapper(written, encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", console)
    print_json({"labels": ["猫", "é", "😀", "\udcff"]})
    console.flush()
    assert json.loads(written.getvalue().decode(encoding)) == {
        "format": "cn-clip json 1",
        "labels": ["猫", "é", "😀", "\udcff"],
    }
    assert ("猫".encode() in written.getvalue()) == (encoding == "utf-8")


def commands_of(app, before=()):
    """Yield the words of every command, and its options."""
    names = [name for name in app if not name.startswith("-")]
    for name in names:
        yield from commands_of(app[name], [*before, name])
    if not names:
        options = {
            name
            for argument in app.assemble_argument_collection()
            for name in argument.names
            if name.startswith("--")
        }
        yield list(before), sorted(options)


def test_an_empty_argument_of_any_command_is_named(capsys):
    """An unset shell variable never means the current folder."""
    seen = 0
    for words, options in commands_of(cli.app):
        for option in options:
            for given in ([option, ""], [f"{option}="], [option, " "]):
                assert run([*words, *given]) == 2
                message = capsys.readouterr().err
                assert f"{option} is empty" in message and message.count("\n") == 1
                seen += 1
        assert run([*words, ""]) == 2
        assert f"argument {len(words) + 1} is empty" in capsys.readouterr().err
    assert seen > 200


@pytest.mark.parametrize("uri", ["", " ", "folder:", "csv:", "csv:?root=x", "csv:a.csv?root="])
def test_a_source_uri_without_a_path_is_refused(uri):
    with pytest.raises(UsageError, match=r"has no path|is empty"):
        open_source(uri)


def test_an_empty_name_or_path_is_not_the_current_folder(monkeypatch, tmp_path):
    make_image().save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="name is empty"):
        cn_clip.load("")
    with pytest.raises(ImageError, match="path is empty"):
        find_images([""])
    with pytest.raises(ImageError, match="path of an image is empty"):
        read_image("")


@pytest.mark.parametrize(
    "command",
    [
        "data pack P --out O --max-side 0",
        "data pack P --out O --max-side -1",
        "data pack P --out O --format webp --quality 101",
        "data pack P --out O --format jpeg --quality -1",
        "data pack P --out O --workers -1",
        "data check P --workers 99999999999999999999",
        "data check P --threshold -1",
        "data check P --threshold 129",
        "data check P --context-length 0",
        "data decontaminate P --against P --out R.jsonl --min-caption -1",
        "eval diagnose --data P --seed -1",
        "eval calibrate --data P --out C.json --seed -1",
        "eval robustness --data P --seed -1",
        "eval robustness --data P --context-length 99999999999999999999",
    ],
)
def test_a_number_out_of_its_range_is_refused_before_anything_is_done(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    make_image().save("a.png")
    Path("p.jsonl").write_text('{"image": "a.png", "text": "a"}\n', encoding="utf-8")
    arguments = [{"P": "jsonl:p.jsonl"}.get(each, each) for each in command.split()]
    assert run(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and arguments[-1] in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "p.jsonl"]


@pytest.mark.skipif(os.name == "nt", reason="a folder in use cannot be deleted here")
def test_a_deleted_current_folder_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(["data", "check", f"folder:{tmp_path}", "--workers", "2"]) == 2
    monkeypatch.chdir(tmp_path)
    assert "the current folder does not exist any more" in capsys.readouterr().err
