"""Initial weights: files written by the original libraries, compared with their features."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, TEXT, make_model

import cn_clip.clip as clip
from cn_clip import weights
from cn_clip.config import ModelConfig, VisionConfig
from cn_clip.errors import CheckpointError

TOWERS = GOLDEN / "towers"
VIT = ModelConfig("vit", 32, VisionConfig("vit", 32, 64, (2,), 8), TEXT)
RN = ModelConfig("rn", 32, VisionConfig("resnet", 64, 8, (1, 1, 1, 1)), TEXT)


def image_features(model, images):
    with torch.no_grad():
        return model.encode_image(torch.as_tensor(images)).numpy()


@pytest.mark.parametrize(
    ("file", "config", "features", "side"),
    [
        ("openai_vit.pt", VIT, "openai_vit", 32),
        ("openai_rn.pt", RN, "openai_rn", 64),
        ("open_clip_vit.safetensors", VIT, "open_clip_vit", 32),
    ],
)
def test_image_towers_of_openai_and_open_clip_give_their_own_features(file, config, features, side):
    golden = np.load(TOWERS / "features.npz")
    model = clip.load(make_model(config), "cpu", clip_path=str(TOWERS / file))
    ours = image_features(model, golden[f"images_{side}"])
    np.testing.assert_allclose(ours, golden[features], atol=1e-5, rtol=1e-5)


def test_an_openai_state_dict_reads_like_the_archive(tmp_path):
    tensors = weights.read_tensors(TOWERS / "openai_vit.pt")
    torch.save(tensors, tmp_path / "state.pt")
    tower = weights.image_tower(tmp_path / "state.pt")
    archived = weights.image_tower(TOWERS / "openai_vit.pt")
    assert tower.tensors.keys() == archived.tensors.keys()
    assert all(torch.equal(t, tower.tensors[n]) for n, t in archived.tensors.items())
    assert "transformer.resblocks.0.ln_1.weight" in tower.dropped


def test_the_code_of_an_archive_is_never_run(tmp_path):
    """An archive whose pickle calls a function is refused before the function is looked up."""
    import zipfile

    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(TOWERS / "openai_vit.pt") as good, zipfile.ZipFile(path, "w") as evil:
        for info in good.infolist():
            pickled = info.filename.endswith("/data.pkl")
            proof = f"touch {tmp_path}/ran".encode()
            call = b"cposix\nsystem\n(X" + len(proof).to_bytes(4, "little") + proof + b"tR."
            evil.writestr(info.filename, call if pickled else good.read(info))
    with pytest.raises(CheckpointError, match=r"refused: its pickle names posix\.system"):
        weights.read_tensors(path)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_or_inconsistent_archive_is_refused(tmp_path):
    import zipfile

    path = tmp_path / "cut.pt"
    with zipfile.ZipFile(TOWERS / "openai_vit.pt") as good, zipfile.ZipFile(path, "w") as bad:
        for info in good.infolist():
            content = good.read(info)
            cut = info.filename.endswith("/data/6")
            bad.writestr(info.filename, content[:100] if cut else content)
    with pytest.raises(CheckpointError, match="not a valid TorchScript archive"):
        weights.read_tensors(path)


@pytest.mark.parametrize("safe", [True, False])
def test_the_image_tower_of_a_clip_model_gives_its_own_features(tmp_path, safe):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=_small(num_attention_heads=1, vocab_size=64),
            vision_config=_small(num_attention_heads=1, image_size=32, patch_size=8)
            | {"intermediate_size": 256},
            projection_dim=32,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    if not safe:
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    model = clip.load(make_model(VIT), "cpu", clip_path=str(tmp_path))
    images = np.load(TOWERS / "features.npz")["images_32"]
    with torch.no_grad():
        pooled = theirs.vision_model(pixel_values=torch.from_numpy(images)).pooler_output
        expected = theirs.visual_projection(pooled).numpy()
    np.testing.assert_allclose(image_features(model, images), expected, atol=1e-5, rtol=1e-5)
    assert model.logit_scale == theirs.logit_scale


def test_a_clip_with_another_activation_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"vision_config": {"hidden_act": "gelu"}}')
    torch.save(weights.read_tensors(TOWERS / "openai_vit.pt"), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="trained with gelu"):
        weights.image_tower(tmp_path)


def _small(**more):
    return {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128} | more


@pytest.mark.parametrize("form", ["BertModel", "BertForPreTraining", "gamma and beta", "bin"])
def test_text_towers_of_bert_give_its_own_features(tmp_path, form):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**_small(num_attention_heads=1, vocab_size=TEXT.vocab_size))
    whole = transformers.BertForPreTraining if form != "BertModel" else transformers.BertModel
    theirs = whole(config).eval()
    theirs.save_pretrained(tmp_path)
    if form in ("gamma and beta", "bin"):
        state = {
            name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
            if form == "gamma and beta"
            else name: tensor
            for name, tensor in theirs.state_dict().items()
        }
        torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    tower = weights.text_tower(tmp_path)
    assert any("pooler" in name for name in tower.dropped)
    assert form == "BertModel" or any(name.startswith("cls.") for name in tower.dropped)

    model = clip.load(make_model(VIT), "cpu", bert_path=str(tmp_path))
    ids = torch.tensor([[101, 3, 4, 5, 102, 0], [101, 9, 8, 102, 0, 0]])
    bert = theirs if form == "BertModel" else theirs.bert
    with torch.no_grad():
        hidden = bert(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state[:, 0]
        expected = hidden @ model.text_projection
        np.testing.assert_allclose(model.encode_text(ids), expected, atol=1e-5, rtol=1e-5)


def test_another_resolution_resizes_the_positions():
    from dataclasses import replace

    config = replace(VIT, vision=replace(VIT.vision, resolution=48))
    model = clip.load(make_model(config), "cpu", clip_path=str(TOWERS / "openai_vit.pt"))
    positions = weights.image_tower(TOWERS / "openai_vit.pt").tensors["visual.positional_embedding"]
    expected = weights.resize_positions(positions, 37).float()
    torch.testing.assert_close(model.visual.positional_embedding.detach(), expected)


def test_a_file_without_the_tower_is_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"no image tower of a CLIP; .* conv\.weight"):
        clip.load(make_model(VIT), "cpu", clip_path=str(tmp_path / "other.pt"))
    with pytest.raises(CheckpointError, match="no BERT"):
        clip.load(make_model(VIT), "cpu", bert_path=str(TOWERS / "openai_vit.pt"))
