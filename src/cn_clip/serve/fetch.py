"""Images fetched from public web addresses, and from no others.

A URL is an order to this server to connect somewhere. So every host name of every hop is resolved
here, all its addresses must be public, and the connection goes to the address that was checked: a
name that resolves to another one a moment later gains nothing.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from contextlib import suppress
from urllib.parse import urljoin, urlsplit

from cn_clip.serve.problems import RequestError
from cn_clip.text import valid_text
from cn_clip.translation import _

MAX_BYTES = 32 << 20
MAX_SECONDS = 15.0
MAX_HOPS = 4
_PORTS = {"http": 80, "https": 443}
_CHUNK = 64 << 10
_REDIRECTS = (301, 302, 303, 307, 308)
# IPv6 addresses that contain an IPv4 address, to which a gateway connects: Teredo, 6to4 and its
# relays (mapped and NAT64 ones are outside of 2000::/3); and what older Pythons take for public.
_REFUSED = [
    ipaddress.ip_network(network)
    for network in ("2001::/23", "2002::/16", "192.88.99.0/24", "192.0.0.0/24")
]
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


def fetch_image(url: str) -> bytes:
    """Return the body of a public http or https address.

    Raises:
        RequestError: the address is not public, does not answer, or is too large or slow.
    """
    deadline = time.monotonic() + MAX_SECONDS
    for _hop in range(MAX_HOPS):
        found = _get(url, deadline)
        if isinstance(found, bytes):
            return found
        url = found
    raise _refused(url, _("it redirects too often"))


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # with a scope, such as fe80::1%eth0
        return False
    if any(ip in network for network in _REFUSED if network.version == ip.version):
        return False
    if ip.version == 6 and ip not in _GLOBAL_UNICAST:
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_private or ip.is_reserved)


def _get(url: str, deadline: float) -> bytes | str:
    """Return the body of a URL, or the URL that it redirects to."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _refused(url, _("it is not a URL")) from None
    if parts.scheme not in _PORTS or not host:
        raise _refused(url, _("only http and https addresses are fetched"))
    if parts.username is not None or parts.password is not None:
        raise _refused(url, _("it has a user name or a password"))
    if port not in (None, _PORTS[parts.scheme]):
        raise _refused(url, _("its port is not 80 or 443"))
    address = _public_address(url, host, _PORTS[parts.scheme])
    connection = _Connection(host, address, _PORTS[parts.scheme], parts.scheme == "https", deadline)
    target = parts.path or "/"
    if parts.query:
        target += f"?{parts.query}"
    headers = {"Accept": "image/*", "User-Agent": "cn-clip", "Connection": "close"}
    left = max(0.0, deadline - time.monotonic())  # the names of hosts may have taken it
    timer = threading.Timer(left, connection.cut)  # also while a head trickles in
    timer.daemon = True
    timer.start()
    try:
        connection.request("GET", target, headers=headers)
        response = connection.getresponse()
        if response.status in _REDIRECTS:
            return urljoin(url, response.headers.get("Location", ""))
        if response.status != 200:
            raise _refused(url, _("it answers {status}", status=response.status))
        return _body(url, response, deadline)
    # The names of hosts and the answers of servers are hostile input to these modules.
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise _refused(url, str(error) or type(error).__name__) from None
    finally:
        timer.cancel()
        connection.close()


def _public_address(url: str, host: str, port: int) -> str:
    """Return an address of a host; all of its addresses must be public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise _refused(url, _("its host is unknown")) from None
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise _refused(url, _("its address is not public"))
    return addresses[0]


def _body(url: str, response: http.client.HTTPResponse, deadline: float) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        chunk = response.read1(_CHUNK)
        if not chunk:
            _left(deadline)  # a connection that the timer cut is not a complete body
            return b"".join(chunks)
        size += len(chunk)
        if size > MAX_BYTES:
            raise _refused(url, _("it has over {limit:,} bytes", limit=MAX_BYTES))
        chunks.append(chunk)


class _Connection(http.client.HTTPConnection):
    """A connection to a checked address, in the name of its host."""

    def __init__(self, host: str, address: str, port: int, secure: bool, deadline: float) -> None:
        super().__init__(host, port, timeout=MAX_SECONDS)
        self._address, self._secure, self._deadline = address, secure, deadline
        # http.client forgets its socket when the body begins; the body keeps it open.
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        """Connect to the address; its host name is only used for TLS and the header Host."""
        self.sock = socket.create_connection((self._address, self.port), _left(self._deadline))
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(
                self.sock, server_hostname=self.host
            )
        self._socket = self.sock

    def cut(self) -> None:
        """End all reads at once; called from another thread."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(_("it took over {seconds:g} s", seconds=MAX_SECONDS))
    return left


def _refused(url: str, reason: str) -> RequestError:
    return RequestError(
        _("{url} is not fetched: {reason}", url=valid_text(url), reason=reason), code="not_fetched"
    )
