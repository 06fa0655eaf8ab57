"""An HTTP proxy that puts the faults of a busy or broken object store between a client and a real S3 server."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

UNDELETED = "<DeleteResult><Error><Key>k</Key><Code>SlowDown</Code><Message>m</Message></Error></DeleteResult>"
ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>{}</Message></Error>'
HOP_BY_HOP = {"connection", "content-length", "transfer-encoding", "keep-alive", "expect", "te", "upgrade"}


@dataclass
class Faults:
    """What happens to requests: shares between 0 and 1, drawn in this order from a seeded generator.

    deny       403 AccessDenied, before the server sees the request
    slow_down  503 SlowDown, before the server sees the request
    cut        the connection breaks midway in the answer: the server has done what was asked
    shorten    the answer's body loses its second half and says so in Content-Length: it looks whole
    undeleted  so many bulk deletions answer 200 and that they failed, key by key
    deny_first the first so many requests are denied
    checksums  whether answers keep the checksums that the store sends with them
    delay_s    seconds before every answer
    methods    HTTP methods that the shares and the delay apply to, all when empty
    """

    deny: float = 0.0
    slow_down: float = 0.0
    cut: float = 0.0
    shorten: float = 0.0
    undeleted: int = 0
    deny_first: int = 0
    checksums: bool = True
    delay_s: float = 0.0
    methods: tuple[str, ...] = ()
    seed: int = 0


@dataclass
class Proxy:
    """A running proxy: its endpoint, its faults (to be changed at will) and what it has counted by method and fault.

    body_bytes: of all answers' bodies together
    """

    endpoint: str
    upstream: str
    faults: Faults
    counts: Counter[str] = field(default_factory=Counter)
    body_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    parts: set[str] = field(default_factory=set)
    max_parts: int | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.faults.seed)
        self._more = threading.Condition()

    def take_parts(self, count: int | None) -> None:
        """From now on the store takes `count` part files in all; uploads of others wait. None: as many as there are."""
        with self._more:
            self.max_parts = count
            self._more.notify_all()

    def has_to_wait(self, method: str, path: str) -> bool:
        """Whether an upload had to wait for `take_parts`; returns when it need not any more."""
        if method != "PUT" or "/parts/" not in path:
            return False
        has_waited = False
        with self._more:
            while self.max_parts is not None and len(self.parts | {path}) > self.max_parts:
                has_waited = True
                self._more.wait()
            if not has_waited:
                self.parts.add(path)
        return has_waited

    def draw(self, method: str) -> str:
        """The fault of the next request, empty for none; counted."""
        faults = self.faults
        with self.lock:
            self.counts[method] += 1
            at = self.random.random()
            if faults.deny_first > 0:
                faults.deny_first -= 1
                at, fault = -1.0, "deny"
            else:
                fault = ""
            for name in ("deny", "slow_down", "cut", "shorten"):
                share = getattr(faults, name) if not faults.methods or method in faults.methods else 0.0
                if 0 <= at < share:
                    fault = name
                at -= share
                if fault:
                    break
            self.counts[fault or "passed"] += 1
        return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: Proxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        body = self._body()
        fault = self.proxy.draw(self.command)
        if self.proxy.has_to_wait(self.command, self.path):
            fault = "slow_down"  # who sent it may be dead by now; a living one sends it again
        if self.command in (self.proxy.faults.methods or [self.command]):
            time.sleep(self.proxy.faults.delay_s)
        if fault == "deny":
            self._answer(403, {}, ERROR.format("AccessDenied", "Access Denied").encode())
        elif fault == "slow_down":
            self._answer(503, {}, ERROR.format("SlowDown", "Please reduce your request rate.").encode())
        elif self.path.endswith("?delete") and self.proxy.faults.undeleted > 0:
            self.proxy.faults.undeleted -= 1
            self._answer(200, {}, UNDELETED.encode())
        else:
            self._forward(body, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _forward(self, body: bytes, fault: str) -> None:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP}
        upstream = http.client.HTTPConnection(urlsplit(self.proxy.upstream).netloc, timeout=60)
        try:
            upstream.request(self.command, self.path, body or None, headers | {"Content-Length": str(len(body))})
            answer = upstream.getresponse()
            content = answer.read()
            kept = {k: v for k, v in answer.getheaders() if k.lower() not in HOP_BY_HOP}
            if not self.proxy.faults.checksums:
                kept = {k: v for k, v in kept.items() if not k.lower().startswith("x-amz-checksum")}
            length = int(answer.getheader("Content-Length") or 0) if self.command == "HEAD" else len(content)
        finally:
            upstream.close()
        if fault == "shorten" and self.command == "GET" and "list-type" not in self.path:
            content, length = content[: len(content) // 2], len(content) // 2
        self._answer(answer.status, kept, content, length, is_cut=fault == "cut")

    def _answer(
        self, status: int, headers: dict[str, str], content: bytes, length: int | None = None, is_cut: bool = False
    ) -> None:
        if is_cut and not content:  # nothing to break midway: no answer at all
            self.close_connection = True
            return
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            with self.proxy.lock:
                self.proxy.body_bytes += len(content)
            self.wfile.write(content[: len(content) // 2] if is_cut else content)
        if is_cut:
            self.close_connection = True


@contextmanager
def faulty(upstream: str, faults: Faults) -> Iterator[Proxy]:
    """A proxy in front of the S3 server at `upstream`, in threads of this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}", upstream, faults)
    server.RequestHandlerClass = type("Handler", (_Handler,), {"proxy": proxy})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
