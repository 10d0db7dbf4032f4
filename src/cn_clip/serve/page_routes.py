"""The page and its files, sessions, probes and metrics."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Protocol

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from cn_clip.serve.guard import COOKIE
from cn_clip.serve.inputs import parse
from cn_clip.serve.keys import SESSION_SECONDS, Keys
from cn_clip.serve.metrics import CONTENT_TYPE, Metrics
from cn_clip.serve.problems import RequestError
from cn_clip.serve.responses import body_of, errors, json_response
from cn_clip.serve.schemas import LoginRequest
from cn_clip.serve.settings import Settings
from cn_clip.translation import _

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
BODIES: list[type[BaseModel]] = [LoginRequest]


def page_files() -> dict[str, tuple[bytes, str]]:
    """Return the files of the page: path on the server, content and media type."""
    found = {}
    for file in files("cn_clip.serve").joinpath("static").iterdir():
        kind = _TYPES.get(file.name[file.name.rfind(".") :])
        if kind is not None:
            path = "/" if file.name == "index.html" else f"/static/{file.name}"
            found[path] = (file.read_bytes(), kind)
    return found


class Served(Protocol):
    """What the page needs of a server."""

    settings: Settings
    metrics: Metrics
    keys: Keys | None

    def not_ready(self) -> str | None:
        """Return why requests cannot be answered now; None if they can."""
        ...


def page_routes(service: Served, pages: dict[str, tuple[bytes, str]]) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["server"])

    @router.get("/livez", responses=errors())
    async def livez() -> dict[str, str]:
        """Return that the process answers."""
        return {"status": "ok"}

    @router.get("/readyz", responses=errors())
    async def readyz() -> Response:
        """Return whether requests can be answered: the queues work and the library is there."""
        reason = service.not_ready()
        if reason is not None:
            return json_response({"status": "unavailable", "reason": reason}, status=503)
        return json_response({"status": "ok"})

    @router.get("/metrics", responses=errors(), response_class=Response)
    async def metrics() -> Response:
        """Return metrics in the format of Prometheus, those of all workers together."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    @router.get("/session", responses=errors())
    async def session(request: Request) -> dict[str, bool]:
        """Return whether the page needs no log-in, or has logged in."""
        return {"key": request.scope.get("cn_clip.key") is not None}

    @router.post(
        "/login",
        status_code=204,
        responses=errors(400, 408, 413),
        openapi_extra=body_of(LoginRequest),
    )
    async def login(request: Request) -> Response:
        """Exchange an API key for a session cookie, so that the page can show images."""
        given = parse(LoginRequest, await request.body())
        if service.keys is None:
            return Response(status_code=204)
        name = service.keys.name_of(given.key.strip())
        if name is None:
            raise RequestError(_("the API key is not valid"), status=401, code="invalid_api_key")
        response = Response(status_code=204)
        response.set_cookie(
            COOKIE,
            service.keys.new_session(name, service.settings.secret),
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
            path="/",
        )
        return response

    @router.post("/logout", status_code=204, responses=errors())
    async def logout() -> Response:
        """End the session of the page."""
        response = Response(status_code=204)
        response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        return response

    for path, (content, kind) in pages.items():
        router.add_api_route(path, _static(content, kind), include_in_schema=False)
    return router


def _static(content: bytes, kind: str):  # type: ignore[no-untyped-def]
    tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
    headers = {"cache-control": "no-cache", "etag": tag}

    async def static(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=kind)

    return static
