"""Exports: two graphs that equal the model, and a folder that is enough for another program."""

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import TINY, cosines, make_image, make_model
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

import cn_clip
from cn_clip import export as export_module
from cn_clip import weights
from cn_clip.backends.exported import read_exported
from cn_clip.embedder import Embedder
from cn_clip.errors import CheckpointError, UsageError
from cn_clip.export import export
from cn_clip.image.decode import normalize, to_pixels
from cn_clip.sample import embedded_sample

TEXTS = ["猫", "一只虎斑猫看着镜头", "很长的句子" * 9, "A photo of 火箭"]


def axes(path):
    graph = onnx.load(path, load_external_data=False).graph
    return [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (graph.input[0], graph.output[0])
    ]


def test_graphs_have_named_dynamic_axes_and_one_file_of_weights_each(tiny_export):
    assert axes(tiny_export / "image.onnx") == [["batch", 3, 32, 32], ["batch", 32]]
    assert axes(tiny_export / "text.onnx") == [["batch", "length"], ["batch", 32]]
    assert sorted(path.name for path in tiny_export.glob("*.data")) == [
        "image.onnx.data",
        "text.onnx.data",
    ]


@pytest.mark.parametrize("kind", ["resnet", "efficientnet_lite"])
def test_every_image_tower_is_exported_and_equals_the_model(kind, tmp_path):
    model = make_model(TINY[kind])
    weights.save_folder(model, tmp_path / "model")
    result = export(tmp_path / "model", tmp_path / "out")
    assert result.parity.smallest_cosine >= 0.99999 and result.parity.top10_agreement == 1
    images = [make_image(seed) for seed in range(5)]
    expected = Embedder.from_model(model).embed_images(images)
    actual = cn_clip.load(tmp_path / "out", backend="onnx").embed_images(images)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_backend_equals_torch_at_any_batch_size_and_text_length(
    backend, tiny_checkpoint, tiny_export
):
    original, ours = cn_clip.load(tiny_checkpoint), cn_clip.load(tiny_export, backend=backend)
    for count in (0, 1, 3, 7, 33):
        images = [make_image(seed) for seed in range(count)]
        np.testing.assert_allclose(
            ours.embed_images(images), original.embed_images(images), atol=2e-6
        )
    for texts in ([], ["猫"], TEXTS, TEXTS * 20):
        np.testing.assert_allclose(ours.embed_texts(texts), original.embed_texts(texts), atol=2e-6)
    assert ours.logit_scale == original.logit_scale
    assert ours.parameter_count == original.parameter_count
    assert ours.context_length == 52


def test_the_folder_alone_is_enough_for_another_program(tiny_export):
    """Only onnxruntime, and numbers from the files: no code of this package."""
    session = onnxruntime.InferenceSession(tiny_export / "text.onnx")
    config = json.loads((tiny_export / "config.json").read_text(encoding="utf-8"))
    golden = json.loads((tiny_export / "golden/golden.json").read_text(encoding="utf-8"))
    for text in golden["texts"]:
        ids = np.array([text["ids"]])
        features = session.run(None, {config["text"]["input"]: ids})[0]
        assert cosines(features, np.array([text["embedding"]])) > 0.99999
    preprocessing = json.loads((tiny_export / "preprocessor_config.json").read_text())
    session = onnxruntime.InferenceSession(tiny_export / "image.onnx")
    from PIL import Image

    for image in golden["images"]:
        pixels = np.asarray(Image.open(tiny_export / "golden" / image["file"]), np.float32) / 255
        pixels = (pixels - preprocessing["image_mean"]) / preprocessing["image_std"]
        batch = np.float32(np.moveaxis(pixels, -1, 0)[None])
        features = session.run(None, {config["image"]["input"]: batch})[0]
        assert cosines(features, np.array([image["embedding"]])) > 0.99999
    lengths = [len(text["ids"]) for text in golden["texts"]]
    assert min(lengths) == 3 and max(lengths) > 30


def test_transformers_reads_the_tokenizer_and_the_preprocessing(tiny_export, golden_strings):
    tokenizer = AutoTokenizer.from_pretrained(tiny_export)
    ours = cn_clip.load(tiny_export)
    texts = [text for text in golden_strings if len(text) < 50 and not set(text) & set("Σ[")]
    texts += embedded_sample().texts
    assert tokenizer(texts)["input_ids"] == ours.prepare_texts(texts)
    image = make_image(size=(300, 200))
    expected = normalize(to_pixels(image, 32))
    for auto in (AutoImageProcessor, AutoProcessor):
        processor = auto.from_pretrained(tiny_export)
        pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(pixels, expected, atol=1e-6)


def test_official_names_in_float16(tiny_checkpoint, tiny_export, tmp_path):
    export(tiny_checkpoint, tmp_path / "vit", official_names=True, precision="float16")
    assert axes(tmp_path / "vit/vit.img.fp16.onnx")[0] == ["batch", 3, 32, 32]
    size = (tmp_path / "vit/vit.txt.fp16.onnx.data").stat().st_size
    assert size < 0.51 * (tiny_export / "text.onnx.data").stat().st_size
    session = onnxruntime.InferenceSession(tmp_path / "vit/vit.txt.fp16.onnx")
    original = cn_clip.load(tiny_checkpoint)
    ids = original.tokenizer(TEXTS)
    features = session.run(["unnorm_text_features"], {"text": ids})[0]
    expected = original.backend.run_texts(ids, ids != 0)
    np.testing.assert_allclose(features, expected, rtol=1e-2, atol=1e-2)
    assert not np.allclose(features, expected, rtol=1e-6, atol=1e-6)  # rounded weights
    ours = cn_clip.load(tmp_path / "vit")
    assert ours.backend.precision == "float16"
    assert cosines(ours.embed_texts(TEXTS), original.embed_texts(TEXTS)).min() > 0.9995


@pytest.fixture
def known_graphs(tiny_export, monkeypatch):
    """Copy the graphs of ``tiny_export`` instead of tracing the model again."""

    def copy(model, folder, image, text):
        for file in tiny_export.glob("*.onnx*"):
            shutil.copy(file, folder)

    monkeypatch.setattr(export_module, "write_graphs", copy)


def test_openvino_format_runs_in_openvino_only(tiny_checkpoint, tmp_path, known_graphs):
    export(tiny_checkpoint, tmp_path / "ov", to="openvino")
    original = cn_clip.load(tiny_checkpoint)
    ours = cn_clip.load(tmp_path / "ov")
    np.testing.assert_allclose(ours.embed_texts(TEXTS), original.embed_texts(TEXTS), atol=2e-6)
    assert not list((tmp_path / "ov").glob("*.onnx*"))
    with pytest.raises(UsageError, match='no ONNX graphs; load it with backend="openvino"'):
        cn_clip.load(tmp_path / "ov", backend="onnx")


def test_an_export_that_differs_leaves_nothing_behind(
    tiny_checkpoint, tmp_path, monkeypatch, known_graphs
):
    monkeypatch.setitem(export_module.REQUIRED_COSINE, "float32", 1.1)
    with pytest.raises(CheckpointError, match="was not written: the smallest cosine"):
        export(tiny_checkpoint, tmp_path / "there/out")
    assert list((tmp_path / "there").iterdir()) == []


def test_missing_packages_and_impossible_names_are_reported_first(
    tiny_checkpoint, tmp_path, monkeypatch
):
    with pytest.raises(UsageError, match="a:b cannot name graphs because of its :"):
        export(tiny_checkpoint, tmp_path / "a:b", official_names=True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *a: None if name in ("onnxscript", "nncf") else find_spec(name, *a),
    )
    with pytest.raises(UsageError, match=r"missing: pip install onnxscript$"):
        export(tiny_checkpoint, tmp_path / "out")
    with pytest.raises(UsageError, match=r"missing: pip install onnxscript nncf$"):
        export(tiny_checkpoint, tmp_path / "out", to="openvino", precision="int8")


def test_a_frozen_axis_is_found(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.export.Dim", lambda *_, **__: None)  # nothing is dynamic
    with pytest.raises(CheckpointError, match=r"wrote pixel_values of shape \[3, 3, 32, 32\]"):
        export(tiny_checkpoint, tmp_path / "there/out")
    assert list((tmp_path / "there").iterdir()) == []


def test_the_fingerprint_names_the_export_and_its_original(tiny_checkpoint, tiny_export):
    original, ours = cn_clip.load(tiny_checkpoint), cn_clip.load(tiny_export)
    assert ours.derived_from == original.fingerprint != ours.fingerprint
    assert read_exported(tiny_export).fingerprint == ours.fingerprint
    fast = cn_clip.load(tiny_export, fast_decode=True)
    assert fast.fingerprint != ours.fingerprint and fast.derived_from == ours.derived_from


def test_without_a_folder_the_export_is_cached_for_the_backend(
    tiny_checkpoint, tmp_path, monkeypatch, known_graphs
):
    monkeypatch.setenv("CN_CLIP_CACHE", str(tmp_path / "cache"))
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    with pytest.raises(UsageError, match="has not been exported for backend 'onnx'; run once"):
        cn_clip.load(model, backend="onnx")
    export(model)
    for backend in ("onnx", "openvino"):  # OpenVINO runs ONNX graphs
        assert cn_clip.load(model, backend=backend).embed_texts("猫").shape == (1, 32)
    (model / "notes.txt").write_text("mine")
    cn_clip.load(model, backend="onnx", precision="float32")  # notes do not matter
    with pytest.raises(UsageError, match=r"run once: .* --precision int8"):
        cn_clip.load(model, backend="openvino", precision="int8+bfloat16")
    weights.save_folder(make_model(TINY["vit"], seed=1), tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", model)
    with pytest.raises(UsageError, match="has not been exported"):  # not the old export
        cn_clip.load(model, backend="onnx")


def test_exports_are_made_of_checkpoints_and_run_without_torch(tiny_export, tmp_path):
    with pytest.raises(UsageError, match="is an export, which torch cannot run"):
        export(tiny_export, tmp_path / "again")
    code = (
        "import sys, cn_clip\n"
        f"embedder = cn_clip.load({str(tiny_export)!r}, backend='onnx')\n"
        "embedder.embed_texts('猫'), embedder.fingerprint\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.full
@pytest.mark.parametrize("name", [*cn_clip.config.MODELS])
def test_every_official_model_is_exported(name, tmp_path):
    """With random weights: the published ones are not at hand."""
    config = cn_clip.config.MODELS[name]
    weights.save_folder(make_model(config), tmp_path / name)
    assert export(tmp_path / name, tmp_path / "out").parity.smallest_cosine >= 0.99999
