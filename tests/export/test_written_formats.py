"""TensorRT's script and Core ML models: written beside verified ONNX graphs, and never run."""

import importlib.util
import os
import shutil
import subprocess

import onnx
import pytest
from conftest import TINY, cosines, make_model

import cn_clip
from cn_clip import weights
from cn_clip.backends.exported import read_exported
from cn_clip.cli.export import export as command
from cn_clip.errors import CheckpointError, UsageError
from cn_clip.export import export

FAKE_TRTEXEC = '#!/bin/sh\nprintf "%s\\n" "$@" >> "$LOG"\necho >> "$LOG"\n'


@pytest.fixture(scope="module")
def with_script(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats") / "my model"
    return folder, export(
        tiny_checkpoint, folder, to="tensorrt", precision="float16", official_names=True
    )


def test_the_script_gives_trtexec_each_graph_with_a_profile_for_all_its_axes(with_script, tmp_path):
    folder, _ = with_script
    tool, log = tmp_path / "trtexec", tmp_path / "log"
    tool.write_text(FAKE_TRTEXEC)
    tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log)}
    subprocess.run(["sh", folder / "tensorrt/build.sh"], env=environment, check=True)
    commands = [call.splitlines() for call in log.read_text().strip().split("\n\n")]
    assert len(commands) == 2
    for arguments, axes in zip(commands, ([None, 3, 32, 32], [None, None]), strict=True):
        assert "--fp16" in arguments
        options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        graph = onnx.load(folder / "tensorrt" / options["--onnx"], load_external_data=False).graph
        shapes = []
        for kind in ("min", "opt", "max"):
            name, shape = options[f"--{kind}Shapes"].split(":")
            assert name == graph.input[0].name
            shapes.append(list(map(int, shape.split("x"))))
        for smallest, usual, largest, fixed in zip(*shapes, axes, strict=True):
            assert smallest < usual < largest if fixed is None else {smallest, largest} == {fixed}
    assert shapes[0][1] == 2 and shapes[2][1] == 52  # texts of any length
    log.unlink()
    subprocess.run(
        ["sh", folder / "tensorrt/build.sh"], env=environment | {"FLAGS": ""}, check=True
    )
    assert "--fp16" not in log.read_text()


def test_what_was_never_run_is_marked_and_the_onnx_graphs_are_verified(with_script):
    folder, result = with_script
    assert "NEVER RUN" in (folder / "tensorrt/build.sh").read_text()
    assert (result.format, result.runtime) == ("tensorrt", "onnx")
    assert result.parity.smallest_cosine >= 0.9995
    assert result.never_run.startswith("tensorrt/build.sh")
    exported = read_exported(folder)
    assert exported.runtime == "onnx" and "tensorrt/build.sh" in exported.files
    assert cn_clip.load(folder, backend="onnx").embed_texts("猫").shape == (1, 32)


def test_the_command_says_what_was_never_run(
    tiny_checkpoint, tiny_export, tmp_path, capsys, monkeypatch
):
    def copy(model, folder, image, text):  # instead of tracing the model again
        for file in tiny_export.glob("*.onnx*"):
            shutil.copy(file, folder)

    monkeypatch.setattr("cn_clip.export.write_graphs", copy)
    command(model=str(tiny_checkpoint), to="tensorrt", out=str(tmp_path / "out"))
    words = " ".join(capsys.readouterr().out.split())
    assert "never run tensorrt/build.sh" in words and "only the ONNX graphs were verified" in words
    assert "FLAGS=${FLAGS-}" in (tmp_path / "out/tensorrt/build.sh").read_text()  # float32


@pytest.mark.parametrize("to", ["tensorrt", "coreml"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": None}, "writes files for another machine; give a folder with --out"),
        ({"precision": "int8"}, "has no precision 'int8': its own tools quantise"),
    ],
)
def test_options_that_do_not_fit_are_refused(tiny_checkpoint, tmp_path, to, options, message):
    with pytest.raises(UsageError, match=f"--to {to} {message}"):
        export(tiny_checkpoint, to=to, **{"out": tmp_path / "out"} | options)


def test_coreml_without_coremltools_is_refused_at_once(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(UsageError, match="coremltools, which is not installed: pip install coreml"):
        export(tiny_checkpoint, tmp_path / "out", to="coreml")
    assert not (tmp_path / "out").exists()


needs_coremltools = pytest.mark.skipif(
    importlib.util.find_spec("coremltools") is None, reason="coremltools is not installed"
)


@needs_coremltools
@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # of coremltools, about the versions of other packages
@pytest.mark.parametrize("kind", sorted(TINY))
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_core_ml_models_have_dynamic_axes_and_are_marked(kind, precision, tmp_path):
    import coremltools as ct

    model = make_model(TINY[kind])
    weights.save_folder(model, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", to="coreml", precision=precision)
    assert "never run" in (tmp_path / "out/coreml/README.txt").read_text()
    size = model.config.vision.resolution
    for name, source, ranges in (
        ("image", "pixel_values", [(1, 64), (3, 3), (size, size), (size, size)]),
        ("text", "input_ids", [(1, 64), (2, 52)]),
    ):
        package = str(tmp_path / f"out/coreml/{name}.mlpackage")
        description = ct.models.MLModel(package, skip_model_load=True).get_spec().description
        (value,), (features,) = description.input, description.output
        shape = value.type.multiArrayType.shapeRange.sizeRanges
        assert (value.name, features.name) == (source, f"{name}_features")
        assert [(axis.lowerBound, axis.upperBound) for axis in shape] == ranges
        assert "never run" in description.metadata.shortDescription
    ours = cn_clip.load(tmp_path / "out").embed_texts("猫")
    assert cosines(ours, cn_clip.load(tmp_path / "model").embed_texts("猫")).min() > 0.999


@needs_coremltools
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_coremltools_cannot_convert_is_named(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("coremltools.convert", lambda *_, **__: 1 / 0)
    with pytest.raises(CheckpointError, match=r"coremltools .* cannot convert .*ZeroDivisionError"):
        export(tiny_checkpoint, tmp_path / "there/out", to="coreml")
    assert list((tmp_path / "there").iterdir()) == []
