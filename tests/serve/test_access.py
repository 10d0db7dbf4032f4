"""Who may ask what, and within which limits."""

import http.client
import os
import socket
import threading
import time

import httpx
import pytest
from serve.servers import Settings, body, make_library, serving

from cn_clip.errors import UsageError
from cn_clip.serve.keys import Keys, add_key, hash_of
from cn_clip.serve.run import check_access, serve
from cn_clip.serve.settings import is_loopback


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "keys"


@pytest.fixture(scope="module")
def key(keys):
    return add_key(str(keys), "anna")


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tmp_path_factory, keys, key):
    library = make_library(tmp_path_factory.mktemp("served"), tiny_checkpoint, 2)
    settings = Settings(
        library=str(library), image_batch=1, keys=str(keys), max_body=1 << 20, body_seconds=0.6
    )
    with serving(settings) as client:
        yield client


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def walk(server):
    """Yield the method and an example path of every route."""
    schema = server.get("/openapi.json", headers=bearer(server.key)).json()
    for path, operations in schema["paths"].items():
        for method in operations:
            yield method.upper(), path.replace("{image}", "1")
    yield from [("GET", "/openapi.json"), ("GET", "/nothing"), ("GET", "/static/none.js")]


def test_without_a_key_every_route_but_probes_and_page_is_401(server, key):
    server.key = key
    routes = list(walk(server))
    assert len(routes) > 15
    for method, path in routes:
        answer = server.request(method, path)
        if path in ("/livez", "/readyz"):
            assert answer.status_code == 200
        elif path == "/login":
            assert answer.status_code == 400
        else:
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
        for name in ("content-security-policy", "x-content-type-options"):
            assert name in answer.headers, (method, path)
    assert server.get("/").status_code == 200
    assert "/v1" not in server.get("/livez").text


def test_a_key_opens_and_another_does_not(server, key):
    assert server.get("/v1/models", headers=bearer(key)).status_code == 200
    assert server.get("/v1/models", headers={"authorization": f"bearer  {key}"}).status_code == 200
    for wrong in ("x", key[:-1], key + "x", hash_of(key), "é"):
        headers = {"authorization": f"Bearer {wrong}".encode()}
        assert server.get("/v1/models", headers=headers).status_code == 401
    assert server.get("/v1/models", headers={"authorization": f"Basic {key}"}).status_code == 401


def test_the_file_has_hashes_and_no_keys(keys, key):
    text = keys.read_text()
    assert key not in text and hash_of(key) in text
    if os.name == "posix":
        assert keys.stat().st_mode & 0o777 == 0o600


def test_a_session_opens_images_and_ends_with_its_key(server, keys):
    key = add_key(str(keys), "berta")
    with httpx.Client(base_url=server.base_url, trust_env=False) as page:
        time.sleep(1.1)  # the server looks once per second
        assert page.post("/login", json={"key": "wrong"}).status_code == 401
        answer = page.post("/login", json={"key": key})
        cookie = answer.headers["set-cookie"]
        assert answer.status_code == 204 and key not in cookie
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie
        assert page.get("/v1/images/1/thumbnail").status_code == 200
        assert page.get("/session").json() == {"key": True}
        value = page.cookies["cnclip_session"].strip('"')
        name, until, signature = value.split(":")
        for forged in (
            f"anna:{until}:{signature}",
            f"{name}:{int(until) + 1}:{signature}",
            f"{name}:{until}:{signature[:-1]}0",
            f"{name}:{until}",
            "::",
            f"{name}:{'9' * 5000}:{signature}",
        ):
            headers = {"cookie": f"cnclip_session={forged}"}
            fresh = httpx.get(f"{server.base_url}/v1/models", headers=headers, trust_env=False)
            assert fresh.status_code == 401
        keys.write_text("".join(keys.read_text().splitlines(keepends=True)[:1]))  # revoked
        time.sleep(1.1)
        assert page.get("/v1/images/1/thumbnail").status_code == 401
        assert page.get("/v1/models", headers=bearer(key)).status_code == 401


def test_a_damaged_file_of_keys_lets_no_one_in(tmp_path):
    path = tmp_path / "keys"
    key = add_key(str(path), "a")
    keys = Keys(str(path))
    assert keys.name_of(key) == "a"
    path.write_text("nonsense")
    keys._checked = 0
    assert keys.name_of(key) is None
    with pytest.raises(UsageError, match="line 1"):
        Keys(str(path))


@pytest.mark.parametrize("name", ["", "a b", "../x", "a" * 65, "a\nb"])
def test_a_bad_name_of_a_key_is_refused(tmp_path, name):
    with pytest.raises(UsageError):
        add_key(str(tmp_path / "keys"), name)


def test_a_name_of_a_key_is_not_given_twice(tmp_path):
    add_key(str(tmp_path / "keys"), "a")
    with pytest.raises(UsageError, match="already"):
        add_key(str(tmp_path / "keys"), "a")


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://["},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_page_of_another_site_cannot_make_a_browser_ask(server, headers):
    assert server.post("/login", json={"key": "x"}, headers=headers).status_code == 403


def test_the_page_works_behind_a_proxy_that_changes_the_host(server):
    headers = {"origin": "https://photos.example", "sec-fetch-site": "same-origin"}
    assert server.post("/login", json={"key": "x"}, headers=headers).status_code == 401


def test_pages_of_other_sites_cannot_embed_images_but_may_link(server):
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert server.get("/", headers=headers).status_code == 403
    headers["sec-fetch-mode"] = "navigate"
    assert server.get("/", headers=headers).status_code == 200


def test_without_keys_only_names_of_this_machine_are_answered(tiny_checkpoint):
    with serving(Settings(model=str(tiny_checkpoint), image_batch=1)) as client:
        for host in ("localhost:1", "127.0.0.1", "[::1]:80", "127.1.2.3"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "[", "10.0.0.1"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 403
        client.service.draining = True  # as during the drain
        assert client.get("/readyz").status_code == 503


def connect(server):
    return socket.create_connection(("127.0.0.1", server.base_url.port), timeout=10)


def read_answer(connection):
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer


def test_a_large_body_is_refused_before_it_is_sent(server, key):
    with connect(server) as connection:
        head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
        connection.sendall(f"{head}content-length: 500000000\r\n\r\n".encode())
        assert read_answer(connection).status == 413
        connection.settimeout(5)
        assert connection.recv(1) == b""  # closed: the rest is not read


def test_a_large_body_without_a_length_is_cut(server, key):
    def chunks():
        for _number in range(64):
            yield b"x" * 65536

    with pytest.raises(httpx.HTTPError) as caught:
        answer = server.post("/v1/embeddings", content=chunks(), headers=bearer(key))
        assert answer.status_code == 413
        raise httpx.WriteError("refused")
    assert isinstance(caught.value, httpx.WriteError | httpx.ReadError)
    assert server.get("/livez").status_code == 200


def test_a_body_that_trickles_is_cut(server, key):
    with connect(server) as connection:
        head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
        connection.sendall(f"{head}content-length: 1000\r\n\r\n{{".encode())
        start = time.perf_counter()
        assert read_answer(connection).status == 408
        assert time.perf_counter() - start < 3


def test_a_body_without_a_key_is_not_read(server):
    with connect(server) as connection:
        connection.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n"
        )
        assert read_answer(connection).status == 401


def test_a_large_head_is_refused(server):
    with connect(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 100_000)
        assert read_answer(connection).status == 431


def test_a_head_that_trickles_is_cut(server, monkeypatch):
    monkeypatch.setattr("cn_clip.serve.protocol.HEAD_SECONDS", 0.2)
    with connect(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost:")
        connection.settimeout(5)
        assert connection.recv(100) == b""
    with connect(server) as connection:  # a connection that says nothing
        connection.settimeout(5)
        assert connection.recv(100) == b""


def test_clients_that_close_at_once_leave_nothing_behind(server, key):
    service = server.service
    payload = b'{"input": ["' + "猫".encode() * 40 + b'"]}'
    for number in range(30):
        with connect(server) as connection:
            head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
            head += f"content-length: {len(payload)}\r\n\r\n"
            connection.sendall(head.encode() + payload[: number * 5])
    deadline = time.monotonic() + 5
    while service._engine.busy and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not service._engine.busy
    request = {"input": "猫"}
    assert server.post("/v1/embeddings", json=request, headers=bearer(key)).status_code == 200


def test_beyond_the_bound_requests_get_429_at_once(tiny_checkpoint):
    settings = Settings(model=str(tiny_checkpoint), image_batch=1, text_bound=40)
    with serving(settings) as client:
        engine = client.service._engine
        gate, run = threading.Event(), engine.texts._run

        def slow(items):
            gate.wait(10)
            return run(items)

        engine.texts._run = slow
        statuses = []

        def ask(number):
            # A client of its own for each: one client shares its connections.
            answer = httpx.post(
                f"{client.base_url}/v1/embeddings",
                **body({"input": f"猫{number} " * 10}),
                timeout=20,
                trust_env=False,
            )
            statuses.append((answer.status_code, answer.headers.get("retry-after")))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 5
        while len(statuses) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        refused = list(statuses)
        gate.set()
        for thread in threads:
            thread.join()
        assert [status for status, _retry in refused] == [429] * 5
        assert all(int(retry) >= 1 for _status, retry in refused)
        assert sorted(status for status, _retry in statuses) == [200, *[429] * 5]


def test_requests_that_wait_too_long_are_503(tiny_checkpoint):
    settings = Settings(model=str(tiny_checkpoint), image_batch=1, timeout=0.2)
    with serving(settings) as client:
        engine = client.service._engine
        gate, run = threading.Event(), engine.texts._run
        engine.texts._run = lambda items: (gate.wait(10), run(items))[1]
        answer = client.post("/v1/embeddings", json={"input": "猫"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "timeout"
        gate.set()
        assert not engine.busy


def test_other_machines_need_keys_or_a_word():
    with pytest.raises(UsageError, match="--no-auth"):
        check_access(Settings(host="0.0.0.0"))
    check_access(Settings(host="0.0.0.0", no_auth=True))
    check_access(Settings(host="0.0.0.0", key="x"))
    check_access(Settings())
    with pytest.raises(UsageError, match="both"):
        check_access(Settings(no_auth=True, key="x"))


def test_loopback_is_recognised():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    for other in ("0.0.0.0", "::", "", "10.0.0.1", "localhost.evil.example", "::ffff:8.8.8.8"):
        assert not is_loopback(other)


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} is in use"):
            serve(Settings(port=port), lambda address: None)


def test_a_file_of_keys_that_others_can_read_is_warned_of(tmp_path):
    from cn_clip.serve.keys import warn_if_readable

    path = tmp_path / "keys"
    add_key(str(path), "a")
    warn_if_readable(str(path))
    path.chmod(0o644)
    with pytest.warns(UserWarning, match="chmod 600"):
        warn_if_readable(str(path))


def test_a_request_with_trailers_is_cut(server):
    with connect(server) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        answer = read_answer(connection)
        assert answer.status == 200 and answer.headers["connection"] == "close"
    with connect(server) as connection:
        connection.sendall(b"POST /login HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        connection.sendall(b"0\r\na: b\r\nc: d\r\n")
        connection.settimeout(5)
        assert connection.recv(1000) == b""


def test_a_get_whose_body_does_not_come_is_answered_and_closed(server):
    with connect(server) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n")
        answer = read_answer(connection)
        assert answer.status == 200 and answer.headers["connection"] == "close"
        answer.read()
        connection.settimeout(5)
        assert connection.recv(1) == b""


@pytest.mark.parametrize("name", ["小王", "andré", "b.c-d_1"])
def test_the_page_logs_in_with_a_key_of_any_name(tiny_checkpoint, tmp_path, name):
    path = str(tmp_path / "keys")
    key = add_key(path, name)
    with serving(Settings(model=str(tiny_checkpoint), image_batch=1, keys=path)) as client:
        assert client.get("/v1/models").status_code == 401
        assert client.post("/login", json={"key": key}).status_code == 204
        assert client.get("/v1/models").status_code == 200


def test_a_body_above_the_bound_of_all_bodies_is_read_if_it_is_alone(tiny_checkpoint):
    settings = Settings(model=str(tiny_checkpoint), image_batch=1, max_buffered=1000)
    with serving(settings) as client:
        values = {"input": "猫", "user": "x" * 200_000}
        assert client.post("/v1/embeddings", json=values).status_code == 200
