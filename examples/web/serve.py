"""Serve this folder to browsers on this computer: ``python examples/web/serve.py [PORT]``.

The headers COOP and COEP let the page use threads. Only files inside the folder are served.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PORT = 8080


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, with the headers for threads, and without lists of folders."""

    protocol_version = "HTTP/1.1"
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def translate_path(self, path: str) -> str:
        """Return the file of a URL's path; a name that does not exist if it is outside."""
        translated = super().translate_path(path)
        inside = Path(os.path.realpath(translated)).is_relative_to(os.path.realpath(self.directory))
        return translated if inside else os.path.join(self.directory, "\0")

    def list_directory(self, path: str) -> None:  # type: ignore[override]
        self.send_error(404)

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")  # ask whether a file changed
        super().end_headers()


def serve(port: int, folder: Path = FOLDER) -> ThreadingHTTPServer:
    """Return a server bound to loopback; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(folder)))


def main() -> None:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else PORT
    with serve(port) as server:
        print(f"http://127.0.0.1:{server.server_port}/ (stop with Ctrl+C)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
