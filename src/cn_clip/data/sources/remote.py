"""Files behind URLs: S3, Google Cloud Storage, Azure, OSS, Hugging Face and web servers.

They are read in blocks through a cache on the local disk. The library is obstore, whose own means
give the credentials. Its threads do not survive a fork, so workers that read remote files are not
forked (see ``loader``).
"""

from __future__ import annotations

import fnmatch
import http.client
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from importlib import import_module
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import quote, urlsplit

from cn_clip.data.captions import digest
from cn_clip.data.sources.block_cache import BLOCK_SIZE, BlockCache, default_cache
from cn_clip.data.sources.shard_file import FileState, ReadAt, changed_message
from cn_clip.errors import DataError, UnavailableError, UsageError
from cn_clip.install import install_command
from cn_clip.text import path_text
from cn_clip.translation import _

_Result = TypeVar("_Result")
SCHEMES = ("s3", "gs", "az", "oss", "hf", "https", "http")
_ATTEMPTS = 6
_FIRST_PAUSE = 0.2  # seconds; doubled after each attempt
_TIMEOUT = 30.0  # seconds for a block, or another request
_THREADS = 16  # requests at once
_AHEAD = 4  # blocks, when a file is read in sequence
_FEW = 8  # files of a folder that are asked for one by one
_HUB = "https://huggingface.co"


def is_remote(path: str) -> bool:
    """Return whether a path is a URL of a remote file."""
    return path.partition("://")[0] in SCHEMES and "://" in path


class RemoteFile:
    """A file behind a URL."""

    def __init__(self, url: str, state: FileState | None = None) -> None:
        """Name a file; ``state`` is its present state, if it is known."""
        self.url, self._state = url, state
        self.name, self.short_name = path_text(url), path_text(url).rpartition("/")[2]
        self.identity = url.encode(errors="surrogateescape")

    def state(self) -> FileState:
        if self._state is None:
            store, path = locate(self.url)
            self._state = state_of(request(self.name, lambda: obstore().head(store, path)))
        return self._state

    def read(self, state: FileState, offset: int, length: int) -> bytes:
        stop = min(offset + length, state.size)
        parts = []
        while offset < stop:
            number, within = divmod(offset, BLOCK_SIZE)
            taken = min(stop - offset, BLOCK_SIZE - within)
            fetch = partial(self._fetch, state, number)
            part = _blocks().read(self._key(state), number, within, taken, fetch)
            if len(part) != taken:
                raise UnavailableError(changed_message(self.name))
            parts.append(part)
            offset += taken
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_ahead(self, offset: int, length: int) -> None:
        state = self.state()
        for number in range(offset // BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE)):
            if not _blocks().has(self._key(state), number):
                _pool(os.getpid()).submit(self._read_block, state, number)

    def open(self, state: FileState) -> BinaryIO:
        return cast(BinaryIO, _InSequence(self, state))

    def _read_block(self, state: FileState, number: int) -> None:
        # Its reader reports an error.
        _blocks().read(self._key(state), number, 0, 0, lambda: self._fetch(state, number))

    def _key(self, state: FileState) -> str:
        return f"{digest(f'{self.url}|{state.size}|{state.version}'):016x}"

    def _fetch(self, state: FileState, number: int) -> bytes:
        store, path = locate(self.url)
        start, stop = number * BLOCK_SIZE, min((number + 1) * BLOCK_SIZE, state.size)

        def get() -> bytes:
            result = obstore().get(store, path, options={"range": (start, stop)})
            if state_of(result.meta) != state:
                raise UnavailableError(changed_message(self.name))
            content = bytes(result.bytes())
            if len(content) != stop - start:
                raise OSError(_("the connection ended early"))
            return content

        return request(self.name, get)


def read_object(url: str, limit: int) -> bytes:
    """Return a small file behind a URL, by one request and without the cache.

    Raises:
        DataError: it cannot be read, or is larger than ``limit`` bytes.
    """
    name = path_text(url)
    store, path = locate(url)

    def get() -> bytes:
        result = obstore().get(store, path)
        if result.meta["size"] > limit:
            raise DataError(
                _(
                    "{path} has {size:,} bytes, above the limit of {limit:,}",
                    path=name,
                    size=result.meta["size"],
                    limit=limit,
                )
            )
        return bytes(result.bytes())

    return request(name, get)


class _InSequence(ReadAt):
    """Reads a file in sequence, and the next blocks ahead."""

    _block = -1

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._block != (block := self.tell() // BLOCK_SIZE):
            self._block = block
            left = self._state.size - self.tell()
            self._file.read_ahead(self.tell(), min(left, _AHEAD * BLOCK_SIZE))
        return super().readinto(buffer)


def find_files(pattern: str, urls: Sequence[str]) -> list[RemoteFile]:
    """Return the files of URLs, in order; each may hold globs in its last parts, whose matches are
    sorted.

    Many files in one folder are listed at once where the store can list.

    Args:
        pattern: what the URLs were expanded from, for messages.
        urls: names, or globs.

    Raises:
        UsageError: obstore is missing, or a store that cannot list is asked to.
        DataError: the store cannot be reached, refuses access, or a folder cannot be listed.
    """
    folders: dict[str, int] = {}
    for url in urls:
        folder = url.rpartition("/")[0]
        folders[folder] = folders.get(folder, 0) + 1
    listed: dict[str, FileState] = {}
    for folder, count in folders.items():
        if _can_list(folder) and (count > _FEW or _is_glob(folder)):
            listed |= _list(folder)
    files: list[RemoteFile] = []
    for url in urls:
        if not _is_glob(url):
            files.append(RemoteFile(url, listed.get(url)))
            continue
        folder = re.split(r"/[^/]*[*?[]", url)[0]
        if not _can_list(folder):
            raise UsageError(
                _(
                    "{pattern}: files of a web server cannot be listed; name them with braces, "
                    "such as {{00000..00099}}.tar",
                    pattern=pattern,
                )
            )
        match = re.compile(_glob_expression(url)).fullmatch
        found = listed if folder == url.rpartition("/")[0] and listed else _list(folder)
        files += [RemoteFile(name, state) for name, state in sorted(found.items()) if match(name)]
    unknown = [file for file in files if file._state is None]
    if len(unknown) > 1:
        for _state in _pool(os.getpid()).map(lambda file: file.state(), unknown):
            pass
    return files


def _glob_expression(url: str) -> str:
    """Return a glob as a regular expression: ``*`` and ``?`` stay within a folder."""
    expression = fnmatch.translate(url).replace("(?s:", "(?:")
    return expression.replace(".*", "[^/]*")


def _is_glob(url: str) -> bool:
    return any(character in url for character in "*?[")


def _can_list(url: str) -> bool:
    return urlsplit(url).scheme in ("s3", "gs", "az", "oss")


def _list(folder: str) -> dict[str, FileState]:
    store, prefix = locate(folder)
    root = folder[: len(folder) - len(prefix)].rstrip("/") if prefix else folder.rstrip("/")

    def collect() -> dict[str, FileState]:
        pages: Iterable[Any] = obstore().list(store, prefix or None, chunk_size=1000)
        return {f"{root}/{meta['path']}": state_of(meta) for page in pages for meta in page}

    return request(path_text(folder), collect)


def state_of(meta: Any) -> FileState:
    """Return the state of a file from what its store says about it."""
    tag = meta.get("e_tag")
    version = digest(tag) >> 1 if tag else int(meta["last_modified"].timestamp() * 1e9)
    return FileState(meta["size"], version)


def request(name: str, send: Callable[[], _Result]) -> _Result:
    """Return the result of a request, which is sent again after errors that may pass.

    Raises:
        UnavailableError: it fails for good; the message names the file.
    """
    errors = import_module("obstore.exceptions")
    refused = errors.PermissionDeniedError, errors.UnauthenticatedError
    pause = _FIRST_PAUSE
    for attempt in range(_ATTEMPTS):
        try:
            return send()
        except (errors.NotFoundError, FileNotFoundError):
            raise UnavailableError(_("{path}: no such file", path=name)) from None
        except refused:
            raise UnavailableError(
                _(
                    "{path}: access is refused; give the credentials that its store needs, such as "
                    "AWS_ACCESS_KEY_ID, or AWS_SKIP_SIGNATURE=true for a public bucket",
                    path=name,
                )
            ) from None
        except (errors.BaseError, OSError) as error:
            reason = str(error).partition("\n")[0]
            if attempt + 1 == _ATTEMPTS or _is_final(reason):
                raise UnavailableError(
                    _("{path} cannot be read: {reason}", path=name, reason=reason)
                ) from None
            time.sleep(pause)
            pause *= 2
    raise AssertionError


def _is_final(reason: str) -> bool:
    """Return whether an error stays: a refused redirect, or an answer 4xx."""
    return re.search(r"redirect|status(?: code)?:? ?4(?!08|29)\d\d", reason) is not None


def locate(url: str) -> tuple[Any, str]:
    """Return the store of a URL, a store of obstore, and the path in it."""
    parts = urlsplit(url)
    if parts.scheme == "hf":
        endpoint = os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")
        names = f"{parts.netloc}{parts.path}".split("/")
        if len(names) < 4 or not names[-1]:
            raise UsageError(_("{url}: write hf://datasets/OWNER/NAME/PATH", url=url))
        repository, path = "/".join(names[:3]), "/".join(names[3:])
        return locate(f"{endpoint}/{repository}/resolve/main/{path}")
    root = f"{parts.scheme}://{parts.netloc}"
    if parts.scheme in ("http", "https"):
        if parts.netloc != urlsplit(os.environ.get("HF_ENDPOINT", _HUB)).netloc:
            _refuse_redirects(root, parts.path)
    elif parts.scheme == "s3" and (own := _own_endpoint()):
        _refuse_redirects(own.rstrip("/"), f"/{parts.netloc}{parts.path}")
    return _store(root, os.getpid()), parts.path.lstrip("/")


def _own_endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""


_asked: set[str] = set()  # servers that do not redirect


def _refuse_redirects(root: str, path: str) -> None:
    """Ask a server once for a file; obstore follows redirects, and cannot be told not to.

    Raises:
        DataError: it redirects to another server.
    """
    if root in _asked:
        return
    parts = urlsplit(root)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=_TIMEOUT)
    try:
        connection.request("HEAD", quote(f"{parts.path}{path}", safe="/%"))
        answer = connection.getresponse()
        target = urlsplit(answer.getheader("Location") or "") if answer.status // 100 == 3 else None
    except (OSError, http.client.HTTPException):  # obstore reports it
        return
    finally:
        connection.close()
    if target is not None and target.netloc not in ("", parts.netloc):
        raise DataError(
            _(
                "{root} redirects to {other}, which is refused; if you trust it, give that address",
                root=root,
                other=f"{target.scheme}://{target.netloc}",
            )
        )
    _asked.add(root)


@lru_cache(maxsize=64)
def _store(root: str, _process: int) -> Any:
    """Return the store of a bucket or a web server. Its credentials are those that obstore finds:
    variables of the environment, or of the machine."""
    stores = import_module("obstore.store") if obstore() else None
    assert stores is not None
    options: dict[str, Any] = {
        "client_options": {
            "timeout": f"{_TIMEOUT:g}s",
            "connect_timeout": f"{min(10.0, _TIMEOUT):g}s",
            "allow_http": root.startswith("http:") or _endpoint_is_plain(),
        },
        "retry_config": {"max_retries": 0},  # retried by ``request``
    }
    if root.startswith("oss://"):
        endpoint = os.environ.get("OSS_ENDPOINT")
        if not endpoint:
            raise UsageError(
                _(
                    "{root}: set OSS_ENDPOINT, such as https://oss-cn-hangzhou.aliyuncs.com, and "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                    root=root,
                )
            )
        options |= {"endpoint": endpoint, "virtual_hosted_style_request": True}
        root = f"s3://{root.removeprefix('oss://')}"
    return stores.from_url(root, **options)


def _endpoint_is_plain() -> bool:
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "OSS_ENDPOINT")
    return any(os.environ.get(name, "").startswith("http:") for name in names)


@cache
def obstore() -> Any:
    try:
        return import_module("obstore")
    except ImportError:
        raise UsageError(
            _("remote files need obstore: {command}", command=install_command("remote"))
        ) from None


@cache
def _blocks() -> BlockCache:
    return default_cache()


@lru_cache(maxsize=1)
def _pool(_process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="remote")
