"""Commands as a user runs them: output, exit codes, one sentence on stderr."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError

import pytest
from conftest import encoded, make_image

from cn_clip import hub, weights
from cn_clip.cli import run


@pytest.fixture
def model(tiny_model, tmp_path):
    weights.save_folder(tiny_model, tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def cn_clip(capsys, model):
    """Run a command; return its exit code, stdout and stderr."""

    def command(*arguments):
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_classify_prints_probabilities_cosines_and_bars(cn_clip, model, image_folder):
    code, out, err = cn_clip(
        "classify",
        image_folder,
        "--labels",
        "猫,狗，火箭、咖啡",
        "--model",
        model,
        "--top",
        3,
    )
    assert code == 0 and err == ""
    assert out.count("probability") == out.count(".jpg") == 3
    assert "cosine" in out and "█" in out
    assert (
        sum(line.strip().startswith(("猫", "狗", "火箭", "咖啡")) for line in out.splitlines()) == 9
    )


def test_classify_json_is_one_document(cn_clip, model, image_folder):
    code, out, _ = cn_clip(
        "classify", image_folder / "*.jpg", "--labels", "猫,狗", "--model", model, "--json",
        "--template", "一张{}的照片", "--template", "{}",
    )  # fmt: skip
    assert code == 0
    document = json.loads(out)
    assert document["labels"] == ["猫", "狗"] and document["failed"] == []
    assert document["templates"] == ["一张{}的照片", "{}"]
    assert len(document["images"]) == 3
    for image in document["images"]:
        probabilities = [prediction["probability"] for prediction in image["predictions"]]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert probabilities == sorted(probabilities, reverse=True)


def test_labels_come_from_a_file_with_or_without_byte_order_mark(
    cn_clip, model, image_folder, tmp_path
):
    file = tmp_path / "labels.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text("猫\n\n狗\r\n", encoding=encoding)
        image = image_folder / "0.jpg"
        _, out, _ = cn_clip("classify", image, "--labels-file", file, "--model", model, "--json")
        assert json.loads(out)["labels"] == ["猫", "狗"]
    file.write_text("猫\n狗", encoding="gb18030")
    code, _, err = cn_clip("classify", image_folder, "--labels-file", file)
    assert code == 2 and "is not UTF-8" in err


def test_a_damaged_image_is_reported_and_the_others_are_classified(cn_clip, model, image_folder):
    (image_folder / "cut.jpg").write_bytes(encoded(make_image(), "JPEG")[:400])
    code, out, err = cn_clip("classify", image_folder, "--labels", "猫,狗", "--model", model)
    assert code == 1
    assert out.count("probability") == 3
    assert "cut.jpg is damaged" in err and "1 of 4 images failed" in err
    code, out, _ = cn_clip(
        "classify", image_folder, "--labels", "猫,狗", "--model", model, "--json"
    )
    assert code == 1 and len(json.loads(out)["failed"]) == 1


def test_repeated_labels_are_counted_once_with_a_warning(cn_clip, model, image_folder):
    code, out, err = cn_clip(
        "classify", image_folder, "--labels", "猫,狗,狗", "--model", model, "--json"
    )
    assert code == 0 and json.loads(out)["labels"] == ["猫", "狗"]
    assert err == "cn-clip: warning: label '狗' is given more than once; counted once\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["classify", "{folder}", "--labels", "猫"], 2, "at least two different labels"),
        (["classify", "{folder}", "--labels", "猫,,狗"], 2, "label 2 of 3 is empty"),
        (["classify", "{folder}"], 2, "give either --labels"),
        (["classify", "{folder}", "--labels", "a,b", "--labels-file", "x"], 2, "give either"),
        (["classify", "{folder}", "--labels-file", "none.txt"], 2, "none.txt cannot be read"),
        (["classify", "{folder}", "--labels", "猫,狗", "--top", "0"], 2, "--top 0"),
        (["classify", "{folder}", "--labels", "猫,狗", "--top", "x"], 2, "--top"),
        (["classify", "{folder}", "--labels", "猫,狗", "--template", "x"], 2, "has no {}"),
        (["classify", "{folder}", "--labels", "猫,狗", "--model", "mimi"], 2, "did you mean mini"),
        (["classify", "{folder}", "--labels", "猫,狗", "--colour", "red"], 2, "--colour"),
        (["classify", "{folder}", "--labels", "猫,狗", "--precision", "int3"], 2, "int3"),
        (["classify", "none.jpg", "--labels", "猫,狗"], 1, "no such file"),
        (["classify", "~nobody-of-this-name/a.jpg", "--labels", "猫,狗"], 1, "not a valid path"),
        (["classify", "x" * 300 + ".jpg", "--labels", "猫,狗"], 1, "not a valid path"),
        (["classify", "{empty}", "--labels", "猫,狗"], 1, "holds no image"),
        (["clasify"], 2, "classify"),
    ],
)
def test_bad_usage_is_one_sentence_and_the_right_code(
    cn_clip, image_folder, tmp_path, arguments, code, message
):
    (tmp_path / "empty").mkdir()
    places = {"{folder}": image_folder, "{empty}": tmp_path / "empty"}
    exit_code, out, err = cn_clip(*(places.get(argument, argument) for argument in arguments))
    assert (exit_code, out) == (code, "")
    assert message in err and err.startswith("cn-clip: ") and err.count("\n") == 1


def test_models_lists_every_name_with_its_path(cn_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "CACHE", str(tmp_path / "cache"))
    (tmp_path / "clip_cn_rn50.pt").touch()
    code, out, _ = cn_clip("models", "--download-root", tmp_path, "--json")
    rows = {row["name"]: row for row in json.loads(out)["models"]}
    assert code == 0 and list(rows) == hub.names()
    assert rows["RN50"]["path"] == str(tmp_path / "clip_cn_rn50.pt")
    assert rows["ViT-B-16"]["path"] is None
    # The paper's table 1: 77M, 188M, 406M, 407M, 958M.
    millions = {name: round(row["parameters"] / 1e6) for name, row in rows.items()}
    assert (millions["RN50"], millions["ViT-B-16"], millions["ViT-L-14"]) == (77, 188, 406)
    assert (millions["ViT-L-14-336"], millions["ViT-H-14"]) == (407, 958)
    code, out, _ = cn_clip("models")
    assert code == 0 and "in the package" in out and "to be downloaded: clip_cn_vit-b-16.pt" in out


def test_doctor_reports_a_working_environment_as_ready(cn_clip):
    code, out, _ = cn_clip("doctor", "--offline", "--json")
    report = json.loads(out)
    states = {finding["what"]: finding["state"] for finding in report["findings"]}
    assert code == 0 and report["ready"]
    assert states["embedded model"] == states["torch"] == states["cpu"] == "ok"
    code, out, _ = cn_clip("doctor", "--offline")
    assert code == 0 and out.rstrip().endswith("ready")


def test_doctor_reports_a_broken_embedded_model(cn_clip, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "EMBEDDED_FOLDER", tmp_path)
    code, out, _ = cn_clip("doctor", "--offline")
    assert code == 1 and "no config.json" in out and "not ready" in out


def test_doctor_works_without_an_installed_distribution(cn_clip, monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(import_module("cn_clip.cli.doctor").metadata, "requires", requires)
    code, out, _ = cn_clip("doctor", "--offline")
    assert code == 0 and "cn-clip is not installed; pip install -e " in out


def test_doctor_names_missing_and_old_packages_with_the_command(cn_clip, monkeypatch):
    module = import_module("cn_clip.cli.doctor")  # the package's attribute is the command
    versions = {"torch": None, "pillow": "9.5.0"}
    real = module._version
    monkeypatch.setattr(module, "_version", lambda name: versions.get(name, real(name)))
    code, out, _ = cn_clip("doctor", "--offline")
    assert code == 1 and "not ready" in out
    assert "missing; install it: pip install 'torch>=2.6'" in out
    assert "9.5.0 is too old; install it: pip install 'pillow>=13'" in out


def test_a_console_without_chinese_gets_escapes(model, image_folder):
    command = [sys.executable, "-m", "cn_clip", "classify", str(image_folder)]
    command += ["--labels", "猫,狗", "--model", model]
    run = subprocess.run(
        command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"}
    )
    assert run.returncode == 0 and b"\\u732b" in run.stdout


def test_a_hub_that_cannot_be_reached_is_a_note_not_a_failure(cn_clip, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "127.0.0.1:9")
    code, out, _ = cn_clip("doctor", "--json")
    states = {finding["what"]: finding["state"] for finding in json.loads(out)["findings"]}
    assert code == 0 and states["Hugging Face"] == states["ModelScope"] == "note"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a named pipe")
def test_ctrl_c_ends_with_130_and_no_traceback(model, image_folder, tmp_path):
    os.mkfifo(tmp_path / "labels")
    command = [sys.executable, "-m", "cn_clip", "classify"]
    command += [str(image_folder), "--labels-file", str(tmp_path / "labels")]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with open(tmp_path / "labels", "w"):  # opens when the command opens it and waits for labels
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert err.strip() == "cn-clip: interrupted"
