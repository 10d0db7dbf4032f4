"""The PyTorch backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cn_clip import weights
from cn_clip.backends import Features, ParameterCount, Pixels
from cn_clip.config import ModelConfig
from cn_clip.errors import UsageError
from cn_clip.fingerprint import Fingerprint, TensorBytes, derived, fingerprint_of
from cn_clip.model.clip import CLIP
from cn_clip.tokenizer import default_tokenizer
from cn_clip.translation import _

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchBackend:
    """Runs a ``CLIP`` on its device, without gradients; see ``Backend``."""

    def __init__(self, model: CLIP) -> None:
        if model.config.vision.kind != "vit":  # convolutions are faster with channels last
            model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model
        self._device = model.text_projection.device
        mean, std = model.config.image_mean, model.config.image_std
        self._mean = torch.tensor(mean, device=self._device)[:, None, None]
        self._std = torch.tensor(std, device=self._device)[:, None, None]

    @property
    def dim(self) -> int:
        return self.model.config.embed_dim

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().float().exp())

    @property
    def precision(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def parameter_count(self) -> ParameterCount:
        image = sum(parameter.numel() for parameter in self.model.visual.parameters())
        return ParameterCount(image, sum(p.numel() for p in self.model.parameters()))

    # Not inference_mode: sharded weights (FSDP2) cannot be gathered in it.
    @torch.no_grad()
    def run_images(self, pixels: Pixels) -> Features:
        images = torch.from_numpy(pixels).to(self._device)
        if images.dtype == torch.uint8:
            images = (images.float() / 255 - self._mean) / self._std
        return self.model.encode_image(images).float().cpu().numpy()

    @torch.no_grad()
    def run_texts(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_]) -> Features:
        # ``mask`` is not needed: the model masks padding by its id, 0.
        features = self.model.encode_text(torch.from_numpy(ids).to(self._device))
        return features.float().cpu().numpy()


def load_model(
    path: Path,
    *,
    expected: ModelConfig | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> CLIP:
    """Load a checkpoint for inference; arguments and errors are those of ``cn_clip.load``."""
    target = pick_device(device)
    dtype = pick_precision(precision, target)
    checkpoint = weights.read(path)
    if expected is not None:
        weights.check_model(checkpoint.config, expected, path)
    return weights.build(checkpoint, dtype=dtype).to(target).requires_grad_(False)


def model_fingerprint(model: CLIP, *, fast_decode: bool = False) -> Fingerprint:
    """Return the fingerprint of a model in memory.

    Rounded weights are fingerprinted as they are, without ``derived_from``.
    """
    original = _fingerprint(model.config, model.state_dict())
    return derived(original, ["fast_decode"] if fast_decode else [])


def file_fingerprint(path: Path, precision: str, *, fast_decode: bool = False) -> Fingerprint:
    """Return the fingerprint of a checkpoint that runs in ``precision``."""
    checkpoint = weights.read(path)
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    original = _fingerprint(checkpoint.config, tensors)
    return derived(original, [precision, *(["fast_decode"] if fast_decode else [])])


def _fingerprint(config: ModelConfig, state: Mapping[str, torch.Tensor]) -> str:
    tensors = (
        TensorBytes(
            name,
            str(tensor.dtype).removeprefix("torch."),
            tensor.shape,
            weights.tensor_bytes(tensor),
        )
        for name, tensor in state.items()
    )
    return fingerprint_of(config, default_tokenizer().vocab, tensors)


_USUAL_NAMES = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "metal": "mps", "apple": "mps"}


def pick_device(device: str | torch.device) -> torch.device:
    """Return the device of this name; ``"auto"`` is CUDA, then Apple's MPS, then the CPU.

    Raises:
        UsageError: the device does not exist on this machine.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        picked = torch.device(device)
        usable = picked.type != "meta" and bool(torch.ones(1, device=picked).cpu())
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError):
        usable = False  # each device type raises its own error
    if not usable:
        kind, colon, index = str(device).lower().partition(":")
        usual = _USUAL_NAMES.get(kind)
        raise UsageError(
            _(
                "device {device!r} is not available; {hint}torch {version} has: {devices}",
                device=str(device),
                hint=""
                if usual is None
                else _("did you mean {name}? ", name=usual + colon + index),
                version=torch.__version__,
                devices=", ".join(_devices()),
            )
        )
    return picked


def _devices() -> list[str]:
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of this name; ``"auto"`` is float16 on CUDA and float32 elsewhere.

    Raises:
        UsageError: the precision is unknown.
    """
    if precision == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if precision not in _PRECISIONS:
        available = ", ".join(["auto", *_PRECISIONS])
        raise UsageError(
            _(
                "unknown precision {precision!r}; available: {available}",
                precision=precision,
                available=available,
            )
        )
    return _PRECISIONS[precision]
