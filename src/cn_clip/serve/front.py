"""The server in front of parts: it has no model and no images, and merges what the parts find.

Every part is a server of its own (``cn-clip serve --library FOLDER --shards 0:250``). A search asks
all of them, and its answer says which ones are missing from it. What needs the model alone is
passed to one of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any

import httpx
from fastapi import APIRouter, FastAPI, Query, Request, Response
from pydantic import BaseModel
from pydantic_core import to_json

from cn_clip import __version__
from cn_clip.serve import page_routes
from cn_clip.serve.guard import Guard
from cn_clip.serve.inputs import parse
from cn_clip.serve.keys import Keys
from cn_clip.serve.library_routes import ImageId, check_search
from cn_clip.serve.metrics import Metrics
from cn_clip.serve.parts import Answer, Parts, good_answers, merged_hits, parts_state
from cn_clip.serve.problems import unavailable
from cn_clip.serve.responses import (
    POST_ERRORS,
    answer_errors,
    body_of,
    describe,
    errors,
    json_response,
)
from cn_clip.serve.schemas import KnnRequest, KnnResult, MergedResponse, SearchRequest
from cn_clip.serve.settings import Settings
from cn_clip.translation import _

BODIES: list[type[BaseModel]] = [KnnRequest, SearchRequest]
_MODEL = ("/v1/embeddings", "/v1/classify", "/v1/similarity")
_PASSED = ("content-type", "cache-control", "etag", "retry-after")
_DESCRIPTION = "Search of embedding shards that several servers have, a part each."


class Front:
    """What the routes share.

    Attributes:
        settings, metrics: of the server.
        keys: None lets everyone in.
        parts: the servers behind.
    """

    def __init__(self, settings: Settings) -> None:
        """Check the addresses.

        Raises:
            UsageError: one is invalid.
        """
        self.settings = settings
        self.metrics = Metrics()
        self.keys = Keys(settings.keys, settings.key) if settings.needs_key else None
        self.parts = Parts(settings.parts, key=settings.parts_key, timeout=settings.timeout)
        self.draining = False

    def not_ready(self) -> str | None:
        """Return why requests cannot be answered now; None if they can, by some parts at least."""
        if self.draining:
            return _("the server is ending")
        if len(self.parts.reasons) == len(self.parts.urls):
            return _("no part answers")
        return None


def create_front(settings: Settings) -> Guard:
    """Return the application.

    Raises:
        UsageError: an address is invalid.
    """
    front = Front(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await front.parts.start()
        yield
        front.draining = True
        await front.parts.close()

    app = FastAPI(
        title="cn-clip", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.service = front
    pages = page_routes.page_files()
    app.include_router(_search_routes(front))
    app.include_router(_passing_routes(front))
    app.include_router(page_routes.page_routes(front, pages))
    describe(app, [*BODIES, *page_routes.BODIES], _DESCRIPTION)
    answer_errors(app)
    return Guard(app, settings=settings, keys=front.keys, metrics=front.metrics, open_paths=pages)


def _search_routes(front: Front) -> APIRouter:
    router = APIRouter(tags=["library"])

    @router.post(
        "/v1/search",
        response_model=MergedResponse,
        responses=errors(*POST_ERRORS),
        openapi_extra=body_of(SearchRequest),
    )
    async def search(request: Request) -> Response:
        """Find images in all parts. `parts.missing` lists those that did not answer."""
        given = parse(SearchRequest, await request.body())
        return json_response(await _search(front, given, request))

    @router.get("/v1/search", response_model=MergedResponse, responses=errors(400, 404, 429))
    async def search_by_text(
        request: Request,
        q: str = "",
        like: Annotated[list[int], Query()] = [],  # noqa: B006
        k: Annotated[int, Query(ge=1)] = 20,
        offset: Annotated[int, Query(ge=0)] = 0,
    ) -> Response:
        """Find images in all parts; for curl and links."""
        values = {"query": q, "like": like, "k": k, "offset": offset}
        given = parse(SearchRequest, to_json(values))
        return json_response(await _search(front, given, request))

    @router.post(
        "/knn-service",
        response_model=list[KnnResult],
        responses=errors(*POST_ERRORS),
        openapi_extra=body_of(KnnRequest),
        tags=["clip-retrieval"],
    )
    async def knn(request: Request) -> Response:
        """Find images, as clients of clip-retrieval ask; the header `x-missing-parts` says how many
        parts did not answer."""
        body = await request.body()
        given = parse(KnnRequest, body)
        answers = await front.parts.ask_all("POST", "/knn-service", body=body)
        with _understood():
            results = [hit for answer in good_answers(answers) for hit in answer.values()]
            merged = merged_hits(results, "similarity", given.num_images)
        missing = len(parts_state(answers)["missing"])
        return json_response(merged, headers={"x-missing-parts": str(missing)})

    @router.get("/v1/library", responses=errors(404))
    async def state() -> Response:
        """Return the images of all parts, and what each part says of itself."""
        answers = await front.parts.ask_all("GET", "/v1/library")
        return json_response(_state(answers))

    return router


def _passing_routes(front: Front) -> APIRouter:
    """Return the routes that one part answers."""
    router = APIRouter(tags=["model"])

    async def by_any(request: Request) -> Response:
        """Answered by one of the parts."""
        body = await request.body() if request.method == "POST" else None
        return _passed(await front.parts.ask_one(request.method, request.url.path, body=body))

    for path in _MODEL:
        router.add_api_route(path, by_any, methods=["POST"], responses=errors(*POST_ERRORS))
    for path in ("/v1/models", "/indices-list"):
        router.add_api_route(path, by_any, methods=["GET"], responses=errors(404))

    @router.get("/v1/images/{image}", responses=errors(400, 404), response_class=Response)
    async def image(request: Request, image: ImageId) -> Response:
        """Return an image, from the part that has it."""
        return _passed(await front.parts.ask_for(f"/v1/images/{image}", request.url.query))

    @router.get("/v1/images/{image}/thumbnail", responses=errors(404), response_class=Response)
    async def thumbnail(request: Request, image: ImageId) -> Response:
        """Return the thumbnail of an image, from the part that has it."""
        return _passed(await front.parts.ask_for(f"/v1/images/{image}/thumbnail", ""))

    return router


async def _search(front: Front, given: SearchRequest, request: Request) -> dict[str, Any]:
    request.scope["cn_clip.query"] = given.query
    wanted = check_search(given, front.settings)
    asked = given.model_copy(update={"offset": 0, "k": wanted})
    body = asked.model_dump_json(exclude_defaults=True).encode()
    answers = await front.parts.ask_all("POST", "/v1/search", body=body)
    with _understood():
        found = [answer.values() for answer in good_answers(answers)]
        hits = [hit for values in found for hit in values["hits"]]
        merged = merged_hits(hits, "cosine", wanted)
        more = len(hits) > wanted or any(values["more"] for values in found)
        return {
            "query": found[0]["query"],
            "images": sum(values["images"] for values in found),
            "nothing_matches": not any(hit["matches"] for hit in merged),
            "more": more and wanted < front.settings.max_results,
            "hits": merged[given.offset :],
            "parts": parts_state(answers),
        }


def _state(answers: list[Answer]) -> dict[str, Any]:
    with _understood():
        found = [answer.values() | {"part": answer.part} for answer in good_answers(answers)]
        shown = [
            {name: values.get(name) for name in ("part", "images", "shards")} for values in found
        ]
        return {
            "name": found[0]["name"],
            "images": sum(values["images"] for values in found),
            "unreadable": 0,
            "model": found[0]["model"],
            "roots": [],
            "may_index": False,
            "index": None,
            "parts": parts_state(answers) | {"found": shown},
        }


@contextmanager
def _understood() -> Iterator[None]:
    """Refuse with 503 if a part does not answer as this program does."""
    try:
        yield
    except (KeyError, TypeError, AttributeError):
        raise unavailable(_("a part answers as another program does")) from None


def _passed(response: httpx.Response) -> Response:
    headers = {name: response.headers[name] for name in _PASSED if name in response.headers}
    return Response(response.content, response.status_code, headers)
