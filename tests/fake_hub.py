"""Answers as Hugging Face's hub does: revisions, ETags, redirects, ranges, refusals."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

__all__ = ["FakeHub", "run_hub"]

_LFS_ENDINGS = (".safetensors", ".gguf", ".bin")


@dataclass(kw_only=True)
class FakeHub:
    """A hub of repositories; large files are redirected to, as to a CDN.

    url           where it listens
    repositories  a repository's files by the names of its branches, by its name
    token         the one that callers must have, where it isn't None
    gated         repositories that refuse everyone
    status        of every answer, where it isn't None
    breaks        bytes of a file's body after which the connection is closed, once each
    requests      method, path and Range of each
    """

    url: str = ""
    repositories: dict[str, dict[str, Mapping[str, bytes]]] = field(default_factory=dict)
    token: str | None = None
    gated: set[str] = field(default_factory=set)
    status: int | None = None
    breaks: dict[str, list[int]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    def commit(self, files: Mapping[str, bytes]) -> str:
        """Return the commit's hash."""
        return sha1(repr(sorted(files.items())).encode()).hexdigest()

    def names_of(self, method: str = "GET") -> list[str]:
        """Return the files that were asked for, in order."""
        paths = (path for asked, path, _ in self.requests if asked == method)
        return [
            path.partition("/resolve/")[2].partition("/")[2] for path in paths if "/res" in path
        ]


@contextmanager
def run_hub(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve the hub on a free port of loopback."""

    class Handler(_Handler):
        its = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    its: FakeHub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.its, unquote(urlsplit(self.path).path)
        if path.startswith("/api/agent-harnesses"):
            return self._send(404)
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if hub.status is not None:
            return self._send(hub.status)
        if path.startswith("/cdn/"):
            return self._send_file(path.rpartition("/")[2])
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repository, kind, rest = "/".join(parts[:2]), parts[2:3], parts[3:]
        given = self.headers.get("Authorization")
        if given and hub.token and given != f"Bearer {hub.token}":
            message = "Invalid credentials in Authorization header"
            return self._send(401, {"X-Error-Message": message})
        if repository in hub.gated:
            return self._send(403 if given else 401, {"X-Error-Code": "GatedRepo"})
        if repository not in hub.repositories or (hub.token and not given):
            return self._send(404 if given else 401, {"X-Error-Code": "RepoNotFound"})
        branches = hub.repositories[repository]
        revision = rest[0] if rest else "main"
        found = [f for b, f in branches.items() if revision in (b, hub.commit(f))]
        if not found:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        files = found[0]
        match kind:
            case ["resolve"]:
                return self._resolve(repository, files, "/".join(rest[1:]))
            case _:
                siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                info = {"id": repository, "sha": hub.commit(files), "siblings": siblings}
                return self._send_json(info)

    def _resolve(self, repository: str, files: Mapping[str, bytes], name: str) -> None:
        headers = {"X-Repo-Commit": self.its.commit(files)}
        if name not in files:
            return self._send(404, headers | {"X-Error-Code": "EntryNotFound"})
        data = files[name]
        if name.endswith(_LFS_ENDINGS):
            etag = sha256(data).hexdigest()
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            # Another host, or the client takes it for a renamed repository and follows at once.
            elsewhere = self.its.url.replace("127.0.0.1", "localhost")
            return self._send(302, headers | {"Location": f"{elsewhere}/cdn/{repository}/{etag}"})
        return self._send(200, headers | {"ETag": f'"{sha1(data).hexdigest()}"'}, data)

    def _send_file(self, etag: str) -> None:
        files = [
            (name, data)
            for branches in self.its.repositories.values()
            for branch in branches.values()
            for name, data in branch.items()
            if sha256(data).hexdigest() == etag
        ]
        name, data = files[0]
        asked = self.headers.get("Range", "").removeprefix("bytes=").rstrip("-")
        start = int(asked or 0)
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        breaks = self.its.breaks.get(name)
        self._send(206 if asked else 200, headers, data[start:], breaks.pop(0) if breaks else None)

    def _send_json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(
        self,
        status: int,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        break_at: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:break_at])
            self.wfile.flush()
        if break_at is not None:
            self.close_connection = True
