"""``cn-clip serve``: an HTTP server for embeddings, search, and a page."""

from __future__ import annotations

import os
import sys
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from cn_clip.cli.library_options import DEFAULT, LibraryLoading
from cn_clip.cli.show import Flag
from cn_clip.errors import UsageError
from cn_clip.install import install_command
from cn_clip.translation import _

KEY_VARIABLE = "CN_CLIP_API_KEY"

Port = Annotated[int, Parameter(validator=Number(gte=0, lte=65535))]
Count = Annotated[int, Parameter(validator=Number(gte=1, lte=1024))]
Seconds = Annotated[float, Parameter(validator=Number(gt=0, lte=86400))]
Optional = Annotated[float | None, Parameter(validator=Number(gt=0, lte=31_536_000))]
Megabytes = Annotated[int, Parameter(validator=Number(gte=1, lte=1024))]

# `--parts URL URL`, and `--parts URL --parts URL`
Urls = Annotated[tuple[str, ...], Parameter(negative=(), show_default=False, consume_multiple=True)]


def serve(
    *,
    library: str | None = None,
    shards: str | None = None,
    parts: Urls = (),
    host: str = "127.0.0.1",
    port: Port = 8000,
    keys: str | None = None,
    new_key: str | None = None,
    no_auth: Flag = False,
    workers: Count = 1,
    unload_after: Optional = None,
    timeout: Seconds = 30.0,
    max_body: Megabytes = 32,
    image_batch: Annotated[int | None, Parameter(validator=Number(gte=1, lte=1024))] = None,
    fetch: Flag = False,
    original_files: Flag = False,
    show_paths: Flag = False,
    allow_index: Flag = False,
    log_queries: Flag = False,
    loading: LibraryLoading = DEFAULT,
) -> int:
    """Serve embeddings, classification and search over HTTP, with a page for people.

    The API has the shape of OpenAI's: POST /v1/embeddings takes texts and images. /openapi.json
    describes it. Only programs on this machine can connect, unless --host is another address; then
    API keys are needed. Ctrl-C or SIGTERM ends the server once it has answered what it received.

    The environment variable CN_CLIP_API_KEY is one more key. CN_CLIP_PARTS_KEY is the key for the
    servers of --parts.

    Parameters
    ----------
    library
        A name, or the path of a folder made by `cn-clip index`, or of embedding shards of `cn-clip
        bulk`. By default the library "default", if there is one and no --model is given.
    shards
        Of embedding shards, serve only these: the first, and the one after the last, such as 0:250.
    parts
        Merge the results of these servers, which have a part of the shards each. No model and no
        library are loaded here.
    host
        Address to listen on; 0.0.0.0 is all of this machine.
    port
        Port to listen on; 0 is any free one.
    keys
        File of API keys, as --new-key writes it. Deleting a line revokes its key at once.
    new_key
        Add a key with this name to the file of --keys, print it, and exit. Only its hash is stored.
    no_auth
        Let everyone in who can connect.
    workers
        Number of processes; each loads the model.
    unload_after
        Unload the model after this many seconds without a request; the next one loads it again.
    timeout
        Seconds after which a request that waits is refused (503).
    max_body
        Megabytes of a request.
    image_batch
        Images per batch. By default the size that pays, measured at the start.
    fetch
        Let clients give images as URLs; only public addresses are fetched.
    original_files
        Let clients read files as they are, with EXIF and GPS.
    show_paths
        Show absolute paths in results, instead of paths that begin with the name of their folder.
    allow_index
        Let clients start `cn-clip index` from the page.
    log_queries
        Write the text of queries to the log.
    """
    from cn_clip.search.places import DEFAULT as DEFAULT_LIBRARY
    from cn_clip.search.places import is_library, library_path

    if new_key is not None:
        return _add_key(new_key, keys)
    _check_installed()
    from cn_clip.serve.keys import warn_if_readable
    from cn_clip.serve.run import serve as run_server
    from cn_clip.serve.settings import PARTS_KEY_VARIABLE, Settings
    from cn_clip.shards.folder import parse_range

    if parts and (library is not None or shards is not None or loading.model is not None):
        raise UsageError(_("--parts has no library, shards or model of its own; leave them out"))
    if shards is not None and library is None:
        raise UsageError(_("--shards needs the folder of the shards: --library FOLDER"))
    if keys is not None:
        warn_if_readable(keys)
    is_default = library is None and loading.model is None and not parts
    if is_default and is_library(library_path(DEFAULT_LIBRARY)):
        library = DEFAULT_LIBRARY
    settings = Settings(
        library=library,
        shards=None if shards is None else parse_range(shards),
        parts=parts,
        parts_key=os.environ.get(PARTS_KEY_VARIABLE) or None,
        model=loading.model,
        backend=loading.backend,
        device=loading.device,
        precision=loading.precision,
        fast_decode=loading.fast_decode,
        host=host,
        port=port,
        keys=keys,
        key=os.environ.get(KEY_VARIABLE) or None,
        no_auth=no_auth,
        workers=workers,
        unload_after=unload_after,
        timeout=timeout,
        max_body=max_body << 20,
        image_batch=image_batch,
        fetch=fetch,
        original_files=original_files,
        show_paths=show_paths,
        allow_index=allow_index,
        log_queries=log_queries,
    )
    run_server(settings, _announce)
    return 0


def _add_key(name: str, keys: str | None) -> int:
    from cn_clip.serve.keys import add_key

    if keys is None:
        raise UsageError(_("--new-key needs the file: --keys FILE"))
    print(add_key(keys, name))
    return 0


def _check_installed() -> None:
    try:
        import fastapi
        import httptools
        import httpx
        import prometheus_client
        import uvicorn

        del fastapi, httptools, httpx, prometheus_client, uvicorn
    except ImportError as error:
        raise UsageError(
            _(
                "{name} is not installed; run: {command}",
                name=error.name,
                command=install_command("serve"),
            )
        ) from None


def _announce(address: str) -> None:
    print(_("cn-clip: serving at {address}", address=address), file=sys.stderr, flush=True)
