"""Requests that are refused, and the HTTP status of every error."""

from __future__ import annotations

from cn_clip.errors import CNClipError, DataError, ImageError, LibraryError, UsageError
from cn_clip.translation import _

RETRY_LIMIT = 30  # seconds; the longest Retry-After


class RequestError(CNClipError):
    """A request is refused.

    Attributes:
        status: of the response.
        kind: ``error.type`` of the response, as OpenAI names it.
        param: the part of the request that is at fault, such as ``input[2]``.
        code: ``error.code`` of the response.
        retry_after: seconds, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after


def overloaded(retry_after: float) -> RequestError:
    """Return the refusal of a request for which there is no room, with the seconds to wait."""
    seconds = max(1, min(RETRY_LIMIT, round(retry_after + 0.5)))
    return RequestError(
        _("the server is busy; try again in {seconds} s", seconds=seconds),
        status=429,
        code="overloaded",
        retry_after=seconds,
    )


def unavailable(message: str, *, code: str = "unavailable") -> RequestError:
    """Return the refusal of a request that cannot be answered now."""
    return RequestError(message, status=503, code=code, retry_after=1)


def too_late(seconds: float) -> RequestError:
    """Return the refusal of a request that was not answered in time."""
    return unavailable(
        _("no answer within {seconds:g} s; try again later", seconds=seconds), code="timeout"
    )


def problem_of(error: CNClipError) -> RequestError:
    """Return an error of the package as the refusal of a request."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, UsageError | ImageError | DataError) and not isinstance(
        error, LibraryError
    ):
        return RequestError(str(error))
    return unavailable(str(error))


_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          429: "rate_limit_error", 503: "server_error"}  # fmt: skip


def error_body(
    message: str, status: int, *, param: str | None = None, code: str | None = None
) -> dict[str, object]:
    """Return the JSON of a refusal, in the shape of OpenAI's API."""
    kind = _KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
