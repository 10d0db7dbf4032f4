"""Local files of a named model: in the package, in a cache, or downloaded from a hub.

A name is ``mini``, a published model, or ``org/name`` of a repository that has a Chinese-CLIP. The
hubs' own libraries download and resume; this module checks the SHA-256 and moves the files to
their folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from cn_clip.config import PUBLISHED, read_config_json, shard_names
from cn_clip.errors import CheckpointError, MissingWeightsError, UnknownModelError, UsageError
from cn_clip.translation import N_, _, translate

EMBEDDED = "mini"
_MAX_REASON = 60  # characters of a hub's error message in ours
EMBEDDED_FOLDER = Path(str(files("cn_clip").joinpath("assets", EMBEDDED)))
CACHE = "~/.cache/clip"  # the official package's cache
HUBS = ("huggingface", "modelscope")

_OWNERS = {"huggingface": "OFA-Sys", "modelscope": "AI-ModelScope"}
_TITLES = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}
_OTHERS = {  # what to try where a hub cannot be reached, as often in mainland China
    "huggingface": N_("CN_CLIP_HUB=modelscope or HF_ENDPOINT"),
    "modelscope": N_("CN_CLIP_HUB=huggingface"),
}
_INCOMPLETE = ".fetching"  # folder of incomplete downloads, in the target folder
_INDEX = ".index.json"  # suffix of an index of shards
_WEIGHTS = (
    "model.safetensors",
    f"model.safetensors{_INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
)
_CONFIGS = ("config.json", "preprocessor_config.json")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def names() -> list[str]:
    """Return all short names that ``locate`` knows, the embedded model first."""
    return [EMBEDDED, *PUBLISHED]


def is_repository(name: str) -> bool:
    """Whether a name has the form of a repository, ``org/name``, and not of a file."""
    match = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)
    if is_openai_name(name):
        return False
    return match is not None and not re.search(r"\.(pth?|bin|safetensors|onnx)$", name)


def is_openai_name(name: str) -> bool:
    """Whether a name has the form that OpenAI writes, ``ViT-B/16``."""
    return re.match(r"ViT-\w/\d", name) is not None


def find(name: str, download_root: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the local file or folder of a model, None if it is not on this machine.

    Raises:
        UnknownModelError: no model has this name.
    """
    if name == EMBEDDED:
        return EMBEDDED_FOLDER
    if name not in PUBLISHED and not is_repository(name):
        raise UnknownModelError(_("model"), name, names())
    roots = [download_root] if download_root is not None else []
    for root in [*roots, CACHE]:
        path = _find_in(name, Path(root).expanduser())
        if path is not None:
            return path
    return _in_hugging_face_cache(name)


def locate(
    name: str,
    *,
    download_root: str | os.PathLike[str] | None = None,
    use_modelscope: bool | None = None,
) -> Path:
    """Return the local path of a model's weights; download them to ``download_root`` if needed.

    Args:
        name: one of ``names()``, or ``org/name`` of a repository.
        download_root: searched before ``~/.cache/clip``, and downloaded to.
        use_modelscope: True downloads from ModelScope, False from Hugging Face. The default is
            the environment variable ``CN_CLIP_HUB``. ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are
            respected.

    Raises:
        UnknownModelError: no model has this name.
        MissingWeightsError: the download failed; the message names the file and its folder.
        CheckpointError: a downloaded file is damaged, or the model is not a Chinese-CLIP.
        UsageError: ``CN_CLIP_HUB`` is not a known hub.
    """
    path = find(name, download_root)
    if path is not None:
        return path
    hub = _preferred() if use_modelscope is None else HUBS[use_modelscope]
    root = Path(download_root if download_root is not None else CACHE).expanduser()
    try:
        from filelock import FileLock  # comes with huggingface_hub

        incomplete = root / _INCOMPLETE / name.replace("/", "--")
        incomplete.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{incomplete}.lock"):  # a second process waits for the first download
            path = find(name, download_root)
            return path if path is not None else _download(name, hub, root, incomplete)
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _disk_full(name, root, error) from error
        raise _missing(name, hub, root, error) from error
    except Exception as error:  # the hub libraries raise many kinds for a failed download
        raise _missing(name, hub, root, error) from error


def modelscope_endpoint() -> str:
    """Return ModelScope's address; MODELSCOPE_DOMAIN overrides it, as in its own library."""
    return f"https://{os.environ.get('MODELSCOPE_DOMAIN', 'www.modelscope.cn')}"


# Local files


def _find_in(name: str, root: Path) -> Path | None:
    if name in PUBLISHED:
        path = root / PUBLISHED[name].filename
        return path if os.path.isfile(path) else None
    return _model_in(root / name.replace("/", "--"))


def _in_hugging_face_cache(name: str) -> Path | None:
    """Return the model from the cache that Hugging Face's libraries share, if it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    published = PUBLISHED.get(name)
    owner = _OWNERS["huggingface"]
    try:
        repository = f"{owner}/{published.repository}" if published else name
        folder = Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None  # ValueError: not a valid name of a repository
    if published and os.path.isfile(folder / published.filename):
        return folder / published.filename
    return _model_in(folder)


def _model_in(folder: Path) -> Path | None:
    """Return the folder if its format is known, or the only weights file in it."""
    try:
        entries = sorted(os.listdir(folder))
    except (OSError, ValueError):  # no such folder, or not a valid name
        return None
    chosen = _choose(entries)
    if chosen is None:
        return None
    return folder if "config.json" in chosen else folder / chosen[-1]


def _choose(names: list[str]) -> list[str] | None:
    """Return the files of a repository that a model needs; the weights or their index are last."""
    if "config.json" in names:
        for weights in _WEIGHTS:
            if weights in names:
                return [*(name for name in _CONFIGS if name in names), weights]
    checkpoints = [name for name in names if name.endswith((".pt", ".pth"))]
    return checkpoints if len(checkpoints) == 1 else None


# Downloads


def _download(name: str, hub: str, root: Path, incomplete: Path) -> Path:
    """Download to ``incomplete``, then move the complete files to ``root``; resumable."""
    download = _from_modelscope if hub == "modelscope" else _from_hugging_face
    if name in PUBLISHED:
        published = PUBLISHED[name]
        file = download(f"{_OWNERS[hub]}/{published.repository}", published.filename, incomplete)
        target = root / published.filename
        os.replace(file, target)
        shutil.rmtree(incomplete, ignore_errors=True)
        return target
    names = _list_modelscope(name) if hub == "modelscope" else _list_hugging_face(name)
    chosen = _choose(names)
    if chosen is None:
        first_names = ", ".join(sorted(names)[:8]) or _("nothing")
        raise CheckpointError(
            _(
                "{name} on {title} has no Chinese-CLIP in a known format (config.json with "
                "model.safetensors or pytorch_model.bin, or one .pt file); it has {first_names}",
                name=name,
                title=_TITLES[hub],
                first_names=first_names,
            )
        )
    for file_name in chosen:
        file = download(name, file_name, incomplete)
        if file_name == "config.json":
            _check_model_type(name, file)
        if file_name.endswith(_INDEX):
            for shard in shard_names(file):
                download(name, shard, incomplete)
    target = root / name.replace("/", "--")
    shutil.rmtree(incomplete / ".cache", ignore_errors=True)
    os.replace(incomplete, target)
    return target if "config.json" in chosen else target / chosen[-1]


def _check_model_type(name: str, config: Path) -> None:
    """Refuse another architecture before its weights are downloaded."""
    values = read_config_json(config)
    model_type = values.get("model_type") if isinstance(values, dict) else None
    ours = isinstance(values, dict) and "embed_dim" in values
    if model_type != "chinese_clip" and not ours:
        raise CheckpointError(
            _(
                "{name} is a model of type {model_type!r}, not a Chinese-CLIP; its weights were "
                "not downloaded",
                name=name,
                model_type=model_type,
            )
        )


def _list_hugging_face(repository: str) -> list[str]:
    from huggingface_hub import HfApi

    return [file.rfilename for file in HfApi().model_info(repository).siblings or []]


def _from_hugging_face(repository: str, filename: str, folder: Path) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(repository, filename)
    try:
        metadata = get_hf_file_metadata(url)  # fails at once without a network
    except HfHubHTTPError as error:
        if error.response.status_code not in (408, 429, 500, 502, 503, 504):
            raise
        metadata = get_hf_file_metadata(url, retry_on_errors=True)
    file = Path(hf_hub_download(repository, filename, local_dir=folder))
    difference = _difference(file, metadata.size, metadata.etag)
    if difference:
        file.unlink()
        raise CheckpointError(
            _(
                "{filename} of {repository} came with {difference}; it was deleted. Try again, or "
                "try another hub (CN_CLIP_HUB=modelscope) or a mirror (HF_ENDPOINT)",
                filename=filename,
                repository=repository,
                difference=difference,
            )
        )
    return file


def _difference(file: Path, size: int | None, etag: str | None) -> str | None:
    """Return how a file differs from the hub's metadata; small files have no SHA-256 there."""
    if size is not None and file.stat().st_size != size:
        return _("{st_size:,} bytes instead of {size:,}", st_size=file.stat().st_size, size=size)
    if etag is None or not re.fullmatch("[0-9a-f]{64}", etag):
        return None
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return (
        None
        if digest == etag
        else _("SHA-256 {digest}... instead of {etag}...", digest=digest[:12], etag=etag[:12])
    )


def _list_modelscope(repository: str) -> list[str]:
    api = _modelscope("modelscope.hub.api").HubApi()
    return [file["Path"] for file in api.get_model_files(repository, recursive=False)]


def _from_modelscope(repository: str, filename: str, folder: Path) -> Path:
    download = _modelscope("modelscope.hub.file_download").model_file_download
    return Path(download(model_id=repository, file_path=filename, local_dir=str(folder)))


def _modelscope(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise ImportError(_("the modelscope package is missing: pip install modelscope")) from None


def _preferred() -> str:
    hub = os.environ.get("CN_CLIP_HUB") or HUBS[0]
    if hub not in HUBS:
        raise UsageError(
            _(
                "CN_CLIP_HUB={hub!r} is not a known hub; give {hubs}",
                hub=hub,
                hubs=_(" or ").join(HUBS),
            )
        )
    return hub


def _disk_full(name: str, root: Path, error: OSError) -> MissingWeightsError:
    return MissingWeightsError(
        _(
            "no space in {folder} to download {name} ({reason}). Free some space, or give another "
            "folder: download_root",
            folder=root,
            name=name,
            reason=error.strerror,
        )
    )


def _missing(name: str, hub: str, root: Path, error: Exception) -> MissingWeightsError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    reason = re.sub(r"(https?://[^/\s]+)/[^\s:]*", r"\1", reason)  # the host is enough
    if len(reason) > _MAX_REASON:
        reason = f"{reason[:_MAX_REASON]}…"
    if name in PUBLISHED:
        published = PUBLISHED[name]
        return MissingWeightsError(
            _(
                "{name} needs {filename}, not downloaded ({reason}). Try {other}, or "
                "get it from {owner}/{repository} on {title} and put it into {folder}",
                name=name,
                filename=published.filename,
                reason=reason,
                other=translate(_OTHERS[hub]),
                owner=_OWNERS[hub],
                repository=published.repository,
                title=_TITLES[hub],
                folder=root,
            )
        )
    return MissingWeightsError(
        _(
            "{name} is not a file or folder, and could not be downloaded from {title} ({reason}). "
            "Try {other}, or put its config.json and model.safetensors (or pytorch_model.bin) into "
            "{folder}",
            name=name,
            title=_TITLES[hub],
            other=translate(_OTHERS[hub]),
            reason=reason,
            folder=root / name.replace("/", "--"),
        )
    )
