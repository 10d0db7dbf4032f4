"""From a model's name to verified files on this machine: embedded, kept, or fetched from a hub.

A name is ``mini``, one of the published models, or ``org/name`` of any repository that holds a
Chinese-CLIP. The hubs' own libraries download, resume and wait their turn; here files are
compared with the SHA-256 that the hub states before they take their place.
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

from cn_clip.config import PUBLISHED, read_json, shards_of
from cn_clip.errors import CheckpointError, MissingWeightsError, UnknownModelError, UsageError

EMBEDDED = "mini"
_MAX_REASON = 60  # characters of a hub's own error in ours; it begins with what matters
EMBEDDED_FOLDER = Path(str(files("cn_clip").joinpath("assets", EMBEDDED)))
CACHE = "~/.cache/clip"  # the official package's, so that files fetched by it are found
HUBS = ("huggingface", "modelscope")

_OWNERS = {"huggingface": "OFA-Sys", "modelscope": "AI-ModelScope"}
_TITLES = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}
_FETCHING = ".fetching"  # in the folder that files are fetched to: what is not whole yet
_INDEX = ".index.json"  # names the shards of a file
_WEIGHTS = (
    "model.safetensors",
    f"model.safetensors{_INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{_INDEX}",
)
_BESIDE = ("config.json", "preprocessor_config.json")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, one's share of it, a limit


def names() -> list[str]:
    """Every short name that ``locate`` knows, the embedded model first."""
    return [EMBEDDED, *PUBLISHED]


def is_repository(name: str) -> bool:
    """Whether a name is written like a hub's repository, ``org/name``, rather than like a file."""
    spelled = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)
    if name.replace("/", "-") in names():  # OpenAI writes ViT-B/16
        return False
    return spelled is not None and not re.search(r"\.(pth?|bin|safetensors|onnx)$", name)


def find(name: str, download_root: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the local file or folder of a model, or None when it would have to be fetched.

    Raises:
        UnknownModelError: no model has that name.
    """
    if name == EMBEDDED:
        return EMBEDDED_FOLDER
    if name not in PUBLISHED and not is_repository(name):
        raise UnknownModelError("model", name, names())
    roots = [download_root] if download_root is not None else []
    for root in [*roots, CACHE]:
        path = _found(name, Path(root).expanduser())
        if path is not None:
            return path
    return _in_hugging_face_cache(name)


def locate(
    name: str,
    *,
    download_root: str | os.PathLike[str] | None = None,
    use_modelscope: bool | None = None,
) -> Path:
    """Return the local path of a model's weights; fetch them into ``download_root`` if needed.

    Args:
        name: one of ``names()``, or ``org/name`` of a repository.
        download_root: looked into before ``~/.cache/clip``, and fetched to.
        use_modelscope: fetch from ModelScope; False is Hugging Face. By default the environment
            decides: ``CN_CLIP_HUB=modelscope``. ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are
            honoured.

    Raises:
        UnknownModelError: no model has that name.
        MissingWeightsError: they are not here and no hub gave them; says what to put where.
        CheckpointError: the hub gave something else than it promised, or no Chinese-CLIP.
        UsageError: ``CN_CLIP_HUB`` names no hub.
    """
    found = find(name, download_root)
    if found is not None:
        return found
    hub = _preferred() if use_modelscope is None else HUBS[use_modelscope]
    root = Path(download_root if download_root is not None else CACHE).expanduser()
    try:
        from filelock import FileLock  # comes with huggingface_hub

        work = root / _FETCHING / name.replace("/", "--")
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{work}.lock"):  # a second process waits, then finds what the first fetched
            found = find(name, download_root)
            return found if found is not None else _fetch(name, hub, root, work)
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise _no_room(name, root, error) from error
        raise _missing(name, hub, root, error) from error
    except Exception as error:  # the hub libraries raise many kinds; all mean "not here"
        raise _missing(name, hub, root, error) from error


def modelscope_endpoint() -> str:
    """Return ModelScope's address; MODELSCOPE_DOMAIN overrides it, as in its own library."""
    return f"https://{os.environ.get('MODELSCOPE_DOMAIN', 'www.modelscope.cn')}"


# Local files


def _found(name: str, root: Path) -> Path | None:
    if name in PUBLISHED:
        path = root / PUBLISHED[name].filename
        return path if os.path.isfile(path) else None
    return _model_in(root / name.replace("/", "--"))


def _in_hugging_face_cache(name: str) -> Path | None:
    """Return what transformers or another user of Hugging Face's library fetched already."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    published = PUBLISHED.get(name)
    owner = _OWNERS["huggingface"]
    try:
        repository = f"{owner}/{published.repository}" if published else name
        folder = Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None  # ValueError: the name is none that Hugging Face could have
    if published and os.path.isfile(folder / published.filename):
        return folder / published.filename
    return _model_in(folder)


def _model_in(folder: Path) -> Path | None:
    """Return the folder of a model in a known format, or the only file of weights in it."""
    try:
        inside = sorted(os.listdir(folder))
    except (OSError, ValueError):  # there is none, or its name is none that a folder can have
        return None
    chosen = _choose(inside)
    if chosen is None:
        return None
    return folder if "config.json" in chosen else folder / chosen[-1]


def _choose(names: list[str]) -> list[str] | None:
    """Choose what to load out of a repository's files; the weights, or their index, come last."""
    if "config.json" in names:
        for weights in _WEIGHTS:
            if weights in names:
                return [*(name for name in _BESIDE if name in names), weights]
    alone = [name for name in names if name.endswith((".pt", ".pth"))]
    return alone if len(alone) == 1 else None


# Fetching


def _fetch(name: str, hub: str, root: Path, work: Path) -> Path:
    """Fetch into ``work``, which keeps what a break leaves, and move what is whole to its place."""
    get = _from_modelscope if hub == "modelscope" else _from_hugging_face
    if name in PUBLISHED:
        published = PUBLISHED[name]
        file = get(f"{_OWNERS[hub]}/{published.repository}", published.filename, work)
        target = root / published.filename
        os.replace(file, target)
        shutil.rmtree(work, ignore_errors=True)
        return target
    listed = _list_modelscope(name) if hub == "modelscope" else _list_hugging_face(name)
    chosen = _choose(listed)
    if chosen is None:
        shown = ", ".join(sorted(listed)[:8]) or "nothing"
        raise CheckpointError(
            f"{name} on {_TITLES[hub]} holds no Chinese-CLIP in a known format (config.json with "
            f"model.safetensors or pytorch_model.bin, or one .pt file); it has {shown}"
        )
    for file_name in chosen:
        file = get(name, file_name, work)
        if file_name == "config.json":
            _check_kind(name, file)
        if file_name.endswith(_INDEX):
            for shard in shards_of(file):
                get(name, shard, work)
    target = root / name.replace("/", "--")
    shutil.rmtree(work / ".cache", ignore_errors=True)
    os.replace(work, target)
    return target if "config.json" in chosen else target / chosen[-1]


def _check_kind(name: str, config: Path) -> None:
    """Refuse another architecture before its weights are fetched."""
    values = read_json(config)
    kind = values.get("model_type") if isinstance(values, dict) else None
    ours = isinstance(values, dict) and "embed_dim" in values
    if kind != "chinese_clip" and not ours:
        raise CheckpointError(
            f"{name} is a model of type {kind!r}, not a Chinese-CLIP; its weights were not fetched"
        )


def _list_hugging_face(repository: str) -> list[str]:
    from huggingface_hub import HfApi

    return [file.rfilename for file in HfApi().model_info(repository).siblings or []]


def _from_hugging_face(repository: str, filename: str, folder: Path) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(repository, filename)
    try:
        stated = get_hf_file_metadata(url)  # says at once when there is no network
    except HfHubHTTPError as error:
        if error.response.status_code not in (408, 429, 500, 502, 503, 504):
            raise
        stated = get_hf_file_metadata(url, retry_on_errors=True)
    file = Path(hf_hub_download(repository, filename, local_dir=folder))
    wrong = _difference(file, stated.size, stated.etag)
    if wrong:
        file.unlink()
        raise CheckpointError(
            f"{filename} of {repository} came with {wrong}; it was thrown away. Try again, or "
            "another hub: CN_CLIP_HUB=modelscope, or a mirror by HF_ENDPOINT"
        )
    return file


def _difference(file: Path, size: int | None, etag: str | None) -> str | None:
    """Say how a file differs from what the hub states; small files come without a SHA-256."""
    if size is not None and file.stat().st_size != size:
        return f"{file.stat().st_size:,} bytes instead of {size:,}"
    if etag is None or not re.fullmatch("[0-9a-f]{64}", etag):
        return None
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return None if digest == etag else f"SHA-256 {digest[:12]}... instead of {etag[:12]}..."


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
        raise ImportError("the modelscope package is missing: pip install modelscope") from None


def _preferred() -> str:
    hub = os.environ.get("CN_CLIP_HUB") or HUBS[0]
    if hub not in HUBS:
        raise UsageError(f"CN_CLIP_HUB={hub!r} is no hub known here; give {' or '.join(HUBS)}")
    return hub


def _no_room(name: str, root: Path, error: OSError) -> MissingWeightsError:
    return MissingWeightsError(
        f"no room in {root} to download {name} ({error.strerror}). Free some space, or give "
        "another place: download_root"
    )


def _missing(name: str, hub: str, root: Path, error: Exception) -> MissingWeightsError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if len(reason) > _MAX_REASON:
        reason = f"{reason[:_MAX_REASON]}…"
    if name in PUBLISHED:
        published = PUBLISHED[name]
        return MissingWeightsError(
            f"{name} needs {published.filename}, not found here and not fetched ({reason}). "
            f"Get it from {_OWNERS['huggingface']}/{published.repository} on Hugging Face "
            f"({_OWNERS['modelscope']} on ModelScope) and put it into {root}"
        )
    return MissingWeightsError(
        f"{name} is neither a file or folder here nor could it be fetched from {_TITLES[hub]} "
        f"({reason}). Download config.json and model.safetensors (or pytorch_model.bin) of {name} "
        f"and put them into {root / name.replace('/', '--')}"
    )
