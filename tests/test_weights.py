"""Checkpoints: round trips, refusals, and untrusted files."""

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import TINY, make_model
from safetensors.torch import save_file

from cn_clip import weights
from cn_clip.config import MODELS, ModelConfig
from cn_clip.errors import CheckpointError, MissingWeightsError


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)


def test_our_folder_round_trips_every_kind_of_model(any_tiny_model, tmp_path):
    weights.save_folder(any_tiny_model, tmp_path / "model")
    again = weights.build(weights.read(tmp_path / "model"))
    assert again.config == any_tiny_model.config
    assert not again.training
    assert_same(state_of(again), state_of(any_tiny_model))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_official_file_round_trips_and_its_model_is_detected(kind, tmp_path):
    model = make_model(TINY[kind])
    weights.save_official(model, tmp_path / "model.pt")
    again = weights.build(weights.read(tmp_path / "model.pt"))
    assert again.config.vision.kind == kind
    assert again.config.text.layers == model.config.text.layers
    assert again.config.vision.layers == model.config.vision.layers
    assert again.config.vision.resolution == model.config.vision.resolution
    assert_same(state_of(again), state_of(model))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_named_model_is_recognized_by_its_shapes(name):
    from cn_clip.model.clip import CLIP

    with torch.device("meta"):
        state = CLIP(MODELS[name]).state_dict()
    assert weights.infer_config(state, "file") == MODELS[name]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrap", ["bare", "state_dict", "with optimizer"])
@pytest.mark.parametrize("zipped", [True, False])
def test_official_files_are_read_in_every_layout(tiny_model, tmp_path, prefix, wrap, zipped):
    state = {prefix + name: tensor for name, tensor in state_of(tiny_model).items()}
    blob = state if wrap == "bare" else {"epoch": 3, "name": "run", "state_dict": state}
    if wrap == "with optimizer":
        blob["optimizer"] = {"state": {0: {"exp_avg": torch.zeros(10_000_000)}}}
    path = tmp_path / "file.pt"
    torch.save(blob, path, _use_new_zipfile_serialization=zipped)
    checkpoint = weights.read(path)
    assert_same(checkpoint.tensors, state_of(tiny_model))


def test_loaded_weights_do_not_depend_on_the_file(tiny_model, tmp_path):
    expected = state_of(tiny_model)
    weights.save_official(tiny_model, tmp_path / "model.pt")
    weights.save_folder(tiny_model, tmp_path / "model")
    for path, file in (("model.pt", "model.pt"), ("model", "model/model.safetensors")):
        model = weights.build(weights.read(tmp_path / path))
        with open(tmp_path / file, "r+b") as stream:  # another program overwrites it
            stream.truncate(0)
        assert_same(state_of(model), expected)


def test_dropped_pooler_names_are_reported(tiny_model, tmp_path):
    extra = {
        "bert.pooler.dense.weight": torch.zeros(2, 2),
        "bert.pooler.dense.bias": torch.zeros(2),
    }
    torch.save({"state_dict": state_of(tiny_model) | extra}, tmp_path / "file.pt")
    checkpoint = weights.read(tmp_path / "file.pt")
    assert checkpoint.dropped == tuple(extra)
    assert_same(checkpoint.tensors, state_of(tiny_model))


def test_flash_attention_names_are_read(tiny_model, tmp_path):
    plain = state_of(tiny_model)
    fused = dict(plain)
    for name in plain:
        if "in_proj_" in name:
            fused[name.replace("in_proj_", "Wqkv.")] = fused.pop(name)
    for layer in range(2):
        stem = f"bert.encoder.layer.{layer}.attention"
        for kind in ("weight", "bias"):
            parts = [fused.pop(f"{stem}.self.{p}.{kind}") for p in ("query", "key", "value")]
            fused[f"{stem}.self.Wqkv.{kind}"] = torch.cat(parts)
            fused[f"{stem}.self.out_proj.{kind}"] = fused.pop(f"{stem}.output.dense.{kind}")
    torch.save({"state_dict": fused}, tmp_path / "file.pt")
    assert_same(weights.read(tmp_path / "file.pt").tensors, plain)


def test_half_precision_files_load_in_float32_or_as_they_are(tiny_model, tmp_path):
    weights.save_folder(tiny_model.half(), tmp_path / "half")
    assert weights.build(weights.read(tmp_path / "half")).dtype == torch.float32
    assert weights.build(weights.read(tmp_path / "half"), dtype=None).dtype == torch.float16


def test_missing_unexpected_and_wrongly_shaped_keys_are_all_listed(tiny_model):
    tensors = state_of(tiny_model)
    del tensors["visual.ln_post.bias"]
    tensors["visual.extra"] = torch.zeros(1)
    tensors["text_projection"] = torch.zeros(64, 7)
    with pytest.raises(CheckpointError) as error:
        weights.build(weights.Checkpoint(tiny_model.config, tensors))
    message = str(error.value)
    assert "1 missing (visual.ln_post.bias)" in message
    assert "1 unexpected (visual.extra)" in message
    assert "1 wrongly shaped (text_projection [64, 7] instead of [64, 32])" in message


class Bomb:
    """A pickle that creates a file when executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_never_executed(tmp_path, zipped):
    proof = tmp_path / "executed"
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": Bomb(proof)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"refused: its pickle names \S*system"):
        weights.read(path)
    assert not proof.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's, before its error
def test_a_malicious_pickle_without_an_archive_is_refused_too(tmp_path):
    proof = tmp_path / "executed"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Bomb(proof)))
    with pytest.raises(CheckpointError):
        weights.read(tmp_path / "evil.pt")
    assert not proof.exists()


@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"not a model", b"PK\x03\x04cut", b"\xff" * 4096, b"\x80\x02q.", b"\x80\x02h\x05."],
)
def test_garbage_is_refused_in_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name) as error:
        weights.read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_refused(tiny_model, tmp_path):
    weights.save_official(tiny_model, tmp_path / "model.pt")
    weights.save_folder(tiny_model, tmp_path / "model")
    for path in (tmp_path / "model.pt", tmp_path / "model" / "model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match="not a valid"):
            weights.read(path if path.suffix == ".pt" else path.parent)


def test_an_inconsistent_safetensors_header_is_refused(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 999]}}).encode()
    raw = len(header).to_bytes(8, "little") + header + bytes(36)
    (tmp_path / "lie.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        weights.read(tmp_path / "lie.safetensors")
    (tmp_path / "huge.safetensors").write_bytes((2**62).to_bytes(8, "little") + bytes(100))
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        weights.read(tmp_path / "huge.safetensors")


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"not a Chinese-CLIP.*starts with conv\.weight"):
        weights.read(tmp_path / "other.pt")
    torch.save({"state_dict": {"a": 3}}, tmp_path / "numbers.pt")
    with pytest.raises(CheckpointError, match="'a' is not a tensor"):
        weights.read(tmp_path / "numbers.pt")
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="has no state dict, but list"):
        weights.read(tmp_path / "list.pt")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("visual.conv1.weight", torch.zeros(()), "are those of no model"),
        ("text_projection", torch.zeros(3), "are those of no model"),
        ("visual.conv1.weight", torch.zeros(64, 3, 0, 0), "impossible value"),
        ("bert.embeddings.word_embeddings.weight", torch.zeros(3), "are those of no model"),
        ("text_projection", torch.zeros(64, 32, dtype=torch.int64), "1 not of floating point"),
    ],
)
def test_tensors_of_impossible_shapes_are_refused(tiny_model, tmp_path, name, tensor, message):
    torch.save(state_of(tiny_model) | {name: tensor}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=message):
        weights.build(weights.read(tmp_path / "file.pt"))


def test_a_missing_file_has_its_own_error(tmp_path):
    with pytest.raises(MissingWeightsError, match="no such file or folder"):
        weights.read(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError):
        weights.read(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"name": "x"}', "incomplete"),
        ('{"name": "x", "colour": 1}', "unknown key 'colour'"),
        ('{"model_type": "blip"}', "type 'blip', not 'chinese_clip'"),
        ('{"model_type": "chinese_clip", "vision_config": {"hidden_act": "gelu"}}', "hidden_act"),
    ],
)
def test_a_bad_config_is_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        weights.read(tmp_path)


@pytest.mark.parametrize("save", [weights.save_folder, weights.save_official])
def test_a_full_disk_loses_nothing(tiny_model, tmp_path, save, request):
    target = tmp_path / "model"
    save(tiny_model, target)
    before = state_of(weights.build(weights.read(target)))
    request.getfixturevalue("full_disk")
    with pytest.raises(CheckpointError, match="nothing was changed"):
        save(make_model(TINY["vit"], seed=1), target)
    assert_same(state_of(weights.build(weights.read(target))), before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_is_never_replaced_by_a_folder(tiny_model, tmp_path):
    (tmp_path / "mine.pt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"mine\.pt is a file; give a new folder"):
        weights.save_folder(tiny_model, tmp_path / "mine.pt")
    assert (tmp_path / "mine.pt").read_text() == "mine"


def test_saving_replaces_a_model_folder_but_no_folder_with_other_files(tiny_model, tmp_path):
    weights.save_folder(tiny_model, tmp_path / "model")
    weights.save_folder(make_model(TINY["resnet"]), tmp_path / "model")
    assert weights.read(tmp_path / "model").config.vision.kind == "resnet"
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="has other files"):
        weights.save_folder(tiny_model, tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("config", [TINY["efficientnet_lite"], None])
def test_a_config_that_shapes_do_not_show_is_not_written_as_an_official_file(config, tmp_path):
    # Shapes do not show the number of heads: two heads of 32 would become one of 64.
    two_heads = replace(TINY["vit"], text=replace(TINY["vit"].text, heads=2))
    with pytest.raises(CheckpointError, match="write a folder instead"):
        weights.save_official(make_model(config or two_heads), tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vision", "layers", 3),
        ("vision", "layers", []),
        ("vision", "kind", "mamba"),
        ("vision", "resolution", "224"),
        ("text", "heads", 3),
        ("text", "layers", 10**9),
        (None, "embed_dim", "a"),
        (None, "image_mean", 5),
        (None, "background", "nocolour"),
        (None, "context_length", 4096),
    ],
)
def test_an_impossible_value_in_a_config_is_named(tiny_model, part, key, value):
    values = tiny_model.config.to_dict()
    (values[part] if part else values)[key] = value
    with pytest.raises(CheckpointError, match=f"impossible value: .*{key}"):
        ModelConfig.from_dict(values)


def test_positions_are_resized_with_aligned_corners():
    grid = torch.arange(9, dtype=torch.float32).view(9, 1)
    resized = weights.resize_positions(torch.cat([torch.tensor([[7.0]]), grid]), 26)
    assert resized.shape == (26, 1)
    assert resized[0] == 7
    corners = resized[1:].view(5, 5)[[0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, torch.tensor([0.0, 2.0, 6.0, 8.0]))
    assert weights.resize_positions(resized, 26) is resized
