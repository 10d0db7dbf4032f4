"""A server from its start to its end: socket, processes, drain."""

from __future__ import annotations

import errno
import gc
import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from cn_clip.errors import CNClipError, UsageError
from cn_clip.processes import end_with_parent, usable_cpus
from cn_clip.serve.metrics import SHARED
from cn_clip.serve.protocol import BoundedProtocol
from cn_clip.serve.settings import Settings
from cn_clip.translation import _

DRAIN_SECONDS = 30
_BACKLOG = 2048


def serve(settings: Settings, on_start: Callable[[str], None]) -> None:
    """Serve until a signal ends it; requests inside are answered first.

    Args:
        settings: of the server.
        on_start: called with its address once the port is open; the model is loaded after that.

    Raises:
        UsageError: the port is in use, or the options contradict each other.
        CNClipError: the library or the model cannot be opened.
    """
    check_access(settings)
    with (
        _bind(settings) as listening,
        tempfile.TemporaryDirectory(prefix="cn_clip-serve-") as folder,
    ):
        settings = replace(settings, run_folder=folder, secret=secrets.token_bytes(32))
        on_start(address(settings, listening))
        if settings.workers == 1:
            uvicorn.Server(_config(settings, _create_app)).run([listening])
            return
        threads = max(1, usable_cpus() // settings.workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # else each worker uses all CPUs
        os.environ[SHARED] = folder  # before prometheus_client is imported in a worker
        _Workers(_config(settings, _create_worker_app), [listening]).run()


def check_access(settings: Settings) -> None:
    """Refuse to let everyone in by accident.

    Raises:
        UsageError: others can connect, and neither keys nor ``--no-auth`` are given.
    """
    if not (settings.is_local or settings.needs_key or settings.no_auth):
        raise UsageError(
            _(
                "{host} can be reached from other machines; give --keys FILE, or --no-auth to let "
                "everyone in",
                host=settings.host,
            )
        )
    if settings.no_auth and settings.needs_key:
        raise UsageError(_("--no-auth and keys are both given; give one of them"))


def address(settings: Settings, listening: socket.socket) -> str:
    """Return the address of the page."""
    port = listening.getsockname()[1]
    host = settings.host if settings.host not in ("0.0.0.0", "::", "") else socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def _create_app(settings: Settings) -> object:
    from cn_clip.serve.app import create_app  # imports prometheus_client

    log_to_stderr()
    app = create_app(settings)
    # A full garbage collection visits some 500,000 objects of the libraries and of the model, and
    # stops all requests for 150 ms. These objects stay, so they are exempt.
    gc.collect()
    gc.freeze()
    return app


def _create_worker_app(settings: Settings) -> object:
    end_with_parent(grace=DRAIN_SECONDS)
    try:
        return _create_app(settings)
    except CNClipError as error:
        print(f"cn-clip: {error}", file=sys.stderr)
        sys.exit(STARTUP_FAILURE)  # the parent does not start another one


def _config(settings: Settings, factory: Callable[[Settings], object]) -> uvicorn.Config:
    return uvicorn.Config(
        partial(factory, settings),
        factory=True,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        workers=settings.workers,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        timeout_worker_healthcheck=30,
    )


class _Workers(Multiprocess):
    """Worker processes; one that dies is replaced, and its gauges are forgotten."""

    def init_processes(self) -> None:
        """Start the workers."""
        super().init_processes()
        self._close_their_ends()

    def keep_subprocess_alive(self) -> None:
        """Replace the workers that have died."""
        before = {process.pid for process in self.processes}
        super().keep_subprocess_alive()
        self._close_their_ends()
        gone = before - {process.pid for process in self.processes}
        for pid in gone:
            for file in Path(os.environ[SHARED]).glob(f"gauge_live*_{pid}.db"):
                file.unlink(missing_ok=True)

    def _close_their_ends(self) -> None:
        """Close the workers' ends of the pipes in this process: else one that is killed while it is
        asked whether it is alive is awaited for the whole timeout."""
        if os.name == "posix":  # elsewhere a worker takes its end from here, later
            for process in self.processes:
                process.child_conn.close()


def _bind(settings: Settings) -> socket.socket:
    """Open the port.

    Raises:
        UsageError: it is in use, or the address is not of this machine.
    """
    host, port = settings.host.strip("[]"), settings.port
    try:
        family, _kind, _protocol, _name, target = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            if os.name == "posix":
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(target)
            listening.listen(_BACKLOG)
            listening.set_inheritable(True)
        except BaseException:
            listening.close()
            raise
        return listening
    except (OSError, UnicodeError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UsageError(_("port {port} is in use; give another --port", port=port)) from None
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            _("cannot listen on {host}:{port}: {reason}", host=host, port=port, reason=reason)
        ) from None


def log_to_stderr() -> None:
    """Write the log of requests to stderr, one JSON object per line; errors as text."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    requests = logging.getLogger("cn_clip.serve")
    requests.handlers[:] = [handler]
    requests.setLevel(logging.INFO)
    requests.propagate = False
    server = logging.getLogger("uvicorn.error")
    server.handlers[:] = [handler]
    server.setLevel(logging.ERROR)
    server.propagate = False
