"""Where the official package keeps the same functions, for scripts that import them from here."""

from cn_clip import hub
from cn_clip.clip import (
    available_models,
    create_model,
    image_transform,
    load,
    load_from_name,
    tokenize,
)
from cn_clip.config import MODELS, PUBLISHED

_MODELS = {name: (it.repository, it.filename) for name, it in PUBLISHED.items()}
_MODEL_INFO = {
    name: {"struct": it.struct, "input_resolution": MODELS[name].vision.resolution}
    for name, it in PUBLISHED.items()
}


def _download(modelname: str, root: str, use_modelscope: bool = False) -> str:
    """Return the path of a published model's file, fetched into ``root`` if it is nowhere."""
    return str(hub.locate(modelname, download_root=root, use_modelscope=use_modelscope))


__all__ = [
    "available_models",
    "create_model",
    "image_transform",
    "load",
    "load_from_name",
    "tokenize",
]
