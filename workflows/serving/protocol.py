"""Messages of the WebSocket protocol and bodies of the HTTP routes; docs/reference/serving.md describes them."""

from typing import Annotated, Any, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from mfcore.errors import UserInputError
from workflows.serving.appearance import MAX_SEED
from workflows.serving.outbox import ChunkNews
from workflows.serving.service import SessionSpec

SOCKET_PATH = "/v1/realtime/video"
MAX_SECONDS = 86_400.0  # of a session that stops alone
MAX_VIDEO_SECONDS = 600.0
MAX_MESSAGE_BYTES = 12_000_000
MAX_TRANSITION_CHUNKS = 1000

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class _Message(BaseModel):
    """Base of all inputs: unknown fields are ignored, numbers are finite."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class SessionRequest(_Message):
    """Conditions of a session: body of ``POST /v1/sessions``, and part of ``session.start``."""

    prompt: str | None = None
    transcript: str = ""
    seed: Seed = 0
    face_seed: Seed | None = None
    voice_seed: Seed | None = None
    face: Base64Bytes | None = None
    voice: Base64Bytes | None = None
    resume: str | None = None

    def spec(self) -> SessionSpec:
        """Return the conditions for the service."""
        return SessionSpec(**{name: getattr(self, name) for name in SessionSpec.__dataclass_fields__})


class SessionStart(SessionRequest):
    """First message of a client."""

    type: Literal["session.start"]
    session_id: str | None = None
    format: Literal["m4s"] = "m4s"
    seconds: Annotated[float, Field(gt=0, le=MAX_SECONDS)] | None = None  # None: until session.stop
    received: Annotated[int, Field(ge=0)] | None = None  # chunks that the client has


class VoiceChange(_Message):
    """Voice of an event: drawn or uploaded."""

    seed: Seed | None = None
    data: Base64Bytes | None = None


class ClipChange(_Message):
    """Change of a running clip: one of its fields."""

    prompt: str | None = None
    transcript: str | None = None
    voice: VoiceChange | None = None

    @model_validator(mode="after")
    def _check_one(self) -> "ClipChange":
        if sum(part is not None for part in (self.prompt, self.transcript, self.voice)) != 1:
            raise UserInputError("an event has one of prompt, transcript and voice")
        return self


class SessionInteraction(_Message):
    """Event of a client."""

    type: Literal["session.interaction"]
    event_id: Annotated[str, Field(min_length=1, max_length=128)]
    event: ClipChange
    transition_chunks: Annotated[int, Field(ge=1, le=MAX_TRANSITION_CHUNKS)] = 1


class SessionAck(_Message):
    """Playhead of a client."""

    type: Literal["session.ack"]
    played_to: float


class SessionCommand(_Message):
    """Message without fields."""

    type: Literal["session.snapshot", "session.ping", "session.stop"]


ClientMessage = Annotated[SessionStart | SessionInteraction | SessionAck | SessionCommand, Field(discriminator="type")]
CLIENT_MESSAGE: TypeAdapter[ClientMessage] = TypeAdapter(ClientMessage)


class VideoRequest(SessionRequest):
    """Body of ``POST /v1/videos``."""

    seconds: Annotated[float, Field(gt=0, le=MAX_VIDEO_SECONDS)] = 10.0


def chunk_metadata(news: ChunkNews) -> dict[str, Any]:
    """Return the message in front of a fragment."""
    made = news.made
    return {
        "type": "video.chunk_metadata",
        "first_chunk": made.chunk,
        "last_chunk": made.chunk,
        "num_frames": made.frames,
        "num_audio_samples": made.samples,
        "start_seconds": made.start_seconds,
        "byte_length": len(made.data),
        "started_event_ids": list(made.started),
        "active_event_ids": list(made.active),
        "completed_event_ids": list(made.completed),
        "final": made.is_last,
    }


def chunk_metrics(news: ChunkNews, nfe: int) -> dict[str, Any]:
    """Return the message after a fragment."""
    measured = {
        "type": "chunk_metrics",
        "chunk": news.made.chunk,
        "made_ms": round(news.made_ms, 1),
        "ahead_ms": round(news.ahead_ms, 1),
        "deadline_missed": news.deadline_missed,
        "nfe": nfe,
        "rows": news.rows,
    }
    return measured | ({} if news.first_chunk_ms is None else {"first_chunk_ms": round(news.first_chunk_ms, 1)})
