"""A server on this machine that answers huggingface_hub as the Hugging Face hub does."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Serves repositories from folders: `root/org/repo@revision`.

    Attributes:
        requests: the paths that were asked for, each with its range.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.requests = root, list[tuple[str, str]]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        address = urlsplit(self.path).path
        self.server.requests.append((unquote(address), self.headers.get("range", "")))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)/?(.*)", address)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", address)
        if api:
            repo, kind, revision, path = map(unquote, api.groups())
        elif file:
            kind, (repo, revision, path) = "file", map(unquote, file.groups())
        else:
            self._fail("RepoNotFound")
            return
        folder = self.server.root / f"{repo}@{revision.replace('/', '--')}"
        if not folder.is_dir():
            others = folder.parent.glob(f"{folder.name.partition('@')[0]}@*")
            self._fail("RevisionNotFound" if any(others) else "RepoNotFound")
        elif kind == "revision":
            self._send(200, {"id": repo, "sha": "0" * 40})
        elif not (folder / path).exists():
            self._fail("EntryNotFound")
        elif kind == "tree":
            self._send(200, [_entry(each, folder) for each in sorted((folder / path).iterdir())])
        else:
            first, last = map(int, self.headers["range"].removeprefix("bytes=").split("-"))
            with (folder / path).open("rb") as opened:
                opened.seek(first)
                self._send(206, opened.read(last + 1 - first))

    def _send(self, code: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, reason: str) -> None:
        self._send(404, {"error": reason}, **{"X-Error-Code": reason})


def _entry(path: Path, folder: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"type": "file", "path": name, "oid": digest[:40], "size": path.stat().st_size}
