"""The initial model, and the origin of each of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cn_clip import hub, weights
from cn_clip.config import MODELS, ModelConfig, model_config
from cn_clip.errors import MissingWeightsError, UsageError
from cn_clip.model.clip import CLIP, initialize
from cn_clip.train.recipe.schema import Start
from cn_clip.translation import _

_POSITIONS = "visual.positional_embedding"


@dataclass(frozen=True, slots=True)
class Origin:
    """The tensors of a model from one file; ``dropped`` are the file's unused tensors."""

    place: str
    names: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = {name.split(".")[0] for name in self.names}
        dropped = _("; left out: {dropped}", dropped=_listed(self.dropped)) if self.dropped else ""
        names = ", ".join(sorted(f"{p}.*" if p in ("visual", "bert") else p for p in parts))
        return _(
            "{names} ({tensor_count} tensors) from {place}{dropped}",
            names=names,
            tensor_count=len(self.names),
            place=self.place,
            dropped=dropped,
        )


def initial_model(start: Start, seed: int) -> tuple[CLIP, list[Origin]]:
    """Build the model with random weights, then load the checkpoint, then the file of each tower.

    Returns:
        The model in float32, and the origins of its tensors, the random ones last, as
        ``"random numbers"``.

    Raises:
        UsageError: the recipe names no model.
        UnknownModelError: the model is unknown.
        MissingWeightsError: a file is missing.
        CheckpointError: a file does not fit the model.
    """
    checkpoint = None if start.checkpoint is None else weights.read(_locate(start.checkpoint))
    config = _config(start, None if checkpoint is None else checkpoint.config)
    loaded: dict[str, Tensor] = {}
    origins: list[Origin] = []
    shapes = _skeleton(config).state_dict()
    if checkpoint is not None:
        tensors = _resized(checkpoint.tensors, shapes)
        weights.check_fit(
            tensors,
            shapes,
            _("{name}, loaded from {checkpoint}", name=config.name, checkpoint=start.checkpoint),
        )
        loaded |= tensors
        origins.append(Origin(str(start.checkpoint), tuple(tensors), checkpoint.dropped))
    for path, prefix, read in (
        (start.image, "visual.", weights.image_tower),
        (start.text, "bert.", weights.text_tower),
    ):
        if path is None:
            continue
        if not Path(path).expanduser().exists():
            raise MissingWeightsError(
                _(
                    "no such file: {path}; give a file with the {prefix}* weights",
                    path=path,
                    prefix=prefix,
                )
            )
        tower = read(Path(path).expanduser())
        tensors = _resized(tower.tensors, shapes)
        wanted = {n: t for n, t in shapes.items() if n.startswith(prefix) or n in tensors}
        weights.check_fit(
            tensors,
            wanted,
            _(
                "the {prefix}* tower of {name} from {path}",
                prefix=prefix,
                name=config.name,
                path=path,
            ),
        )
        loaded |= tensors
        origins = [replace(o, names=tuple(n for n in o.names if n not in tensors)) for o in origins]
        origins.append(Origin(path, tuple(tensors), tower.dropped))
    with torch.device("meta"):
        model = CLIP(config)
    model.to_empty(device="cpu")
    initialize(model, torch.Generator().manual_seed(seed))
    model.load_state_dict(model.state_dict() | {n: t.float() for n, t in loaded.items()})
    random = tuple(name for name, _ in model.named_parameters() if name not in loaded)
    if random:
        origins.append(Origin(_("random numbers"), random))
    return model, [origin for origin in origins if origin.names]


def initial_config(start: Start) -> ModelConfig:
    """Return the config of the initial model; no weights are read.

    Raises:
        UsageError, UnknownModelError, MissingWeightsError, CheckpointError: as ``initial_model``.
    """
    if start.checkpoint is None or start.model is not None:
        return _config(start, None)
    return _config(start, weights.read_config(_locate(start.checkpoint)))


def _config(start: Start, of_checkpoint: ModelConfig | None) -> ModelConfig:
    if start.model is not None:
        config = _named_config(start.model)
        if of_checkpoint is not None and _shape(config) != _shape(of_checkpoint):
            weights.check_model(of_checkpoint, config, str(start.checkpoint))
    elif of_checkpoint is not None:
        config = of_checkpoint
    else:
        raise UsageError(
            _(
                "the recipe names no model; give --start.model, such as ViT-B-16, or "
                "--start.checkpoint"
            )
        )
    if start.resolution is not None:
        config = replace(config, vision=replace(config.vision, resolution=start.resolution))
    if start.context_length is not None:
        config = replace(config, context_length=start.context_length)
    return ModelConfig.from_dict(config.to_dict())  # checked


def _shape(config: ModelConfig) -> ModelConfig:
    """Return a config without name and resolution, which may differ from a checkpoint's."""
    return replace(config, name="", vision=replace(config.vision, resolution=0))


def _named_config(model: str) -> ModelConfig:
    name = model.replace("/", "-")
    if name in MODELS:
        return MODELS[name]
    if "@" in model:
        return model_config(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return weights.read_config(folder)
    return weights.read_config(hub.locate(name))


def _locate(checkpoint: str) -> Path:
    path = Path(checkpoint).expanduser()
    if path.exists():
        return path
    if checkpoint.replace("/", "-") in hub.names():
        return hub.locate(checkpoint.replace("/", "-"))
    if hub.is_repository(checkpoint):
        return hub.locate(checkpoint)
    raise MissingWeightsError(
        _("no such file, folder or model: {checkpoint!r} (start.checkpoint)", checkpoint=checkpoint)
    )


def _skeleton(config: ModelConfig) -> CLIP:
    with torch.device("meta"):
        return CLIP(config)


def _resized(tensors: Mapping[str, Tensor], shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Resize position embeddings to the model's resolution, except those of a ResNet."""
    resized = dict(tensors)
    if _POSITIONS in resized and _POSITIONS in shapes:
        resized[_POSITIONS] = weights.resize_positions(
            resized[_POSITIONS], shapes[_POSITIONS].shape[0]
        )
    return resized


def _listed(names: tuple[str, ...], shown: int = 3) -> str:
    more = _(" and {count} more", count=len(names) - shown) if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{more}"
