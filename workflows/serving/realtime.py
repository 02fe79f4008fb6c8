"""WebSocket adapter: the realtime video protocol over the session service."""

import asyncio
import logging
import secrets
import time
from contextlib import suppress
from typing import Any, assert_never

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import ValidationError

from workflows.serving import protocol
from workflows.serving.access import MessageRate
from workflows.serving.engine import ServerFullError
from workflows.serving.outbox import AsyncOutbox, ChunkNews, SessionEnd, SnapshotNews
from workflows.serving.protocol import SessionAck, SessionCommand, SessionInteraction, SessionStart
from workflows.serving.reservations import Reservations
from workflows.serving.service import RequestRefusedError, SessionService, SessionSpec, missed_chunks
from workflows.serving.session import Session

_LOGGER = logging.getLogger(__name__)
START_TIMEOUT_S = 10.0
MAX_PLAIN_CHARS = 16_000  # of a message without upload
CLOSE_CODES = {"stopped": 1000, "idle": 4000, "shutdown": 1012, "failed": 1011, "left": 1000}
_SLOW_CLIENT_S = 20.0  # in which a client must take one message


class RealtimeConnection:
    """One accepted WebSocket."""

    def __init__(
        self, socket: WebSocket, service: SessionService, reservations: Reservations, *, rate: MessageRate
    ) -> None:
        self._socket, self._service, self._reservations, self._rate = socket, service, reservations, rate
        self._engine = service.engine
        self._sending = asyncio.Lock()
        self._name = secrets.token_hex(12)

    async def serve(self) -> None:
        """Serve the client until the session or the connection ends."""
        try:
            start = await asyncio.wait_for(self._receive_start(), START_TIMEOUT_S)
        except TimeoutError:
            await self._refuse("bad_message", "no session.start within 10 s", close=1008)
            return
        if start is None:
            return
        opened_at = time.monotonic()
        try:
            session = await asyncio.to_thread(self._session_of, start)
            outbox = AsyncOutbox()
            missed = missed_chunks(session, start.received)
            await self._send_start(session, missed[0].chunk if missed else session.row.chunk)
            for made in missed:
                await self._send_chunk(ChunkNews(made=made))
            self._service.open(session, outbox, name=self._name, opened_at=opened_at, seconds=start.seconds)
        except RequestRefusedError as error:
            await self._refuse(error.code, str(error), close=1008)
            return
        except ServerFullError as error:
            await self._refuse_full(error)
            return
        await self._run(outbox)

    async def _receive_start(self) -> SessionStart | None:
        while True:
            text = await self._receive_text()
            message = None if text is None else await self._parse(text)
            if isinstance(message, SessionStart):
                return message
            await self._refuse("bad_message", "the first message is session.start", close=1008)
            return None

    def _session_of(self, start: SessionStart) -> Session:
        if start.session_id is not None:
            return self._reservations.take(start.session_id)
        if start.resume is not None:
            return self._service.resume(start.resume)
        return self._service.prepare(start.spec())

    async def _send_start(self, session: Session, first_chunk: int) -> None:
        await self._send(
            {
                "type": "video.start",
                "session_id": self._name,
                "resume": session.key,
                **self._service.stream_facts(),
                "first_chunk": first_chunk,
                "start_seconds": float(first_chunk * session.chunk_seconds),
            }
        )

    async def _run(self, outbox: AsyncOutbox) -> None:
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._write(outbox))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._engine.stop(self._name, "left")
            for task in (reader, writer):
                task.cancel()
                with suppress(asyncio.CancelledError, WebSocketDisconnect, RuntimeError, TimeoutError, OSError):
                    await task

    async def _read(self) -> None:
        while (text := await self._receive_text()) is not None:
            if not self._rate.allow():
                await self._error("rate_limited", "too many messages: the last one is ignored. Send fewer")
                await asyncio.sleep(0.1)  # slows the client down through its socket
                continue
            message = await self._parse(text)
            if message is not None:
                await self._handle(message)

    async def _receive_text(self) -> str | None:
        """Return the next text message, "" for a binary one, None at the end of the connection."""
        try:
            received = await self._socket.receive()
        except (WebSocketDisconnect, RuntimeError):
            return None
        if received["type"] == "websocket.disconnect":
            return None
        return received.get("text") or ""

    async def _parse(self, text: str) -> protocol.ClientMessage | None:
        """Return a message; a wrong one is answered with ``error``."""
        try:
            message = protocol.CLIENT_MESSAGE.validate_json(text)
        except (ValidationError, RecursionError) as error:
            await self._error("bad_message", describe_validation(error))
            return None
        if len(text) > MAX_PLAIN_CHARS and not _has_upload(message):
            await self._error("too_large", f"a message of {len(text)} characters: use at most {MAX_PLAIN_CHARS}")
            return None
        return message

    async def _handle(self, message: protocol.ClientMessage) -> None:
        match message:
            case SessionAck():
                self._engine.acknowledge(self._name, message.played_to)
            case SessionInteraction():
                await self._interact(message)
            case SessionCommand(type="session.ping"):
                await self._send({"type": "session.pong"})
            case SessionCommand(type="session.snapshot"):
                self._engine.request_snapshot(self._name)
            case SessionCommand():
                self._engine.stop(self._name)
            case SessionStart():
                await self._error("bad_message", "the session has started already")
            case _:
                assert_never(message)

    async def _interact(self, message: SessionInteraction) -> None:
        try:
            applies = await asyncio.to_thread(self._apply, message)
        except RequestRefusedError as error:
            await self._error(error.code, str(error), event_id=message.event_id)
            return
        if applies is not None:
            queued = {"type": "session.interaction.queued", "event_id": message.event_id}
            await self._send(queued | {"applies_at_seconds": round(applies, 3)})

    def _apply(self, message: SessionInteraction) -> float | None:
        event, identity = message.event, message.event_id
        if event.transcript is not None:
            return self._service.say(self._name, event.transcript, identity)
        chunks = message.transition_chunks
        if event.prompt is not None:
            return self._service.change_caption(self._name, event.prompt, event_id=identity, chunks=chunks)
        assert event.voice is not None
        spec = SessionSpec(voice_seed=event.voice.seed, voice=event.voice.data)
        return self._service.change_voice(self._name, spec, event_id=identity, chunks=chunks)

    async def _write(self, outbox: AsyncOutbox) -> None:
        while True:
            match await outbox.get():
                case ChunkNews() as news:
                    await self._send_chunk(news)
                case SnapshotNews() as news:
                    await self._send({"type": "session.snapshot", "resume": news.key, "seconds": news.seconds})
                case SessionEnd() as end:
                    if end.reason == "failed":
                        await self._error("failed", "the server cannot continue this session: start a new one")
                    done = {"type": "session.done", "reason": end.reason, "resume": end.key, "seconds": end.seconds}
                    await self._send(done)
                    await self._close(CLOSE_CODES[end.reason])
                    return

    async def _send_chunk(self, news: ChunkNews) -> None:
        async with self._sending:  # the fragment is the message after its metadata
            await self._send_json(protocol.chunk_metadata(news))
            await asyncio.wait_for(self._socket.send_bytes(news.made.data), _SLOW_CLIENT_S)
        if not news.made.is_last:
            await self._send(protocol.chunk_metrics(news, self._service.talker.params.num_function_evaluations))

    async def _send(self, message: dict[str, Any]) -> None:
        async with self._sending:
            await self._send_json(message)

    async def _send_json(self, message: dict[str, Any]) -> None:
        await asyncio.wait_for(self._socket.send_json(message), _SLOW_CLIENT_S)

    async def _error(self, code: str, message: str, *, event_id: str | None = None) -> None:
        named = {} if event_id is None else {"event_id": event_id}
        with suppress(WebSocketDisconnect, RuntimeError):
            await self._send({"type": "error", "code": code, "message": message, **named})

    async def _refuse(self, code: str, message: str, *, close: int) -> None:
        await self._error(code, message)
        await self._close(close)

    async def _refuse_full(self, error: ServerFullError) -> None:
        full = {"capacity": error.capacity, "active": error.active, "retry_after": error.retry_after}
        with suppress(WebSocketDisconnect, RuntimeError):
            await self._send({"type": "queue_status", **full})
        await self._refuse("full", str(error), close=1013)

    async def _close(self, code: int) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):
            await self._socket.close(code)


def describe_validation(error: ValidationError | RecursionError) -> str:
    """Return the first reason of a wrong input, with the place of the value."""
    if isinstance(error, RecursionError):
        return "the message is nested too deeply"
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]


def _has_upload(message: protocol.ClientMessage) -> bool:
    if isinstance(message, SessionStart):
        return message.face is not None or message.voice is not None
    return isinstance(message, SessionInteraction) and message.event.voice is not None
