"""An object store on loopback: a folder as a bucket of S3 and as a web server, and its faults.

    python tests/data/object_server.py FOLDER [LATENCY]    # prints its port

GET and HEAD with ranges and ETags, S3's ListObjectsV2 at ``/BUCKET?list-type=2`` in pages, PUT with
conditions, copies, multipart uploads, and DELETE.
"""

import hashlib
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else many answers take 40 ms

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def do_PUT(self):
        self.change()

    def do_POST(self):
        self.change()

    def do_DELETE(self):
        self.change()

    def fault(self, path):
        """Return the fault of this request, if it has one."""
        server = self.server
        time.sleep(server.latency)
        with server.lock:
            server.requests[self.command, path] += 1
            faults = server.faults.get(path) or server.faults.get("*") or []
            if faults:
                return faults.pop(0)
            if server.random is not None and server.random.random() < server.failure_rate:
                return server.random.choice(("reset", "stall", 500, 503))
        return None

    def change(self):
        """Write or remove a file, or answer a part of a multipart upload."""
        parts = urlsplit(self.path)
        path = unquote(parts.path).lstrip("/").partition("/")[2]
        query = parse_qs(parts.query, keep_blank_values=True)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.fault(path)
        if fault == "stall":
            time.sleep(self.server.stall)
        if isinstance(fault, int):
            return self.reply(fault, b"<Error/>")
        with self.server.lock:
            status, answer, headers = self.changed(path, query, content)
        if fault == "reset":  # after the change: the answer is lost
            return self.reset()
        return self.reply(status, answer, **headers)

    def changed(self, path, query, content):
        """Return status, content and headers of an answer."""
        server, file = self.server, self.server.folder / path
        if self.command == "POST" and "uploads" in query:
            number = f"{len(server.uploads):08}"
            server.uploads[number] = {}
            text = f"<InitiateMultipartUploadResult><UploadId>{number}</UploadId>"
            return 200, f"{text}</InitiateMultipartUploadResult>".encode(), {}
        if self.command == "PUT" and "partNumber" in query:
            server.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = content
            return 200, b"", {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if self.command == "POST" and "delete" in query:
            deleted = b""
            for key in re.findall(rb"<Key>([^<]*)</Key>", content):
                (server.folder / unquote(key.decode())).unlink(missing_ok=True)
                deleted += b"<Deleted><Key>" + key + b"</Key></Deleted>"
            return 200, b"<DeleteResult>" + deleted + b"</DeleteResult>", {}
        if self.command == "DELETE":
            file.unlink(missing_ok=True)
            return 204, b"", {}
        if source := self.headers.get("x-amz-copy-source"):
            origin = server.folder / unquote(source).lstrip("/").partition("/")[2]
            if not origin.is_file():
                return 404, b"<Error><Code>NoSuchKey</Code></Error>", {}
            content = origin.read_bytes()
        if self.command == "POST":
            stored = server.uploads[query["uploadId"][0]]
            content = b"".join(stored[number] for number in sorted(stored))
        none, match = self.headers.get("If-None-Match"), self.headers.get("If-Match")
        if (none == "*" and file.exists()) or (match and (not file.exists() or match != tag(file))):
            return 412, b"<Error><Code>PreconditionFailed</Code></Error>", {}
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = server.folder.parent / f"upload-{threading.get_ident()}"
        temporary.write_bytes(content)
        os.replace(temporary, file)
        answer = b""
        if source:
            answer = f"<CopyObjectResult><ETag>{tag(file)}</ETag></CopyObjectResult>".encode()
        if self.command == "POST":
            answer = f"<CompleteMultipartUploadResult><ETag>{tag(file)}</ETag>".encode()
            answer += b"</CompleteMultipartUploadResult>"
        return 200, answer, {"ETag": tag(file)}

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()
        self.close_connection = True

    def answer(self, *, body):
        server = self.server
        parts = urlsplit(self.path)
        path = unquote(parts.path).lstrip("/").partition("/")[2]
        fault = self.fault(path)
        if fault == "reset":
            return self.reset()
        if fault == "stall":
            time.sleep(server.stall)
        if isinstance(fault, int):
            return self.reply(fault, b"<Error/>")
        if fault == "redirect":
            return self.reply(302, b"", Location=server.elsewhere + self.path)
        query = parse_qs(parts.query)
        if "list-type" in query:
            return self.listing(
                query.get("prefix", [""])[0],
                query.get("continuation-token", query.get("start-after", [""]))[0],
            )
        file = server.folder / path
        if not file.is_file():
            return self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
        size = file.stat().st_size
        headers = {
            "ETag": tag(file),
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

    def listing(self, prefix, after):
        names = sorted(
            file.relative_to(self.server.folder).as_posix()
            for file in (self.server.folder / prefix.rpartition("/")[0]).rglob("*")
            if file.is_file()
        )
        names = [name for name in names if name.startswith(prefix) and name > after]
        rows = []
        for name in names[: self.server.page]:
            status = (self.server.folder / name).stat()
            date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(status.st_mtime))
            rows.append(
                f"<Contents><Key>{name}</Key><LastModified>{date}</LastModified>"
                f"<ETag>{tag(self.server.folder / name)}</ETag><Size>{status.st_size}</Size>"
                "</Contents>"
            )
        rest = len(names) > self.server.page
        token = names[self.server.page - 1] if rest else ""
        text = (
            f"<ListBucketResult><IsTruncated>{str(rest).lower()}</IsTruncated>"
            + (f"<NextContinuationToken>{token}</NextContinuationToken>" if rest else "")
            + f"<KeyCount>{len(rows)}</KeyCount>{''.join(rows)}</ListBucketResult>"
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


def tag(file):
    """Return the ETag of a file."""
    status = file.stat()
    return f'"{hashlib.sha1(f"{status.st_size}|{status.st_mtime_ns}".encode()).hexdigest()}"'


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
        self.random, self.failure_rate = None, 0.0
        """Which requests fail by chance: a ``random.Random``, and the part of them that does."""
        self.page = 1000  # names of a listing
        self.uploads = {}

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
