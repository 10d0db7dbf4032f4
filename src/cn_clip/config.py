"""Model configs: frozen dataclasses, read from and written to JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from cn_clip.errors import CheckpointError, UnknownModelError, UsageError
from cn_clip.files import read_file
from cn_clip.install import update_command
from cn_clip.text import read_json
from cn_clip.translation import _

BackendName = Literal["auto", "torch", "onnx", "openvino"]
Precision = Literal[
    "auto", "float32", "bfloat16", "float16", "int8", "int8+bfloat16", "fp32", "bf16", "fp16"
]
_SHORT_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
VisionKind = Literal["vit", "resnet", "efficientnet_lite"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def full_precision(name: str) -> str:
    """Return the full name of a precision: ``"float16"`` of ``"fp16"``."""
    return _SHORT_PRECISIONS.get(name, name)


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Shape of an image tower.

    ``layers`` is the number of residual blocks: one value for a ViT, one per stage for a ResNet.
    EfficientNet-Lite0 has a fixed architecture and ignores ``layers`` and ``width``.
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

    ``background`` is the colour behind transparent pixels; None drops the alpha channel, as in
    the training of the official weights. ``cn_clip.clip`` ignores it.
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
        """Return JSON values, the input of ``from_dict``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build a config from JSON values.

        Raises:
            CheckpointError: a key is missing or unknown, or a value is invalid.
        """
        top = _checked_keys(cls, values, "config.json")
        vision = _checked_keys(VisionConfig, top.pop("vision", {}), _("config.json, vision"))
        text = _checked_keys(TextConfig, top.pop("text", {}), _("config.json, text"))
        for values, key in ((vision, "layers"), (top, "image_mean"), (top, "image_std")):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        try:
            config = cls(vision=VisionConfig(**vision), text=TextConfig(**text), **top)
        except TypeError as error:
            raise CheckpointError(_("config.json is incomplete: {error}", error=error)) from None
        check_config(config, "config.json")
        return config


def check_config(config: ModelConfig, where: str) -> None:
    """Raise a ``CheckpointError`` for a value that no model can have; ``where`` is its file."""
    vision, text = config.vision, config.text
    bad = [
        _(
            "{key} = {value!r}, not an integer from 1 to {maximum:,}",
            key=key,
            value=value,
            maximum=maximum,
        )
        for key, maximum in _MAXIMUM.items()
        if not _is_count(value := _value(config, key), maximum)
    ]
    if not isinstance(config.name, str) or not config.name.isprintable():
        bad.append(f"name = {config.name!r}")
    if vision.kind not in get_args(VisionKind):
        bad.append(f"vision.kind = {vision.kind!r}")
    layers, stages = vision.layers, 4 if vision.kind == "resnet" else 1
    if not isinstance(layers, tuple) or not all(_is_count(n, _MAX_LAYERS) for n in layers):
        bad.append(f"vision.layers = {layers!r}")
    elif len(layers) != stages and vision.kind != "efficientnet_lite":
        bad.append(
            _(
                "vision.layers = {layers!r}; a {kind} has {stages}",
                layers=layers,
                kind=vision.kind,
                stages=stages,
            )
        )
    if not _is_number(text.dropout, 0, 0.999):
        bad.append(f"text.dropout = {text.dropout!r}")
    for key, values, minimum in (
        ("image_mean", config.image_mean, -1000),
        ("image_std", config.image_std, 1e-6),
    ):
        three = isinstance(values, tuple) and len(values) == 3
        if not three or not all(_is_number(n, minimum, 1000) for n in values):
            bad.append(f"{key} = {values!r}")
    if config.background not in (None, "white"):
        bad.append(f"background = {config.background!r}")
    bad = bad or _contradictions(config)
    if bad:
        raise CheckpointError(_("{where} has an impossible value: {bad}", where=where, bad=bad[0]))


def _contradictions(config: ModelConfig) -> list[str]:
    """List valid values that contradict each other."""
    vision, text = config.vision, config.text
    bad = []
    if text.hidden_size % text.heads:
        bad.append(
            _(
                "text.heads = {heads}, which does not divide {hidden_size}",
                heads=text.heads,
                hidden_size=text.hidden_size,
            )
        )
    if config.context_length > text.max_positions:
        bad.append(
            _(
                "context_length = {context_length}, above text.max_positions",
                context_length=config.context_length,
            )
        )
    width = vision.width if vision.kind == "vit" else vision.width * 32  # input of the attention
    if vision.kind != "efficientnet_lite" and width % vision.head_width:
        bad.append(
            _(
                "vision.head_width = {head_width}, which does not divide {width}",
                head_width=vision.head_width,
                width=width,
            )
        )
    if vision.kind == "resnet" and vision.width % 2:
        bad.append(_("vision.width = {width}, which is odd", width=vision.width))
    if vision.kind == "vit" and vision.patch_size > vision.resolution:
        bad.append(
            _(
                "vision.patch_size = {patch_size}, above vision.resolution",
                patch_size=vision.patch_size,
            )
        )
    if vision.kind != "vit" and vision.resolution % 32:
        bad.append(
            _(
                "vision.resolution = {resolution}, not a multiple of 32",
                resolution=vision.resolution,
            )
        )
    if (parameters := estimate_parameters(config)) > _MAX_PARAMETERS:
        bad.append(
            _(
                "about {parameters:,} parameters, above {limit:,}",
                parameters=parameters,
                limit=_MAX_PARAMETERS,
            )
        )
    return bad


def estimate_parameters(config: ModelConfig) -> int:
    """Return the number of parameters within a few percent, without building the model."""
    vision, text, embed_dim = config.vision, config.text, config.embed_dim
    width = vision.width
    if vision.kind == "vit":
        positions = (vision.resolution // vision.patch_size) ** 2
        count = width * (3 * vision.patch_size**2 + positions + embed_dim)
        count += vision.layers[0] * 12 * width**2
    elif vision.kind == "resnet":
        count = sum(n * 17 * (width * 2**stage) ** 2 for stage, n in enumerate(vision.layers))
        count += 32 * width * ((vision.resolution // 32) ** 2 + 3 * 32 * width + embed_dim)
    else:
        count = 4_650_000 + 2280 * embed_dim
    tables = text.vocab_size + text.max_positions + text.token_types
    layer = 4 * text.hidden_size**2 + 2 * text.hidden_size * text.intermediate_size
    return count + text.hidden_size * (tables + embed_dim) + text.layers * layer


def read_config_json(path: Path) -> Any:
    """Read a JSON file of a model folder.

    Raises:
        CheckpointError: the file is unreadable, not JSON, or too large for a config.
    """
    try:
        return read_json(read_file(path, _MAX_JSON_BYTES))
    except ValueError as error:
        raise CheckpointError(
            _("{path} is not JSON ({error}); download it again", path=path, error=error)
        ) from None
    except OSError as error:
        raise CheckpointError(
            _("{path} cannot be read: {reason}", path=path, reason=error.strerror)
        ) from None


def shard_names(index: Path) -> list[str]:
    """Return the file names of the shards in an index.

    Raises:
        CheckpointError: the file is not an index, or names a file outside its folder.
    """
    values = read_config_json(index)
    names = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(names, dict):
        raise CheckpointError(
            _("{index} is not an index of shards: it has no weight_map", index=index)
        )
    shards = sorted({str(shard) for shard in names.values()})
    invalid = [s for s in shards if Path(s).name != s or s.endswith(".json") or "\0" in s]
    if invalid:
        raise CheckpointError(
            _(
                "{index} names {name!r}, not a weights file in its folder",
                index=index,
                name=invalid[0],
            )
        )
    return shards


def _is_count(value: object, maximum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= maximum


def _is_number(value: object, minimum: float, maximum: float) -> bool:
    """Whether a value is a number in this range; False for NaN."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and minimum <= value <= maximum  # type: ignore[operator]


def _value(config: ModelConfig, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _checked_keys(cls: type, values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise CheckpointError(
            _(
                "{where}: expected an object, found {value_type}",
                where=where,
                value_type=type(values).__name__,
            )
        )
    unknown = sorted(set(values) - {field.name for field in fields(cls)})
    if unknown:
        raise CheckpointError(
            _(
                "{where}: unknown key {unknown!r}; was it written by a newer cn_clip? Update "
                "with: {command}",
                where=where,
                unknown=unknown[0],
                command=update_command(),
            )
        )
    return dict(values)


# Far above every published model; they bound the memory of a model and of its input.
_MAXIMUM = {
    "embed_dim": 16_384,
    "context_length": 65_536,
    "vision.resolution": 2048,
    "vision.width": 16_384,
    "vision.patch_size": 512,
    "vision.head_width": 16_384,
    "text.hidden_size": 16_384,
    "text.layers": 256,
    "text.heads": 1024,
    "text.intermediate_size": 131_072,
    "text.vocab_size": 10_000_000,
    "text.max_positions": 65_536,
    "text.token_types": 1024,
}
_MAX_LAYERS = 256
_MAX_PARAMETERS = 5_000_000_000
_MAX_JSON_BYTES = 32 << 20  # an index of shards names every tensor

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
    """A published model: official tower names, repository and weights file."""

    vision: str
    text: str
    repository: str
    filename: str

    @property
    def struct(self) -> str:
        """The official ``vision@text`` name."""
        return f"{self.vision}@{self.text}"


# Released by the authors: Yang et al., "Chinese CLIP", arXiv:2211.01335, and their hub pages.
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

    ``/`` is accepted for ``-``, as in OpenAI's names. ``resolution`` is the side of the square
    input in pixels; the default is the tower's own.

    Raises:
        UsageError: ``struct`` has no ``@``.
        UnknownModelError: a tower is unknown; the message offers the nearest name.
    """
    vision_name, at, text_name = struct.replace("/", "-").partition("@")
    if not at:
        raise UsageError(
            _(
                "{struct!r} names no text tower; name both: ViT-B-16@RoBERTa-wwm-ext-base-chinese",
                struct=struct,
            )
        )
    if vision_name not in VISION_TOWERS:
        raise UnknownModelError(_("image tower"), vision_name, VISION_TOWERS)
    if text_name not in TEXT_TOWERS:
        raise UnknownModelError(_("text tower"), text_name, TEXT_TOWERS)
    vision = VISION_TOWERS[vision_name]
    if resolution is not None:
        vision = replace(vision, resolution=resolution)
    return ModelConfig(
        name=struct, embed_dim=EMBED_DIMS[vision_name], vision=vision, text=TEXT_TOWERS[text_name]
    )


# Every named model except `mini`, which has its own config.json in the package. ViT-B-32 has no
# published weights.
MODELS: dict[str, ModelConfig] = {
    **{
        name: replace(model_config(published.struct), name=name)
        for name, published in PUBLISHED.items()
    },
    "ViT-B-32": replace(model_config("ViT-B-32@RoBERTa-wwm-ext-base-chinese"), name="ViT-B-32"),
}
