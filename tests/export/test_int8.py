"""int8 exports: small, close to the model, and honest about what was not measured."""

import errno
import json
import logging
import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import TINY, cosines, make_image, make_model
from onnx import TensorProto, helper, numpy_helper

import cn_clip
from cn_clip import export as export_module
from cn_clip import weights
from cn_clip.backends.exported import read_exported
from cn_clip.cli import run
from cn_clip.errors import CheckpointError, CNClipError, ImageError, UsageError
from cn_clip.eval.zeroshot import read_templates
from cn_clip.export import export, fastest
from cn_clip.export.int8_inputs import calibration_of
from cn_clip.export.layers import ConvolutionQuantizer, Layer, float_layers
from cn_clip.export.parity import Parity
from cn_clip.export.quantize import _store_in_int8

TEXTS = ["猫", "一只虎斑猫看着镜头", "很长的句子" * 9, "A photo of 火箭"]


@pytest.fixture
def known_graphs(tiny_export, monkeypatch):
    """Copy the graphs of ``tiny_export`` instead of tracing the model again."""

    def copy(model, folder, image, text):
        for file in tiny_export.glob("*.onnx*"):
            shutil.copy(file, folder)

    for module in (export_module, fastest):
        monkeypatch.setattr(module, "write_graphs", copy)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder of 40 images with captions, and its URI."""
    folder = tmp_path_factory.mktemp("photos")
    rows = ["image,caption"]
    for n in range(40):
        make_image(n, (32, 32)).save(folder / f"{n}.png")
        rows.append(f"{n}.png,第{n}张照片")
    (folder / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


def size_of(folder):
    return sum(path.stat().st_size for path in folder.glob("*.data"))


@pytest.mark.usefixtures("known_graphs")
def test_a_transformer_in_int8_is_small_and_close(tiny_checkpoint, tiny_export, tmp_path):
    result = export(tiny_checkpoint, tmp_path / "int8", precision="int8")
    assert result.precision == "int8" and result.parity.smallest_cosine > 0.98
    assert size_of(tmp_path / "int8") < 0.3 * size_of(tiny_export)
    for name in ("image", "text"):
        graph = onnx.load(tmp_path / f"int8/{name}.onnx", load_external_data=False).graph
        kinds = {node.op_type for node in graph.node}
        assert {"DynamicQuantizeLinear", "MatMulInteger"} <= kinds
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        content = (tmp_path / f"int8/{name}.onnx").read_bytes()
        assert b".py" not in content  # no stack traces of the exporter
    original, ours = cn_clip.load(tiny_checkpoint), cn_clip.load(tmp_path / "int8", backend="onnx")
    assert ours.backend.precision == "int8"
    images = [make_image(seed) for seed in range(5)]
    for actual, expected in (
        (ours.embed_images(images), original.embed_images(images)),
        (ours.embed_texts(TEXTS), original.embed_texts(TEXTS)),
    ):
        assert 0.98 < cosines(actual, expected).min() < 0.99999999
    deviation = read_exported(tmp_path / "int8").deviation
    assert 0 < deviation.image < 0.02 and 0 < deviation.text < 0.02


@pytest.mark.parametrize(
    "kind", ["resnet", pytest.param("efficientnet_lite", marks=pytest.mark.full)]
)
def test_convolutions_run_in_int8(kind, tmp_path):
    weights.save_folder(make_model(TINY[kind]), tmp_path / "model")
    result = export(tmp_path / "model", tmp_path / "out", precision="int8")
    assert result.parity.image_cosine[0] > 0.9
    model = onnx.load(tmp_path / "out/image.onnx")
    stored = {w.name: w.data_type for w in model.graph.initializer if len(w.dims) == 4}
    int8 = sum(data_type == TensorProto.INT8 for data_type in stored.values())
    assert int8 >= 0.7 * len(stored)


def convolution(name, source, weight):
    """Return a convolution, and its weight as an initializer."""
    node = helper.make_node("Conv", [source, f"{name}.weight"], [f"{name}.out"], name)
    return node, numpy_helper.from_array(weight.astype(np.float32), f"{name}.weight")


def test_layers_beside_outliers_have_the_largest_errors(tmp_path):
    """The second writes a channel 1,000 times as large as the rest, which the third ignores."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(16, 16, 1, 1))
    outlier = plain.copy()
    outlier[0] *= 1000
    ignoring = plain.copy()
    ignoring[:, 0] /= 1e6
    nodes, values = zip(
        convolution("a", "x", plain),
        convolution("b", "a.out", outlier),
        convolution("c", "b.out", ignoring),
        strict=True,
    )
    flat = helper.make_node("ReduceMean", ["c.out", "axes"], ["y"], keepdims=0)
    axes = numpy_helper.from_array(np.array([2, 3]), "axes")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16, 2, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 16])
    graph = helper.make_graph([*nodes, flat], "graph", [x], [y], [*values, axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "graph.onnx")
    images = [rng.normal(size=(1, 16, 2, 2)).astype(np.float32) for _ in range(32)]
    quantizer = ConvolutionQuantizer(tmp_path / "graph.onnx", images)
    errors = quantizer.errors()
    assert [layer.before for layer in quantizer.layers] == [None, 0, 1]
    assert errors[0] < 0.001 and min(errors[1:]) > 0.01


@pytest.mark.parametrize(
    ("errors", "kept"),
    [
        ([0.001, 0.001, 0.001], set()),  # small enough all together
        ([0, 0.5, 0, 0, 0, 0, 0, 0], {0, 1}),  # with the layer before it
        ([0.5, 0, 0, 0, 0, 0, 0, 0], {0}),
        ([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], {0, 1}),  # at most a quarter
        ([0, 0, 0, 0.01, 0, 0.01, 0, 0.001], {2, 3, 4, 5}),
    ],
)
def test_the_worst_layers_stay_in_float32(errors, kept):
    layers = [Layer((str(n),), n - 1 if n else None) for n in range(len(errors))]
    if len(kept) > 2:  # of more layers
        layers += [Layer((str(n),), n - 1) for n in range(len(errors), 16)]
        errors = errors + [0] * (16 - len(errors))
    assert float_layers(layers, errors) == kept


def test_stored_weights_are_right_to_half_a_step_of_their_output_channel():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(128, 160)).astype(np.float32) * np.float32(10) ** rng.integers(
        -3, 3, (1, 160)
    ).astype(np.float32)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [128, 128])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [128, 160])
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "graph", [x], [y], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    _store_in_int8(model)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    stored = session.run(None, {"x": np.eye(128, dtype=np.float32)})[0]
    half_a_step = np.abs(weight).max(axis=0) / 127 / 2
    assert (np.abs(stored - weight) <= half_a_step * 1.001).all()


def test_a_layer_kept_in_float32_keeps_its_large_weight():
    weight = np.random.default_rng(0).normal(size=(128, 128, 1, 1))
    nodes, values = zip(
        convolution("first", "x", weight), convolution("second", "first.out", weight), strict=True
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 128, 1, 1])
    y = helper.make_tensor_value_info("second.out", TensorProto.FLOAT, [1, 128, 1, 1])
    model = helper.make_model(helper.make_graph(nodes, "graph", [x], [y], values))
    _store_in_int8(model, {"first"})
    types = {w.name.removesuffix(".int8"): w.data_type for w in model.graph.initializer}
    assert types["first.weight"] == TensorProto.FLOAT
    assert types["second.weight"] == TensorProto.INT8


def test_too_few_calibration_images_are_refused_with_both_numbers(tiny_checkpoint, tmp_path):
    images = [make_image(seed) for seed in range(5)]
    with pytest.raises(UsageError, match="at least 32 images, 5 were given"):
        export(tiny_checkpoint, tmp_path / "out", precision="int8", images=images)
    assert not (tmp_path / "out").exists()


def test_calibration_takes_the_given_images_or_the_sample(tiny_checkpoint):
    original = cn_clip.load(tiny_checkpoint)
    own = calibration_of(original, [make_image(seed) for seed in range(700)], [])
    assert len(own.images) == 300 and own.images[0].shape == (1, 3, 32, 32)
    assert not np.array_equal(own.images[0], own.images[-1])
    sample = calibration_of(original, [], ["一只猫"])
    assert len(sample.images) == 47 and len(sample.texts) == 64


@pytest.mark.usefixtures("known_graphs")
def test_openvino_int8_is_close_and_nncf_leaves_no_trace(tiny_checkpoint, tmp_path, capfd):
    before = logging.getLoggerClass(), dict(os.environ), logging.getLogger().handlers[:]
    result = export(tiny_checkpoint, tmp_path / "out", to="openvino", precision="int8")
    assert capfd.readouterr() == ("", "")
    assert (logging.getLoggerClass(), dict(os.environ), logging.getLogger().handlers) == before
    assert result.parity.smallest_cosine > 0.97
    ours = cn_clip.load(tmp_path / "out")
    assert ours.backend.precision == "int8"
    assert b'element_type="i8"' in (tmp_path / "out/text.xml").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smooth_quant_alpha": 0.5, "precision": "int8"}, "only int8 in OpenVINO"),
        ({"smooth_quant_alpha": 0.5, "to": "openvino"}, "only int8 in OpenVINO"),
        (
            {"smooth_quant_alpha": 2.0, "to": "openvino", "precision": "int8"},
            "the alpha 2.0 of SmoothQuant is not from 0 to 1",
        ),
    ],
)
def test_an_alpha_without_use_is_refused(options, message, tiny_checkpoint, tmp_path):
    with pytest.raises(UsageError, match=message):
        export(tiny_checkpoint, tmp_path / "out", **options)


def trial(precision, images, megabytes, holds=True):
    parity = Parity(1, 1, (1.0, 1.0), (1.0, 1.0), 1.0)
    return fastest.Trial("int8", precision, images, 1000, megabytes, parity, 0.0, holds)


def test_the_fastest_that_holds_is_picked_and_the_smallest_of_equals():
    slow, fast, lossy = trial("a", 10, 9), trial("b", 20, 9), trial("c", 90, 1, holds=False)
    assert fastest.pick([slow, fast, lossy]) == fast
    as_fast = trial("d", 19.9, 5)
    assert fastest.pick([slow, fast, as_fast]) == as_fast
    assert fastest.pick([lossy]) is None


@pytest.mark.usefixtures("known_graphs")
def test_every_precision_is_tried_and_the_chosen_one_written(
    tiny_checkpoint, photos, tmp_path, monkeypatch
):
    monkeypatch.setitem(fastest.REQUIRED_COSINE, "float16", 1.1)
    spec = f"csv:{photos / 'captions.csv'}"
    choice = fastest.export_fastest(
        tiny_checkpoint, tmp_path / "there/out", dataset=spec, max_recall_drop=100
    )
    assert [trial.precision for trial in choice.trials] == ["float32", "float16", "int8"]
    assert [trial.holds for trial in choice.trials] == [True, False, True]
    assert choice.chosen == fastest.pick(choice.trials)
    assert read_exported(tmp_path / "there/out").precision == choice.chosen.stored
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["out"]
    for precision, measured in zip(("float32", "int8"), choice.trials[::2], strict=True):
        folder = tmp_path / precision
        export(tiny_checkpoint, folder, precision=precision)
        recall = fastest.ScoredSet(spec).score(cn_clip.load(folder, backend="onnx"))
        assert measured.drop == pytest.approx(100 * (choice.score - recall))


@pytest.fixture
def refuse(monkeypatch):
    """Return a function after which exports of these stored precisions fail their self-test."""

    def refuse(*stored):
        def open_unless_refused(folder, exported, config, precision):
            if exported.precision in stored:
                raise CheckpointError(f"{exported.precision} is wrong")
            return export_module.as_embedder(folder, exported, config, precision)

        monkeypatch.setattr(fastest, "as_embedder", open_unless_refused)

    return refuse


@pytest.mark.usefixtures("known_graphs")
def test_drops_are_relative_to_the_original_even_if_float32_is_refused(
    tiny_checkpoint, photos, tmp_path, refuse
):
    refuse("float32")
    spec = f"csv:{photos / 'captions.csv'}"
    choice = fastest.export_fastest(
        tiny_checkpoint, tmp_path / "out", dataset=spec, max_recall_drop=100
    )
    assert choice.refused == ["float32 is wrong"]
    assert [trial.precision for trial in choice.trials] == ["float16", "int8"]
    original = fastest.ScoredSet(spec).score(cn_clip.load(tiny_checkpoint, device="cpu"))
    assert choice.score == pytest.approx(original)
    exported = read_exported(tmp_path / "out")
    assert choice.result.fingerprint == exported.fingerprint
    assert choice.result.precision == exported.precision == choice.chosen.stored


@pytest.mark.usefixtures("known_graphs")
def test_nothing_is_written_or_left_if_every_precision_is_refused(
    tiny_checkpoint, photos, tmp_path, refuse
):
    refuse("float32", "float16", "int8")
    with pytest.raises(CheckpointError, match="works on this CPU: float32 is wrong"):
        fastest.export_fastest(
            tiny_checkpoint,
            tmp_path / "out",
            dataset=f"csv:{photos / 'captions.csv'}",
            max_recall_drop=100,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("known_graphs")
def test_a_full_disk_is_one_message_and_leaves_nothing(
    tiny_checkpoint, photos, tmp_path, monkeypatch
):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fastest, "finish_export", full)
    with pytest.raises(CNClipError, match=r"could not write .*out: No space left on device"):
        fastest.export_fastest(
            tiny_checkpoint,
            tmp_path / "out",
            dataset=f"csv:{photos / 'captions.csv'}",
            max_recall_drop=100,
        )
    assert not list(tmp_path.iterdir())


def test_the_chosen_precision_has_the_official_names(tiny_checkpoint, photos, tmp_path, refuse):
    refuse("float32", "float16")
    fastest.export_fastest(
        tiny_checkpoint,
        tmp_path / "out",
        dataset=f"csv:{photos / 'captions.csv'}",
        max_recall_drop=100,
        official_names=True,
    )
    names = {f"out.{tower}.int8.onnx{end}" for tower in ("img", "txt") for end in ("", ".data")}
    assert {path.name for path in (tmp_path / "out").glob("*.onnx*")} == names
    exported = read_exported(tmp_path / "out")
    assert exported.image.file == "out.img.int8.onnx" and exported.image.input == "image"
    assert cn_clip.load(tmp_path / "out", backend="onnx").embed_texts("猫").any()


def test_an_unreadable_image_for_calibration_is_named(photos, tmp_path):
    scored = fastest.ScoredSet(f"csv:{photos / 'captions.csv'}")
    with pytest.raises(ImageError, match=r"missing\.png cannot be read: No such file"):
        scored.check_unseen([tmp_path / "missing.png"])


def test_without_images_for_calibration_the_set_is_not_read(photos, monkeypatch):
    scored = fastest.ScoredSet(f"csv:{photos / 'captions.csv'}")
    monkeypatch.setattr(scored, "_contents", lambda: pytest.fail("it was read"))
    scored.check_unseen([])


@pytest.mark.usefixtures("known_graphs")
def test_the_command_says_that_recall_was_not_measured(tiny_checkpoint, tmp_path, capsys):
    words = ["export", "--model", str(tiny_checkpoint), "--out", str(tmp_path / "out")]
    assert run([*words, "--precision", "float16"]) == 0
    assert "not measured; give --max-recall-drop and --dataset" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-recall-drop", "1"], "give both, or neither"),
        (["--dataset", "csv:a.csv"], "give both, or neither"),
        (["--max-recall-drop", "1", "--dataset", "x", "--precision", "int8"], "drop --precision"),
        (["--max-recall-drop", "-1", "--dataset", "x"], "drop of -1.0 points; give a number"),
        (["--max-recall-drop", "nan", "--dataset", "x"], "drop of nan points; give a number"),
        (["--max-recall-drop", "1", "--dataset", "x"], "x"),
        (["--images", "missing", "--precision", "int8"], "missing"),
    ],
)
def test_options_that_contradict_are_bad_usage(arguments, message, tiny_checkpoint, capsys):
    assert run(["export", "--model", str(tiny_checkpoint), *arguments]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


@pytest.mark.usefixtures("known_graphs")
def test_the_table_has_every_precision_and_unreadable_images_fail(
    tiny_checkpoint, photos, tmp_path, capsys
):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "7.png").write_bytes(b"broken")
    words = ["--out", str(tmp_path / "out"), "--dataset", f"csv:{folder}/captions.csv"]
    command = ["export", "--model", str(tiny_checkpoint), *words, "--max-recall-drop", "100"]
    assert run(command) == 1
    captured = capsys.readouterr()
    rows = [line.split()[0] for line in captured.out.splitlines()[1:4]]
    assert rows == ["float32", "float16", "int8"]
    assert "captions.csv, line 9" in captured.err and "1 unreadable and excluded" in captured.err


def test_labelled_images_are_scored_by_accuracy(tiny_checkpoint, tmp_path):
    for name in ("000", "001"):
        (tmp_path / "set/test" / name).mkdir(parents=True)
        for n in range(3):
            make_image(n + 3 * int(name)).save(tmp_path / f"set/test/{name}/{n}.png")
    (tmp_path / "set/label_cn.txt").write_text("猫\n狗\n", encoding="utf-8")
    scored = fastest.ScoredSet(str(tmp_path / "set"))
    assert scored.metric == "accuracy"
    embedder = cn_clip.load(tiny_checkpoint)
    images = [make_image(n) for n in range(6)]
    templates = read_templates("general")
    labels = [embedder.embed_texts([t.format(label) for t in templates]) for label in "猫狗"]
    means = np.stack([rows.mean(axis=0) / np.linalg.norm(rows.mean(axis=0)) for rows in labels])
    best = (embedder.embed_images(images) @ means.T).argmax(axis=1)
    assert scored.score(embedder) == pytest.approx(np.mean(best == [0, 0, 0, 1, 1, 1]))


def test_calibration_images_of_the_evaluation_set_are_refused(tiny_checkpoint, photos, tmp_path):
    images = sorted(photos.glob("*.png"))[:33]
    with pytest.raises(UsageError, match="33 of the images for calibration are in the eval"):
        fastest.export_fastest(
            tiny_checkpoint,
            tmp_path / "out",
            dataset=f"csv:{photos}/captions.csv",
            max_recall_drop=1,
            images=images,
        )


@pytest.mark.full
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_mini_in_int8(to, tmp_path):
    """Bars with a margin; measured on the stamps: mean cosine 0.997, recall +0.15 points."""
    result = export("mini", tmp_path / "out", to=to, precision="int8")
    assert result.parity.image_cosine[0] > 0.97 and result.parity.text_cosine[0] > 0.97
    assert result.parity.top10_agreement >= 0.9
    total = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert total <= {"onnx": 15e6, "openvino": 16e6}[to]
    config = json.loads((tmp_path / "out/config.json").read_text("utf-8"))
    assert config["precision"] == "int8"
