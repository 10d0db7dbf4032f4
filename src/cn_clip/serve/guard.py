"""What every request passes: access, limits of the body, security headers, metrics and the log.

Deny by default: a path that is not listed as open needs a key or a session.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cn_clip.errors import CNClipError
from cn_clip.serve.keys import Keys
from cn_clip.serve.metrics import Metrics
from cn_clip.serve.problems import RequestError, error_body, overloaded, problem_of
from cn_clip.serve.settings import Settings, is_loopback
from cn_clip.translation import _, answer_in

COOKIE = "cnclip_session"
OPEN = ("/", "/livez", "/readyz", "/login")  # and the files of the page
_SAFE = ("GET", "HEAD", "OPTIONS")
_SECURITY = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        b"connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-embedder-policy", b"require-corp"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
]

log = logging.getLogger("cn_clip.serve")


@dataclass(slots=True)
class _Answer:
    """What was sent."""

    status: int = 0
    size: int = 0


class Guard:
    """The outermost layer of the application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: Settings,
        keys: Keys | None,
        metrics: Metrics,
        open_paths: Iterable[str],
    ) -> None:
        """Wrap an application.

        Args:
            app: the application.
            settings: of the server.
            keys: that are valid; None lets everyone in.
            metrics: to count requests in.
            open_paths: of the page's files, which need no key.
        """
        self._app, self._settings, self._keys, self._metrics = app, settings, keys, metrics
        self._open = frozenset([*OPEN, *open_paths])
        self._buffered = 0
        self._max_buffered = max(settings.max_buffered, settings.max_body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # a WebSocket is closed without an answer
        start = time.perf_counter()
        answer = _Answer()
        body = _Body(self._settings)
        accepted = dict(scope["headers"]).get(b"accept-language", b"").decode("latin-1")

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                headers = [*message["headers"], *_SECURITY]
                if not any(name == b"cache-control" for name, _value in headers):
                    headers.append((b"cache-control", b"no-store"))
                if not body.complete:  # the rest of the body is not read
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            else:
                answer.size += len(message.get("body", b""))
            await send(message)

        try:
            with answer_in(accepted):
                try:
                    self._check_access(scope)
                    await self._answer(scope, receive, send_secured, body)
                except CNClipError as error:
                    if answer.status:
                        raise
                    await _send_problem(problem_of(error), send_secured)
        except asyncio.CancelledError:
            answer.status = answer.status or 499  # the client left
        finally:
            self._buffered -= body.size
            self._count(scope, answer, time.perf_counter() - start)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, body: _Body) -> None:
        """Read the body, and run the application until it answers or the client leaves."""
        safe = scope["method"] in _SAFE
        body.complete = safe and not _has_body(scope)
        if not safe:
            await body.read(scope, receive, self._buffer)
        left = asyncio.Event()

        async def receive_body() -> Message:
            if not body.taken:
                body.taken = True
                return {"type": "http.request", "body": body.content, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        if safe:  # a body that it has all the same is not read
            await self._app(scope, receive_body, send)
            return
        work = asyncio.ensure_future(self._app(scope, receive_body, send))
        watch = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()  # its items in the queues are dropped
            await work
        finally:
            watch.cancel()
            work.cancel()

    def _buffer(self, size: int) -> None:
        """Account for bytes of bodies in memory."""
        if self._buffered + size > self._max_buffered:
            raise overloaded(1)
        self._buffered += size

    def _check_access(self, scope: Scope) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self._keys is None and self._settings.is_local and not _is_local_host(host):
            # A page of another site may point its own name at this machine (DNS rebinding).
            raise RequestError(
                _("{host!r} is not a name of this server", host=host), status=403, code="host"
            )
        scope["cn_clip.key"] = None
        if self._keys is not None and (given := _bearer(headers)) is not None:
            name = self._keys.name_of(given)
            if name is None:
                raise _no_access(_("the API key is not valid"))
            scope["cn_clip.key"] = name
            return
        self._check_origin(scope, headers, host)
        if scope["path"] in self._open or self._keys is None:
            return
        session = _cookie(headers)
        name = self._keys.name_of_session(session, self._settings.secret) if session else None
        if name is None:
            raise _no_access(_("this needs an API key: Authorization: Bearer KEY"))
        scope["cn_clip.key"] = name

    def _check_origin(self, scope: Scope, headers: dict[bytes, bytes], host: str) -> None:
        """Refuse requests that a page of another site makes a browser send."""
        site = headers.get(b"sec-fetch-site")
        foreign = site not in (None, b"none", b"same-origin")
        if scope["method"] in _SAFE:
            foreign = foreign and headers.get(b"sec-fetch-mode") != b"navigate"
        elif site is None and (origin := headers.get(b"origin")) is not None:
            # Browsers that do not tell the site; and those that speak to us without TLS.
            foreign = _netloc(origin) != host
        if foreign:
            raise RequestError(_("a page of another site may not do this"), status=403, code="site")

    def _count(self, scope: Scope, answer: _Answer, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or (
            scope["path"] if scope["path"] in self._open else "other"
        )
        self._metrics.request(route, scope["method"], answer.status, seconds)
        if not log.isEnabledFor(logging.INFO):
            return
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "method": scope["method"],
            "route": route,
            "status": answer.status,
            "ms": round(1000 * seconds, 1),
            "bytes": answer.size,
            "key": scope.get("cn_clip.key"),
        }
        if self._settings.log_queries:
            entry["query"] = scope.get("cn_clip.query") or scope["query_string"].decode("latin-1")
        log.info("%s", json.dumps(entry, ensure_ascii=False))


class _Body:
    """The body of a request, read within limits."""

    def __init__(self, settings: Settings) -> None:
        self._limit, self._seconds = settings.max_body, settings.body_seconds
        self.content = b""
        self.size = 0
        self.complete = False
        self.taken = False

    async def read(self, scope: Scope, receive: Receive, account: Callable[[int], None]) -> None:
        """Read all of it.

        Raises:
            RequestError: it is too large (413), too slow (408), or memory is short (429).
            CancelledError: the client left.
        """
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._limit:
            raise self._too_large()
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise asyncio.CancelledError
                    chunk = message.get("body", b"")
                    account(len(chunk))
                    self.size += len(chunk)
                    if self.size > self._limit:
                        raise self._too_large()
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise RequestError(
                _("the body did not arrive within {seconds:g} s", seconds=self._seconds),
                status=408,
                code="slow_body",
            ) from None
        self.content = b"".join(chunks)
        self.complete = True

    def _too_large(self) -> RequestError:
        return RequestError(
            _("the body has over {limit:,} bytes; send less at once", limit=self._limit),
            status=413,
            code="body_too_large",
        )


def _has_body(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_problem(problem: RequestError, send: Send) -> None:
    content = error_body(str(problem), problem.status, param=problem.param, code=problem.code)
    body = json.dumps(content, ensure_ascii=False).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if problem.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if problem.retry_after is not None:
        headers.append((b"retry-after", str(problem.retry_after).encode()))
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _netloc(origin: bytes) -> str | None:
    with suppress(ValueError):
        return urlsplit(origin.decode("latin-1")).netloc
    return None


def _no_access(message: str) -> RequestError:
    return RequestError(message, status=401, code="invalid_api_key")


def _bearer(headers: dict[bytes, bytes]) -> str | None:
    scheme, _space, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip().decode("latin-1") if scheme.lower() == b"bearer" else None


def _cookie(headers: dict[bytes, bytes]) -> str | None:
    for part in headers.get(b"cookie", b"").decode("latin-1").split(";"):
        name, _equals, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return None


def _is_local_host(host: str) -> bool:
    with suppress(ValueError):
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    return False
