"""The shapes of every model: frozen values, derived from one another, readable from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from cn_clip.errors import CheckpointError, UnknownModelError, UsageError

BackendName = Literal["auto", "torch"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
VisionKind = Literal["vit", "resnet", "efficientnet_lite"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Shape of an image tower.

    ``layers`` counts the residual blocks: one number for a ViT, one per stage for a ResNet;
    an EfficientNet-Lite0 has a fixed plan and ignores it, together with ``width``.
    """

    kind: VisionKind
    resolution: int = 224
    width: int = 768
    layers: tuple[int, ...] = (12,)
    patch_size: int = 16
    head_width: int = 64


@dataclass(frozen=True, slots=True)
class TextConfig:
    """Shape of a BERT text tower."""

    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 21128
    max_positions: int = 512
    token_types: int = 2
    dropout: float = 0.1


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything needed to build a model and to prepare its input.

    ``background`` is the colour that transparent pixels are laid on by our own API;
    ``None`` drops the alpha channel, which is what the official weights were trained with.
    """

    name: str
    embed_dim: int
    vision: VisionConfig
    text: TextConfig
    context_length: int = 52
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    background: Literal["white"] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; ``from_dict`` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build a config from JSON values.

        Raises:
            CheckpointError: a key is missing, unknown or of the wrong kind.
        """
        top = _known(cls, values, "config.json")
        vision = _known(VisionConfig, top.pop("vision", {}), "config.json, vision")
        text = _known(TextConfig, top.pop("text", {}), "config.json, text")
        for values, key in ((vision, "layers"), (top, "image_mean"), (top, "image_std")):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        try:
            config = cls(vision=VisionConfig(**vision), text=TextConfig(**text), **top)
        except TypeError as error:
            raise CheckpointError(f"config.json is incomplete: {error}") from None
        check_config(config, "config.json")
        return config


def check_config(config: ModelConfig, where: str) -> None:
    """Raise a ``CheckpointError`` for a value that would fail later, far from where it stands."""
    vision, text = config.vision, config.text
    counts = {
        "embed_dim": config.embed_dim,
        "context_length": config.context_length,
        **{f"vision.{key}": getattr(vision, key) for key in _VISION_COUNTS},
        **{f"text.{key}": getattr(text, key) for key in _TEXT_COUNTS},
    }
    bad = [f"{key} = {n!r}" for key, n in counts.items() if not _is_count(n, 1_000_000)]
    layers = vision.layers
    if not layers or not isinstance(layers, tuple) or not all(_is_count(n, 1000) for n in layers):
        bad.append(f"vision.layers = {vision.layers!r}")
    if vision.kind not in get_args(VisionKind):
        bad.append(f"vision.kind = {vision.kind!r}")
    for key, numbers in (("image_mean", config.image_mean), ("image_std", config.image_std)):
        three = isinstance(numbers, tuple) and len(numbers) == 3
        if not three or not all(isinstance(n, float) for n in numbers):
            bad.append(f"{key} = {numbers!r}")
    if config.background not in (None, "white"):
        bad.append(f"background = {config.background!r}")
    if not bad and text.hidden_size % text.heads:
        bad.append(f"text.heads = {text.heads}, which does not divide {text.hidden_size}")
    if not bad and config.context_length > text.max_positions:
        bad.append(f"context_length = {config.context_length}, above text.max_positions")
    if bad:
        raise CheckpointError(f"{where} has an impossible value: {bad[0]}")


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _known(cls: type, values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{where}: expected an object, found {type(values).__name__}")
    unknown = sorted(set(values) - {field.name for field in fields(cls)})
    if unknown:
        raise CheckpointError(
            f"{where}: unknown key {unknown[0]!r}; was it written by a newer cn_clip? "
            "Update with: pip install -U cn-clip"
        )
    return dict(values)


_VISION_COUNTS = ("resolution", "width", "patch_size", "head_width")
_TEXT_COUNTS = (
    "hidden_size",
    "layers",
    "heads",
    "intermediate_size",
    "vocab_size",
    "max_positions",
    "token_types",
)

_VIT_B_16 = VisionConfig("vit", 224, width=768, layers=(12,), patch_size=16)
_VIT_L_14 = VisionConfig("vit", 224, width=1024, layers=(24,), patch_size=14)

VISION_TOWERS: dict[str, VisionConfig] = {
    "ViT-B-32": replace(_VIT_B_16, patch_size=32),
    "ViT-B-16": _VIT_B_16,
    "ViT-L-14": _VIT_L_14,
    "ViT-L-14-336": replace(_VIT_L_14, resolution=336),
    "ViT-H-14": replace(_VIT_L_14, width=1280, layers=(32,), head_width=80),
    "RN50": VisionConfig("resnet", 224, width=64, layers=(3, 4, 6, 3)),
}

_ROBERTA_BASE = TextConfig()

TEXT_TOWERS: dict[str, TextConfig] = {
    "RBT3-chinese": replace(_ROBERTA_BASE, layers=3),
    "RoBERTa-wwm-ext-base-chinese": _ROBERTA_BASE,
    "RoBERTa-wwm-ext-large-chinese": replace(
        _ROBERTA_BASE, hidden_size=1024, layers=24, heads=16, intermediate_size=4096
    ),
}

EMBED_DIMS = {
    "ViT-B-32": 512,
    "ViT-B-16": 512,
    "ViT-L-14": 768,
    "ViT-L-14-336": 768,
    "ViT-H-14": 1024,
    "RN50": 1024,
}


@dataclass(frozen=True, slots=True)
class Published:
    """A published model: its towers by their official names, and the file its weights come in."""

    vision: str
    text: str
    repository: str
    filename: str

    @property
    def struct(self) -> str:
        """The official ``vision@text`` name."""
        return f"{self.vision}@{self.text}"


# What the authors released: Yang et al., "Chinese CLIP", arXiv:2211.01335, and their hub pages.
PUBLISHED: dict[str, Published] = {
    "ViT-B-16": Published(
        "ViT-B-16",
        "RoBERTa-wwm-ext-base-chinese",
        "chinese-clip-vit-base-patch16",
        "clip_cn_vit-b-16.pt",
    ),
    "ViT-L-14": Published(
        "ViT-L-14",
        "RoBERTa-wwm-ext-base-chinese",
        "chinese-clip-vit-large-patch14",
        "clip_cn_vit-l-14.pt",
    ),
    "ViT-L-14-336": Published(
        "ViT-L-14-336",
        "RoBERTa-wwm-ext-base-chinese",
        "chinese-clip-vit-large-patch14-336px",
        "clip_cn_vit-l-14-336.pt",
    ),
    "ViT-H-14": Published(
        "ViT-H-14",
        "RoBERTa-wwm-ext-large-chinese",
        "chinese-clip-vit-huge-patch14",
        "clip_cn_vit-h-14.pt",
    ),
    "RN50": Published("RN50", "RBT3-chinese", "chinese-clip-rn50", "clip_cn_rn50.pt"),
}


def model_config(struct: str, *, resolution: int | None = None) -> ModelConfig:
    """Return the config of ``"VISION@TEXT"``, such as ``"ViT-B-16@RoBERTa-wwm-ext-base-chinese"``.

    The two names may hold ``/`` for ``-``, as OpenAI writes them. ``resolution`` is the side of
    the square input in pixels; by default the tower's own.

    Raises:
        UsageError: ``struct`` has no ``@``.
        UnknownModelError: a tower is unknown; the message offers the nearest name.
    """
    vision_name, at, text_name = struct.replace("/", "-").partition("@")
    if not at:
        raise UsageError(
            f"{struct!r} names no text tower; write both, as ViT-B-16@RoBERTa-wwm-ext-base-chinese"
        )
    if vision_name not in VISION_TOWERS:
        raise UnknownModelError("image tower", vision_name, VISION_TOWERS)
    if text_name not in TEXT_TOWERS:
        raise UnknownModelError("text tower", text_name, TEXT_TOWERS)
    vision = VISION_TOWERS[vision_name]
    if resolution is not None:
        vision = replace(vision, resolution=resolution)
    return ModelConfig(
        name=struct, embed_dim=EMBED_DIMS[vision_name], vision=vision, text=TEXT_TOWERS[text_name]
    )


# Every model that has a name. ViT-B-32 has towers but no published weights; `mini` is embedded in
# the package, with a config.json of its own beside its weights.
MODELS: dict[str, ModelConfig] = {
    **{
        name: replace(model_config(published.struct), name=name)
        for name, published in PUBLISHED.items()
    },
    "ViT-B-32": replace(model_config("ViT-B-32@RoBERTa-wwm-ext-base-chinese"), name="ViT-B-32"),
}
