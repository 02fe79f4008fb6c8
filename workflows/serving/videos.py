"""Adapter for finished clips (``POST /v1/videos``): order, status, download. Orders are made one at a time."""

import asyncio
import contextlib
import logging
import secrets
import shutil
import tempfile
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse
from pydantic import ValidationError

from workflows.serving.engine import ServerFullError
from workflows.serving.outbox import AsyncOutbox, ChunkNews, SessionEnd
from workflows.serving.protocol import VideoRequest
from workflows.serving.realtime import describe_validation
from workflows.serving.service import RequestRefusedError, SessionService

_LOGGER = logging.getLogger(__name__)
_MAX_WAITING = 8
_MAX_KEPT = 32  # finished clips
_RETRY_S = 0.5
Status = Literal["queued", "in_progress", "completed", "failed"]


@dataclass(kw_only=True)
class VideoOrder:
    """One ordered clip. Mutable: its status changes."""

    request: VideoRequest
    file: Path
    model: str
    size: str
    id: str = field(default_factory=lambda: f"video_{secrets.token_hex(12)}")
    status: Status = "queued"
    progress: int = 0  # percent
    created_at: int = field(default_factory=lambda: int(time.time()))
    error: dict[str, str] | None = None

    def facts(self) -> dict[str, Any]:
        """Return the answer of the routes."""
        shown = {
            name: getattr(self, name) for name in ("id", "status", "progress", "created_at", "model", "size", "error")
        }
        return shown | {"object": "video", "seconds": f"{self.request.seconds:g}"}


class VideoOrders:
    """Orders of one server, made one after another in the order of arrival."""

    def __init__(self, service: SessionService) -> None:
        self._service = service
        self._folder = Path(tempfile.mkdtemp(prefix="mfctl-videos-"))
        self._orders: OrderedDict[str, VideoOrder] = OrderedDict()
        self._task: asyncio.Task[None] | None = None

    def add(self, request: VideoRequest) -> VideoOrder:
        """Queue an order. Raises ServerFullError."""
        engine = self._service.engine
        if sum(order.status == "queued" for order in self._orders.values()) >= _MAX_WAITING:
            raise ServerFullError(engine.capacity, engine.active, engine.limits.retry_seconds)
        height, width = self._service.talker.size or (0, 0)
        name = f"{len(self._orders)}-{secrets.token_hex(4)}.mp4"
        order = VideoOrder(
            request=request, file=self._folder / name, model=self._service.talker.name, size=f"{width}x{height}"
        )
        self._orders[order.id] = order
        self._drop_old()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return order

    def get(self, name: str) -> VideoOrder:
        """Return an order. Raises KeyError."""
        return self._orders[name]

    def close(self) -> None:
        """Stop the work and delete all files."""
        if self._task is not None:
            self._task.cancel()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _drop_old(self) -> None:
        done = [order for order in self._orders.values() if order.status in ("completed", "failed")]
        for order in done[: max(0, len(done) - _MAX_KEPT)]:
            order.file.unlink(missing_ok=True)
            del self._orders[order.id]

    async def _work(self) -> None:
        while (order := next((o for o in self._orders.values() if o.status == "queued"), None)) is not None:
            try:
                await self._make(order)
            except ServerFullError:
                await asyncio.sleep(_RETRY_S)
            except RequestRefusedError as error:
                order.status, order.error = "failed", {"code": error.code, "message": str(error)}
            except Exception:
                _LOGGER.exception("a clip cannot be made")
                order.status, order.error = "failed", {"code": "failed", "message": "internal error"}

    async def _make(self, order: VideoOrder) -> None:
        session = await asyncio.to_thread(self._service.prepare, order.request.spec())
        outbox, engine, seconds = AsyncOutbox(), self._service.engine, order.request.seconds
        self._service.open(session, outbox, name=order.id, seconds=seconds)
        order.status = "in_progress"
        try:
            with order.file.open("wb") as file:
                while not isinstance(news := await outbox.get(), SessionEnd):
                    if isinstance(news, ChunkNews):
                        file.write(news.made.data)
                        made = (news.made.chunk + 1) * float(session.chunk_seconds)
                        engine.acknowledge(order.id, made)
                        order.progress = min(99, int(100 * made / seconds))
        finally:
            engine.stop(order.id)
        if news.reason != "stopped":
            raise RuntimeError(f"the session ended: {news.reason}")
        order.status, order.progress = "completed", 100


def add_videos(app: FastAPI, orders: VideoOrders) -> None:
    """Add the routes of finished clips."""
    missing = RequestRefusedError("unknown_video", "there is no such clip: it was never ordered, or is deleted")

    def find(name: str) -> VideoOrder:
        with contextlib.suppress(KeyError):
            return orders.get(name)
        raise missing

    @app.post("/v1/videos")
    async def create_video(request: Request) -> dict[str, Any]:
        """Order a finished clip."""
        try:
            wanted = VideoRequest.model_validate_json(await request.body() or b"{}")
        except ValidationError as error:
            raise RequestRefusedError("bad_message", describe_validation(error)) from None
        return orders.add(wanted).facts()

    @app.get("/v1/videos/{name}")
    async def get_video(name: str) -> dict[str, Any]:
        """Return the status of a clip."""
        return find(name).facts()

    @app.get("/v1/videos/{name}/content")
    async def get_content(name: str) -> FileResponse:
        """Return the mp4 file of a finished clip."""
        order = find(name)
        if order.status != "completed":
            raise RequestRefusedError("not_ready", f"the clip is {order.status}: try again later")
        return FileResponse(order.file, media_type="video/mp4", filename=f"{order.id}.mp4")
