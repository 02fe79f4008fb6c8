"""Run a server in this process (``mfctl serve``)."""

import asyncio
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType

import psutil
import torch
import uvicorn

from mfcore.errors import UserInputError, check_range
from workflows.inference.sampling import MAX_STEPS
from workflows.serving.access import AccessPolicy
from workflows.serving.app import create_app
from workflows.serving.engine import EngineLimits, ServingEngine
from workflows.serving.protocol import MAX_MESSAGE_BYTES
from workflows.serving.service import SessionService
from workflows.serving.snapshots import SnapshotStore
from workflows.serving.talker import Talker

MEMORY_SHARE = 0.5  # of the free memory, for sessions
DRAIN_SECONDS = 10.0  # to finish chunks and send snapshots when the server stops
SEND_SECONDS = 0.3  # for the last messages to the clients
MAX_SESSIONS = 1024


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Address and limits of a server."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    token: str | None = None
    snapshots: str | None = None  # folder or s3:// prefix; None: in memory
    messages_per_second: float = 20.0  # of one client, mean over a few seconds
    limits: EngineLimits = field(default_factory=EngineLimits)

    def __post_init__(self) -> None:
        check_range("--port", self.port, 0, 65535)
        check_range("--sessions", self.limits.sessions, 1, MAX_SESSIONS)
        if not self.token and not is_loopback(self.host):
            raise UserInputError(
                f"--host {self.host}: other machines can reach this address. Add --token TOKEN, or use 127.0.0.1."
            )


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free_memory(device: torch.device) -> int:
    """Return the bytes that sessions may use on the device of the network."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(free * MEMORY_SHARE)


class RunningServer(uvicorn.Server):
    """Server of one application that ends its sessions with snapshots before it stops."""

    def __init__(self, talker: Talker, options: ServerOptions) -> None:
        """Bind the address. Raises UserInputError if it is not free."""
        self.socket = _bind(options.host, options.port)
        self.engine = ServingEngine(talker, limits=options.limits, snapshots=SnapshotStore(options.snapshots))
        config = uvicorn.Config(
            create_app(
                SessionService(self.engine),
                AccessPolicy(options.token, messages_per_second=options.messages_per_second),
            ),
            log_level="warning",
            access_log=False,
            ws_max_size=MAX_MESSAGE_BYTES,
            ws_max_queue=16,
            timeout_graceful_shutdown=int(DRAIN_SECONDS),
        )
        super().__init__(config)

    @property
    def url(self) -> str:
        """Return the address of the page."""
        return page_url(*self.socket.getsockname()[:2])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections and start the warm-up."""
        await super().startup(sockets)
        self.engine.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the sessions, send their snapshot keys, then close the connections."""
        await asyncio.to_thread(self.engine.shutdown, DRAIN_SECONDS)
        await asyncio.sleep(SEND_SECONDS)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Stop on SIGINT and SIGTERM. Unlike the base class, do not raise the signal again at the end."""
        with _signals_handled_by(self.handle_exit):
            yield


@contextmanager
def _signals_handled_by(handle: Callable[[int, FrameType | None], None]) -> Generator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_signals() -> Generator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set."""
    stop = threading.Event()
    with _signals_handled_by(lambda number, frame: stop.set()):
        yield stop


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserInputError(
            f"--host {host} --port {port}: the address cannot be used: {error.strerror or error}. Use another port, "
            "or --port 0 for any free one."
        ) from None
    listener.set_inheritable(False)
    return listener


def claim_port(options: ServerOptions) -> int:
    """Return the port of the options, any free one for 0. Raises UserInputError if it cannot be used."""
    with _bind(options.host, options.port) as listener:
        return listener.getsockname()[1]


def page_url(host: str, port: int) -> str:
    """Return the address of the page."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def run_server(talker: Talker, options: ServerOptions, *, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; ``on_ready`` gets the URL after the warm-up.

    Raises UserInputError for a wrong address, RuntimeError if the warm-up fails.
    """
    server = RunningServer(talker, options)

    def announce() -> None:
        server.engine.warmed_up.wait()
        if server.engine.ready.is_set():
            on_ready(server.url)
        else:
            server.should_exit = True

    threading.Thread(target=announce, name="announce", daemon=True).start()
    asyncio.run(server.serve([server.socket]))
    if not server.engine.ready.is_set():
        raise RuntimeError("the warm-up of the server failed; the log above has the reason")


@contextmanager
def background_server(talker: Talker, options: ServerOptions, *, timeout: float = 60.0) -> Generator[RunningServer]:
    """Run a server in a thread of this process, ready when yielded; for tests and benchmarks."""
    server = RunningServer(talker, options)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([server.socket])), name="server", daemon=True)
    thread.start()
    try:
        if not server.engine.ready.wait(timeout):
            raise RuntimeError("the server did not start")
        yield server
    finally:
        server.should_exit = True
        thread.join(timeout)


def load_talker(checkpoint: str, *, steps: int | None, device: str | None) -> Talker:
    """Load a network. Raises UserInputError for wrong input."""
    check_range("--steps", steps, 1, MAX_STEPS)
    name = os.path.basename(checkpoint.rstrip("/"))
    return Talker.from_checkpoint(checkpoint, name=name, steps=steps, device=device)


def serve_checkpoint(
    options: ServerOptions, *, checkpoint: str, steps: int | None, device: str | None, on_ready: Callable[[str], None]
) -> None:
    """Load a network and serve it. Raises UserInputError for wrong input."""
    talker = load_talker(checkpoint, steps=steps, device=device)
    limits = replace(options.limits, memory_bytes=free_memory(talker.device))
    run_server(talker, replace(options, limits=limits), on_ready=on_ready)
