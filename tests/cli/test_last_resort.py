"""Whatever happens, a command ends with one sentence and its exit code, and never a traceback."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_picture

import cn_clip
from cn_clip import cli
from cn_clip.cli import run
from cn_clip.cli.crash import unexpected
from cn_clip.cli.show import print_json
from cn_clip.data.sources.open import open_source
from cn_clip.errors import DataError, ImageError, UsageError
from cn_clip.image.decode import find_images, read_image


@pytest.fixture
def failing(monkeypatch, tmp_path, capsys):
    """Run a command that raises an error; return its exit code and what it says."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("CN_CLIP_DEBUG", raising=False)

    def command(error, *arguments):
        def raises(*_, **__):
            raise error

        monkeypatch.setattr(cli, "app", raises)
        code = run(arguments or ["models"])
        told = capsys.readouterr()
        assert told.out == ""
        return code, told.err

    return command


def details_of(said):
    return Path(re.search(r"\S+\.txt", said)[0]).read_text(encoding="utf-8")


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
def test_an_error_that_nobody_foresaw_is_one_sentence_that_names_its_details(failing, error):
    code, said = failing(error, "models", "--json")
    assert code == 1 and said.count("\n") == 1 and len(said) <= 310
    assert said.startswith(f"cn-clip: unexpected {type(error).__name__}")
    assert "please report it with the details in " in said
    details = details_of(said)
    assert "Traceback" in details and "['models', '--json']" in details
    assert cn_clip.__version__ in details and "Python 3" in details


def test_each_error_has_a_file_of_its_own(failing):
    first, second = (failing(KeyError("x"))[1] for _ in range(2))
    assert first != second and details_of(first) and details_of(second)


def test_details_that_cannot_be_written_are_shown_by_a_variable(failing, monkeypatch):
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(OSError("full")))
    assert failing(KeyError("x")) == (
        1,
        "cn-clip: unexpected KeyError: 'x'; please report it. CN_CLIP_DEBUG=1 shows the details\n",
    )


def test_a_variable_shows_the_traceback(failing, monkeypatch):
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
    monkeypatch.setenv("USE_AUTH", "1")  # too short to be one, and in every text
    error = ValueError(
        "GET https://me:pw123@host/x?access_token=qwerty&size=1 with hush-hush: hf_abcdefghij1"
    )
    arguments = ["models", "--token", "argtok", "--api-key=argkey", "--json", "sesame9"]
    _, said = failing(error, *arguments)
    for text in (said, details_of(said)):
        for secret in (
            *("hush-hush", "sesame9", "pw123", "qwerty", "hf_abcdefghij1", "argtok", "argkey"),
        ):
            assert secret not in text
    assert "https://***@host/x?access_token=***&size=1" in said
    assert "'--token', '***'" in details_of(said)


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
def test_what_has_a_remedy_is_no_error_to_report(failing, error, code, sentence):
    got, said = failing(error)
    assert got == code and said.startswith(f"cn-clip: {sentence}") and "report" not in said


def test_a_very_long_message_leaves_the_place_whole(failing):
    _, said = failing(ValueError("x" * 100_000), "models", "y" * 100_000)
    assert details_of(said)


def test_the_sentence_can_be_asked_for_without_an_environment(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    error = ValueError("\udcff 猫")
    assert r"\udcff 猫" in details_of(unexpected(error, ["\udcff"]))


def shell(line, **environment):
    """Run a line of a shell in which $CN is cn-clip; return its exit code, output and errors."""
    values = os.environ | {"CN": f"{sys.executable} -m cn_clip"} | environment
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=values)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    return done.returncode, done.stdout, done.stderr.decode()


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a shell and /dev/full")


@linux
@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("$CN --version > /dev/full", 1, "No space left on device"),
        ("$CN modles 2> /dev/full", 2, ""),
        ("$CN --version | true; exit ${PIPESTATUS[0]}", 1, ""),
        ("$CN --version >&- 2>&- <&-", 0, ""),
        ("$CN classify x --labels-file - <&-", 2, "at least two different labels"),
    ],
)
def test_outputs_that_cannot_be_written_are_told_by_the_exit_code(line, code, said):
    got, _, err = shell(line)
    assert got == code and said in err and err.count("\n") == bool(said)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "gb18030", "utf-8"])
def test_json_is_json_on_every_console(monkeypatch, encoding):
    written = io.BytesIO()
    console = io.TextIOWrapper(written, encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", console)
    print_json({"labels": ["猫", "é", "😀", "\udcff"]})
    console.flush()
    assert json.loads(written.getvalue().decode(encoding)) == {
        "labels": ["猫", "é", "😀", "\udcff"]
    }
    assert ("猫".encode() in written.getvalue()) == (encoding == "utf-8")


def leaves(app, before=()):
    """Yield the words of every command, and its options."""
    names = [name for name in app if not name.startswith("-")]
    for name in names:
        yield from leaves(app[name], [*before, name])
    if not names:
        options = {
            name
            for argument in app.assemble_argument_collection()
            for name in argument.names
            if name.startswith("--")
        }
        yield list(before), sorted(options)


def test_an_empty_argument_of_any_command_is_named(capsys):
    """What a shell makes of a variable that is not set is never the current folder."""
    seen = 0
    for words, options in leaves(cli.app):
        for option in options:
            for given in ([option, ""], [f"{option}="], [option, " "]):
                assert run([*words, *given]) == 2
                said = capsys.readouterr().err
                assert f"{option} is empty" in said and said.count("\n") == 1
                seen += 1
        assert run([*words, ""]) == 2
        assert f"argument {len(words) + 1} is empty" in capsys.readouterr().err
    assert seen > 200


@pytest.mark.parametrize("uri", ["", " ", "folder:", "csv:", "csv:?root=x", "csv:a.csv?root="])
def test_a_source_without_a_path_is_refused(uri):
    with pytest.raises(UsageError, match=r"has no path|is empty"):
        open_source(uri)


def test_an_empty_name_or_path_is_not_the_current_folder(monkeypatch, tmp_path):
    make_picture().save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="name is empty"):
        cn_clip.load("")
    with pytest.raises(ImageError, match="path is empty"):
        find_images([""])
    with pytest.raises(ImageError, match="path of an image is empty"):
        read_image("")
