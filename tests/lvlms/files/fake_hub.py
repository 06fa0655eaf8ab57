"""A Hugging Face hub of one model on this machine: as much of the protocol as `huggingface_hub` asks for."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FakeHub(ThreadingHTTPServer):
    """`commits` are folders by commit; `branch` is the commit of `main`; `asked` are the requests, in order."""

    daemon_threads = True

    def __init__(self, model: str, commits: dict[str, Path], branch: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.commits, self.branch = model, commits, branch
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.server
        hub.asked.append(f"{self.command} {path}")
        api, files = f"/api/models/{hub.model}", f"/{hub.model}/resolve/"
        if path.startswith(f"{api}/tree/"):
            folder = hub.commits[path.rpartition("/")[2]]
            entries = [
                {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": _digest(folder / name)}
                for name in sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
            ]
            self._send(json.dumps(entries).encode())
        elif path == api or path.startswith(f"{api}/revision/"):
            asked = path.rpartition("/revision/")[2] if path != api else "main"
            commit = hub.branch if asked == "main" else asked
            self._send(json.dumps({"id": hub.model, "sha": commit, "siblings": []}).encode(), commit in hub.commits)
        elif path.startswith(files):
            commit, _, name = path.removeprefix(files).partition("/")
            file = hub.commits[commit] / name
            self._send(file.read_bytes() if file.is_file() else b"", file.is_file(), commit, file)
        else:
            self._send(b"{}", False)

    def _send(self, body: bytes, found: bool = True, commit: str = "", file: Path | None = None) -> None:
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body)))
        if commit:
            self.send_header("X-Repo-Commit", commit)
        if file is not None and found:
            self.send_header("ETag", f'"{_digest(file)}"')
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound" if commit else "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


@contextmanager
def silence() -> Iterator[tuple[str, list[int]]]:
    """The URL of a server that takes connections and never answers, and a list with an entry for each of them."""
    listener = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []
    counted: list[int] = []

    def take() -> None:
        while True:
            try:
                connection, (_, port) = listener.accept()
            except OSError:
                return
            taken.append(connection)
            counted.append(port)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", counted
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in taken:
            connection.close()
