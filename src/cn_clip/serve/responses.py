"""JSON responses, errors as responses, and how both appear in the OpenAPI description."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from cn_clip.errors import CNClipError
from cn_clip.serve.problems import error_body, problem_of
from cn_clip.serve.schemas import ErrorResponse
from cn_clip.translation import _

POST_ERRORS = (400, 404, 408, 413, 429)  # of routes with a body, beside those of all routes
IMAGE_HEADERS = {"cache-control": "private, max-age=3600"}
_REFERENCE = "#/components/schemas/{model}"
_ERRORS = {
    400: "The request is invalid.",
    401: "An API key is needed.",
    403: "Not from another site, or not allowed by the owner.",
    404: "There is no such thing.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "The server is busy; see Retry-After.",
    503: "The server cannot answer now.",
}


def json_response(
    values: Any, *, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return a response of JSON values."""
    return Response(to_json(values), status, headers, "application/json")


def errors(*more: int) -> dict[int | str, dict[str, Any]]:
    """Return the errors of a route for its description: those of all routes, and more."""
    codes = sorted({401, 403, 503, *more})
    return {code: {"model": ErrorResponse, "description": _ERRORS[code]} for code in codes}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the description of a body that the route itself parses."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI, bodies: list[type[BaseModel]], description: str) -> None:
    """Make ``app.openapi`` complete: bodies that routes parse themselves, keys, no 422."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=description, routes=app.routes
            )
            _key, parts = models_json_schema(
                [(body, "validation") for body in bodies], ref_template=_REFERENCE
            )
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {}).update(parts["$defs"])
            for name in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(name, None)
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


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
