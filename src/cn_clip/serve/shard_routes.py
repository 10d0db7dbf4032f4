"""Routes of embedding shards: those of a library, without filters and index runs."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic_core import to_json

from cn_clip.errors import CNClipError, DataError
from cn_clip.search.hit import Hit
from cn_clip.serve.inputs import parse, text_of
from cn_clip.serve.library_routes import ImageId, check_search, contents_of, knn_vector
from cn_clip.serve.problems import RequestError
from cn_clip.serve.rendering import MAX_SIDE, rendered
from cn_clip.serve.responses import IMAGE_HEADERS, POST_ERRORS, body_of, errors, json_response
from cn_clip.serve.schemas import (
    KnnRequest,
    KnnResult,
    LibraryResponse,
    SearchRequest,
    SearchResponse,
)
from cn_clip.serve.service import ServedShards, Service
from cn_clip.translation import _


def shard_routes(service: Service, shards: ServedShards) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["library"])

    @router.post(
        "/v1/search",
        response_model=SearchResponse,
        responses=errors(*POST_ERRORS),
        openapi_extra=body_of(SearchRequest),
    )
    async def search(request: Request) -> Response:
        """Find images by text, by images, by images of the shards, or by all of these."""
        given = parse(SearchRequest, await request.body())
        return json_response(await _search(service, shards, given, request))

    @router.get("/v1/search", response_model=SearchResponse, responses=errors(400, 404, 429))
    async def search_by_text(
        request: Request,
        q: str = "",
        like: Annotated[list[int], Query()] = [],  # noqa: B006
        k: Annotated[int, Query(ge=1)] = 20,
        offset: Annotated[int, Query(ge=0)] = 0,
    ) -> Response:
        """Find images by text, or by images of the shards; for curl and links."""
        values = {"query": q, "like": like, "k": k, "offset": offset}
        given = parse(SearchRequest, to_json(values))
        return json_response(await _search(service, shards, given, request))

    @router.get(
        "/v1/images/{image}",
        responses={**errors(400, 404, 429), 200: {"content": {"image/*": {}}}},
        response_class=Response,
    )
    async def image(
        request: Request, image: ImageId, side: Annotated[int, Query(ge=16, le=MAX_SIDE)] = 2048
    ) -> Response:
        """Return an image whose file is on this machine, upright, without EXIF and GPS."""
        content, kind = await service.renderings.run(_image, shards, image, side)
        return Response(content, headers=IMAGE_HEADERS, media_type=kind)

    @router.get(
        "/v1/images/{image}/thumbnail",
        responses={**errors(400, 404, 429), 200: {"content": {"image/webp": {}}}},
        response_class=Response,
    )
    async def thumbnail(request: Request, image: ImageId) -> Response:
        """Return the thumbnail of an image: WebP, at most 320 pixels wide and high."""
        content = await service.renderings.run(shards.thumbnail, image)
        if content is None:
            raise _unreadable(image)
        return Response(content, headers=IMAGE_HEADERS, media_type="image/webp")

    @router.get("/v1/library", response_model=LibraryResponse, responses=errors(404))
    async def state() -> Response:
        """Return the state of the shards: their images, the model, and which shards these are."""
        return json_response(await service.searches.run(_state, shards))

    @router.post(
        "/knn-service",
        response_model=list[KnnResult],
        responses=errors(*POST_ERRORS),
        openapi_extra=body_of(KnnRequest),
        tags=["clip-retrieval"],
    )
    async def knn(request: Request) -> Response:
        """Find images, as clients of clip-retrieval ask."""
        given = parse(KnnRequest, await request.body())
        vector = await knn_vector(service, await service.engine(), given)
        return json_response(await service.searches.run(_nearest, shards, vector, given.num_images))

    @router.get("/indices-list", responses=errors(404), tags=["clip-retrieval"])
    async def indices() -> list[str]:
        """List the folder, as clients of clip-retrieval ask."""
        return [shards.folder.path.name]

    return router


async def _search(
    service: Service, shards: ServedShards, given: SearchRequest, request: Request
) -> dict[str, Any]:
    settings = service.settings
    query = text_of(given.query, "query", settings.max_text) if given.query.strip() else ""
    request.scope["cn_clip.query"] = query
    wanted = check_search(given, settings)
    if given.filters is not None and any(
        value not in (None, "") for value in given.filters.model_dump().values()
    ):
        raise RequestError(_("embedding shards are searched without filters"), param="filters")
    images = await contents_of(service, given.images)
    hits = await service.searches.run(
        shards.search, query, images=images, like=given.like, k=wanted + 1
    )
    shown = [_found(hit, absolute=settings.show_paths) for hit in hits[given.offset : wanted]]
    return {
        "query": query,
        "images": len(shards),
        "nothing_matches": not any(hit.matches for hit in hits[:wanted]),
        "more": len(hits) > wanted and wanted < settings.max_results,
        "hits": shown,
    }


def _found(hit: Hit, *, absolute: bool) -> dict[str, Any]:
    """Return a result for JSON."""
    values = hit.to_dict()
    del values["uri"]  # it has the whole path
    # All digits: a server that merges parts orders by them.
    values["cosine"] = hit.cosine
    values["path"] = hit.path if absolute else PurePath(hit.path).name
    values["image"] = f"/v1/images/{hit.id}"
    values["thumbnail"] = f"/v1/images/{hit.id}/thumbnail"
    return values


def _image(shards: ServedShards, image: int, side: int) -> tuple[bytes, str]:
    try:
        content = shards.content(image)
    except CNClipError:  # its message has paths of this machine
        raise _unreadable(image) from None
    return rendered(content, max_side=side)


def _unreadable(image: int) -> RequestError:
    return RequestError(
        _("the file of image {image} cannot be read now", image=image),
        status=404,
        code="file_unreadable",
    )


def _state(shards: ServedShards) -> dict[str, Any]:
    numbers = shards.folder.numbers
    return {
        "name": shards.folder.path.name,
        "images": len(shards),
        "unreadable": 0,
        "model": shards.model_name,
        "roots": [],
        "may_index": False,
        "index": None,
        "shards": {"first": numbers[0], "last": numbers[-1], "count": len(numbers)},
        "unindexed": len(shards.index.unindexed),
    }


def _nearest(shards: ServedShards, vector: Any, k: int) -> list[dict[str, Any]]:
    if len(vector) != shards.folder.dim:
        raise DataError(_("the model of the shards has changed; start the server again"))
    top = shards.index.search(vector[None], k)
    ids = top.indexes[0].tolist()
    facts = shards.facts_of(ids)
    return [
        {
            "id": image,
            "similarity": score,
            "caption": facts[image].caption if image in facts else None,
            "url": f"/v1/images/{image}",
        }
        for image, score in zip(ids, top.scores[0].tolist(), strict=True)
    ]
