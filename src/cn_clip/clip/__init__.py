"""The official package's functions under their names: ``import cn_clip.clip as clip``.

A thin facade for code written against the official ``cn_clip``; new code is better served by
``cn_clip.load``. Differences, all on purpose: models come in eval mode and float32 on every
device, quotes are normalised, files are never executed, and what does not fit is an error.

One thing is kept although nobody would choose it: the official package rounds most weights to
float16 while it loads them, on the CPU too. Here they are rounded likewise, so that scores agree
with those on record; ``cn_clip.load`` keeps the precision of the file.
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
from cn_clip.clip.transforms import Normalize, Resize, ToTensor, convert_to_rgb
from cn_clip.config import PUBLISHED, ModelConfig, model_config
from cn_clip.errors import CheckpointError, UnknownModelError, UsageError
from cn_clip.image.modes import DEEP
from cn_clip.model.clip import CLIP, initialize
from cn_clip.model.vision import SelfAttention, VisionTransformer
from cn_clip.tokenizer import default_tokenizer

__all__ = [
    "available_models",
    "convert_state_dict",
    "create_model",
    "image_transform",
    "load",
    "load_from_name",
    "tokenize",
]

_tokenizer = default_tokenizer()  # under the name that scripts reach for


class ImageTransform:
    """PIL image to a float32 tensor (3, S, S), exactly as the official preprocessing.

    That clips 16-bit and float values at 255, which the first such image warns of.

    ``transforms`` are its steps, a list as torchvision's ``Compose`` has it.
    """

    def __init__(self, image_size: int, normalize: Normalize) -> None:
        self.image_size = image_size
        self.transforms: list[Callable[[Any], Any]] = [
            Resize((image_size, image_size)),
            convert_to_rgb,
            ToTensor(),
            normalize,
        ]

    def __call__(self, image: Image.Image) -> Tensor:
        if image.mode in DEEP:
            _warn_of_clipping(image.mode)
        value: Any = image
        for transform in self.transforms:
            value = transform(value)
        return value  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"ImageTransform(image_size={self.image_size})"


@cache
def _warn_of_clipping(mode: str) -> None:
    """Warn once of each mode."""
    warnings.warn(
        f"an image of mode {mode}: values above 255 become white, as in the official "
        "preprocessing; convert it to 8 bits first, or use cn_clip.load().embed_images, which "
        "scales it",
        stacklevel=3,
    )


def available_models() -> list[str]:
    """Return the names that ``load_from_name`` knows."""
    return list(PUBLISHED)


def image_transform(image_size: int = 224) -> ImageTransform:
    """Return the preprocessing: squash bicubic, RGB, ``/255``, CLIP mean and std."""
    return ImageTransform(image_size, Normalize())


def tokenize(texts: str | Sequence[str], context_length: int = 52) -> torch.LongTensor:
    """Return token ids (N, ``context_length``), padded with 0.

    Longer texts are cut; the first time this warns, and
    ``cn_clip.tokenizer.default_tokenizer().truncated`` counts them all.
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
        name: one of ``available_models()``, a path, or ``org/name`` of a repository; a file needs
            no further names, but those given are checked against it.
        device: by default CUDA if there is one, else the CPU.
        download_root: where the file is looked for and downloaded to; ``~/.cache/clip`` by default.
        vision_model_name: such as ``"ViT-B-16"``.
        text_model_name: such as ``"RoBERTa-wwm-ext-base-chinese"``.
        input_resolution: side of the square input in pixels.
        use_modelscope: download from ModelScope instead of Hugging Face; by default the
            environment's ``CN_CLIP_HUB`` decides.

    Raises:
        UnknownModelError: neither a name nor a path.
        MissingWeightsError: the weights are neither here nor to be downloaded.
        CheckpointError: the file is damaged, refused, or holds another model.
        UsageError: the device cannot be had.
    """
    target = _device(device)
    wanted: ModelConfig | None = None
    if name in PUBLISHED:
        path = hub.locate(name, download_root=download_root, use_modelscope=use_modelscope or None)
        wanted = model_config(PUBLISHED[name].struct)
    elif os.path.exists(name) or hub.is_repository(name):
        path = Path(name)
        if not path.exists():
            path = hub.locate(
                name, download_root=download_root, use_modelscope=use_modelscope or None
            )
        if vision_model_name and text_model_name:
            wanted = model_config(
                f"{vision_model_name}@{text_model_name}", resolution=input_resolution
            )
        elif vision_model_name or text_model_name:
            raise UsageError("give both vision_model_name and text_model_name, or neither")
    else:
        raise UnknownModelError("model", name, available_models())
    checkpoint = weights.read(path)
    if wanted is not None:
        weights.check_model(checkpoint.config, wanted, path)
    if input_resolution not in (None, checkpoint.config.vision.resolution):
        raise CheckpointError(
            f"{path} takes {checkpoint.config.vision.resolution} pixels, "
            f"not input_resolution={input_resolution}"
        )
    model = _round_as_official(weights.build(checkpoint))
    model.to(target)
    return model, _transform_of(model.config)


def create_model(model_name: str, checkpoint: Mapping[str, Any] | None = None) -> CLIP:
    """Return the model ``"VISION@TEXT"``, in eval mode and float32.

    Args:
        model_name: such as ``"ViT-B-16@RoBERTa-wwm-ext-base-chinese"``.
        checkpoint: what ``torch.load`` of an official file returns, the state dict or a dict that
            holds it; without it the weights are drawn at random, from torch's global generator.

    Raises:
        UnknownModelError: a tower is unknown.
        CheckpointError: the weights are of another model.
    """
    config = model_config(model_name)
    if checkpoint is None:
        with torch.device("meta"):
            model = CLIP(config)
        model.to_empty(device="cpu")
        initialize(model)
        return model.eval()
    tensors, dropped = weights.official_names(weights.state_dict_in(checkpoint, "the checkpoint"))
    weights.check_model(weights.infer_config(tensors, "the checkpoint"), config, "the checkpoint")
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    return _round_as_official(weights.build(weights.Checkpoint(config, own, dropped)))


def load(
    model: CLIP,
    device: str | torch.device | None = None,
    clip_path: str | None = None,
    bert_path: str | None = None,
    use_flash_attention: bool = False,
) -> CLIP:
    """Fill a model's image tower and text tower from two files, and return it in eval mode.

    Args:
        model: from ``create_model``.
        device: by default CUDA if there is one, else the CPU.
        clip_path: a file, or the folder that holds it, of OpenAI's CLIP (a TorchScript archive
            too), Hugging Face's ``CLIPModel``, open_clip or Chinese-CLIP. Position embeddings are
            resized to the model's resolution; ``logit_scale`` is taken where there is one.
        bert_path: a file, or the folder that holds it, of a ``BertModel`` such as RoBERTa-wwm-ext
            or RBT3. The pooler and the heads of pre-training are left out.
        use_flash_attention: accepted and ignored; attention picks the fastest kernel by itself.

    Raises:
        CheckpointError: a tower in a file is not whole, or of another shape.
        UsageError: the device cannot be had.
    """
    target = _device(device)
    state = model.state_dict()
    given: dict[str, Tensor] = {}
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
        wanted = {n: t for n, t in state.items() if n.startswith(prefix) or n in tower}
        weights.check_fit(tower, wanted, f"the {prefix}* tower from {path}")
        given |= tower
    model.load_state_dict(state | given)
    return model.to(target).eval()


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under their plain names, from those that flash-attention training wrote.

    The official function also converts the other way; here no code path wants those names.
    """
    return weights.unfuse_attention(state_dict)


@torch.no_grad()
def _round_as_official(model: CLIP) -> CLIP:
    """Round to float16, in place, what the official ``convert_weights`` halves."""
    halved = [*model.bert.parameters(), model.text_projection]
    for module in model.visual.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            halved += module.parameters()
        elif isinstance(module, SelfAttention):
            halved += [module.in_proj_weight, module.in_proj_bias]
        elif isinstance(module, VisionTransformer):
            halved.append(module.proj)
    for parameter in halved:
        for piece in torch.split(
            parameter.view(-1), 1 << 18
        ):  # what fits the cache needs no new memory
            piece.copy_(piece.half())
    return model


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return pick_device(device)


def _transform_of(config: ModelConfig) -> ImageTransform:
    return ImageTransform(config.vision.resolution, Normalize(config.image_mean, config.image_std))
