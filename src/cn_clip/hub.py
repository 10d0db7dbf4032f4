"""From a model's name to a file on this machine: embedded, kept, or fetched from a hub."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from cn_clip.config import PUBLISHED
from cn_clip.errors import MissingWeightsError, UnknownModelError

EMBEDDED = "mini"
EMBEDDED_FOLDER = Path(str(files("cn_clip").joinpath("assets", EMBEDDED)))
CACHE = "~/.cache/clip"  # the official package's, so that files fetched by it are found

_HUGGING_FACE, _MODELSCOPE = "OFA-Sys", "AI-ModelScope"


def names() -> list[str]:
    """Every name that ``locate`` knows, the embedded model first."""
    return [EMBEDDED, *PUBLISHED]


def find(name: str, download_root: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the local file or folder of a model, or None when it would have to be fetched.

    Raises:
        UnknownModelError: no model has that name.
    """
    if name == EMBEDDED:
        return EMBEDDED_FOLDER
    if name not in PUBLISHED:
        raise UnknownModelError("model", name, names())
    roots = [download_root] if download_root is not None else []
    for root in [*roots, CACHE]:
        path = Path(root).expanduser() / PUBLISHED[name].filename
        if path.is_file():
            return path
    return None


def locate(
    name: str,
    *,
    download_root: str | os.PathLike[str] | None = None,
    use_modelscope: bool = False,
) -> Path:
    """Return the local path of a model's weights; fetch them into ``download_root`` if needed.

    Raises:
        UnknownModelError: no model has that name.
        MissingWeightsError: they are not here and no hub gave them; says what to put where.
    """
    found = find(name, download_root)
    if found is not None:
        return found
    root = Path(download_root if download_root is not None else CACHE).expanduser()
    published = PUBLISHED[name]
    try:
        root.mkdir(parents=True, exist_ok=True)
        fetch = _from_modelscope if use_modelscope else _from_hugging_face
        return fetch(published.repository, published.filename, root)
    except Exception as error:  # the hub libraries raise many kinds; all mean "not here"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingWeightsError(
            f"{name} needs {published.filename}, which is not in {root} and could not be fetched "
            f"({reason}). Download it from {_HUGGING_FACE}/{published.repository} on Hugging Face "
            f"or {_MODELSCOPE}/{published.repository} on ModelScope and put it into {root}"
        ) from error


def modelscope_endpoint() -> str:
    """Return ModelScope's address; MODELSCOPE_DOMAIN overrides it, as in its own library."""
    return f"https://{os.environ.get('MODELSCOPE_DOMAIN', 'www.modelscope.cn')}"


def _from_hugging_face(repository: str, filename: str, root: Path) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(f"{_HUGGING_FACE}/{repository}", filename, local_dir=root))


def _from_modelscope(repository: str, filename: str, root: Path) -> Path:
    try:
        from modelscope.hub.file_download import model_file_download
    except ImportError:
        raise ImportError("the modelscope package is missing: pip install modelscope") from None
    return Path(
        model_file_download(
            model_id=f"{_MODELSCOPE}/{repository}", file_path=filename, local_dir=str(root)
        )
    )
