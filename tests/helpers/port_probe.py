"""A client of unknown servers: ``python -m tests.helpers.port_probe TOKEN_FILE PORT...``.

It tries on each port of the loopback to read or change something by the protocols of Ray, of torch.distributed and of
HTTP, and prints the ways that worked as JSON: port -> names. "" as TOKEN_FILE: without a token.
"""

import http.client
import json
import socket
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import grpc

LIMIT_S = 4.0
METHODS = (  # that take an empty request
    "InternalKVGcsService/InternalKVKeys",
    "CoreWorkerService/GetCoreWorkerStats",
    "NodeManagerService/GetNodeStats",
    "ReporterService/GetTraceback",
)
PATHS = ("/", "/api/version", "/metrics")
NOT_SERVED = ("UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


def call_ray(token: str, method: str, port: int) -> bool:
    """Return True if a method of Ray's processes runs."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(f"/ray.rpc.{method}")
        try:
            call(b"", timeout=LIMIT_S, metadata=(("authorization", f"Bearer {token}"),) if token else ())
        except grpc.RpcError as error:
            return error.code().name not in NOT_SERVED
    return True


def use_store(token: str, port: int) -> bool:
    """Return True if a ``TCPStore`` of torch.distributed replies; it has no tokens, and its keys can be changed."""
    del token
    validate, ping = struct.pack("=BI", 0, 0x3C85F7CE), struct.pack("=BI", 13, 4711)
    try:
        with socket.create_connection(("127.0.0.1", port), LIMIT_S) as connection:
            connection.settimeout(LIMIT_S)
            connection.sendall(validate + ping)
            return connection.recv(4) == struct.pack("=I", 4711)
    except OSError:
        return False


def get_page(token: str, path: str, port: int) -> bool:
    """Return True if an HTTP server sends a page, other than Prometheus counters."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)) as connection:
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
            reply = connection.getresponse()
            return reply.status == 200 and not reply.read().startswith(b"# HELP")
        except (OSError, http.client.HTTPException):
            return False


WAYS: dict[str, Callable[[str, int], bool]] = {
    **{method: lambda token, port, m=method: call_ray(token, m, port) for method in METHODS},
    **{f"GET {path}": lambda token, port, p=path: get_page(token, p, port) for path in PATHS},
    "TCPStore": use_store,
}


def open_ways(token: str, port: int) -> list[str]:
    """Return the names of the ways that work on a port."""
    return [name for name, way in WAYS.items() if way(token, port)]


if __name__ == "__main__":
    token = Path(sys.argv[1]).read_text() if sys.argv[1] else ""
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(partial(open_ways, token), map(int, sys.argv[2:])))
    print(json.dumps(dict(zip(sys.argv[2:], found, strict=True))))
