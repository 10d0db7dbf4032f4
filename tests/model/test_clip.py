"""Features of the towers compared with the reference, and their invariants."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, TINY, cosines, make_model
from fill import fill
from PIL import Image

from cn_clip.config import MODELS
from cn_clip.image.decode import normalize, to_pixels
from cn_clip.model.clip import CLIP, initialize
from cn_clip.model.vision import keep_random_patches
from cn_clip.tokenizer import Tokenizer
from cn_clip.weights import Checkpoint, build, infer_config

OFFICIAL = ["RN50", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14"]


def shapes(name):
    return json.loads((GOLDEN / f"state_dict_{name}.json").read_text())


@pytest.mark.parametrize("name", OFFICIAL)
def test_state_dict_names_and_shapes_are_the_official_ones(name):
    with torch.device("meta"):
        model = CLIP(MODELS[name])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes(name)


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32", "ViT-B-16"])
def test_features_equal_the_reference(name, golden_strings):
    tensors = {
        key: torch.from_numpy(np.asarray(fill(key, tuple(shape))))
        for key, shape in shapes(name).items()
    }
    model = build(Checkpoint(infer_config(tensors, "golden"), tensors))
    assert model.config == MODELS[name]
    paths = sorted((GOLDEN / "images").iterdir())[:4]
    images = np.stack([normalize(to_pixels(Image.open(path), 224)) for path in paths])
    ids = Tokenizer()(golden_strings[:8])
    ids[7, :6] = [101, 100, 872, 1962, 100, 102]  # see golden/README.md
    with torch.inference_mode():
        image_features = model.encode_image(torch.from_numpy(images))
        text_features = model.encode_text(torch.from_numpy(ids))
        logits, _ = model.get_similarity(torch.from_numpy(images), torch.from_numpy(ids))
    golden = np.load(GOLDEN / "features.npz")
    for kind, features in (("image", image_features), ("text", text_features), ("logits", logits)):
        expected = golden[f"{name}/{kind}"]
        np.testing.assert_allclose(features.numpy(), expected, rtol=0, atol=1e-4)
        assert cosines(features.numpy(), expected).min() >= 0.999999


def inputs(model, batch=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    size = model.config.vision.resolution
    images = torch.randn(batch, 3, size, size, generator=rng)
    ids = torch.randint(200, 8000, (batch, 12), generator=rng)
    ids[0, 5:] = 0
    ids[1, 9:] = 0
    return images, ids


@torch.inference_mode()
def test_padding_never_changes_a_text_feature(tiny_model):
    _, ids = inputs(tiny_model)
    padded = torch.cat([ids, torch.zeros(3, 40, dtype=torch.long)], dim=1)
    together = tiny_model.encode_text(padded)
    for row, length in zip(range(3), (5, 9, 12), strict=True):
        alone = tiny_model.encode_text(ids[row : row + 1, :length])
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_features_of_padding_only_are_finite(tiny_model):
    assert tiny_model.encode_text(torch.zeros(2, 52, dtype=torch.long)).isfinite().all()


@torch.inference_mode()
def test_batching_never_changes_a_feature(any_tiny_model):
    images, ids = inputs(any_tiny_model)
    for encode, batch in ((any_tiny_model.encode_image, images), (any_tiny_model.encode_text, ids)):
        alone = torch.cat([encode(row[None]) for row in batch])
        torch.testing.assert_close(encode(batch), alone, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_similarity_is_the_scaled_cosine_both_ways(any_tiny_model):
    images, ids = inputs(any_tiny_model)
    per_image, per_text = any_tiny_model.get_similarity(images, ids)
    a, b, scale = any_tiny_model(images, ids)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(scale, torch.tensor(1 / 0.07))
    torch.testing.assert_close(per_image, scale * a @ b.T)
    torch.testing.assert_close(per_text, per_image.T)


@torch.inference_mode()
def test_forward_with_one_input_gives_that_towers_features(tiny_model):
    images, ids = inputs(tiny_model)
    torch.testing.assert_close(tiny_model(images, None), tiny_model.encode_image(images))
    torch.testing.assert_close(tiny_model(None, ids), tiny_model.encode_text(ids))
    with pytest.raises(ValueError, match="both None"):
        tiny_model(None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision_stays_close_to_float32(any_tiny_model, dtype):
    images, ids = inputs(any_tiny_model)
    exact = any_tiny_model.encode_image(images), any_tiny_model.encode_text(ids)
    half = any_tiny_model.to(dtype)
    features = half.encode_image(images), half.encode_text(ids)
    assert half.dtype == features[0].dtype == features[1].dtype == dtype
    for a, b in zip(features, exact, strict=True):
        assert cosines(a.float().numpy(), b.numpy()).min() > 0.999


@pytest.mark.parametrize("kind", sorted(TINY))
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    gradients = []
    for enable in (False, True):
        model = make_model(TINY[kind])
        model.bert.train()
        if kind == "vit":  # elsewhere statistics are frozen: BatchNorm must not count a batch twice
            model.visual.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for layer in model.bert.encoder.layer:
            layer.attention.dropout = 0.0
        model.set_grad_checkpointing(enable)
        a, b, scale = model(*inputs(model))
        (scale * a @ b.T).diagonal().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        if gradient is None:
            assert checkpointed[name] is None, name
        else:
            difference = (checkpointed[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert difference < 1e-4, name


def test_patch_masking_keeps_the_class_token_and_a_fraction_of_distinct_patches():
    x = torch.arange(2 * 17 * 3, dtype=torch.float32).view(2, 17, 3)
    torch.manual_seed(0)
    kept = keep_random_patches(x, 0.5)
    assert kept.shape == (2, 9, 3)
    for row, original in zip(kept, x, strict=True):
        assert (row[0] == original[0]).all()
        patches = {tuple(patch.tolist()) for patch in row[1:]}
        assert len(patches) == 8 and patches <= {tuple(p.tolist()) for p in original[1:]}
    assert not (
        kept[0, 1:] - x[0, 0] == kept[1, 1:] - x[1, 0]
    ).all()  # images drop different patches


@torch.inference_mode()
def test_mask_ratio_affects_only_the_vit(any_tiny_model):
    images, _ = inputs(any_tiny_model)
    masked = any_tiny_model.encode_image(images, mask_ratio=0.5)
    changed = not torch.equal(masked, any_tiny_model.encode_image(images))
    assert changed == (any_tiny_model.config.vision.kind == "vit")


def test_attention_goes_through_scaled_dot_product_attention_only(any_tiny_model, monkeypatch):
    calls = 0
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **options):
        nonlocal calls
        calls += 1
        return real(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with torch.inference_mode():
        any_tiny_model(*inputs(any_tiny_model))
    in_vision = {"vit": 2, "resnet": 1, "efficientnet_lite": 0}
    assert calls == 2 + in_vision[any_tiny_model.config.vision.kind]
    assert not any(isinstance(m, torch.nn.MultiheadAttention) for m in any_tiny_model.modules())


def test_the_same_seed_initializes_the_same_weights():
    one, same, other = (make_model(TINY["vit"], seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["text_projection"], other["text_projection"])


@pytest.mark.parametrize("kind", sorted(TINY))
def test_initialize_sets_every_weight(kind):
    model = CLIP(TINY[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialize(model, torch.Generator().manual_seed(0))
    undrawn = [name for name, p in model.named_parameters() if p.isnan().any()]
    assert undrawn == []
