"""A local HTTP server that can break off, refuse ranges, or answer with errors and web pages."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lib.config import WeightsEntry


@dataclass
class Served:
    """A local server: what it sends, and what it was asked."""

    folder: Path
    url: str = ""
    cut_after: list[int] = field(default_factory=list)  # bytes after which each next reply breaks off
    kind: str = "application/octet-stream"
    ranged: bool = True
    tells_size: bool = True  # where it refuses a range beyond the end
    status: int = 0
    asked: list[str] = field(default_factory=list)

    def entry(self, name: str, content: bytes = b"", **fields) -> WeightsEntry:
        if content:
            (self.folder / name).write_bytes(content)
        return WeightsEntry(file=name, url=f"{self.url}/{name}", **fields)


def handler(served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            served.asked.append(asked)
            if served.status:
                self.send_error(served.status)
                return
            path = served.folder / self.path.lstrip("/")
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and served.ranged else 0
            size = path.stat().st_size
            if start and start >= size:
                self.send_response(416)
                if served.tells_size:
                    self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Type", served.kind)
            self.send_header("Content-Length", str(size - start))
            self.end_headers()
            cut = served.cut_after.pop(0) if served.cut_after else size
            with path.open("rb") as file:
                file.seek(start)
                left = min(cut, size - start)
                while left > 0 and (block := file.read(min(left, 1 << 20))):
                    self.wfile.write(block)
                    left -= len(block)
            self.close_connection = True

    return Handler


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """Serves ``folder`` on a free local port."""
    served = Served(folder)
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(served))
    served.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
