"""The official package's functions under their names: ``import cn_clip.clip as clip``.

A thin facade for code written against the official ``cn_clip``; new code should use
``cn_clip.load``. Intended differences: models are in eval mode and float32 on every device, quotes
are normalised, code in files is never run, and weights that do not fit are an error.

The official package rounds most weights to float16 when it loads them, on the CPU too. This
facade does the same, so that published scores are reproduced. ``cn_clip.load`` keeps the precision
of the file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cn_clip import hub, weights
from cn_clip.backends.torch import pick_device
from cn_clip.clip.transforms import Normalize, OnBackground, Resize, ToTensor, convert_to_rgb
from cn_clip.config import PUBLISHED, ModelConfig, model_config
from cn_clip.errors import CheckpointError, UnknownModelError, UsageError
from cn_clip.image.modes import DEEP
from cn_clip.model.clip import CLIP, initialize
from cn_clip.model.vision import SelfAttention, VisionTransformer
from cn_clip.tokenizer import default_tokenizer
from cn_clip.translation import _

__all__ = [
    "available_models",
    "convert_state_dict",
    "create_model",
    "image_transform",
    "load",
    "load_from_name",
    "tokenize",
]

_tokenizer = default_tokenizer()  # scripts use this name
_OFFICIAL_TOWERS = ("vit", "resnet")


class ImageTransform:
    """PIL image to a float32 tensor (3, S, S), exactly as the official preprocessing.

    16-bit and float values are clipped at 255, with a warning for the first such image.
    ``transforms`` is the list of steps, as in torchvision's ``Compose``.
    """

    def __init__(
        self, image_size: int, normalize: Normalize, background: str | None = None
    ) -> None:
        self.image_size = image_size
        # A model with a background was not trained by the official code: its images are upright.
        first = [] if background is None else [OnBackground(background)]
        self.transforms: list[Callable[[Any], Any]] = [
            *first,
            Resize((image_size, image_size)),
            convert_to_rgb,
            ToTensor(),
            normalize,
        ]

    def __call__(self, image: Image.Image) -> Tensor:
        if image.mode in DEEP and not isinstance(self.transforms[0], OnBackground):
            _warn_of_clipping(image.mode)
        value: Any = image
        for transform in self.transforms:
            value = transform(value)
        return value  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"ImageTransform(image_size={self.image_size})"


@cache
def _warn_of_clipping(mode: str) -> None:
    """Warn once per mode."""
    warnings.warn(
        _(
            "in an image of mode {mode}, values above 255 become white, as in the official "
            "preprocessing; convert it to 8 bits first, or use cn_clip.load().embed_images, which "
            "scales the values",
            mode=mode,
        ),
        stacklevel=3,
    )


def available_models() -> list[str]:
    """Return the names that ``load_from_name`` knows."""
    return list(PUBLISHED)


def image_transform(image_size: int = 224) -> ImageTransform:
    """Return the preprocessing of the published models: bicubic squash, RGB, ``/255``, CLIP mean
    and std.

    Other models may have another mean and std: use the transform that ``load_from_name`` returns.
    """
    return ImageTransform(image_size, Normalize())


def tokenize(texts: str | Sequence[str], context_length: int = 52) -> torch.LongTensor:
    """Return token ids (N, ``context_length``), padded with 0.

    Longer texts are truncated. The first one warns, and
    ``cn_clip.tokenizer.default_tokenizer().truncated`` counts all of them.
    """
    ids = torch.from_numpy(default_tokenizer()(texts, context_length))
    assert isinstance(ids, torch.LongTensor)
    return ids


def load_from_name(
    name: str,
    device: str | torch.device | None = None,
    download_root: str | None = None,
    vision_model_name: str | None = None,
    text_model_name: str | None = None,
    input_resolution: int | None = None,
    use_modelscope: bool = False,
) -> tuple[CLIP, ImageTransform]:
    """Return ``(model, preprocess)`` of a published model or of a checkpoint file.

    Args:
        name: one of ``available_models()``, ``"mini"``, a path, or ``org/name`` of a repository.
            The model is detected from the file; the names below are optional and checked.
        device: the default is CUDA if available, else the CPU.
        download_root: searched first and downloaded to; the default is ``~/.cache/clip``.
        vision_model_name: such as ``"ViT-B-16"``.
        text_model_name: such as ``"RoBERTa-wwm-ext-base-chinese"``.
        input_resolution: side of the square input in pixels.
        use_modelscope: download from ModelScope instead of Hugging Face; the default is the
            environment variable ``CN_CLIP_HUB``.

    Raises:
        UnknownModelError: ``name`` is neither a known name nor a path.
        MissingWeightsError: the weights are neither on this machine nor downloadable.
        CheckpointError: the file is damaged, refused, or has another model.
        UsageError: the device is not available.
    """
    target_device = _device(device)
    expected: ModelConfig | None = None
    if name in PUBLISHED:
        path = hub.locate(name, download_root=download_root, use_modelscope=use_modelscope or None)
        expected = model_config(PUBLISHED[name].struct)
    elif name == hub.EMBEDDED:
        path = hub.EMBEDDED_FOLDER
    elif os.path.exists(name) or hub.is_repository(name):
        path = Path(name)
        if not path.exists():
            path = hub.locate(
                name, download_root=download_root, use_modelscope=use_modelscope or None
            )
        if vision_model_name and text_model_name:
            expected = model_config(
                f"{vision_model_name}@{text_model_name}", resolution=input_resolution
            )
        elif vision_model_name or text_model_name:
            raise UsageError(_("give both vision_model_name and text_model_name, or neither"))
    else:
        raise UnknownModelError(_("model"), name, [*available_models(), hub.EMBEDDED])
    checkpoint = weights.read(path)
    if expected is not None:
        weights.check_model(checkpoint.config, expected, path)
    if input_resolution not in (None, checkpoint.config.vision.resolution):
        raise CheckpointError(
            _(
                "{path} takes {resolution} pixels, not input_resolution={input_resolution}",
                path=path,
                resolution=checkpoint.config.vision.resolution,
                input_resolution=input_resolution,
            )
        )
    model = weights.build(checkpoint)
    if model.config.vision.kind in _OFFICIAL_TOWERS:
        _round_as_official(model)
    model.to(target_device)
    return model, _transform_for(model.config)


def create_model(model_name: str, checkpoint: Mapping[str, Any] | None = None) -> CLIP:
    """Return the model ``"VISION@TEXT"``, in eval mode and float32.

    Args:
        model_name: such as ``"ViT-B-16@RoBERTa-wwm-ext-base-chinese"``.
        checkpoint: what ``torch.load`` returns for an official file, a state dict or a dict that
            contains one. Without it, the weights are random, from torch's global generator.

    Raises:
        UnknownModelError: a tower is unknown.
        CheckpointError: the weights belong to another model.
    """
    config = model_config(model_name)
    if checkpoint is None:
        with torch.device("meta"):
            model = CLIP(config)
        model.to_empty(device="cpu")
        initialize(model)
        return model.eval()
    tensors, dropped = weights.official_names(
        weights.state_dict_in(checkpoint, _("the checkpoint"))
    )
    weights.check_model(
        weights.infer_config(tensors, _("the checkpoint")), config, _("the checkpoint")
    )
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return _round_as_official(weights.build(weights.Checkpoint(config, copies, dropped)))


def load(
    model: CLIP,
    device: str | torch.device | None = None,
    clip_path: str | None = None,
    bert_path: str | None = None,
    use_flash_attention: bool = False,
) -> CLIP:
    """Load a model's image tower and text tower from two files; return it in eval mode.

    Args:
        model: from ``create_model``.
        device: the default is CUDA if available, else the CPU.
        clip_path: file or folder of OpenAI's CLIP (also a TorchScript archive), Hugging Face's
            ``CLIPModel``, open_clip or Chinese-CLIP. Position embeddings are resized to the
            model's resolution; ``logit_scale`` is loaded if the file has it.
        bert_path: file or folder of a ``BertModel`` such as RoBERTa-wwm-ext or RBT3. The pooler
            and the pre-training heads are ignored.
        use_flash_attention: accepted and ignored; torch picks the fastest kernel.

    Raises:
        CheckpointError: a tower in a file is incomplete or has other shapes.
        UsageError: the device is not available.
    """
    target_device = _device(device)
    state = model.state_dict()
    loaded: dict[str, Tensor] = {}
    for path, prefix, read in (
        (clip_path, "visual.", weights.image_tower),
        (bert_path, "bert.", weights.text_tower),
    ):
        if path is None:
            continue
        tower = read(path).tensors
        positions = "visual.positional_embedding"
        if positions in tower and positions in state:
            length = state[positions].shape[0]
            tower[positions] = weights.resize_positions(tower[positions], length)
        expected = {n: t for n, t in state.items() if n.startswith(prefix) or n in tower}
        weights.check_fit(
            tower, expected, _("the {prefix}* tower from {path}", prefix=prefix, path=path)
        )
        loaded |= tower
    model.load_state_dict(state | loaded)
    return model.to(target_device).eval()


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of official flash-attention training to the plain official names.

    The official function also converts the other way, which this package never needs.
    """
    return weights.unfuse_attention(state_dict)


def halved_parameters(model: CLIP) -> list[nn.Parameter]:
    """Return the parameters that the official package holds in float16."""
    halved = [*model.bert.parameters(), model.text_projection]
    for module in model.visual.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            halved += module.parameters()
        elif isinstance(module, SelfAttention):
            halved += [module.in_proj_weight, module.in_proj_bias]
        elif isinstance(module, VisionTransformer):
            halved.append(module.proj)
    return halved


@torch.no_grad()
def _round_as_official(model: CLIP) -> CLIP:
    """Round these parameters to float16, in place; they stay float32."""
    for parameter in halved_parameters(model):
        for chunk in torch.split(parameter.view(-1), 1 << 18):  # small chunks stay in the cache
            chunk.copy_(chunk.half())
    return model


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return pick_device(device)


def _transform_for(config: ModelConfig) -> ImageTransform:
    normalize = Normalize(config.image_mean, config.image_std)
    return ImageTransform(config.vision.resolution, normalize, config.background)
