"""Client of a server: write the clip of a live session to an mp4 file (``mfctl generate --server URL``)."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import ClientConnection, connect

from mfcore.errors import UserInputError
from preprocessing.io.durable_files import atomic_path, make_folders
from preprocessing.media.mp4_boxes import without_description
from workflows.serving.protocol import SOCKET_PATH

OPEN_TIMEOUT_S = 20.0
START_TIMEOUT_S = 60.0  # until the answer to session.start
CHUNK_TIMEOUT_S = 60.0  # without a fragment
PING_AFTER_S = 1.0  # without any message
SILENCE_S = 2.5  # without any message, not even session.pong: the connection is lost. A proxy may hide the loss
RESUME_ATTEMPTS = 12
RESUME_WAIT_S = 0.2  # before the first attempt; doubles up to MAX_RESUME_WAIT_S
MAX_RESUME_WAIT_S = 2.0


class ServerRefusedError(UserInputError):
    """The server refused a session, with a code of the protocol."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class ReceivedFragment:
    """One fragment with its metadata."""

    metadata: dict[str, Any]
    data: bytes

    @property
    def chunk(self) -> int:
        """Return the number of the chunk."""
        return self.metadata["last_chunk"]

    @property
    def is_last(self) -> bool:
        """Return True for the rest of the streams, which is not a chunk."""
        return self.metadata["final"]


def socket_url(server: str) -> str:
    """Return the WebSocket address of a server given as http(s):// or ws(s):// URL, with its token.

    Raises UserInputError for another URL.
    """
    parts = urlsplit(server)
    schemes = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
    if parts.scheme not in schemes or not parts.netloc:
        raise UserInputError(f"--server {server}: not an address. Use one such as http://127.0.0.1:8000.")
    path = parts.path if parts.path.endswith(SOCKET_PATH) else parts.path.rstrip("/") + SOCKET_PATH
    return urlunsplit((schemes[parts.scheme], parts.netloc, path, parts.query, ""))


class LiveClient:
    """One session of a server. Raises ServerRefusedError and UserInputError."""

    def __init__(self, server: str, start: dict[str, Any]) -> None:
        """Connect and start a session with the fields of ``session.start``; ``facts`` has the answer."""
        self._open = ExitStack()
        url = socket_url(server)
        try:
            self._socket: ClientConnection = self._open.enter_context(
                connect(url, max_size=None, open_timeout=OPEN_TIMEOUT_S, compression=None)
            )
        except (OSError, InvalidHandshake, InvalidURI, TimeoutError) as error:
            raise UserInputError(
                f"--server {server}: the server does not accept the connection: {error or type(error).__name__}. "
                "Check that `mfctl serve` runs there, and its token."
            ) from None
        self.messages: list[dict[str, Any]] = []  # all but fragments and their metadata
        self.done: dict[str, Any] | None = None
        self.close_code: int | None = None
        self._pings = 0  # without answer, of this class
        self.send("session.start", **start)
        self.facts = self._expect_start()

    def send(self, kind: str, **fields: Any) -> None:
        """Send one message."""
        self._socket.send(json.dumps({"type": kind, **fields}))

    def _expect_start(self) -> dict[str, Any]:
        while True:
            message = self._receive(START_TIMEOUT_S)
            if message is None:
                raise ServerRefusedError("closed", f"the server closed the connection with code {self.close_code}")
            if isinstance(message, bytes):
                continue
            if message["type"] == "error":
                raise ServerRefusedError(message["code"], message["message"])
            if message["type"] == "video.start":
                return message

    def _receive(self, silence: float = SILENCE_S) -> dict[str, Any] | bytes | None:
        """Return the next message, None at the end or after ``silence`` seconds without a message."""
        begin = time.monotonic()
        while True:
            try:
                received = self._socket.recv(timeout=min(PING_AFTER_S, silence))
                break
            except ConnectionClosed as closed:
                self.close_code = closed.rcvd.code if closed.rcvd else 1006
                return None
            except TimeoutError:
                if time.monotonic() - begin >= silence - PING_AFTER_S / 2:
                    self.close_code = 1006
                    return None
                with suppress(ConnectionClosed):
                    self.send("session.ping")
                    self._pings += 1
        if isinstance(received, bytes):
            return received
        message = json.loads(received)
        if message["type"] == "session.pong" and self._pings:
            self._pings -= 1
        else:
            self.messages.append(message)
        return message

    def fragments(self) -> Iterator[ReceivedFragment]:
        """Yield the fragments until the session or the connection ends."""
        metadata: dict[str, Any] = {}
        last = time.monotonic()
        while (message := self._receive()) is not None and time.monotonic() - last < CHUNK_TIMEOUT_S:
            if isinstance(message, bytes):
                yield ReceivedFragment(metadata=metadata, data=message)
                last = time.monotonic()
            elif message["type"] == "video.chunk_metadata":
                metadata = message
            elif message["type"] == "session.done":
                self.done = message

    def acknowledge(self, fragment: ReceivedFragment) -> None:
        """Acknowledge a fragment as played, so that the server continues at full speed."""
        self.play_to((fragment.chunk + 1) * self.facts["chunk_seconds"])

    def play_to(self, seconds: float) -> None:
        """Report the playhead."""
        with suppress(ConnectionClosed):  # the next message has the reason
            self.send("session.ack", played_to=seconds)

    def close(self) -> None:
        """Close the connection."""
        self._open.close()


class ClipFile:
    """mp4 file that grows with the fragments of a session, also of one that was resumed."""

    def __init__(self, path: Path) -> None:
        """Create the file."""
        self._file = path.open("wb")
        self._ends: list[int] = []  # bytes after each chunk

    @property
    def chunks(self) -> int:
        """Return the number of chunks in the file."""
        return len(self._ends)

    def cut(self, first_chunk: int) -> None:
        """Remove the chunks from ``first_chunk`` on, which a resumed session makes again.

        Raises RuntimeError if chunks before it are missing.
        """
        if first_chunk > self.chunks:
            raise RuntimeError(
                f"the resumed clip begins at chunk {first_chunk}, but {self.chunks} chunks were received"
            )
        del self._ends[first_chunk:]
        self._file.truncate(self._ends[-1] if self._ends else 0)
        self._file.seek(0, os.SEEK_END)

    def append(self, fragment: ReceivedFragment) -> None:
        """Append a fragment; only the first one keeps the description of the streams."""
        self._file.write(without_description(fragment.data) if self._ends else fragment.data)
        self._file.flush()
        if not fragment.is_last:
            self._ends.append(self._file.tell())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_live_clip(
    server: str, start: dict[str, Any], out: Path, *, seconds: float, on_chunk: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Write a clip of a server into an mp4 file and return its facts.

    A lost connection is resumed from the last snapshot. Raises ServerRefusedError, UserInputError for a wrong address,
    and RuntimeError if the clip cannot be completed.
    """
    make_folders(out.absolute().parent)
    with atomic_path(out.absolute()) as temporary, closing(ClipFile(temporary)) as clip:
        facts, wanted = _stream_into(clip, server, start, seconds=seconds, on_chunk=on_chunk)
    return {
        "path": str(out),
        "seconds": wanted * facts["chunk_seconds"],
        "fps": facts["fps"],
        "server": server.split("?")[0],
        "session_id": facts["session_id"],
    }


def _stream_into(
    clip: ClipFile, server: str, start: dict[str, Any], *, seconds: float, on_chunk: Callable[[int], None]
) -> tuple[dict[str, Any], int]:
    start = first = start | {"seconds": seconds}
    failures = 0
    while failures < RESUME_ATTEMPTS:
        failures += 1
        try:
            with closing(LiveClient(server, start)) as client:
                wanted = ceil(seconds / client.facts["chunk_seconds"])
                clip.cut(client.facts["first_chunk"])
                client.play_to(client.facts["start_seconds"])  # the state may be older than the last acknowledgment
                for fragment in client.fragments():
                    clip.append(fragment)
                    failures = 0
                    if fragment.is_last:
                        continue
                    on_chunk(clip.chunks)
                    client.acknowledge(fragment)
                if client.done is not None and client.done["reason"] == "stopped":
                    return client.facts, wanted
                again = {"resume": client.facts["resume"], "received": clip.chunks, "seconds": seconds}
                start = again if clip.chunks else first
        except UserInputError:
            if start is first:
                raise
        time.sleep(min(MAX_RESUME_WAIT_S, RESUME_WAIT_S * 2**failures))
    raise RuntimeError(f"the server ended the session after {clip.chunks} chunks and did not resume it")
