"""Routes of the model alone: embeddings, classification, similarity, the list of models."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from cn_clip.errors import CNClipError
from cn_clip.serve.engine import Engine, Vector
from cn_clip.serve.inputs import check_count, image_content, is_image, parse, text_of
from cn_clip.serve.problems import RequestError
from cn_clip.serve.responses import POST_ERRORS, body_of, errors, json_response
from cn_clip.serve.schemas import (
    ClassifyRequest,
    ClassifyResponse,
    EmbeddingsRequest,
    EmbeddingsResponse,
    ModelsResponse,
    SimilarityRequest,
    SimilarityResponse,
)
from cn_clip.serve.service import DEFAULT_MODEL, Service
from cn_clip.translation import _
from cn_clip.zeroshot import softmax

_DIGITS = 9
_TINY = 1e-50  # instead of zero; a float32 is larger

BODIES: list[type[BaseModel]] = [EmbeddingsRequest, ClassifyRequest, SimilarityRequest]


def model_routes(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["model"])
    limits = service.settings

    @router.get("/v1/models", response_model=ModelsResponse, responses=errors())
    async def models() -> Response:
        """List the model of this server, in the shape of OpenAI's API."""
        return json_response({"object": "list", "data": [await _card(service)]})

    @router.post(
        "/v1/embeddings",
        response_model=EmbeddingsResponse,
        responses=errors(*POST_ERRORS),
        openapi_extra=body_of(EmbeddingsRequest),
    )
    async def embeddings(request: Request) -> Response:
        """Embed texts and images as unit vectors in one space, in the shape of OpenAI's API."""
        given = parse(EmbeddingsRequest, await request.body())
        engine = await service.engine()
        _check_model(given.model, service, engine)
        if given.dimensions not in (None, engine.embedder.dim):
            raise RequestError(
                _(
                    "dimensions is {dimensions}, and the model has {dim}; leave it out",
                    dimensions=given.dimensions,
                    dim=engine.embedder.dim,
                ),
                param="dimensions",
            )
        inputs: list[Any] = given.input if isinstance(given.input, list) else [given.input]
        if not inputs:
            raise RequestError(_("input is empty; give a text"), param="input")
        check_count(inputs, "input", limits.max_inputs)
        vectors, tokens = await _embed_mixed(service, engine, inputs)
        encode = _base64 if given.encoding_format == "base64" else _numbers
        data = [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response(
            {"object": "list", "data": data, "model": engine.embedder.name, "usage": usage}
        )

    @router.post(
        "/v1/classify",
        response_model=ClassifyResponse,
        responses=errors(*POST_ERRORS),
        openapi_extra=body_of(ClassifyRequest),
    )
    async def classify(request: Request) -> Response:
        """Classify images by labels, zero-shot; an unreadable image has an error of its own."""
        given = parse(ClassifyRequest, await request.body())
        engine = await service.engine()
        _check_model(given.model, service, engine)
        check_count(given.images, "images", min(limits.max_inputs, limits.image_bound))
        labels = _labels(given.labels, limits.max_text)
        check_count(labels, "labels", limits.max_inputs)
        templates = [text_of(t, "templates", limits.max_text) for t in given.templates]
        for template in templates:
            if "{}" not in template:
                raise RequestError(
                    _("the template {template!r} has no {{}}", template=template),
                    param="templates",
                )
        sentences = [template.replace("{}", label) for label in labels for template in templates]
        check_count(sentences, "labels x templates", 8 * limits.max_inputs)
        for sentence in sentences:
            text_of(sentence, "labels", limits.max_text)
        entries = await engine.embed_texts(sentences)
        stacked = np.stack([entry.vector for entry in entries])
        mean = stacked.reshape(len(labels), len(templates), -1).mean(axis=1)
        prototypes = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        data = []
        for index, image in enumerate(await _embed_contents(service, engine, given.images)):
            if isinstance(image, CNClipError):
                data.append({"index": index, "error": {"message": str(image)}})
                continue
            cosines = prototypes @ image
            probabilities = softmax(engine.embedder.logit_scale * cosines[None])[0]
            order = np.argsort(-probabilities, kind="stable")[: given.top]
            predictions = [
                {
                    "label": labels[i],
                    "probability": float(probabilities[i]),
                    "cosine": float(cosines[i]),
                }
                for i in order
            ]
            data.append({"index": index, "predictions": predictions})
        return json_response(
            {
                "model": engine.embedder.name,
                "logit_scale": engine.embedder.logit_scale,
                "data": data,
            }
        )

    @router.post(
        "/v1/similarity",
        response_model=SimilarityResponse,
        responses=errors(*POST_ERRORS),
        openapi_extra=body_of(SimilarityRequest),
    )
    async def similarity(request: Request) -> Response:
        """Compare images with texts, or texts with each other: a table of cosines."""
        given = parse(SimilarityRequest, await request.body())
        engine = await service.engine()
        _check_model(given.model, service, engine)
        check_count(given.texts, "texts", limits.max_inputs)
        check_count(given.images, "images", min(limits.max_inputs, limits.image_bound))
        texts = [
            text_of(text, f"texts[{index}]", limits.max_text)
            for index, text in enumerate(given.texts)
        ]
        columns = np.stack([entry.vector for entry in await engine.embed_texts(texts)])
        rows: list[Vector | CNClipError] = list(columns)
        if given.images:
            rows = await _embed_contents(service, engine, given.images)
        cosines: list[list[float] | None] = []
        probabilities: list[list[float] | None] = []
        faults = {}
        for index, row in enumerate(rows):
            if isinstance(row, CNClipError):
                faults[str(index)] = str(row)
                cosines.append(None)
                probabilities.append(None)
                continue
            values = columns @ row
            cosines.append(values.tolist())
            scaled = softmax(engine.embedder.logit_scale * values[None])
            probabilities.append(scaled[0].tolist())
        return json_response(
            {
                "model": engine.embedder.name,
                "logit_scale": engine.embedder.logit_scale,
                "cosines": cosines,
                "probabilities": probabilities,
                "errors": faults,
            }
        )

    return router


async def _embed_mixed(
    service: Service, engine: Engine, inputs: list[Any]
) -> tuple[list[Vector], int]:
    """Embed texts and images in the order of the inputs; return the number of tokens too."""
    images = {i: value for i, value in enumerate(inputs) if is_image(value)}
    texts = {
        i: text_of(value, f"input[{i}]", service.settings.max_text)
        for i, value in enumerate(inputs)
        if i not in images
    }
    check_count(list(images), "input", service.settings.image_bound)
    vectors: dict[int, Vector] = {}
    tokens = 0
    if texts:
        entries = await engine.embed_texts(list(texts.values()))
        vectors |= {i: entry.vector for i, entry in zip(texts, entries, strict=True)}
        tokens = sum(entry.tokens for entry in entries)
    if images:
        contents = [image_content(value, f"input[{i}]") for i, value in images.items()]
        embedded = await _embed(service, engine, contents)
        for i, vector in zip(images, embedded, strict=True):
            if isinstance(vector, CNClipError):
                status = vector.status if isinstance(vector, RequestError) else 400
                place = f"input[{i}]"
                raise RequestError(
                    _("{place}: {reason}", place=place, reason=vector), status=status, param=place
                )
            vectors[i] = vector
    return [vectors[i] for i in range(len(inputs))], tokens


async def _embed_contents(
    service: Service, engine: Engine, images: list[Any]
) -> list[Vector | CNClipError]:
    """Embed the images of a request; an unreadable one has its error."""
    contents: list[Any] = []
    for index, value in enumerate(images):
        try:
            contents.append(image_content(value, f"images[{index}]"))
        except RequestError as error:
            contents.append(error)
    good = [content for content in contents if not isinstance(content, RequestError)]
    embedded = iter(await _embed(service, engine, good))
    return [c if isinstance(c, RequestError) else next(embedded) for c in contents]


async def _embed(
    service: Service, engine: Engine, contents: list[Any]
) -> list[Vector | CNClipError]:
    if not contents:
        return []
    fetched = await service.contents(contents)
    embedded = iter(await engine.embed_images([c for c in fetched if isinstance(c, bytes)]))
    return [next(embedded) if isinstance(content, bytes) else content for content in fetched]


async def _card(service: Service) -> dict[str, Any]:
    card: dict[str, Any] = {
        "id": service.settings.model or DEFAULT_MODEL,
        "object": "model",
        "created": service.started,
        "owned_by": "cn-clip",
    }
    if service.is_loaded:  # else asking for the list would load the model
        embedder = (await service.engine()).embedder
        card |= {
            "id": embedder.name,
            "dim": embedder.dim,
            "context_length": embedder.context_length,
            "logit_scale": embedder.logit_scale,
            "precision": embedder.backend.precision,
            "fingerprint": embedder.fingerprint,
        }
    return card


def _check_model(name: str | None, service: Service, engine: Engine) -> None:
    known = engine.embedder.name
    if name not in (None, "", "default", known, service.settings.model):
        raise RequestError(
            _("unknown model {name!r}; this server has {known}", name=name, known=known),
            status=404,
            param="model",
            code="model_not_found",
        )


def _labels(given: list[str], limit: int) -> list[str]:
    """Return the labels without duplicates."""
    texts = (text_of(text, f"labels[{i}]", limit).strip() for i, text in enumerate(given))
    labels = list(dict.fromkeys(texts))
    if len(labels) < 2:
        raise RequestError(_("give at least two different labels"), param="labels")
    return labels


def _numbers(vector: npt.NDArray[np.float32]) -> list[float]:
    """Return numbers of nine significant digits: as many as a float32 has, of the 17 of JSON."""
    wide = vector.astype(np.float64)
    exponents = np.floor(np.log10(np.maximum(np.abs(wide), _TINY)))
    scales = 10.0 ** (_DIGITS - 1 - exponents)
    numbers: list[float] = (np.rint(wide * scales) / scales).tolist()
    return numbers


def _base64(vector: npt.NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
