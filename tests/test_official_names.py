"""The official modules that scripts import, compared with what the official package does."""

import importlib
import inspect
import json
import sys

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from fill import fill

import cn_clip
import cn_clip.clip as clip
from cn_clip.clip import model as official
from cn_clip.clip.bert_tokenizer import FullTokenizer, default_vocab
from cn_clip.errors import CheckpointError, UsageError

sys.path.insert(0, str(GOLDEN / "official"))
from record_official import INFO, TEXTS, filled

RECORDED = json.loads((GOLDEN / "official" / "official.json").read_text(encoding="utf-8"))
ARRAYS = np.load(GOLDEN / "official" / "official.npz")


def images_of(side):
    return torch.from_numpy(fill(f"images {side}", (2, 3, side, side)))


@pytest.mark.parametrize("module", RECORDED["signatures"])
def test_every_module_has_the_official_names_and_parameters(module):
    loaded = importlib.import_module(module)
    for name, parameters in RECORDED["signatures"][module].items():
        assert list(inspect.signature(getattr(loaded, name)).parameters) == parameters, name


def test_the_old_import_lines_work():
    for line in (
        "from cn_clip.clip.model import CLIP, convert_weights, restore_model, resize_pos_embed",
        "from cn_clip.clip.model import convert_state_dict, LayerNorm, QuickGELU, ModifiedResNet",
        "from cn_clip.clip.utils import _MODELS, _MODEL_INFO, _download, _tokenizer, create_model",
        "from cn_clip.clip.utils import image_transform, convert_weights, CLIP, restore_model",
        "from cn_clip.clip.bert_tokenizer import FullTokenizer",
        "from cn_clip.training.main import convert_models_to_fp32",
        "from cn_clip.clip import _tokenizer; _tokenizer.convert_tokens_to_ids(['皮'])",
    ):
        exec(line, {})


@pytest.mark.parametrize("kind", sorted(INFO))
def test_a_model_of_the_official_arguments_has_the_official_features(kind):
    model = filled(official.CLIP(**INFO[kind]))
    with torch.no_grad():
        image = model.encode_image(images_of(INFO[kind]["image_resolution"])).numpy()
        text = model.encode_text(clip.tokenize(TEXTS)).numpy()
    np.testing.assert_allclose(image, ARRAYS[f"{kind} image"], atol=2e-5)
    np.testing.assert_allclose(text, ARRAYS[f"{kind} text"], atol=2e-5)


@pytest.mark.parametrize("kind", sorted(INFO))
def test_convert_weights_rounds_the_official_parameters(kind):
    model = filled(official.CLIP(**INFO[kind]))
    official.convert_weights(model)
    half = sorted(n for n, p in model.named_parameters() if p.dtype == torch.half)
    assert half == RECORDED["half"][kind]
    with torch.no_grad():
        text = model.encode_text(clip.tokenize(TEXTS)).numpy()
    assert text.dtype == np.float16
    np.testing.assert_allclose(text, ARRAYS[f"{kind} half text"], atol=1e-2)
    if kind == "vit":
        image = model.encode_image(images_of(32)).detach().numpy()
        np.testing.assert_allclose(image, ARRAYS["vit half image"], atol=1e-2)
    official.convert_models_to_fp32(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_position_embeddings_are_resized_in_place_as_officially():
    larger = official.CLIP(**INFO["vit"] | {"image_resolution": 48})
    state = {f"module.{n}": t for n, t in filled(official.CLIP(**INFO["vit"])).state_dict().items()}
    official.resize_pos_embed(state, larger, prefix="module.")
    resized = state["module.visual.positional_embedding"]
    np.testing.assert_allclose(resized.numpy(), ARRAYS["resized"], atol=1e-6)
    with pytest.raises(UsageError, match="'nearest' is not supported; use bicubic"):
        official.resize_pos_embed(state, larger, interpolation="nearest")
    resnet = official.CLIP(**INFO["resnet"])
    state = resnet.state_dict()
    official.resize_pos_embed(state, resnet)
    assert state.keys() == resnet.state_dict().keys()


def test_restore_model_fills_both_towers_and_resizes():
    plain = filled(official.CLIP(**INFO["vit"])).state_dict()
    model = official.CLIP(**INFO["vit"] | {"image_resolution": 48})
    bert = {"bert.pooler.dense.bias": torch.zeros(64), **plain}
    assert official.restore_model(model, plain, bert, False) is model and not model.training
    official.convert_models_to_fp32(model)
    features = model.encode_image(images_of(48)).detach().numpy()
    np.testing.assert_allclose(features, ARRAYS["restored image"], atol=1e-4)
    with pytest.raises(CheckpointError, match=r"has no bert\.\*; it starts with visual"):
        official.restore_model(model, None, {"visual.proj": torch.zeros(1)}, False)
    with pytest.raises(CheckpointError, match="wrongly shaped"):
        official.restore_model(model, {"visual.proj": torch.zeros(1)}, None, False)


def test_models_of_any_function_are_instances_of_the_official_class(tiny_model):
    assert isinstance(tiny_model, official.CLIP)
    assert not isinstance(torch.nn.Linear(1, 1), official.CLIP)


def test_unsupported_sizes_are_refused():
    with pytest.raises(UsageError, match="the activation relu"):
        official.CLIP(**INFO["vit"] | {"text_hidden_act": "relu"})


def test_the_tokenizer_has_the_official_methods():
    tokenizer = FullTokenizer()
    for text, tokens in RECORDED["tokens"].items():
        assert tokenizer.tokenize(text) == tokens
        assert tokenizer.convert_tokens_to_string(tokens) == RECORDED["strings"][text]
        assert tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(tokens)) == tokens
    assert tokenizer.vocab_size() == RECORDED["vocab_size"]
    for index, token in RECORDED["inv_vocab"].items():
        assert tokenizer.inv_vocab[int(index)] == token
    assert FullTokenizer(default_vocab()).vocab == tokenizer.vocab
    with pytest.raises(UsageError, match="lower case only"):
        FullTokenizer(do_lower_case=False)


def test_mini_loads_by_name_with_its_own_transform():
    """``image_transform`` has another mean and std: its cosine to the right one is about 0.93."""
    model, preprocess = clip.load_from_name("mini", device="cpu")
    embedder = cn_clip.load()
    for name in ("rgb_wide.png", "rgba.png"):
        path = GOLDEN / "images" / name
        if not path.exists():
            continue
        from PIL import Image

        with torch.no_grad():
            features = model.encode_image(preprocess(Image.open(path))[None])
            wrong = model.encode_image(clip.image_transform(224)(Image.open(path))[None])
        right = embedder.embed_images(path)[0]
        unit = torch.nn.functional.normalize(features).numpy()[0]
        assert unit @ right > 0.99999
        assert torch.nn.functional.normalize(wrong).numpy()[0] @ right < 0.99
    assert "mini" not in clip.available_models()
