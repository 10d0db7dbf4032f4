"""The application: all routes behind the guard."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from cn_clip import __version__
from cn_clip.serve import library_routes, model_routes, page_routes, shard_routes
from cn_clip.serve.front import create_front
from cn_clip.serve.guard import Guard
from cn_clip.serve.responses import answer_errors, describe
from cn_clip.serve.service import Service
from cn_clip.serve.settings import Settings

log = logging.getLogger("cn_clip.serve")

_DESCRIPTION = (
    "Embeddings of images and Chinese texts in one space, classification, and search. Images are "
    "base64 or data: URIs."
)


def create_app(settings: Settings) -> Guard:
    """Return the application of a server; its model is loaded, unless it is one in front of parts.

    Raises:
        CNClipError: the library or the model cannot be opened.
    """
    if settings.parts:
        return create_front(settings)
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
