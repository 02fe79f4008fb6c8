"""ASGI application: routes of a server over one session service."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response, WebSocket
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from mfcore.errors import UserInputError
from workflows.serving import appearance
from workflows.serving.access import AccessPolicy, MessageRate
from workflows.serving.engine import ServerFullError
from workflows.serving.protocol import MAX_MESSAGE_BYTES, SOCKET_PATH, SessionRequest
from workflows.serving.realtime import RealtimeConnection, describe_validation
from workflows.serving.reservations import Reservations
from workflows.serving.service import RequestRefusedError, SessionService
from workflows.serving.videos import VideoOrders, add_videos

PAGE = Path(__file__).parent / "page"
STATUS_CODES = {"unknown_video": 404, "unknown_snapshot": 404, "not_ready": 409, "too_large": 413}
"""HTTP status by error code; 422 for others."""
SeedQuery = Annotated[int, Query(ge=0, le=appearance.MAX_SEED)]


def create_app(service: SessionService, policy: AccessPolicy) -> FastAPI:
    """Return the application of a service."""
    orders = VideoOrders(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        yield
        orders.close()

    app = FastAPI(title="Mutual Forcing live", version="1", lifespan=lifespan)
    _add_access(app, policy)
    _add_errors(app)
    _add_status(app, service)
    _add_sessions(app, service, policy)
    add_videos(app, orders)
    app.mount("/page", StaticFiles(directory=PAGE, check_dir=False))
    return app


def _add_access(app: FastAPI, policy: AccessPolicy) -> None:
    @app.middleware("http")
    async def check(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        if not policy.allows_origin(request.headers):
            return refusal(403, "origin", "pages of another host may not use this server")
        if not policy.allows_token(request.url.path, request.query_params, request.headers):
            return refusal(401, "token", "a token is required: add ?token=TOKEN or the header Authorization")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > 2 * MAX_MESSAGE_BYTES:
            return refusal(413, "too_large", f"the body is over {2 * MAX_MESSAGE_BYTES} bytes")
        return await answer(request)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestRefusedError)
    async def refused(request: Request, error: RequestRefusedError) -> JSONResponse:
        return refusal(STATUS_CODES.get(error.code, 422), error.code, str(error))

    @app.exception_handler(ServerFullError)
    async def full(request: Request, error: ServerFullError) -> JSONResponse:
        facts = {"capacity": error.capacity, "active": error.active, "retry_after": error.retry_after}
        answer = refusal(503, "full", str(error), **facts)
        answer.headers["Retry-After"] = str(max(1, round(error.retry_after)))
        return answer


def refusal(status: int, code: str, message: str, **facts: Any) -> JSONResponse:
    """Return an error answer."""
    return JSONResponse({"error": {"code": code, "message": message, **facts}}, status)


def _add_status(app: FastAPI, service: SessionService) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Return at once: the process runs."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> Response:
        """Return 200 after the warm-up."""
        ready = service.engine.ready.is_set()
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return the metrics in the text format of Prometheus."""
        return Response(service.engine.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/info")
    async def info(request: Request) -> dict[str, Any]:
        """Return facts about network and limits."""
        return await run_in_threadpool(service.info)

    @app.get("/v1/faces", response_class=Response)
    async def faces(seed: SeedQuery = 0) -> Response:
        """Return a drawn face as PNG; the header X-Caption describes it."""
        try:
            png, caption = await run_in_threadpool(appearance.face_png, service.talker, seed)
        except UserInputError as error:
            return refusal(404, "bad_face", str(error))
        return Response(png, media_type="image/png", headers={"X-Caption": caption, "Cache-Control": "max-age=3600"})

    @app.get("/v1/voices", response_class=Response)
    async def voices(seed: SeedQuery = 0) -> Response:
        """Return a drawn voice as WAV."""
        try:
            return Response(await run_in_threadpool(appearance.voice_wav, service.talker, seed), media_type="audio/wav")
        except UserInputError as error:
            return refusal(404, "bad_voice", str(error))


def _add_sessions(app: FastAPI, service: SessionService, policy: AccessPolicy) -> None:
    reservations = Reservations(service)

    @app.post("/v1/sessions", status_code=201)
    async def create_session(request: Request) -> dict[str, str]:
        """Create a session; the WebSocket at ``url`` streams it."""
        wanted = await read_session_request(request)
        if wanted.resume is not None:
            session = await run_in_threadpool(service.resume, wanted.resume)
        else:
            session = await run_in_threadpool(service.prepare, wanted.spec())
        name = await run_in_threadpool(reservations.add, session)
        scheme = "wss" if request.url.scheme == "https" else "ws"
        url = f"{scheme}://{request.url.netloc}{SOCKET_PATH}?session_id={name}"
        return {"session_id": name, "url": url, "resume": session.key}

    @app.websocket(SOCKET_PATH)
    async def realtime(socket: WebSocket) -> None:
        headers = socket.headers
        if not policy.allows_origin(headers) or not policy.allows_token(socket.url.path, socket.query_params, headers):
            await socket.close(1008)  # before accepting: the client gets 403
            return
        await socket.accept()
        rate = MessageRate(policy.messages_per_second)
        await RealtimeConnection(socket, service, reservations, rate=rate).serve()


async def read_session_request(request: Request) -> SessionRequest:
    """Return the conditions in a JSON or multipart body. Raises RequestRefusedError."""
    try:
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            body = await request.body()
            return SessionRequest.model_validate_json(body or b"{}")
        async with request.form(max_files=2, max_fields=16) as form:
            fields: dict[str, Any] = {}
            for name, value in form.items():
                fields[name] = await value.read() if isinstance(value, UploadFile) else value
        files = {name: fields.pop(name) for name in ("face", "voice") if isinstance(fields.get(name), bytes)}
        return SessionRequest.model_validate(fields).model_copy(update={k: v for k, v in files.items() if v})
    except ValidationError as error:
        raise RequestRefusedError("bad_message", describe_validation(error)) from None
