"""The functions of the official package."""

import inspect

import numpy as np
import pytest
import torch
from conftest import GOLDEN, TEXT, TINY, make_model
from PIL import Image

import cn_clip.clip as clip
from cn_clip import config, weights
from cn_clip.clip import available_models, load_from_name
from cn_clip.errors import CheckpointError, MissingWeightsError, UnknownModelError, UsageError
from cn_clip.image.decode import normalize


def test_exported_names_and_signatures_are_the_official_ones():
    parameters = {
        name: list(inspect.signature(getattr(clip, name)).parameters) for name in clip.__all__
    }
    assert parameters == {
        "available_models": [],
        "convert_state_dict": ["state_dict"],
        "create_model": ["model_name", "checkpoint"],
        "image_transform": ["image_size"],
        "load": ["model", "device", "clip_path", "bert_path", "use_flash_attention"],
        "load_from_name": [
            "name",
            "device",
            "download_root",
            "vision_model_name",
            "text_model_name",
            "input_resolution",
            "use_modelscope",
        ],
        "tokenize": ["texts", "context_length"],
    }
    assert inspect.signature(clip.tokenize).parameters["context_length"].default == 52
    assert inspect.signature(clip.image_transform).parameters["image_size"].default == 224
    assert clip._tokenizer.vocab["[CLS]"] == 101
    import cn_clip.clip.utils as utils

    for name in utils.__all__:
        assert getattr(utils, name) is getattr(clip, name)


@pytest.mark.parametrize(
    ("statement", "successor"),
    [
        ("from cn_clip.clip.configuration_bert import BertConfig", "cn_clip.clip.create_model"),
        ("from cn_clip.clip.modeling_bert import BertModel", "cn_clip.clip.create_model"),
        ("from cn_clip.training.data import get_data", "cn-clip train"),
        ("from cn_clip.eval.data import get_zeroshot_dataset", "cn-clip eval"),
        ("import cn_clip.eval.extract_features_onnx", "cn-clip embed"),
        ("import cn_clip.deploy.onnx_to_tensorrt", "cn-clip export --to tensorrt"),
    ],
)
def test_importing_a_removed_official_module_names_its_replacement(statement, successor):
    with pytest.raises(ModuleNotFoundError, match=rf"official package is gone; .*{successor}"):
        exec(statement, {})


def test_an_unknown_module_gives_pythons_own_error():
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'cn_clip\.clip\.nothing'$"):
        exec("import cn_clip.clip.nothing", {})


def test_the_official_utils_tables_exist(tmp_path):
    from cn_clip.clip.utils import _MODEL_INFO, _MODELS, _download

    assert _MODELS["RN50"] == ("chinese-clip-rn50", "clip_cn_rn50.pt")
    assert _MODEL_INFO["ViT-L-14-336"] == {
        "struct": "ViT-L-14-336@RoBERTa-wwm-ext-base-chinese",
        "input_resolution": 336,
    }
    assert list(_MODELS) == list(_MODEL_INFO) == available_models()
    (tmp_path / "clip_cn_rn50.pt").touch()
    assert _download("RN50", str(tmp_path)) == str(tmp_path / "clip_cn_rn50.pt")


def test_the_tokenizer_converts_tokens_and_ids_like_the_official_one():
    assert clip._tokenizer.convert_tokens_to_ids(["皮", "卡"]) == [4649, 1305]
    assert clip._tokenizer.convert_ids_to_tokens([101, 4649]) == ["[CLS]", "皮"]


def test_preprocessing_steps_are_the_official_ones():
    preprocess = clip.image_transform(64)
    resize, rgb, to_tensor, normalized = preprocess.transforms
    assert resize.size == (64, 64) and resize.interpolation == Image.Resampling.BICUBIC
    assert normalized.mean == (0.48145466, 0.4578275, 0.40821073)
    assert normalized.std == (0.26862954, 0.26130258, 0.27577711)
    image = Image.open(GOLDEN / "images" / "rgb_wide.png")
    pixels = to_tensor(rgb(resize(image)))
    assert pixels.min() >= 0 and pixels.max() <= 1
    assert torch.equal(normalized(pixels), preprocess(image))
    preprocess.transforms.pop()  # as scripts do to get pixels
    assert torch.equal(preprocess(image), pixels)


def test_available_models_are_the_official_five():
    assert available_models() == ["ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "RN50"]


def test_tokenize_returns_a_padded_long_tensor():
    ids = clip.tokenize(["杰尼龟", "皮卡丘"])
    assert ids.dtype == torch.long and ids.shape == (2, 52)
    assert clip.tokenize("皮卡丘", context_length=8).tolist() == [
        [101, 4649, 1305, 687, 102, 0, 0, 0]
    ]


@pytest.mark.parametrize("name", sorted(p.name for p in (GOLDEN / "images").iterdir()))
@pytest.mark.filterwarnings("ignore:in an image of mode I;16")
def test_image_transform_equals_the_reference(name):
    tensor = clip.image_transform()(Image.open(GOLDEN / "images" / name))
    pixels = np.load(GOLDEN / "pixels.npz")[name].transpose(1, 2, 0)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 224, 224)
    np.testing.assert_array_equal(tensor.numpy(), normalize(pixels))


@pytest.fixture
def small_official(monkeypatch):
    """Make ViT-B-16 the name of a tiny model."""
    tiny = TINY["vit"]
    monkeypatch.setitem(config.VISION_TOWERS, "ViT-B-16", tiny.vision)
    monkeypatch.setitem(config.TEXT_TOWERS, "RoBERTa-wwm-ext-base-chinese", TEXT)
    monkeypatch.setitem(config.EMBED_DIMS, "ViT-B-16", tiny.embed_dim)
    return make_model(tiny)


def test_the_official_example_runs_from_download_root(small_official, tmp_path):
    weights.save_official(small_official, tmp_path / "clip_cn_vit-b-16.pt")
    model, preprocess = load_from_name("ViT-B-16", device="cpu", download_root=str(tmp_path))
    assert not model.training
    assert preprocess.image_size == 32
    image = preprocess(Image.open(GOLDEN / "images" / "rgb_wide.png")).unsqueeze(0)
    text = clip.tokenize(["杰尼龟", "妙蛙种子", "小火龙", "皮卡丘"])
    with torch.no_grad():
        logits_per_image, logits_per_text = model.get_similarity(image, text)
        again, _ = model.get_similarity(image, text)
    assert logits_per_image.shape == (1, 4) and logits_per_text.shape == (4, 1)
    assert torch.equal(logits_per_image, again)
    # As in the official package: most weights rounded to float16, the others exact, all float32.
    state = model.state_dict()
    for name, tensor in small_official.state_dict().items():
        exact = any(part in name for part in ("ln_", "class_emb", "visual.pos", "logit"))
        expected = tensor if exact else tensor.half().float()
        assert torch.equal(state[name], expected), name


def test_a_checkpoint_loads_by_path_and_its_names_are_checked(small_official, tmp_path):
    path = str(tmp_path / "mine.pt")
    weights.save_official(small_official, path)
    _, preprocess = load_from_name(path, device="cpu")
    assert preprocess.image_size == 32
    load_from_name(
        path, "cpu", None, "ViT-B-16", "RoBERTa-wwm-ext-base-chinese", input_resolution=32
    )
    with pytest.raises(CheckpointError, match=r"holds .*, not ViT-L-14@RoBERTa-wwm-ext-base"):
        load_from_name(
            path,
            vision_model_name="ViT-L-14",
            text_model_name="RoBERTa-wwm-ext-base-chinese",
        )
    with pytest.raises(CheckpointError, match="takes 32 pixels, not input_resolution=64"):
        load_from_name(path, device="cpu", input_resolution=64)


def test_a_file_of_another_model_under_an_official_name_is_refused_with_its_model(tmp_path):
    weights.save_official(make_model(TINY["resnet"]), tmp_path / "clip_cn_vit-b-16.pt")
    with pytest.raises(CheckpointError, match=r"holds resnet.*, not ViT-B-16@RoBERTa"):
        load_from_name("ViT-B-16", device="cpu", download_root=str(tmp_path))


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownModelError, match="'ViT-B-61'; did you mean ViT-B-16"):
        load_from_name("ViT-B-61")
    with pytest.raises(RuntimeError):  # the official type
        load_from_name("nope")


def test_missing_weights_offline_name_the_file_and_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("cn_clip.hub.CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingWeightsError) as error:
        load_from_name("RN50", device="cpu", download_root=str(tmp_path / "weights"))
    message = str(error.value)
    assert "clip_cn_rn50.pt" in message and str(tmp_path / "weights") in message
    assert "OFA-Sys/chinese-clip-rn50" in message and "\n" not in message


def test_create_model_without_a_checkpoint_has_random_weights(small_official):
    model = clip.create_model("ViT-B-16@RoBERTa-wwm-ext-base-chinese")
    assert not model.training and model.dtype == torch.float32
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(UnknownModelError, match="image tower 'ViT-B-61'"):
        clip.create_model("ViT-B-61@RBT3-chinese")
    with pytest.raises(UsageError, match="'ViT-B-16' names no text tower"):
        clip.create_model("ViT-B-16")


def test_create_model_takes_what_torch_load_returns(small_official):
    state = {f"module.{name}": t for name, t in small_official.state_dict().items()}
    name = "ViT-B-16@RoBERTa-wwm-ext-base-chinese"
    model = clip.create_model(name, checkpoint={"state_dict": state})
    difference = model.text_projection - small_official.text_projection
    assert 0 < difference.abs().max() < 1e-3
    with pytest.raises(CheckpointError, match="the checkpoint holds"):
        clip.create_model("RN50@RBT3-chinese", checkpoint={"state_dict": state})


def test_load_fills_both_towers_from_two_files(small_official, tmp_path):
    other = make_model(TINY["vit"], seed=5)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "clip.pt")
    bert = {name: t for name, t in other.state_dict().items() if name.startswith("bert.")}
    torch.save(bert, tmp_path / "bert.pt")
    model = make_model(TINY["vit"], seed=6).train()
    projection = model.text_projection.clone()
    clip.load(model, "cpu", str(tmp_path / "clip.pt"), str(tmp_path / "bert.pt"))
    assert not model.training
    for name, tensor in model.state_dict().items():
        expected = projection if name == "text_projection" else other.state_dict()[name]
        assert torch.equal(tensor, expected), name


def test_load_refuses_an_incomplete_tower(small_official, tmp_path):
    bert = {n: t for n, t in small_official.state_dict().items() if n.startswith("bert.enc")}
    torch.save(bert, tmp_path / "bert.pt")
    with pytest.raises(CheckpointError, match=r"do not fit the bert\.\* tower.*5 missing"):
        clip.load(small_official, "cpu", bert_path=str(tmp_path / "bert.pt"))
