"""A fake Hugging Face Hub server on localhost, with the requests for listing and downloading repositories."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "cafe"
CONVERTED = "refs/convert/parquet"


@dataclass
class Repository:
    """A dataset, or with `kind` "models" a model: files of its branch main, and others that the Hub has converted.

    `card` is the metadata in its README. Files are in LFS, except those in `in_git`."""

    files: dict[str, bytes]
    card: dict = field(default_factory=dict)
    converted: dict[str, bytes] | None = None
    kind: str = "datasets"
    in_git: tuple[str, ...] = ("README.md",)

    def tree(self, revision: str) -> dict[str, bytes] | None:
        """The files of a branch or commit; None if it does not exist."""
        branches = {"main": self.files, COMMIT: self.files, CONVERTED: self.converted, COMMIT[::-1]: self.converted}
        return branches.get(revision)


class HubServer(ThreadingHTTPServer):
    """Serves `repositories`, at first one dataset of `files`. `requests` logs method, path and Range header.

    `break_at`: the connection closes after this many bytes of the first GET of a file. `silent`: requests are accepted
    but never answered. `digests`: SHA-256 by path of the first dataset, as listed by the server.
    """

    daemon_threads = True

    def __init__(self, repository: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.repositories = {repository: Repository(files)}
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
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.server.requests.append((self.command, path, self.headers["Range"]))
        if self.server.silent:
            self.server.closing.wait()
            return
        for name, repository in self.server.repositories.items():
            api, root = f"/api/{repository.kind}/{name}/", f"/{repository.kind}/{name}/resolve/".replace("/models", "")
            if path.startswith(f"{api}revision/"):
                return self._send_info(name, repository, path.removeprefix(f"{api}revision/"))
            if path.startswith(f"{api}tree/"):
                commit, _, folder = path.removeprefix(f"{api}tree/").partition("/")
                return self._send_tree(repository, commit, folder, "recursive" in parse_qs(url.query))
            if path.startswith(root):
                revision, _, file = path.removeprefix(root).partition("/")
                return self._send_file((repository.tree(revision) or {}).get(file))
        self._send(b"", status=404, headers={"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _send_info(self, name: str, repository: Repository, branch: str) -> None:
        if repository.tree(branch) is None:
            return self._send(b"", status=404, headers={"X-Error-Code": "RevisionNotFound"})
        info = {"id": name, "sha": COMMIT if branch == "main" else COMMIT[::-1], "cardData": repository.card}
        self._send(json.dumps(info).encode())

    def _send_tree(self, repository: Repository, commit: str, folder: str, recursive: bool) -> None:
        entries = []
        for path, content in (repository.tree(commit) or {}).items():
            inside = path.startswith(f"{folder}/" if folder else "")
            if inside and (recursive or path.rpartition("/")[0] == folder):
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
                if path not in repository.in_git:
                    digest = self.server.digests.get(path) or hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 1}
                entries.append(entry)
        self._send(json.dumps(entries).encode())

    def _send_file(self, content: bytes | None) -> None:
        if content is None:
            return self._send(b"", status=404, headers={"X-Error-Code": "EntryNotFound"})
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers = {"ETag": f'"{self._etag(content)}"', "X-Repo-Commit": COMMIT}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        end = None
        if self.command == "GET":
            end, self.server.break_at = self.server.break_at, None
        self._send(content[start:], status=206 if start else 200, headers=headers, end=end)

    def _etag(self, content: bytes) -> str:
        listed = (self.server.digests.get(path) for path, known in self.server.files.items() if known == content)
        return next(listed, None) or hashlib.sha256(content).hexdigest()

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
