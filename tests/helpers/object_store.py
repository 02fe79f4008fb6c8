"""An S3 server in a process of its own, and a proxy before it that breaks connections as it is told."""

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
_NO = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@contextmanager
def s3_server(log: Path) -> Generator[int]:
    """Its port. It holds one empty bucket; the environment names it, as it would name MinIO or Ceph."""
    port = _free_port()
    with log.open("w") as said:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=said, stderr=said)
        try:
            _wait(f"http://127.0.0.1:{port}")
            with s3_at(port):
                fsspec.filesystem("s3").mkdir(BUCKET)
                yield port
        finally:
            server.kill()
            server.wait()


@contextmanager
def s3_at(port: int) -> Generator[pytest.MonkeyPatch]:
    """The environment says that S3 is at this port of this machine."""
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


def _wait(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


class FaultProxy:
    """Passes TCP connections on; ``fault`` says of each new one what becomes of it.

    ``""``: nothing. ``refuse``: reset at once. ``503``: an answer to whatever is asked. ``silent``: no answer, ever.
    ``torn up N`` and ``torn down N``: reset after N bytes towards the server, or from it.
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
        self.hang_up()

    def hang_up(self) -> None:
        """Reset what is open."""
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
                client.sendall(_NO)
                client.close()
            elif kind == "silent":
                while client.recv(1 << 16):
                    pass
            else:
                self._pass_on(client, kind, int(size))

    def _pass_on(self, client: socket.socket, kind: str, size: int) -> None:
        server = socket.create_connection(("127.0.0.1", self._target))
        self._open.add(server)
        limits = {direction: size if kind == f"torn {direction}" else None for direction in ("up", "down")}
        up = threading.Thread(target=_pump, args=(client, server, limits["up"]), daemon=True)
        up.start()
        _pump(server, client, limits["down"])


def _pump(source: socket.socket, sink: socket.socket, most: int | None) -> None:
    """Bytes from one to the other; behind ``most`` of them both are reset."""
    with suppress(OSError):
        while data := source.recv(1 << 14):
            if most is not None and len(data) > most:
                sink.sendall(data[:most])
                _reset(source)
                _reset(sink)
                return
            sink.sendall(data)
            most = None if most is None else most - len(data)
        sink.shutdown(socket.SHUT_WR)


def _reset(connection: socket.socket) -> None:
    """Close so that the other side gets a reset. A thread that reads from it is woken."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
    connection.close()
