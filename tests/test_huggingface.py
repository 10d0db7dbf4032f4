"""Hugging Face's ChineseCLIPModel folders in both directions, compared with transformers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, TINY, make_model

from cn_clip import weights
from cn_clip.config import MODELS
from cn_clip.errors import CheckpointError, MissingWeightsError
from cn_clip.tokenizer import default_tokenizer

transformers = pytest.importorskip("transformers")

VITS = ["ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14"]


def shallow(name, layers=1):
    """Return a published model with few layers, to be fast."""
    config = MODELS[name]
    vision = replace(config.vision, layers=(layers,))
    return replace(config, vision=vision, text=replace(config.text, layers=layers, vocab_size=300))


def some_input(config):
    side = config.vision.resolution
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[101, 5, 6, 102, 0, 0], [101, 7, 8, 9, 10, 102]])
    return pixels, ids


@torch.no_grad()
def ours_of(model):
    pixels, ids = some_input(model.config)
    return model.encode_image(pixels), model.encode_text(ids)


@torch.no_grad()
def theirs_of(model, config):
    pixels, ids = some_input(config)
    vision = model.vision_model(pixel_values=pixels)
    text = model.text_model(input_ids=ids, attention_mask=(ids != 0).long())
    cls = text.last_hidden_state[:, 0]
    return model.visual_projection(vision.pooler_output), model.text_projection(cls)


def assert_equal_features(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        scale = b.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=1e-5)


def check_both_ways(config, folder):
    model = make_model(config)
    with torch.no_grad():
        model.logit_scale.fill_(3.25)
    weights.save_hugging_face(model, folder / "ours")
    theirs = transformers.ChineseCLIPModel.from_pretrained(folder / "ours").eval()
    assert theirs.logit_scale == model.logit_scale
    assert_equal_features(ours_of(model), theirs_of(theirs, config))

    theirs.save_pretrained(folder / "theirs")
    again = weights.build(weights.read(folder / "theirs"))
    assert_equal_features(ours_of(again), theirs_of(theirs, config))
    back = again.state_dict()
    for name, tensor in model.state_dict().items():
        # transformers sets the embedding of [PAD] to zero.
        row = 1 if name == "bert.embeddings.word_embeddings.weight" else 0
        kept, sent = (back[name][row:], tensor[row:]) if row else (back[name], tensor)
        assert torch.equal(kept, sent), name
    assert replace(again.config, name="") == replace(config, name="")


@pytest.mark.parametrize("name", VITS)
def test_every_vit_width_converts_both_ways(name, tmp_path):
    check_both_ways(shallow(name), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", VITS)
def test_every_complete_vit_converts_both_ways(name, tmp_path):
    check_both_ways(MODELS[name], tmp_path)
    assert weights.read_config(tmp_path / "theirs") == MODELS[name]


def test_bin_files_with_position_ids_are_read(tiny_model, tmp_path):
    weights.save_hugging_face(tiny_model, tmp_path / "hf")
    state = weights.read_tensors(tmp_path / "hf" / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(512)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    checkpoint = weights.read(tmp_path / "hf")
    assert sorted(checkpoint.dropped) == [
        "text_model.embeddings.position_ids",
        "vision_model.embeddings.position_ids",
    ]
    assert_equal_features(ours_of(weights.build(checkpoint)), ours_of(tiny_model))


def test_shards_are_read_and_a_missing_one_is_named(tiny_model, tmp_path):
    weights.save_hugging_face(tiny_model, tmp_path / "one")
    theirs = transformers.ChineseCLIPModel.from_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="400KB")
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2
    again = weights.build(weights.read(tmp_path / "many"))
    assert_equal_features(ours_of(again), ours_of(tiny_model))
    shards[1].unlink()
    with pytest.raises(MissingWeightsError, match=rf"1 of the .* missing: {shards[1].name}"):
        weights.read(tmp_path / "many")


def test_the_model_is_detected_from_a_weights_file_alone(tiny_model, tmp_path):
    weights.save_hugging_face(tiny_model, tmp_path / "hf")
    (tmp_path / "hf" / "config.json").unlink()
    model = weights.build(weights.read(tmp_path / "hf" / "model.safetensors"))
    assert_equal_features(ours_of(model), ours_of(tiny_model))


def test_the_written_tokenizer_gives_the_same_ids(tiny_model, tmp_path):
    weights.save_hugging_face(tiny_model, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    strings = json.loads((GOLDEN / "strings.json").read_text(encoding="utf-8"))
    # Its normalizer also strips accents and drops some characters: plain text only.
    plain = [t for t in strings if all(" " <= c <= "~" or "一" <= c <= "鿿" for c in t)]
    # No truncation; it parses a literal [MASK] as the special token.
    plain = [text for text in plain if len(text) <= 50 and "[" not in text]
    assert len(plain) > 100
    ids = theirs(plain, max_length=52, truncation=True, padding="max_length")["input_ids"]
    np.testing.assert_array_equal(default_tokenizer()(plain, 52), ids)


def test_the_written_preprocessing_gives_the_same_pixels(tiny_model, tmp_path):
    from conftest import make_image

    from cn_clip.image.decode import normalize, to_pixels

    weights.save_hugging_face(tiny_model, tmp_path / "hf")
    processor = transformers.ChineseCLIPImageProcessorPil.from_pretrained(tmp_path / "hf")
    picture = make_image(3, (90, 61))
    theirs = processor(picture, return_tensors="np")["pixel_values"][0]
    ours = normalize(to_pixels(picture, tiny_model.config.vision.resolution))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("kind", ["resnet", "efficientnet_lite"])
def test_towers_that_the_format_does_not_support_are_refused(kind, tmp_path):
    with pytest.raises(CheckpointError, match=f"supports only ViT image towers, not {kind}"):
        weights.save_hugging_face(make_model(TINY[kind]), tmp_path / "hf")
    assert not list(tmp_path.iterdir())
