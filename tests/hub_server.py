"""A fake Hugging Face Hub server on localhost, with the requests for listing and downloading one dataset."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import urlsplit

COMMIT = "c0ffee" * 6 + "cafe"


class HubServer(ThreadingHTTPServer):
    """Serves `files` (path: content) as one dataset. `requests` logs method, path and Range header.

    `break_at`: the connection closes after this many bytes of the first GET of a file. `silent`: requests are accepted
    but never answered. `digests`: SHA-256 by path, as listed by the server.
    """

    daemon_threads = True

    def __init__(self, repository: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository = repository
        self.files = files
        self.digests = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
        self.requests: list[tuple[str, str, str | None]] = []
        self.break_at: int | None = None
        self.silent = False
        self.closing = Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> HubServer:
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, path, self.headers["Range"]))
        if self.server.silent:
            self.server.closing.wait()
        elif path == f"/api/datasets/{self.server.repository}/revision/main":
            self._send(json.dumps({"id": self.server.repository, "sha": COMMIT}).encode())
        elif path.startswith(tree := f"/api/datasets/{self.server.repository}/tree/{COMMIT}"):
            self._send(json.dumps(self._tree(path.removeprefix(tree).strip("/"))).encode())
        elif path.startswith(root := f"/datasets/{self.server.repository}/resolve/{COMMIT}/"):
            self._send_file(path.removeprefix(root))
        else:
            self._send(b"", status=404, headers={"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _tree(self, folder: str) -> list[dict]:
        entries = []
        for path, content in self.server.files.items():
            if path.rpartition("/")[0] == folder:
                entry = {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                if not path.endswith(".md"):
                    entry["lfs"] = {"oid": self.server.digests[path], "size": len(content), "pointerSize": 1}
                entries.append(entry)
        return entries

    def _send_file(self, path: str) -> None:
        content = self.server.files[path]
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers = {"ETag": f'"{self.server.digests[path]}"', "X-Repo-Commit": COMMIT}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        end = None
        if self.command == "GET":
            end, self.server.break_at = self.server.break_at, None
        self._send(content[start:], status=206 if start else 200, headers=headers, end=end)

    def _send(
        self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, end: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:end])

    def log_message(self, *_: object) -> None:
        pass
