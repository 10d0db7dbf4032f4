"""The image tower of `mini`: layers compared with torch's, and the shipped weights on photos."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, make_model

import cn_clip
from cn_clip.model.efficientnet import STAGES, Backbone, ConvNorm, EfficientNetLite

EXAMPLES = Path(__file__).parents[2] / "examples"
LITE = TINY["efficientnet_lite"]


@pytest.fixture(scope="module")
def mini():
    return cn_clip.load("mini", device="cpu")


def test_features_have_one_row_per_image_at_any_resolution():
    tower = make_model(LITE).visual
    for side in (32, 64, 96):
        features = tower(torch.zeros(2, 3, side, side))
        assert features.shape == (2, LITE.embed_dim)
        assert torch.isfinite(features).all()


def test_a_resolution_that_is_not_a_multiple_of_32_is_refused():
    with pytest.raises(ValueError, match="multiple of 32, not 100"):
        EfficientNetLite(replace(LITE.vision, resolution=100), 8)


@pytest.mark.parametrize("kernel", [3, 5])
def test_padding_at_stride_two_equals_tensorflow(kernel):
    """The odd pixel of padding is on the right and bottom."""
    layer = ConvNorm(1, 1, kernel, stride=2).eval()
    image = torch.arange(36.0).reshape(1, 1, 6, 6)
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.weight[0, 0, kernel // 2 - 1, kernel // 2 - 1] = 1  # picks even rows and columns
        picked = layer(image) * (1 + layer.norm.eps) ** 0.5
    assert torch.allclose(picked, image[:, :, ::2, ::2], atol=1e-4)


def test_the_backbone_has_the_shape_of_lite0():
    backbone = Backbone()
    assert len(backbone.blocks) == sum(stage.blocks for stage in STAGES) == 16
    # 4.65 million with the classifier of 1,000 classes, as published (Lite0 has no squeeze).
    classifier = 1280 * 1000 + 1000
    count = sum(parameter.numel() for parameter in backbone.parameters()) + classifier
    assert count == 4_652_008


def test_in_eval_mode_features_do_not_depend_on_the_batch():
    tower = make_model(LITE).visual
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together, alone = tower(images), torch.cat([tower(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-4)


def test_recomputing_activations_changes_no_gradient():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for recompute in (False, True):
        tower = make_model(LITE).visual
        tower.set_grad_checkpointing(recompute)
        tower(images).square().sum().backward()
        gradients.append(tower.backbone.stem.conv.weight.grad)
    assert torch.allclose(*gradients)


@pytest.mark.parametrize(
    ("photo", "label"), [("cat", "猫"), ("coffee", "咖啡"), ("rocket", "火箭")]
)
def test_mini_classifies_photos(mini, photo, label):
    labels = ["猫", "狗", "兔子", "咖啡", "火箭", "宇航员", "汽车", "苹果"]
    result = cn_clip.classify(mini, EXAMPLES / f"{photo}.jpg", labels)
    assert labels[int(result.probabilities[0].argmax())] == label


def test_mini_finds_the_photo_of_a_text(mini):
    photos = ["cat", "coffee", "rocket"]
    images = mini.embed_images([EXAMPLES / f"{name}.jpg" for name in photos])
    texts = mini.embed_texts(["一只猫。", "一杯咖啡", "火箭的照片"])
    assert (texts @ images.T).argmax(1).tolist() == [0, 1, 2]


def test_mini_ignores_the_full_stop_and_knows_synonyms(mini):
    texts = ["自行车", "自行车。", "单车", "大象"]
    cosines = mini.embed_texts(texts) @ mini.embed_texts("自行车").T
    assert cosines[1] > 0.8
    assert cosines[2] > cosines[3]


def test_mini_is_deterministic(mini):
    photo = EXAMPLES / "cat.jpg"
    assert np.array_equal(mini.embed_images(photo), mini.embed_images(photo))
    assert F.cosine_similarity(*torch.from_numpy(mini.embed_images([photo, photo])), dim=0) > 0.9999
