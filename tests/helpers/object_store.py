"""An S3 server in a separate process, and a proxy that injects connection faults."""

import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import pytest

BUCKET = "characters"
_UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@contextmanager
def s3_server(log: Path) -> Generator[int]:
    """Start a server with one empty bucket, set the environment, and yield its port."""
    port = _free_port()
    with log.open("w") as output:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=output, stderr=output)
        try:
            _wait_for_reply(f"http://127.0.0.1:{port}")
            with s3_at(port):
                fsspec.filesystem("s3").mkdir(BUCKET)
                yield port
        finally:
            server.kill()
            server.wait()


def count_requests(log: Path) -> Counter[str]:
    """Count the requests to `s3_server` so far by kind: LIST, GET, HEAD, PUT, POST, DELETE."""
    lines = re.findall(r'"([A-Z]+) (\S+) HTTP', log.read_text())
    return Counter("LIST" if "list-type=2" in path else method for method, path in lines)


@contextmanager
def s3_at(port: int) -> Generator[pytest.MonkeyPatch]:
    """Set the environment to an S3 endpoint at a local port."""
    names = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    names |= {"AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "word", "MFCTL_TRACKER": "json"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        try:
            yield patch
        finally:
            fsspec.filesystem("s3").clear_instance_cache()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for_reply(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


class FaultProxy:
    """TCP proxy; `fault` returns the fault of each new connection.

    ``""``: none. ``refuse``: reset at once. ``503``: reply 503. ``silent``: never reply. ``torn up N`` and
    ``torn down N``: reset after N bytes to the server, or from it.
    """

    def __init__(self, target: int, fault: Callable[[], str]) -> None:
        self._target, self._fault = target, fault
        self.seen: Counter[str] = Counter()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset_all()

    def reset_all(self) -> None:
        """Reset all open connections."""
        for connection in list(self._open):
            _reset(connection)
        self._open.clear()

    def _serve(self) -> None:
        with suppress(OSError):  # closed: the test is over
            while True:
                client, _ = self._listener.accept()
                self._open.add(client)
                threading.Thread(target=self._handle, args=(client,), daemon=True).start()

    def _handle(self, client: socket.socket) -> None:
        fault = self._fault()
        kind, _, size = fault.rpartition(" ") if fault.startswith("torn") else (fault, "", "0")
        self.seen[kind] += 1
        with suppress(OSError):
            if kind == "refuse":
                _reset(client)
            elif kind == "503":
                client.recv(1 << 16)
                client.sendall(_UNAVAILABLE)
                client.close()
            elif kind == "silent":
                while client.recv(1 << 16):
                    pass
            else:
                self._forward(client, kind, int(size))

    def _forward(self, client: socket.socket, kind: str, size: int) -> None:
        server = socket.create_connection(("127.0.0.1", self._target))
        self._open.add(server)
        limits = {direction: size if kind == f"torn {direction}" else None for direction in ("up", "down")}
        up = threading.Thread(target=_pump, args=(client, server, limits["up"]), daemon=True)
        up.start()
        _pump(server, client, limits["down"])


def _pump(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
    """Copy bytes; after `limit` bytes, reset both connections."""
    with suppress(OSError):
        while data := source.recv(1 << 14):
            if limit is not None and len(data) > limit:
                sink.sendall(data[:limit])
                _reset(source)
                _reset(sink)
                return
            sink.sendall(data)
            limit = None if limit is None else limit - len(data)
        sink.shutdown(socket.SHUT_WR)


def _reset(connection: socket.socket) -> None:
    """Close with a TCP reset; a thread that reads from the connection continues."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
    connection.close()
