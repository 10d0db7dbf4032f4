"""The official module path of the same functions, for scripts that import it."""

from cn_clip import hub
from cn_clip.clip import _tokenizer as _tokenizer
from cn_clip.clip import (
    available_models,
    create_model,
    image_transform,
    load,
    load_from_name,
    tokenize,
    transforms,
)
from cn_clip.clip.model import CLIP as CLIP
from cn_clip.clip.model import convert_weights as convert_weights
from cn_clip.clip.model import restore_model as restore_model
from cn_clip.config import MODELS, PUBLISHED

_convert_to_rgb = transforms.convert_to_rgb
_MODELS = {name: (model.repository, model.filename) for name, model in PUBLISHED.items()}
_MODEL_INFO = {
    name: {"struct": model.struct, "input_resolution": MODELS[name].vision.resolution}
    for name, model in PUBLISHED.items()
}


def _download(modelname: str, root: str, use_modelscope: bool = False) -> str:
    """Return the path of a published model's file; download it to ``root`` if needed."""
    return str(hub.locate(modelname, download_root=root, use_modelscope=use_modelscope))


__all__ = [
    "available_models",
    "create_model",
    "image_transform",
    "load",
    "load_from_name",
    "tokenize",
]
