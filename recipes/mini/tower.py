"""The image tower's numbers: ImageNet weights, class prototypes, and a residual in closed form."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cn_clip.config import VisionConfig
from cn_clip.model.efficientnet import ConvNorm, EfficientNetLite

BATCH = 64
PIXEL_MEAN, PIXEL_STD = 127.0, 128.0  # EfficientNet-Lite's own normalisation of 0..255


def image_tower(weights: dict[str, Tensor], embed_dim: int) -> EfficientNetLite:
    """The tower with ImageNet weights in backbone and classifier.

    The package's tensors have other names, but both networks list them in network order.
    """
    tower = EfficientNetLite(VisionConfig("efficientnet_lite", 224), embed_dim)
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
    """(N, 1280) float32 pooled features; bfloat16 inside (cosine 0.9996 to float32)."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    x = pixels.permute(0, 3, 1, 2).float().sub(PIXEL_MEAN).div(PIXEL_STD)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return backbone(x.contiguous(memory_format=torch.channels_last)).float().numpy()


def class_average(tower: EfficientNetLite, features: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Class probabilities of pooled features (N, 1280), averaged over a table (1000, D)."""
    with torch.no_grad():
        weights = tower.classifier(torch.from_numpy(features)).softmax(-1)
    return weights.numpy() @ table


def ridge(features: np.ndarray, targets: np.ndarray, strength: float) -> np.ndarray:
    """(1280, D) W that minimises |features W - targets|^2 + strength * mean variance * |W|^2.

    The residual is fitted to the targets themselves, not to what the class average leaves over,
    and then added: fitting the remainder unlearns the ImageNet classes on pictures unlike photos.
    """
    covariance = features.T @ features / len(features)
    penalty = strength * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    return np.linalg.solve(covariance + penalty, features.T @ targets / len(features))
