"""An object store on loopback: a folder as a bucket of S3 and as a web server, and its faults.

    python tests/data/object_server.py FOLDER [LATENCY]    # prints its port

GET and HEAD with ranges and ETags, and S3's ListObjectsV2 at ``/BUCKET?list-type=2``.
"""

import hashlib
import socket
import sys
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        server = self.server
        parts = urlsplit(self.path)
        path = unquote(parts.path).lstrip("/").partition("/")[2]
        time.sleep(server.latency)
        with server.lock:
            server.requests[self.command, path] += 1
            faults = server.faults.get(path) or server.faults.get("*") or []
            fault = faults.pop(0) if faults else None
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()
            self.close_connection = True
            return
        if fault == "stall":
            time.sleep(server.stall)
        if isinstance(fault, int):
            return self.reply(fault, b"<Error/>")
        if fault == "redirect":
            return self.reply(302, b"", Location=server.elsewhere + self.path)
        query = parse_qs(parts.query)
        if "list-type" in query:
            return self.listing(query.get("prefix", [""])[0])
        file = server.folder / path
        if not file.is_file():
            return self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
        size = file.stat().st_size
        tag = hashlib.sha1(f"{size}|{file.stat().st_mtime_ns}".encode()).hexdigest()
        headers = {
            "ETag": f'"{tag}"',
            "Last-Modified": self.date_time_string(int(file.stat().st_mtime)),
        }
        start, stop, code = 0, size, 200
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop, code = int(first), min(size, int(last) + 1 if last else size), 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        if not body:
            return self.reply(code, b"", length=stop - start, **headers)
        with file.open("rb") as stream:
            stream.seek(start)
            content = stream.read(stop - start)
        server.bytes += len(content)
        if fault == "truncate":
            self.close_connection = True
            return self.reply(code, content[: len(content) // 2], length=len(content), **headers)
        return self.reply(code, content, **headers)

    def listing(self, prefix):
        names = sorted(
            file.relative_to(self.server.folder).as_posix()
            for file in self.server.folder.rglob("*")
            if file.is_file()
        )
        rows = []
        for name in names:
            if name.startswith(prefix):
                status = (self.server.folder / name).stat()
                tag = hashlib.sha1(f"{status.st_size}|{status.st_mtime_ns}".encode()).hexdigest()
                rows.append(
                    f"<Contents><Key>{name}</Key><LastModified>2026-01-01T00:00:00.000Z"
                    f'</LastModified><ETag>"{tag}"</ETag><Size>{status.st_size}</Size></Contents>'
                )
        text = (
            "<ListBucketResult><IsTruncated>false</IsTruncated>"
            f"<KeyCount>{len(rows)}</KeyCount>{''.join(rows)}</ListBucketResult>"
        )
        self.reply(200, text.encode(), **{"Content-Type": "application/xml"})

    def reply(self, status, content, length=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder, latency=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.latency, self.stall = Path(folder), latency, 1.0
        self.requests, self.bytes, self.lock = Counter(), 0, Lock()
        self.faults = {}
        """Path, or * -> faults of the next requests: a status, reset, stall, truncate, redirect."""
        self.elsewhere = ""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass


@contextmanager
def serving(folder, latency=0.0):
    server = Server(folder, latency)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    served = Server(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    print(served.server_address[1], flush=True)
    served.serve_forever()
