"""Servers that each have a part of the shards, asked together, and their results merged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any
from urllib.parse import urlsplit

import httpx

from cn_clip.errors import UsageError
from cn_clip.serve.problems import RequestError, unavailable
from cn_clip.serve.settings import PARTS_KEY_VARIABLE
from cn_clip.translation import _, asked_language

_CONNECTIONS = 64  # to each part
_CONNECT_SECONDS = 5.0  # to connect, a free connection awaited
_PROBE_SECONDS = 2.0  # between probes
_PROBE_TIMEOUT = 5.0  # without an answer for so long, a part is asked nothing but the next probe

log = logging.getLogger("cn_clip.serve")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a part answered.

    Attributes:
        part: its number, from 1 in the order in which the parts are given.
        response: None if there was none.
        reason: why there was none.
        timed_out: whether that is why.
    """

    part: int
    response: httpx.Response | None
    reason: str = ""
    timed_out: bool = False

    @property
    def is_good(self) -> bool:
        """Whether the part did what it was asked."""
        return self.response is not None and self.response.status_code == 200

    @property
    def is_refusal(self) -> bool:
        """Whether the request itself is at fault."""
        # 401 and 403 are about the key that this server has for its parts, and 429 passes.
        return self.response is not None and self.response.status_code in (400, 404, 413)

    @property
    def is_absence(self) -> bool:
        """Whether the part does not have what it was asked for."""
        return self._status == 404

    @property
    def missing(self) -> dict[str, Any]:
        """A part that did not answer, in a response."""
        reason = self.reason or _("it refused ({status})", status=self._status)
        return {"part": self.part, "reason": reason}

    @property
    def _status(self) -> int:
        return 0 if self.response is None else self.response.status_code

    def values(self) -> Any:
        """Return the JSON of the response.

        Raises:
            RequestError: it is none (503).
        """
        assert self.response is not None
        try:
            return self.response.json()
        except (JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise unavailable(_("part {part} does not answer in JSON", part=self.part)) from None


class Parts:
    """The servers. Used from one event loop."""

    def __init__(self, urls: Sequence[str], *, key: str | None, timeout: float) -> None:
        """Check the addresses; nothing is sent.

        Raises:
            UsageError: one is no address of a server, or two are equal.
        """
        self.urls = [_checked(url) for url in urls]
        if len(set(self.urls)) < len(self.urls):
            raise UsageError(_("--parts has an address twice; its images would count twice"))
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        certificates = httpx.create_ssl_context(trust_env=False)
        self._timeout = timeout

        def client() -> httpx.AsyncClient:
            return httpx.AsyncClient(
                headers=headers,
                timeout=httpx.Timeout(timeout, connect=_CONNECT_SECONDS, pool=_CONNECT_SECONDS),
                limits=httpx.Limits(max_connections=_CONNECTIONS),
                verify=certificates,
                trust_env=False,
                follow_redirects=False,
            )

        # A client for each: requests that wait for one part take no connection of another, nor of
        # the probes.
        self._clients = [client() for _url in self.urls]
        self._prober = client()
        self._silent: set[int] = set()  # parts whose last probe timed out
        self.reasons: dict[int, str] = {}  # of the parts that are not ready
        self._next = 0
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to watch whether the parts are ready."""
        await self._probe()
        self._watch = asyncio.get_running_loop().create_task(self._keep_probing())

    async def close(self) -> None:
        """Close all connections."""
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        for client in (*self._clients, self._prober):
            await client.aclose()

    async def ask_all(
        self, method: str, path: str, *, body: bytes | None = None, query: str = ""
    ) -> list[Answer]:
        """Ask every part, at once."""
        numbers = range(1, len(self.urls) + 1)
        return list(
            await asyncio.gather(*(self._ask(n, method, path, body, query) for n in numbers))
        )

    async def ask_one(
        self, method: str, path: str, *, body: bytes | None = None, query: str = ""
    ) -> httpx.Response:
        """Ask the parts in turn, until one answers.

        Raises:
            RequestError: none does (503).
        """
        self._next += 1
        busy: httpx.Response | None = None
        for offset in range(len(self.urls)):
            number = (self._next + offset) % len(self.urls) + 1
            answer = await self._ask(number, method, path, body, query)
            if answer.response is not None and (answer.is_good or answer.is_refusal):
                return answer.response
            if answer.response is not None and answer.response.status_code in (408, 429):
                busy = answer.response
        if busy is not None:
            return busy
        raise unavailable(_("no part answers"))

    async def ask_for(self, path: str, query: str) -> httpx.Response:
        """Return the response of the part that has something.

        Raises:
            RequestError: none has it (404), or a part that may have it does not answer (503).
        """
        answers = await self.ask_all("GET", path, query=query)
        found = next((answer.response for answer in answers if answer.is_good), None)
        if found is not None:
            return found
        refused = next((a.response for a in answers if a.is_refusal and not a.is_absence), None)
        if refused is not None:
            return refused
        if all(answer.is_absence for answer in answers):
            raise RequestError(_("no part has {path}", path=path), status=404)
        raise unavailable(_("no part that answers has {path}", path=path))

    async def _ask(
        self, number: int, method: str, path: str, body: bytes | None, query: str
    ) -> Answer:
        if number in self._silent:
            return Answer(number, None, _("no answer in time"), timed_out=True)
        target = path + (f"?{query}" if query else "")
        return await self._send(self._clients[number - 1], number, method, target, body)

    async def _send(
        self,
        client: httpx.AsyncClient,
        number: int,
        method: str,
        target: str,
        body: bytes | None = None,
    ) -> Answer:
        """Return what a part answered. Whatever goes wrong costs the results of this part only."""
        url = self.urls[number - 1] + target
        headers = {} if body is None else {"content-type": "application/json"}
        if (language := asked_language()) is not None:
            headers["accept-language"] = language
        seconds = _PROBE_TIMEOUT if client is self._prober else self._timeout
        try:
            async with asyncio.timeout(seconds):  # in all: a part may send a byte now and then
                response = await client.request(method, url, content=body, headers=headers)
            return Answer(number, response)
        except (TimeoutError, httpx.TimeoutException):
            answer = Answer(number, None, _("no answer in time"), timed_out=True)
        except Exception as error:  # more than httpx.HTTPError: a host name that IDNA refuses
            log.debug("part %d: %r", number, error)
            answer = Answer(number, None, _("no connection"))
        log.warning("part %d (%s): %s", number, self.urls[number - 1], answer.reason)
        return answer

    async def _keep_probing(self) -> None:
        while True:
            await asyncio.sleep(_PROBE_SECONDS)
            await self._probe()

    async def _probe(self) -> None:
        numbers = range(1, len(self.urls) + 1)
        answers = await asyncio.gather(
            *(self._send(self._prober, number, "GET", "/readyz") for number in numbers)
        )
        self.reasons = {a.part: a.missing["reason"] for a in answers if not a.is_good}
        self._silent = {answer.part for answer in answers if answer.timed_out}


def good_answers(answers: Sequence[Answer]) -> list[Answer]:
    """Return the answers of the parts that did what they were asked.

    Raises:
        RequestError: none did; with the message of a part that refused the request itself.
    """
    good = [answer for answer in answers if answer.is_good]
    if good:
        return good
    refusal = next((answer for answer in answers if answer.is_refusal), None)
    if refusal is None or refusal.response is None:
        raise unavailable(_("no part answers"))
    error = refusal.values()
    error = error.get("error") if isinstance(error, dict) else None
    error = error if isinstance(error, dict) else {}
    raise RequestError(
        str(error.get("message")),
        status=refusal.response.status_code,
        param=error.get("param"),
        code=error.get("code"),
    )


def parts_state(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return how many parts answered, and which did not, for a response."""
    missing = [answer.missing for answer in answers if not answer.is_good]
    return {"asked": len(answers), "answered": len(answers) - len(missing), "missing": missing}


def merged_hits(
    results: Sequence[Mapping[str, Any]], score: str, count: int
) -> list[Mapping[str, Any]]:
    """Return the best results of all parts: by score, ties by id."""
    return sorted(results, key=lambda hit: (-hit[score], hit["id"]))[:count]


def _checked(url: str) -> str:
    url = url.rstrip("/")
    try:
        split = urlsplit(url)
        host = httpx.URL(url).host  # raises if IDNA refuses the name
        good = split.scheme in ("http", "https") and host and split.port != 0
        good = good and not any(each in url for each in "?#")
    except (ValueError, httpx.InvalidURL):
        split, good = urlsplit(""), False
    if "@" in split.netloc:
        raise UsageError(
            _(
                "--parts has an address with a user or a password; give the API key of the parts "
                "in the variable {variable}",
                variable=PARTS_KEY_VARIABLE,
            )
        )
    if not good:
        raise UsageError(
            _("--parts has {url!r}; give addresses such as http://10.0.0.7:8000", url=url)
        )
    return url
