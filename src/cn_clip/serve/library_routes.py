"""Routes of the library: search, its images, its state, and the API of clip-retrieval."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathParameter
from pydantic import BaseModel
from pydantic_core import to_json

from cn_clip.errors import LibraryError
from cn_clip.search.folder import CACHE, StoredModel
from cn_clip.search.images import image_bytes, thumbnail_of
from cn_clip.search.vectors import search_vectors
from cn_clip.serve.engine import Engine
from cn_clip.serve.index_run import IndexRuns
from cn_clip.serve.inputs import image_content, parse, text_of
from cn_clip.serve.problems import RequestError
from cn_clip.serve.rendering import MAX_SIDE, media_type, rendered
from cn_clip.serve.responses import IMAGE_HEADERS, POST_ERRORS, body_of, errors, json_response
from cn_clip.serve.results import Places, filters_of, found
from cn_clip.serve.schemas import (
    KnnRequest,
    KnnResult,
    LibraryResponse,
    SearchRequest,
    SearchResponse,
)
from cn_clip.serve.service import ServedLibrary, Service
from cn_clip.serve.settings import Settings
from cn_clip.translation import _

BODIES: list[type[BaseModel]] = [KnnRequest, SearchRequest]

ImageId = Annotated[int, PathParameter(ge=1, lt=1 << 63)]


def library_routes(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["library"])
    settings = service.settings

    @router.post(
        "/v1/search",
        response_model=SearchResponse,
        responses=errors(*POST_ERRORS),
        openapi_extra=body_of(SearchRequest),
    )
    async def search(request: Request) -> Response:
        """Find images by text, by images, by images of the library, or by all of these."""
        given = parse(SearchRequest, await request.body())
        return json_response(await _search(service, given, request))

    @router.get("/v1/search", response_model=SearchResponse, responses=errors(400, 404, 429))
    async def search_by_text(
        request: Request,
        q: str = "",
        like: Annotated[list[int], Query()] = [],  # noqa: B006
        k: int = 20,
        offset: int = 0,
        folder: str | None = None,
        after: str | None = None,
        before: str | None = None,
    ) -> Response:
        """Find images by text, or by images of the library; for curl and links."""
        values = {"query": q, "like": like, "k": k, "offset": offset}
        conditions = {"folder": folder, "after": after, "before": before}
        given = parse(SearchRequest, to_json(values | {"filters": conditions}))
        return json_response(await _search(service, given, request))

    @router.get(
        "/v1/images/{image}",
        responses={**errors(400, 404, 429), 200: {"content": {"image/*": {}}}},
        response_class=Response,
    )
    async def image(
        request: Request,
        image: ImageId,
        side: Annotated[int, Query(ge=16, le=MAX_SIDE)] = 2048,
        original: bool = False,
    ) -> Response:
        """Return an image of the library, upright, without EXIF and GPS.

        `side` is the limit of its width and height. `original` returns the file as it is, if the
        owner allows it.
        """
        if original and not settings.original_files:
            raise RequestError(
                _("this server does not send files as they are; leave out original"), status=403
            )
        library = service.opened_library()
        tag = await service.renderings.run(_tag, library, image, f"{side}{original}")
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={**IMAGE_HEADERS, "etag": tag})
        content, kind = await service.renderings.run(_image, library, image, side, original)
        return Response(content, headers={**IMAGE_HEADERS, "etag": tag}, media_type=kind)

    @router.get(
        "/v1/images/{image}/thumbnail",
        responses={**errors(400, 404, 429), 200: {"content": {"image/webp": {}}}},
        response_class=Response,
    )
    async def thumbnail(request: Request, image: ImageId) -> Response:
        """Return the thumbnail of an image: WebP, at most 320 pixels wide and high."""
        library = service.opened_library()
        tag = await service.renderings.run(_tag, library, image, "thumbnail")
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={**IMAGE_HEADERS, "etag": tag})
        content = await service.renderings.run(thumbnail_of, library.folder, image)
        if content is None:
            raise _unreadable(image)
        return Response(content, headers={**IMAGE_HEADERS, "etag": tag}, media_type="image/webp")

    @router.get("/v1/library", response_model=LibraryResponse, responses=errors(404))
    async def state() -> Response:
        """Return the state of the library: its images, roots, and the index run."""
        library = service.opened_library()
        values = await service.searches.run(_state, service, library)
        return json_response(values)

    @router.post("/v1/library/index", status_code=202, responses=errors(404, 429))
    async def index() -> Response:
        """Bring the library up to date, if the owner allows it; its progress is in its state."""
        library = service.opened_library()
        runs = _index_runs(service, library)
        if runs is None:
            raise RequestError(
                _("this server may not index; start it with --allow-index"), status=403
            )
        if not runs.state().get("running"):
            service.index_process = runs.start()
        return json_response({"running": True}, status=202)

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
        return json_response(await _knn(service, given))

    @router.get("/indices-list", responses=errors(404), tags=["clip-retrieval"])
    async def indices() -> list[str]:
        """List the library, as clients of clip-retrieval ask."""
        return [service.opened_library().folder.path.name]

    return router


async def _search(service: Service, given: SearchRequest, request: Request) -> dict[str, Any]:
    settings = service.settings
    library = service.opened_library()
    query = text_of(given.query, "query", settings.max_text) if given.query.strip() else ""
    request.scope["cn_clip.query"] = query
    wanted = check_search(given, settings)
    images = await contents_of(service, given.images)
    places = await service.searches.run(Places, library.folder, absolute=settings.show_paths)
    filters = filters_of(given.filters, places)

    def run() -> tuple[list[Any], int]:
        try:
            hits = library.search(
                query, images=images, like=given.like, k=wanted + 1, filters=filters
            )
        except OverflowError:  # a date at the end of time
            raise RequestError(_("a date is out of range"), param="filters") from None
        return hits, len(library)

    hits, count = await service.searches.run(run)
    shown = [found(hit, places) for hit in hits[given.offset : wanted]]
    return {
        "query": query,
        "images": count,
        "nothing_matches": not any(hit.matches for hit in hits[:wanted]),
        "more": len(hits) > wanted and wanted < settings.max_results,
        "hits": shown,
    }


def check_search(given: SearchRequest, settings: Settings) -> int:
    """Return how many results a search needs, with those that are skipped.

    Raises:
        RequestError: they are too many, or there is nothing to search for.
    """
    wanted = given.offset + given.k
    if wanted > settings.max_results:
        raise RequestError(
            _(
                "offset + k is {wanted:,}, above the limit of {limit:,}",
                wanted=wanted,
                limit=settings.max_results,
            ),
            param="k",
        )
    if not (given.query.strip() or given.images or given.like):
        raise RequestError(_("give a query, images, or like"), param="query")
    return wanted


async def contents_of(service: Service, images: list[Any]) -> list[bytes]:
    """Return the bytes of the images of a request."""
    contents = [image_content(value, f"images[{i}]") for i, value in enumerate(images)]
    good = []
    for content in await service.contents(contents):
        if isinstance(content, RequestError):
            raise content
        good.append(content)
    return good


async def _knn(service: Service, given: KnnRequest) -> list[dict[str, Any]]:
    library = service.opened_library()
    model = (await service.searches.run(library.folder.snapshot)).model
    vector = await knn_vector(service, await service.engine_for(model), given)
    return await service.searches.run(_nearest, library, model, vector, given.num_images)


async def knn_vector(
    service: Service, engine: Engine, given: KnnRequest
) -> npt.NDArray[np.float32]:
    """Return the unit vector (D,) that a client of clip-retrieval searches with.

    Raises:
        RequestError: the request gives none.
    """
    vectors = []
    if given.text:
        text = text_of(given.text, "text", service.settings.max_text)
        vectors.append((await engine.embed_texts([text]))[0].vector)
    image = given.image or given.image_url
    if image:
        contents = await contents_of(service, [image])
        embedded = (await engine.embed_images(contents))[0]
        if isinstance(embedded, Exception):
            raise embedded
        vectors.append(embedded)
    if given.embedding_input:
        vectors.append(np.array(given.embedding_input, np.float32))
    if not vectors:
        raise RequestError(_("give text, image, image_url or embedding_input"), param="text")
    dim = engine.embedder.dim
    if any(vector.shape != (dim,) for vector in vectors):
        raise RequestError(
            _("embedding_input is not of {dim} numbers", dim=dim), param="embedding_input"
        )
    mean = np.sum(vectors, axis=0)
    norm = float(np.linalg.norm(mean))
    if not (np.isfinite(norm) and norm > 0):
        raise RequestError(_("the query has no direction"), param="embedding_input")
    unit: npt.NDArray[np.float32] = (mean / norm).astype(np.float32)
    return unit


def _nearest(
    library: ServedLibrary, model: StoredModel, vector: Any, k: int
) -> list[dict[str, Any]]:
    snapshot = library.folder.snapshot()
    if snapshot.model.id != model.id:
        raise RequestError(_("the model of the library has changed; try again"), status=503)
    top = search_vectors(
        snapshot.vectors,
        vector[None].astype(np.float32),
        k,
        allowed=snapshot.searchable,
        cache=library.folder.path / CACHE / str(snapshot.model.id),
    )
    ids = (top.indexes[0] + 1).tolist()
    captions = {
        image: caption
        for image, caption in library.folder.query(
            "SELECT image, MAX(caption) FROM files WHERE image IN "
            f"({','.join('?' * len(ids))}) AND present GROUP BY image",
            ids,
        )
    }
    return [
        {
            "id": image,
            "similarity": round(score, 6),
            "caption": captions[image],
            "url": f"/v1/images/{image}",
        }
        for image, score in zip(ids, top.scores[0].tolist(), strict=True)
        if image in captions
    ]


def _tag(library: ServedLibrary, image: int, variant: str) -> str:
    """Return the entity tag of an image of the library.

    Raises:
        RequestError: the library has no such image (404).
    """
    rows = library.folder.query(
        "SELECT digest FROM images WHERE id = ? AND files > 0 "
        "AND id NOT IN (SELECT image FROM erasures)",
        (image,),
    )
    if not rows:
        raise RequestError(
            _("the library has no image {image}", image=image), status=404, code="no_image"
        )
    key = rows[0][0] + variant.encode()
    return f'"{hashlib.blake2b(key, digest_size=12).hexdigest()}"'


def _image(library: ServedLibrary, image: int, side: int, original: bool) -> tuple[bytes, str]:
    try:
        content = image_bytes(library.folder, image)
    except LibraryError:  # its message has paths of this machine
        raise _unreadable(image) from None
    if original:
        return content, media_type(content)
    return rendered(content, max_side=side)


def _unreadable(image: int) -> RequestError:
    return RequestError(
        _("the file of image {image} cannot be read now", image=image),
        status=404,
        code="file_unreadable",
    )


def _state(service: Service, library: ServedLibrary) -> dict[str, Any]:
    folder = library.folder
    places = Places(folder, absolute=service.settings.show_paths)
    model = folder.active_model()
    runs = _index_runs(service, library)
    counts = dict(folder.query("SELECT root, COUNT(*) FROM files WHERE present GROUP BY root"))
    ids = [row[0] for row in folder.query("SELECT id FROM roots ORDER BY id")]
    return {
        "name": folder.path.name,
        "images": len(library) if model else 0,
        "unreadable": folder.query("SELECT COUNT(*) FROM files WHERE error IS NOT NULL")[0][0],
        "model": model.name if model else None,
        "roots": [
            {"name": name, "files": counts.get(root, 0)}
            for root, (name, _path) in zip(ids, places.roots, strict=True)
        ],
        "may_index": runs is not None,
        "index": None if runs is None else runs.state() or None,
    }


def _index_runs(service: Service, library: ServedLibrary) -> IndexRuns | None:
    if not service.settings.allow_index or service.settings.run_folder is None:
        return None
    return IndexRuns(library.folder.path, Path(service.settings.run_folder))
