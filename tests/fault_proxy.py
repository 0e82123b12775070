"""A proxy in front of an HTTP server that slows, breaks, cuts and falsifies what passes through."""

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PIECE_BYTES = 16 * 1024


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with one response."""

    status: int | None = None
    """Answer this instead of asking the server."""
    resets: bool = False
    """Close the connection without an answer."""
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    falsifies: bool = False
    """Change a byte of the body."""
    bytes_per_second: float | None = None
    """Throttle the body."""


Plan = Callable[[str, str, int], Fault | None]
"""Says what goes wrong, from method, path and number of a request; they count from 0."""


def let_pass(method: str, path: str, count: int) -> Fault | None:
    """Plan nothing."""
    return None


def always(fault: Fault, *, after: int = 0) -> Plan:
    """Plan the same fault for every request, but for the first few."""

    def plan(method: str, path: str, count: int) -> Fault | None:
        return fault if count >= after else None

    return plan


def on_shards(fault: Fault, *, every: int = 1) -> Plan:
    """Plan the same fault for reading every n-th piece of a shard."""
    seen = iter(range(10**9))

    def plan(method: str, path: str, count: int) -> Fault | None:
        is_meant = method == "GET" and "part-" in path and next(seen) % every == every - 1
        return fault if is_meant else None

    return plan


@dataclass
class FaultProxy:
    """Passes requests on; `plan` says what goes wrong with which."""

    target_port: int
    plan: Plan = let_pass
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request."""
    body_bytes: int = 0
    """Bytes of the bodies of GET responses that were sent."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    port: int = 0

    def begin(self, method: str, path: str) -> Fault:
        with self.lock:
            count = len(self.requests)
            self.requests.append((method, path))
        return self.plan(method, path, count) or Fault()

    def forget(self) -> None:
        """Start counting anew."""
        with self.lock:
            self.requests.clear()
            self.body_bytes = 0

    def count(self, method: str, text: str) -> int:
        """Count the requests of a method whose path holds the text."""
        return sum(m == method and text in path for m, path in self.requests)


@contextlib.contextmanager
def fault_proxy(target_port: int) -> Iterator[FaultProxy]:
    """Run a proxy on a free port of the loopback interface."""
    proxy = FaultProxy(target_port)

    class Handler(_Handler):
        state = proxy

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: FaultProxy
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        body = self._read_body()
        fault = self.state.begin(self.command, self.path)
        if fault.resets:
            self._reset()
            return
        if fault.status is not None:
            self.send_response(fault.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        server = http.client.HTTPConnection("127.0.0.1", self.state.target_port, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        if body is not None:
            headers["Content-Length"] = str(len(body))
        server.request(self.command, self.path, body=body, headers=headers)
        answer = server.getresponse()
        content = answer.read()
        server.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        if answer.getheader("Content-Length") is None:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(content, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _send_body(self, content: bytes, fault: Fault) -> None:
        if fault.falsifies and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        cut = len(content) if fault.cut_after is None else fault.cut_after
        for first in range(0, min(cut, len(content)), PIECE_BYTES):
            piece = content[first : min(first + PIECE_BYTES, cut)]
            self.wfile.write(piece)
            if self.command == "GET":
                with self.state.lock:
                    self.state.body_bytes += len(piece)
            if fault.bytes_per_second:
                time.sleep(len(piece) / fault.bytes_per_second)
        if cut < len(content):
            self.wfile.flush()
            self.close_connection = True

    def _read_body(self) -> bytes | None:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        length = self.headers.get("Content-Length")
        return None if length is None else self.rfile.read(int(length))

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)  # close with a reset instead of an orderly end
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def handle(self) -> None:
        # The client may be killed, or hang up.
        with contextlib.suppress(ConnectionError, ValueError, OSError):
            super().handle()
