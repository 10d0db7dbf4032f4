"""Exports that are damaged, do not fit this machine, or give wrong embeddings."""

import importlib.util
import json
import os
import shutil

import numpy as np
import onnxruntime
import pytest
from conftest import cosines
from hypothesis import given
from hypothesis import strategies as st

import cn_clip
from cn_clip.backends import choice, exported
from cn_clip.backends.graph import batch_buckets, padded_length
from cn_clip.backends.pipeline import batches_by_length
from cn_clip.errors import CheckpointError, MissingWeightsError, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CN_CLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy(tiny_export, tmp_path):
    return shutil.copytree(tiny_export, tmp_path / "export")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


@given(st.integers(0, 5000))
def test_buckets_cover_all_rows_once_in_few_sizes_with_little_padding(count):
    buckets = batch_buckets(count)
    assert [row for start, stop, _ in buckets for row in range(start, stop)] == list(range(count))
    for start, stop, size in buckets:
        odd = size // (size & -size)
        padding = size - (stop - start)
        assert odd in (1, 3) and 0 <= padding <= max(1, size // 8)


@given(st.lists(st.integers(2, 512), max_size=200), st.integers(1, 64))
def test_texts_are_batched_with_those_of_about_their_length(lengths, rows):
    batches = list(batches_by_length(lengths, max_rows=rows, max_tokens=1024))
    assert sorted(i for batch, _ in batches for i in batch) == list(range(len(lengths)))
    for batch, longest in batches:
        assert 1 <= len(batch) <= rows and len(batch) * longest <= max(1024, longest)
        assert longest == max(lengths[i] for i in batch)
        assert longest - min(lengths[i] for i in batch) < max(4, (longest + 3) / 4)
        assert 0 <= padded_length(longest) - longest < (4 if longest <= 16 else 8)


def test_a_missing_file_is_named(copy):
    (copy / "text.onnx.data").unlink()
    with pytest.raises(CheckpointError, match=r"text\.onnx\.data is missing"):
        cn_clip.load(copy)


def test_a_file_of_another_size_is_named(copy):
    with (copy / "image.onnx.data").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match=r"image\.onnx\.data has [\d,]+ bytes, the export"):
        cn_clip.load(copy)


def test_changed_content_is_found_by_its_hash_even_after_a_test_passed(copy):
    cn_clip.load(copy)
    path = copy / "text.onnx.data"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"text\.onnx\.data changed since the export"):
        cn_clip.load(copy)


def test_a_graph_of_another_model_is_refused(copy):
    shutil.copy(copy / "text.onnx", copy / "image.onnx")
    digest = exported.hash_file(copy / "image.onnx")
    files = json.loads((copy / "config.json").read_text("utf-8"))["files"]
    files["image.onnx"] = {"bytes": digest.bytes, "sha256": digest.sha256}
    edit_config(copy, files=files)
    with pytest.raises(CheckpointError, match=r"image\.onnx is another graph than"):
        cn_clip.load(copy, backend="onnx")


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_wrong_embeddings_are_refused_with_the_numbers(copy, backend):
    path = copy / "golden/golden.json"
    golden = json.loads(path.read_text("utf-8"))
    golden["texts"][0]["embedding"][:] = golden["texts"][1]["embedding"]
    path.write_text(json.dumps(golden), "utf-8")
    digest = exported.hash_file(path)
    files = json.loads((copy / "config.json").read_text("utf-8"))["files"]
    files["golden/golden.json"] = {"bytes": digest.bytes, "sha256": digest.sha256}
    edit_config(copy, files=files)
    with pytest.raises(CheckpointError, match=r"gives wrong text embeddings .* cosine -?0\.\d+ to"):
        cn_clip.load(copy, backend=backend)


def test_the_self_test_runs_once_and_again_after_the_folder_moved(copy, cache, monkeypatch):
    cn_clip.load(copy, backend="onnx")
    assert len(list((cache / "self-test").iterdir())) == 1
    monkeypatch.setattr("cn_clip.backends.self_test.check_hashes", lambda *_: 1 / 0)
    cn_clip.load(copy, backend="onnx")  # not tested again
    moved = copy.rename(copy.parent / "moved")
    with pytest.raises(ZeroDivisionError):
        cn_clip.load(moved, backend="onnx")


def test_a_cache_that_is_not_writable_does_not_matter(copy, monkeypatch):
    monkeypatch.setenv("CN_CLIP_CACHE", "/proc/cache")
    assert cn_clip.load(copy).embed_texts("猫").shape == (1, 32)
    monkeypatch.setenv("CN_CLIP_CACHE", "~nobody-has-this-name/cache")
    assert cn_clip.load(copy).embed_texts("猫").shape == (1, 32)
    with pytest.raises(UsageError, match=r"home folder of ~nobody.* is unknown; set CN_CLIP_CACHE"):
        cn_clip.load("mini", backend="onnx")


def test_a_changed_config_is_tested_again(copy):
    cn_clip.load(copy, backend="onnx")
    model = json.loads((copy / "config.json").read_text("utf-8"))["model"]
    edit_config(copy, model=model | {"image_mean": [0.0, 0.0, 0.0]})
    with pytest.raises(CheckpointError, match="gives wrong image embeddings"):
        cn_clip.load(copy, backend="onnx")
    vision = model["vision"] | {"resolution": 64}
    edit_config(copy, model=model | {"vision": vision})
    with pytest.raises(CheckpointError, match=r"golden\.json is damaged \(.*32 x 32 pixels"):
        cn_clip.load(copy, backend="onnx")
    edit_config(copy, model=model, deviation={"image": 9.0, "text": 9.0}, precision="int8")
    cn_clip.load(copy, backend="onnx")  # of no use to a graph that is wrong:
    edit_config(copy, model=model | {"image_mean": [9.0, 9.0, 9.0]})
    with pytest.raises(CheckpointError, match="gives wrong image embeddings"):
        cn_clip.load(copy, backend="onnx")


def test_auto_measures_once_and_takes_what_is_installed(copy, cache, monkeypatch):
    cn_clip.load(copy)
    (record,) = (cache / "fastest").iterdir()
    values = json.loads(record.read_text("utf-8"))
    assert set(values["seconds"]) == {"onnx", "openvino"}
    assert values["fastest"] == min(values["seconds"], key=values["seconds"].get)
    monkeypatch.setattr(choice, "_measure", lambda *_: 1 / 0)
    cn_clip.load(copy)
    find_spec = importlib.util.find_spec
    for missing, other in (("onnxruntime", "openvino"), ("openvino", "onnxruntime")):
        monkeypatch.setattr(
            "importlib.util.find_spec",
            lambda name, *a, missing=missing: None if name == missing else find_spec(name, *a),
        )
        ours = cn_clip.load(copy)
        assert other in ours.backend.runtime


def test_a_runtime_that_cannot_be_imported_does_not_stop_the_other(copy, tmp_path, monkeypatch):
    def broken(name):
        if name == "cn_clip.backends.openvino":
            raise ImportError("libopenvino.so: cannot open shared object file")
        return importlib.__import__(name, fromlist=["_"])

    monkeypatch.setattr("importlib.import_module", broken)
    assert "onnxruntime" in cn_clip.load(copy).backend.runtime
    with pytest.raises(UsageError, match="openvino is installed but cannot be imported"):
        cn_clip.load(copy, backend="openvino")


def test_a_runtime_that_is_not_installed_is_named(copy, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(UsageError, match='backend "openvino" needs openvino, which is not inst'):
        cn_clip.load(copy, backend="openvino")
    with pytest.raises(UsageError, match="onnxruntime, which is not installed"):
        cn_clip.load(copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "onnx", "device": "cuda"}, "device 'cuda' is not available: this onnxruntime"),
        ({"backend": "onnx", "device": "tpu"}, "device 'tpu' is not available.* has cpu"),
        ({"backend": "openvino", "device": "gpu"}, "device 'gpu' is not available: OpenVINO"),
        ({"backend": "onnx", "precision": "bfloat16"}, "runs .* in float32, not bfloat16"),
        ({"backend": "openvino", "precision": "int8"}, "precision 'int8' is not available"),
        ({"backend": "torch"}, "is an export, which torch cannot run"),
        ({"backend": "tvm"}, "unknown backend 'tvm'; available: auto, torch, onnx, openvino"),
    ],
)
def test_what_the_machine_lacks_is_refused_in_one_sentence(copy, options, message):
    if options.get("device") == "cuda" and "CUDA" in str(onnxruntime.get_available_providers()):
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(UsageError, match=message):
        cn_clip.load(copy, **options)


def test_bfloat16_runs_where_the_cpu_has_it(copy, tiny_checkpoint):
    import openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(UsageError, match="precision 'bfloat16' is not available on this CPU"):
            cn_clip.load(copy, backend="openvino", precision="bfloat16")
        return
    ours = cn_clip.load(copy, backend="openvino", precision="bfloat16")
    texts = ["猫", "一只虎斑猫看着镜头"]
    expected = cn_clip.load(tiny_checkpoint).embed_texts(texts)
    assert 0.999 < cosines(ours.embed_texts(texts), expected).min() < 0.9999999
    assert ours.backend.precision == "bfloat16"
    assert ours.fingerprint != cn_clip.load(copy).fingerprint
    assert ours.derived_from == cn_clip.load(copy).derived_from


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "cn-clip export 2"}, "its format is 'cn-clip export 2', of a newer cn_clip"),
        ({"format": "cn-clip export x"}, "not 'cn-clip export 1'; export the model again"),
        ({"runtime": "tvm"}, "'tvm' is none of onnx, openvino"),
        ({"logit_scale": "1e999"}, "is not a finite number"),
        ({"image": {"file": "../x", "input": "a", "output": "b"}}, "not a file in the folder"),
        ({"files": {}}, r"lists no image\.onnx"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}, "not a file in the folder"),
        ({"parameters": {"image": []}}, "is damaged"),
        ({"model": {}}, "config.json is incomplete"),
    ],
)
def test_a_damaged_config_is_refused(copy, changes, message):
    edit_config(copy, **changes)
    with pytest.raises(CheckpointError, match=message):
        cn_clip.load(copy)


def test_a_folder_without_a_config_is_no_export(copy):
    (copy / "config.json").unlink()
    with pytest.raises(MissingWeightsError, match=r"has no config\.json"):
        cn_clip.load(copy)


def test_one_embedder_serves_many_threads(tiny_export, tiny_checkpoint):
    from concurrent.futures import ThreadPoolExecutor

    texts = [f"第{i}只猫" for i in range(40)]
    expected = cn_clip.load(tiny_checkpoint).embed_texts(texts)
    for backend in ("onnx", "openvino"):
        ours = cn_clip.load(tiny_export, backend=backend)
        with ThreadPoolExecutor(8) as pool:
            rows = list(pool.map(ours.embed_texts, texts))
        np.testing.assert_allclose(np.concatenate(rows), expected, atol=2e-6)
