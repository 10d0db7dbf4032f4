"""The application: all routes behind the guard."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from cn_clip import __version__
from cn_clip.errors import CNClipError
from cn_clip.serve import library_routes, model_routes, page_routes, shard_routes
from cn_clip.serve.guard import Guard
from cn_clip.serve.problems import error_body, problem_of
from cn_clip.serve.responses import describe, json_response
from cn_clip.serve.service import Service
from cn_clip.serve.settings import Settings
from cn_clip.translation import _

log = logging.getLogger("cn_clip.serve")

_DESCRIPTION = (
    "Embeddings of images and Chinese texts in one space, classification, and search. Images are "
    "base64 or data: URIs."
)


def create_app(settings: Settings) -> Guard:
    """Return the application of a server; its model is loaded.

    Raises:
        CNClipError: the library or the model cannot be opened.
    """
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    app = FastAPI(
        title="cn-clip",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # it would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    pages = page_routes.page_files()
    app.include_router(model_routes.model_routes(service))
    if service.shards is not None:
        app.include_router(shard_routes.shard_routes(service, service.shards))
    else:
        app.include_router(library_routes.library_routes(service))
    app.include_router(page_routes.page_routes(service, pages))
    describe(app, [*model_routes.BODIES, *library_routes.BODIES, *page_routes.BODIES], _DESCRIPTION)
    answer_errors(app)
    return Guard(
        app, settings=settings, keys=service.keys, metrics=service.metrics, open_paths=pages
    )


def answer_errors(app: FastAPI) -> None:
    """Answer errors in the shape of OpenAI's API."""
    app.add_exception_handler(CNClipError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_path)
    app.add_exception_handler(RequestValidationError, _refuse_parameters)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, CNClipError)
    problem = problem_of(error)
    headers = {} if problem.retry_after is None else {"retry-after": str(problem.retry_after)}
    content = error_body(str(problem), problem.status, param=problem.param, code=problem.code)
    return json_response(content, status=problem.status, headers=headers)


async def _refuse_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = (
        _("there is nothing at {path}", path=request.url.path)
        if error.status_code == 404
        else str(error.detail)
    )
    return json_response(
        error_body(message, error.status_code),
        status=error.status_code,
        headers=dict(error.headers or {}),
    )


async def _refuse_parameters(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    message = _("{name}: {reason}", name=name, reason=first["msg"])
    return json_response(error_body(message, 400, param=name), status=400)
