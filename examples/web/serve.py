"""Serve this folder to browsers on this computer: ``python examples/web/serve.py [PORT]``.

The headers COOP and COEP let the page use threads. Only files inside the folder are served.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

FOLDER = Path(__file__).resolve().parent
PORT = 8080


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, with the headers for threads, and without lists of folders."""

    protocol_version = "HTTP/1.1"
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def send_head(self) -> BinaryIO | None:
        """Send the headers of a file inside the folder; links that lead outside are refused."""
        path = self.translate_path(self.path)
        root = os.path.realpath(self.directory)
        if "\0" in path or not Path(os.path.realpath(path)).is_relative_to(root):
            self.send_error(404)
            return None
        return super().send_head()

    def list_directory(self, path: str) -> None:  # type: ignore[override]
        """Refuse to list a folder."""
        self.send_error(404)

    def end_headers(self) -> None:
        """Add the headers for threads."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")  # ask whether a file changed
        super().end_headers()


def serve(port: int, folder: Path = FOLDER) -> ThreadingHTTPServer:
    """Return a server bound to loopback; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve this folder to browsers on this computer.")
    parser.add_argument("port", type=int, nargs="?", default=PORT)
    port = parser.parse_args().port
    if not (FOLDER / "vendor").is_dir():
        sys.exit(f"{FOLDER / 'vendor'} is missing; run npm ci and npm run build first")
    try:
        server = serve(port)
    except (OSError, OverflowError) as error:
        sys.exit(f"port {port} cannot be used ({error}); give another one: python serve.py PORT")
    with server, suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}/ (stop with Ctrl+C)")
        server.serve_forever()


if __name__ == "__main__":
    main()
