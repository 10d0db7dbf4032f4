"""Checkpoints of other programs are read, and other files are refused by kind."""

import gzip
import json

import pytest
import torch
from conftest import TINY, make_image, make_model
from safetensors.torch import save_file

import cn_clip
import cn_clip.clip as clip
from cn_clip import weights
from cn_clip.cli import run
from cn_clip.errors import CheckpointError, MissingWeightsError, UsageError


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


KEYS = ["state_dict", "model", "model_state_dict", "module", "model.state_dict"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "model._orig_mod.module."],
)
def test_every_common_key_and_prefix_is_read(tiny_model, tmp_path, key, prefix):
    state = {prefix + name: tensor for name, tensor in state_of(tiny_model).items()}
    outer, _, inner = key.partition(".")
    blob = {"epoch": 1, outer: {inner: state, "epoch": 2} if inner else state}
    blob |= {"optimizer": {"state": {}}, "pytorch-lightning_version": "2.5"}
    torch.save(blob, tmp_path / "file.pt")
    assert_same(weights.read(tmp_path / "file.pt").tensors, state_of(tiny_model))
    assert weights.other_checkpoint_keys(tmp_path / "file.pt") == (
        "optimizer",
        "pytorch-lightning_version",
    )


def test_a_compiled_or_wrapped_part_of_the_model_is_read(tiny_model, tmp_path):
    inside = {
        name.replace("visual.", "visual._orig_mod.")
        .replace("resblocks.0.", "resblocks.0._checkpoint_wrapped_module.")
        .replace("bert.", "bert.module."): tensor
        for name, tensor in state_of(tiny_model).items()
    }
    torch.save(inside, tmp_path / "file.pt")
    assert_same(weights.read(tmp_path / "file.pt").tensors, state_of(tiny_model))


def test_prefixes_are_removed_from_towers_of_other_models_too(tiny_model, tmp_path):
    bert = {f"_orig_mod.{n}": t for n, t in state_of(tiny_model).items() if n.startswith("bert.")}
    torch.save(bert, tmp_path / "bert.pt")
    plain = {name.removeprefix("_orig_mod.") for name in bert}
    assert weights.text_tower(tmp_path / "bert.pt").tensors.keys() == plain


def test_two_models_in_one_state_dict_are_refused(tiny_model, tmp_path):
    state = state_of(tiny_model)
    torch.save(state | {f"module.{n}": t for n, t in state.items()}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"twice, also as 'module.*; keep only one"):
        weights.read(tmp_path / "file.pt")


def test_tensors_of_no_tower_are_named_with_the_remedy(tiny_model, tmp_path):
    torch.save(state_of(tiny_model) | {"head.weight": torch.zeros(2)}, tmp_path / "file.pt")
    with pytest.raises(
        CheckpointError, match=r"1 unexpected \(head\.weight\); .*remove it"
    ) as error:
        weights.build(weights.read(tmp_path / "file.pt"))
    assert len(str(error.value)) < 300


def test_a_state_dict_under_an_unknown_key_is_suggested(tiny_model, tmp_path):
    torch.save({"net_ema": state_of(tiny_model), "epoch": 1}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r'torch\.save\(torch\.load\(f\)\["net_ema"\], g\)'):
        weights.read(tmp_path / "file.pt")


def test_create_model_finds_the_state_dict_in_a_checkpoint(monkeypatch):
    state = make_model(TINY["vit"]).state_dict()
    with pytest.raises(CheckpointError, match="the checkpoint holds"):  # read, and another model
        clip.create_model("RN50@RBT3-chinese", {"model": state})
    with pytest.raises(CheckpointError, match="the checkpoint is not a state dict"):
        clip.create_model("RN50@RBT3-chinese", {"epoch": 3})


def test_the_format_is_detected_from_the_content_not_the_suffix(tiny_model, tmp_path):
    save_file(state_of(tiny_model), tmp_path / "really_safetensors.pt")
    torch.save(state_of(tiny_model), tmp_path / "really_torch.safetensors")
    for name in ("really_safetensors.pt", "really_torch.safetensors"):
        assert_same(weights.read(tmp_path / name).tensors, state_of(tiny_model))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n",
            "is a Git LFS pointer; fetch the file: git lfs pull",
        ),
        (b"", r"is empty \(0 bytes\); download or copy it again"),
        (bytes(5000), "starts with zeros, as after a broken download"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page, not the file; .*/resolve/"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "is an XML page"),
        (b'{"model_type": "chinese_clip"}', "is a JSON file, not weights; give its folder"),
        (gzip.compress(b"x"), "is compressed with gzip: gunzip it first"),
        (b"PK\x03\x04" + bytes(100), "is not a valid .*its end is missing.*download"),
        (b"hello", "is not a valid .*unknown first bytes; download or copy it again"),
    ],
)
def test_a_file_that_is_not_weights_is_named_by_its_kind(tmp_path, content, message, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\{suffix} {message}"):
        weights.read(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.002, 0.5, 0.95])
def test_a_truncated_file_is_reported_with_the_remedy(tiny_model, tmp_path, kind, share):
    path = tmp_path / "model.pt"
    if kind == "safetensors":
        save_file(state_of(tiny_model), path)
    else:
        torch.save(state_of(tiny_model), path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"not a valid .*download"):
        weights.read(path)


def test_a_folder_given_as_a_file_and_a_file_as_a_folder_are_named(tiny_model, tmp_path):
    weights.save_folder(tiny_model, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"config\.json is a JSON file.*give its folder"):
        weights.read(tmp_path / "model" / "config.json")
    with pytest.raises(MissingWeightsError, match="is a folder; give the weights file"):
        weights.read_tensors(tmp_path / "model")
    with pytest.raises(MissingWeightsError, match=r"give one of these in it: model"):
        weights.read(tmp_path)
    (tmp_path / "runs").mkdir()
    torch.save({}, tmp_path / "runs" / "epoch_9.pt")
    with pytest.raises(MissingWeightsError, match=r"has no config.json.*in it: epoch_9\.pt"):
        weights.read(tmp_path / "runs")
    (tmp_path / "runs" / "latest").write_text("global_step9")
    with pytest.raises(MissingWeightsError, match=r"DeepSpeed wrote it: give the mp_rank_00"):
        weights.read(tmp_path / "runs")


def test_a_folder_without_a_config_is_read_by_the_shapes_of_its_weights(tiny_model, tmp_path):
    save_file(state_of(tiny_model), tmp_path / "model.safetensors")  # as accelerate saves a model
    assert_same(weights.read(tmp_path).tensors, state_of(tiny_model))


DEVICES = ["cuda", "cuda:7", "mps", "xpu", "meta", "nonsense", ""]


@pytest.mark.parametrize("device", DEVICES)
def test_an_unavailable_device_is_reported_before_weights_are_read(
    device, capsys, monkeypatch, tmp_path
):
    if device.partition(":")[0] in ("cuda", "mps") and available(device):
        pytest.skip("it is here")
    image = tmp_path / "x.jpg"
    make_image().save(image)

    def fail(*_, **__):
        raise AssertionError("weights were looked for")

    for name in ("locate", "find"):
        monkeypatch.setattr(f"cn_clip.hub.{name}", fail)
    monkeypatch.setattr(weights, "read", fail)
    monkeypatch.setattr(weights, "image_tower", fail)
    message = rf"device '{device}' is not available; torch \S+ has: cpu"
    with pytest.raises(UsageError, match=message):
        cn_clip.load("ViT-B-16", device=device)
    with pytest.raises(UsageError, match=message):
        clip.load_from_name("ViT-B-16", device=device)
    with pytest.raises(UsageError, match=message):
        clip.load(make_model(TINY["vit"]), device=device, clip_path="x.pt")
    assert run(["classify", str(image), "--labels", "猫,狗", "--device", device or "''"]) == 2
    assert "is not available" in capsys.readouterr().err


def available(device):
    return torch.backends.mps.is_available() if device == "mps" else torch.cuda.is_available()


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "x" * 300, "a\0b"])
def test_an_invalid_path_is_a_missing_file(tmp_path, name):
    for read in (weights.read, weights.read_tensors, weights.image_tower, weights.text_tower):
        with pytest.raises(MissingWeightsError):
            read(tmp_path / name)
    with pytest.raises(MissingWeightsError):
        weights.read_config(tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name.rpartition("/")[2]}}))
    with pytest.raises(
        CheckpointError, match=r"is missing|are missing|not a weights file in its folder"
    ):
        weights.read_tensors(index)


# Configs


WEIRD = [None, True, -1, 0, 1.5, float("nan"), float("inf"), 10**30, "12", "x", [], [1], {}]
COUNTS = [
    *((None, key) for key in ("embed_dim", "context_length")),
    *(("vision", key) for key in ("resolution", "width", "layers", "patch_size", "head_width")),
    *(("text", key) for key in ("hidden_size", "layers", "heads", "intermediate_size")),
    *(("text", key) for key in ("vocab_size", "max_positions", "token_types")),
    *((None, key) for key in ("name", "vision", "text", "image_mean", "image_std", "background")),
    *(("vision", "kind"), ("text", "dropout")),
]


def written(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_any_config_value_loads_or_gives_an_error_that_names_it(tmp_path):
    model = make_model(TINY["vit"])
    weights.save_folder(model, tmp_path / "ours")
    weights.save_hugging_face(model, tmp_path / "hf")
    theirs = json.loads((tmp_path / "hf" / "config.json").read_text())
    places = [(part, key) for part in ("vision_config", "text_config") for key in theirs[part]]
    places += [(None, key) for key in theirs]
    refused = 0
    for folder, where in ((tmp_path / "ours", COUNTS), (tmp_path / "hf", places)):
        whole = (folder / "config.json").read_text()
        for part, key in where:
            for value in WEIRD:
                values = json.loads(whole)
                (values[part] if part else values)[key] = value
                try:
                    read = weights.read_config(written(folder, values))
                except CheckpointError as error:
                    assert len(str(error)) <= 300
                    refused += 1
                else:
                    json.dumps(read.to_dict(), allow_nan=False).encode()
    assert refused > 500


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"9" * 10_000, b'{"name": "\\ud800"}', b""],
)
def test_json_that_is_deep_damaged_or_not_an_object_is_refused(tmp_path, content):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        weights.read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        weights.read_tensors(tmp_path / "model.safetensors.index.json")


def test_a_config_larger_than_its_weights_is_refused(tiny_model, tmp_path):
    weights.save_folder(tiny_model, tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    values["text"] |= {"hidden_size": 4096, "heads": 64, "layers": 20}
    written(tmp_path / "model", values)
    with pytest.raises(
        CheckpointError, match=r"about [\d,]+ parameters and the weights have 1,569,"
    ):
        weights.build(weights.read(tmp_path / "model"))
    values["text"] |= {"hidden_size": 16384, "layers": 256}
    with pytest.raises(CheckpointError, match="impossible value: about"):
        weights.read_config(written(tmp_path / "model", values))


def test_tensors_that_were_saved_transposed_are_read_and_saved_again(tiny_model, tmp_path):
    state = state_of(tiny_model)
    turned = {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in state.items()}
    assert not all(tensor.is_contiguous() for tensor in turned.values())
    torch.save(turned, tmp_path / "file.pt")
    read = weights.build(weights.read(tmp_path / "file.pt"))
    assert_same(read.state_dict(), state)
    weights.save_folder(read, tmp_path / "folder")
    assert_same(weights.read(tmp_path / "folder").tensors, state)
