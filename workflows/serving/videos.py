"""Adapter for finished clips (``POST /v1/videos``): order, status, download. Orders are made one at a time.

With a snapshot folder, status and file of an order lie in it, where other replicas find them.
"""

import asyncio
import json
import logging
import re
import secrets
import shutil
import tempfile
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
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
_PROGRESS_S = 5.0
_LOST_SECONDS = 60.0  # without progress, after which an order of another server counts as lost
_NAME = re.compile(r"video_[0-9a-f]{24}")
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


def _missing() -> RequestRefusedError:
    return RequestRefusedError("unknown_video", "there is no such clip: it was never ordered, or is deleted")


class VideoOrders:
    """Orders of one server, made one after another in the order of arrival."""

    def __init__(self, service: SessionService) -> None:
        self._service = service
        self._folder = Path(tempfile.mkdtemp(prefix="mfctl-videos-"))
        self._orders: OrderedDict[str, VideoOrder] = OrderedDict()
        self._task: asyncio.Task[None] | None = None
        self._dropped: list[str] = []  # orders; their stored files are to be removed

    async def add(self, request: VideoRequest) -> VideoOrder:
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
        await asyncio.to_thread(self._publish, order)
        return order

    def facts(self, name: str) -> dict[str, Any]:
        """Return the status of an order, also of one that another server makes. Raises RequestRefusedError."""
        if name in self._orders:
            return self._orders[name].facts()
        try:
            stored = json.loads(self._read(name, ".json"))
        except FileNotFoundError:
            raise _missing() from None
        lost = time.time() - stored.pop("changed_at") > _LOST_SECONDS
        if lost and stored["status"] in ("queued", "in_progress"):
            message = "the server that made this clip ended: order it again"
            stored |= {"status": "failed", "error": {"code": "failed", "message": message}}
        return stored

    def content(self, name: str) -> Path | bytes:
        """Return the mp4 of a finished order. Raises RequestRefusedError."""
        status = self.facts(name)["status"]
        if status != "completed":
            raise RequestRefusedError("not_ready", f"the clip is {status}: try again later")
        return self._orders[name].file if name in self._orders else self._read(name, ".mp4")

    def _read(self, name: str, suffix: str) -> bytes:
        store = self._service.engine.snapshots.shared
        if store is None or not _NAME.fullmatch(name):
            raise _missing()
        return store.read(f"{name}{suffix}")

    def _publish(self, *orders: VideoOrder) -> None:
        """Store status and file of orders for other servers."""
        if (store := self._service.engine.snapshots.shared) is None:
            return
        for order in orders:
            if order.status == "completed":
                store.write(f"{order.id}.mp4", order.file.read_bytes())
            store.write(f"{order.id}.json", json.dumps(order.facts() | {"changed_at": time.time()}).encode())
        while self._dropped:
            name = self._dropped.pop()
            store.remove(f"{name}.mp4")
            store.remove(f"{name}.json")

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
            self._dropped.append(order.id)

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
            await asyncio.to_thread(self._publish, order)

    async def _show_progress(self) -> None:
        """Publish the open orders again and again, so that other servers know that this one lives."""
        while True:
            await asyncio.sleep(_PROGRESS_S)
            await asyncio.to_thread(
                self._publish, *[o for o in self._orders.values() if o.status in ("queued", "in_progress")]
            )

    async def _make(self, order: VideoOrder) -> None:
        session = await asyncio.to_thread(self._service.prepare, order.request.spec())
        outbox, engine, seconds = AsyncOutbox(), self._service.engine, order.request.seconds
        self._service.open(session, outbox, name=order.id, seconds=seconds)
        order.status = "in_progress"
        shown = asyncio.create_task(self._show_progress())
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
            shown.cancel()
        if news.reason != "stopped":
            raise RuntimeError(f"the session ended: {news.reason}")
        order.status, order.progress = "completed", 100


def add_videos(app: FastAPI, orders: VideoOrders) -> None:
    """Add the routes of finished clips."""

    @app.post("/v1/videos")
    async def create_video(request: Request) -> dict[str, Any]:
        """Order a finished clip."""
        try:
            wanted = VideoRequest.model_validate_json(await request.body() or b"{}")
        except ValidationError as error:
            raise RequestRefusedError("bad_message", describe_validation(error)) from None
        return (await orders.add(wanted)).facts()

    @app.get("/v1/videos/{name}")
    async def get_video(name: str) -> dict[str, Any]:
        """Return the status of a clip."""
        return await asyncio.to_thread(orders.facts, name)

    @app.get("/v1/videos/{name}/content")
    async def get_content(name: str) -> Response:
        """Return the mp4 file of a finished clip."""
        found = await asyncio.to_thread(orders.content, name)
        headers = {"Content-Disposition": f'attachment; filename="{name}.mp4"'}
        if isinstance(found, bytes):
            return Response(found, media_type="video/mp4", headers=headers)
        return FileResponse(found, media_type="video/mp4", headers=headers)
