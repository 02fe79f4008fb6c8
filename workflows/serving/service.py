"""Session service: what every protocol adapter calls to open, change and resume sessions.

Slow work, such as reading uploads and looking words up, is done here, in the thread of the caller.
"""

import time
from dataclasses import dataclass

import torch

from mfcore.errors import UserInputError
from preprocessing.media.live_muxer import AUDIO_CODEC, GENERATED, VIDEO_CODEC
from workflows.serving import appearance
from workflows.serving.engine import ServingEngine
from workflows.serving.outbox import Outbox
from workflows.serving.session import MadeChunk, Session
from workflows.serving.snapshots import new_key, unpack_session
from workflows.serving.talker import Talker

MAX_TEXT = 2000  # characters of a caption or transcript
MAX_UPLOAD_BYTES = 8_000_000
ENGLISH_HINT = "Hello, how are you today?"
SYLLABLE_HINT = "ba de go mi"
_SUGGESTED_CAPTIONS = 6


class RequestRefusedError(Exception):
    """A request that the service refuses, with a code of the protocol."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class SessionSpec:
    """Conditions of a new session."""

    prompt: str | None = None  # None: the caption of the drawn face
    transcript: str = ""
    seed: int = 0
    face_seed: int | None = None  # None: `seed`
    face: bytes | None = None  # file with a picture
    voice_seed: int | None = None
    voice: bytes | None = None  # file with sound


class SessionService:
    """Sessions of one engine."""

    def __init__(self, engine: ServingEngine) -> None:
        self.engine = engine

    @property
    def talker(self) -> Talker:
        """Return the network."""
        return self.engine.talker

    @property
    def mime(self) -> str:
        """Return the MIME type of the stream."""
        codecs = [VIDEO_CODEC] * (self.talker.size is not None) + [AUDIO_CODEC] * (self.talker.sample_rate is not None)
        return f'{"video" if self.talker.size else "audio"}/mp4; codecs="{",".join(codecs)}"'

    def stream_facts(self) -> dict[str, object]:
        """Return rates and sizes of the stream."""
        talker = self.talker
        height, width = talker.size or (0, 0)
        return {
            "mime": self.mime,
            "fps": float(talker.fps) if talker.fps else None,
            "width": width,
            "height": height,
            "sample_rate": talker.sample_rate,
            "chunk_seconds": float(talker.chunk_seconds),
        }

    def info(self) -> dict[str, object]:
        """Return facts about network and limits."""
        talker, engine = self.talker, self.engine
        drawn = appearance.drawn_world(talker) is not None
        faces = range(_SUGGESTED_CAPTIONS) if drawn else range(0)
        return {
            "model": talker.name,
            "stage": talker.pipeline.metadata.stage,
            "nfe": talker.params.num_function_evaluations,
            "video": talker.size is not None,
            "audio": talker.sample_rate is not None,
            **self.stream_facts(),
            "english": talker.english,
            "transcript_hint": ENGLISH_HINT if talker.english else SYLLABLE_HINT,
            "captions": [appearance.draw_face(talker, seed).caption for seed in faces],
            "faces": drawn,
            "voices": appearance.has_voices(talker),
            "capacity": engine.capacity,
            "active": engine.active,
            "chunks_ahead": engine.limits.chunks_ahead,
            "max_text": MAX_TEXT,
            "max_upload_bytes": MAX_UPLOAD_BYTES,
            "snapshots": True,
            "generated": GENERATED,
        }

    def prepare(self, spec: SessionSpec) -> Session:
        """Return the session of a new clip. Raises RequestRefusedError, ServerFullError."""
        self.engine.check_place()
        face, caption = self._face(spec)
        voice = self._voice(spec)
        prompt = caption if spec.prompt is None else check_text(spec.prompt)
        try:
            cond = self.talker.encode(caption=prompt, first_frame=face, voice=voice)
        except UserInputError as error:
            raise RequestRefusedError("bad_voice", str(error)) from None
        session = Session(self.talker, self.talker.start_row(cond, seed=spec.seed), key=new_key())
        if spec.transcript.strip():
            session.say(self.words(spec.transcript), "")
        return session

    def _face(self, spec: SessionSpec) -> tuple[torch.Tensor | None, str]:
        if self.talker.size is None:
            return None, ""
        try:
            if spec.face is not None:
                return appearance.read_face(self.talker, check_upload(spec.face)), ""
            drawn = appearance.draw_face(self.talker, spec.seed if spec.face_seed is None else spec.face_seed)
        except UserInputError as error:
            raise RequestRefusedError("bad_face", str(error)) from None
        return torch.from_numpy(drawn.pixels.copy()), drawn.caption

    def _voice(self, spec: SessionSpec) -> torch.Tensor | None:
        if self.talker.sample_rate is None:
            return None
        try:
            if spec.voice is not None:
                return appearance.read_voice_upload(self.talker, check_upload(spec.voice))
            return None if spec.voice_seed is None else appearance.draw_voice(self.talker, spec.voice_seed)
        except UserInputError as error:
            raise RequestRefusedError("bad_voice", str(error)) from None

    def words(self, text: str) -> list:
        """Return the timed words of a text. Raises RequestRefusedError."""
        try:
            words = self.talker.timed_words(check_text(text))
        except UserInputError as error:
            raise RequestRefusedError("bad_text", str(error)) from None
        if not words:
            raise RequestRefusedError("bad_text", "the text has no word to speak")
        return words

    def resume(self, key: str) -> Session:
        """Return the session of a snapshot. Raises RequestRefusedError, ServerFullError."""
        self.engine.check_place()
        try:
            data = self.engine.snapshots.read(key)
            session = unpack_session(data, self.talker)
        except UserInputError as error:
            raise RequestRefusedError("unknown_snapshot", str(error)) from None
        if self.engine.limits.snapshot_seconds is not None:
            self.engine.snapshots.write(session.key, data)  # this server may end before the first chunk
        return session

    def open(
        self,
        session: Session,
        outbox: Outbox,
        *,
        name: str,
        opened_at: float | None = None,
        seconds: float | None = None,
    ) -> None:
        """Serve a session, until it has ``seconds`` if given. Raises ServerFullError."""
        session.pace.moved_at = time.monotonic()
        self.engine.open(session, outbox, name=name, opened_at=opened_at, seconds=seconds)

    def say(self, name: str, text: str, event_id: str) -> float | None:
        """Append a text and return when it begins. Raises RequestRefusedError."""
        words = self.words(text)
        try:
            return self.engine.say(name, words, event_id)
        except UserInputError as error:
            raise RequestRefusedError("bad_text", str(error)) from None

    def change_caption(self, name: str, caption: str, *, event_id: str, chunks: int) -> float | None:
        """Change the caption and return when it applies. Raises RequestRefusedError."""
        cond = self.talker.encode(
            caption=check_text(caption), first_frame=appearance.default_face(self.talker), voice=None
        )
        return self.engine.change(name, cond, "caption", event_id=event_id, chunks=chunks)

    def change_voice(self, name: str, spec: SessionSpec, *, event_id: str, chunks: int) -> float | None:
        """Change the voice and return when it applies. Raises RequestRefusedError."""
        voice = self._voice(spec)
        try:
            cond = self.talker.encode(caption="", first_frame=appearance.default_face(self.talker), voice=voice)
        except UserInputError as error:
            raise RequestRefusedError("bad_voice", str(error)) from None
        return self.engine.change(name, cond, "voice", event_id=event_id, chunks=chunks)


def missed_chunks(session: Session, received: int | None) -> list[MadeChunk]:
    """Return the stored chunks that a client with ``received`` chunks lacks; none if one of them is not stored."""
    lacking = [] if received is None else [made for made in session.sent if made.chunk >= received]
    return lacking if lacking and lacking[0].chunk == received else []


def check_text(text: str) -> str:
    """Return a text. Raises RequestRefusedError over ``MAX_TEXT`` characters."""
    if len(text) > MAX_TEXT:
        raise RequestRefusedError("too_large", f"the text has {len(text)} characters: use at most {MAX_TEXT}")
    return text


def check_upload(data: bytes) -> bytes:
    """Return an upload. Raises RequestRefusedError over ``MAX_UPLOAD_BYTES``."""
    if len(data) > MAX_UPLOAD_BYTES:
        raise RequestRefusedError(
            "too_large", f"the upload has {len(data)} bytes: use a file of at most {MAX_UPLOAD_BYTES} bytes"
        )
    return data
