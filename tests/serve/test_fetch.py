"""URLs are fetched from public addresses only, at every hop."""

import http.server
import socket
import threading
import time

import pytest
from conftest import encoded, make_image

from cn_clip.serve import fetch
from cn_clip.serve.fetch import fetch_image, is_public
from cn_clip.serve.problems import RequestError

PICTURE = encoded(make_image(1), "PNG")

# Addresses that are not of the public internet, in every spelling that resolvers know.
PRIVATE = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.8.8.8", "169.254.169.254",
    "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.2.1", "192.88.99.1", "192.168.1.1",
    "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1",
    "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1",
    "::ffff:8.8.8.8", "::ffff:0:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::808:808",
    "64:ff9b:1::7f00:1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::",
    "fc00::1", "fd00::1", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "5f00::1",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001::1"]

HOSTILE = [
    "http://127.0.0.1/", "http://localhost/", "http://[::1]/", "http://0/", "http://0x7f000001/",
    "http://2130706433/", "http://017700000001/", "http://127.1/", "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/", "http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/",
    "http://169.254.169.254/latest/meta-data/", "http://[fe80::1%25lo]/", "http://[fd00::1]/",
    "http://user@127.0.0.1/", "http://8.8.8.8@127.0.0.1/", "http://8.8.8.8:22/",
    "http://127.0.0.1:80/", "https://127.0.0.1:443/", "http://8.8.8.8#@127.0.0.1:22/",
    "http:///etc/passwd", "file:///etc/passwd", "ftp://8.8.8.8/", "gopher://8.8.8.8/",
    "http://", "https://", "http://[", "http://8.8.8.8:99999/", "http://8.8.8.8:x/",
    "http://\u2488.0.0.1/", "http://\uff11\uff12\uff17.0.0.1/", "http://a\x00b/", "http://a b/",
    "http://8.8.8.8\\@127.0.0.1/", "http://" + "a" * 300 + "/", "http://a..b/", "http://.:80/",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_public_is_recognised(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_recognised(address):
    assert is_public(address)


@pytest.fixture
def dialled(monkeypatch):
    """Return the list of addresses that are connected to; none is reached."""
    addresses = []

    def connect(address, *_unused):
        addresses.append(address[0])
        raise OSError("no network in tests")

    monkeypatch.setattr(fetch.socket, "create_connection", connect)
    return addresses


@pytest.mark.parametrize("url", HOSTILE)
def test_a_hostile_url_connects_to_nothing_that_is_not_public(dialled, url):
    with pytest.raises(RequestError):
        fetch_image(url)
    assert all(map(is_public, dialled))


def resolve_to(monkeypatch, *answers):
    """Let host names resolve to each answer in turn, the last for ever."""
    remaining = list(answers)

    def resolve(host, port, **_unused):
        addresses = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(fetch.socket, "getaddrinfo", resolve)


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_that_resolves_to_a_private_address_is_refused(dialled, monkeypatch, address):
    resolve_to(monkeypatch, [address])
    with pytest.raises(RequestError, match="not public"):
        fetch_image("http://inside.example/")
    resolve_to(monkeypatch, ["8.8.8.8", address])  # all addresses of a name count
    with pytest.raises(RequestError, match="not public"):
        fetch_image("http://inside.example/")
    assert not dialled


def test_the_checked_address_is_dialled_and_not_resolved_again(dialled, monkeypatch):
    resolve_to(monkeypatch, ["8.8.8.8"], ["127.0.0.1"])  # DNS rebinding
    with pytest.raises(RequestError, match="no network"):
        fetch_image("http://changing.example/")
    assert dialled == ["8.8.8.8"]


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.headers["host"], self.path))
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("location", self.path[4:])
            self.end_headers()
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _number in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        elif self.path == "/slow-head":
            for _number in range(100):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nx: " if not _number else b"x")
                self.wfile.flush()
                time.sleep(0.05)
        elif self.path == "/large":
            self.send_response(200)
            self.end_headers()
            for _number in range(64):
                self.wfile.write(b"x" * 65536)
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("content-length", str(len(PICTURE)))
            self.end_headers()
            self.wfile.write(PICTURE)

    def log_message(self, *_unused):
        pass


@pytest.fixture
def site(monkeypatch):
    """Serve ``Site`` on loopback, at the public address of every ``*.example``."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.requests = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    connect = socket.create_connection
    resolve = socket.getaddrinfo

    def resolve_example(host, port, *parts, **options):
        if host.endswith(".example"):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))]
        return resolve(host, port, *parts, **options)

    def connect_to_site(address, timeout=None):
        assert address == ("93.184.216.34", 80)  # anything else would be a breach
        return connect(server.server_address, timeout)

    monkeypatch.setattr(fetch.socket, "getaddrinfo", resolve_example)
    monkeypatch.setattr(fetch.socket, "create_connection", connect_to_site)
    yield server
    server.shutdown()
    server.server_close()


def test_an_image_is_fetched_through_redirects(site):
    assert fetch_image("http://a.example/cat.png") == PICTURE
    assert fetch_image("http://a.example/to?http://b.example/to?/cat.png") == PICTURE
    assert site.requests[-1] == ("b.example", "/cat.png")


@pytest.mark.parametrize("target", [url for url in HOSTILE if not url.startswith("http:///")])
def test_a_redirect_to_a_hostile_url_is_not_followed(site, target):
    with pytest.raises(RequestError):
        fetch_image(f"http://a.example/to?{target}".replace("#", "%23"))


def test_redirects_in_a_circle_end(site):
    url = "http://a.example/to?"
    with pytest.raises(RequestError, match="too often"):
        fetch_image(url + url + url + url + url + "/x")


def test_a_name_that_takes_too_long_to_resolve_is_the_error_of_its_image(site, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_SECONDS", 0.1)
    resolve = fetch.socket.getaddrinfo

    def slowly(*parts, **options):
        time.sleep(0.2)
        return resolve(*parts, **options)

    monkeypatch.setattr(fetch.socket, "getaddrinfo", slowly)
    with pytest.raises(RequestError, match="took over"):
        fetch_image("http://a.example/a.jpg")


def test_a_status_other_than_200_is_an_error(site):
    with pytest.raises(RequestError, match="404"):
        fetch_image("http://a.example/missing")


@pytest.mark.parametrize("path", ["slow", "slow-head"])
def test_an_answer_that_trickles_is_cut(site, monkeypatch, path):
    monkeypatch.setattr(fetch, "MAX_SECONDS", 0.3)
    start = time.perf_counter()
    with pytest.raises(RequestError):
        fetch_image(f"http://a.example/{path}")
    assert time.perf_counter() - start < 2


def test_an_answer_that_is_too_large_is_cut(site, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 1 << 20)
    with pytest.raises(RequestError, match="over"):
        fetch_image("http://a.example/large")
