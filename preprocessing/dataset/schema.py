"""Parquet schema of clips: one row per clip, with its writer and reader.

The first block of columns has the names, types and axis orders of the text-to-video-and-audio (t2va) schema of
FastVideo: tensors are ``<name>_bytes, _shape, _dtype``, video latents (C, T, h, w), audio latents (C, T), text (L, D).
The second block is specific to this project. In a unimodal dataset, the columns of the other modality are null.
"""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Float64
from PIL import Image
from torch import Tensor

from mfcore.types import AUDIO, VIDEO
from preprocessing.records import Clip, Word

SCHEMA_VERSION = 1
ROW_GROUP = 16  # clips


def _tensor_fields(name: str) -> list[pa.Field]:
    return [
        pa.field(f"{name}_bytes", pa.binary()),
        pa.field(f"{name}_shape", pa.list_(pa.int64())),
        pa.field(f"{name}_dtype", pa.string()),
    ]


CLIPS = pa.schema(
    [
        # FastVideo t2va
        pa.field("id", pa.string()),
        *_tensor_fields("vae_latent"),
        *_tensor_fields("audio_latent"),
        *_tensor_fields("text_embedding"),
        pa.field("file_name", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("media_type", pa.string()),
        pa.field("width", pa.int64()),
        pa.field("height", pa.int64()),
        pa.field("num_frames", pa.int64()),
        pa.field("duration_sec", pa.float64()),
        pa.field("fps", pa.float64()),
        pa.field("audio_sample_rate", pa.int64()),
        # specific to this project
        pa.field("source_uri", pa.string()),
        pa.field("span_start_sec", pa.float64()),
        pa.field(
            "transcript",
            pa.list_(pa.struct([("word", pa.string()), ("start", pa.float64()), ("end", pa.float64())])),
        ),
        *_tensor_fields("transcript_embedding"),
        pa.field("first_frame_png", pa.binary()),
        pa.field("sync_offset_sec", pa.float64()),
        pa.field("sync_confidence", pa.float64()),
        pa.field("video_latent_times", pa.list_(pa.float64())),
        pa.field("audio_latent_times", pa.list_(pa.float64())),
        pa.field("source_content", pa.string()),
        pa.field("source_fps", pa.float64()),
        pa.field("loudness_db", pa.float64()),
        pa.field("transcript_source", pa.string()),  # manifest, sidecar, whisper/...; null: no transcript
        pa.field("fingerprint", pa.binary()),  # for near-duplicates
        pa.field("world", pa.string()),  # synthetic world, such as toyworld/1; null: none, or an older dataset
        pa.field("caption_source", pa.string()),  # manifest, sidecar, measured, vlm/...; null: no caption
        # of people; null: not measured
        pa.field("face_share", pa.float64()),
        pa.field("face_pixels", pa.float64()),
        pa.field("face_frontal_share", pa.float64()),
        pa.field("face_sharpness", pa.float64()),
        pa.field("face_inside_share", pa.float64()),
        pa.field("face_boxes", pa.list_(pa.float32())),  # crop of each frame: left, top, right, bottom, 0 to 1
        pa.field("speech_seconds", pa.float64()),
        pa.field("speech_quality", pa.float64()),
        pa.field("voice_similarity", pa.float64()),
    ],
    metadata={"mfctl_schema_version": str(SCHEMA_VERSION)},
)

REJECTS = pa.schema(
    [
        pa.field("uri", pa.string()),
        pa.field("span_start_sec", pa.float64()),  # null: the whole source
        pa.field("span_end_sec", pa.float64()),
        pa.field("step", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)

SOURCES = pa.schema(
    [
        pa.field("uri", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("fingerprint", pa.string()),
        pa.field("unit", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("transcript", CLIPS.field("transcript").type),
        pa.field("duplicate_of", pa.string()),
    ]
)

_COMMON = [
    *("id", "caption", "source_uri", "span_start_sec", "transcript", "world"),
    *(f"{name}_{part}" for name in ("text_embedding", "transcript_embedding") for part in ("bytes", "shape", "dtype")),
]
_MODALITY_COLUMNS = {
    VIDEO: ["vae_latent_bytes", "vae_latent_shape", "vae_latent_dtype", "first_frame_png"],
    AUDIO: ["audio_latent_bytes", "audio_latent_shape", "audio_latent_dtype"],
}


def columns_for(modalities: Sequence[str]) -> list[str]:
    """Return the columns that are read for clips of these modalities."""
    return _COMMON + [name for m in modalities for name in _MODALITY_COLUMNS[m]]


@dataclass(frozen=True, kw_only=True)
class ClipTensors:
    """One clip as read for training. Latents are raw, without whitening."""

    id: str
    video: Float[Tensor, "n C h w"] | None  # the first latent is the first frame alone
    audio: Float[Tensor, "n C"] | None
    chunks: int  # whole chunks in all modalities that were read
    caption: str
    caption_embedding: Float[Tensor, "L D"]
    words: Float[Tensor, "W D"]
    word_times: Float64[Tensor, "W 2"]  # seconds since the start of the clip
    transcript: tuple[Word, ...]
    first_frame_png: bytes | None
    source_uri: str
    span_start_sec: float
    world: str | None = None  # synthetic world of the clip


# ---------------------------------------------------------------------------------------------------------- clip -> row


def _pack(name: str, array: np.ndarray[Any, Any] | None) -> dict[str, Any]:
    if array is None:
        return {f"{name}_{part}": None for part in ("bytes", "shape", "dtype")}
    return {f"{name}_bytes": array.tobytes(), f"{name}_shape": list(array.shape), f"{name}_dtype": str(array.dtype)}


def _png(frame: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def to_row(
    clip: Clip, *, id: str, file_name: str, fps: float, sample_rate: int, times: dict[str, list[float]], dtype: str
) -> dict[str, Any]:
    """Return the row of an encoded clip. `dtype`: float32 or float16, of the latents."""
    assert clip.latents is not None
    assert clip.caption_embedding is not None
    assert clip.words_embedding is not None
    kind = np.dtype(dtype)
    video, audio = clip.latents.get(VIDEO), clip.latents.get(AUDIO)
    frames = None if clip.frames is None else len(clip.frames)
    height, width = (None, None) if clip.frames is None else clip.frames.shape[1:3]
    return {
        "id": id,
        **_pack("vae_latent", None if video is None else video.transpose(0, 1).contiguous().numpy().astype(kind)),
        **_pack("audio_latent", None if audio is None else audio.transpose(0, 1).contiguous().numpy().astype(kind)),
        **_pack("text_embedding", clip.caption_embedding.numpy()),
        "file_name": file_name,
        "caption": clip.caption,
        "caption_source": clip.caption_source or None,
        "media_type": {(True, True): "video_with_audio", (True, False): "video"}.get(
            (video is not None, audio is not None), "audio"
        ),
        "width": width,
        "height": height,
        "num_frames": frames,
        "duration_sec": frames / fps if frames is not None else clip.span[1] - clip.span[0],
        "fps": fps if frames is not None else None,
        "audio_sample_rate": sample_rate if audio is not None else None,
        "source_uri": clip.source.uri,
        "span_start_sec": clip.span[0],
        "transcript": [asdict(word) for word in clip.transcript],
        "transcript_source": clip.transcript_source or None,
        **_pack("transcript_embedding", clip.words_embedding.numpy()),
        "first_frame_png": None if clip.frames is None else _png(clip.frames[0]),
        "sync_offset_sec": clip.sync[0] if clip.sync else None,
        "sync_confidence": clip.sync[1] if clip.sync else None,
        "fingerprint": clip.fingerprint,
        "video_latent_times": times.get(VIDEO),
        "audio_latent_times": times.get(AUDIO),
        "source_content": clip.content,
        "source_fps": clip.source_fps,
        "loudness_db": clip.loudness_db,
        "world": clip.source.world or None,
        **_people_row(clip),
    }


def _people_row(clip: Clip) -> dict[str, Any]:
    """Return the columns of face and speech that were measured."""
    row: dict[str, Any] = {}
    if face := clip.face:
        row |= {f"face_{name}": getattr(face, name) for name in ("share", "pixels", "frontal_share", "sharpness")}
        row |= {"face_inside_share": face.inside_share, "face_boxes": face.boxes.ravel().tolist()}
    if speech := clip.speech:
        row |= {"speech_seconds": speech.seconds, "speech_quality": speech.quality}
        row |= {"voice_similarity": speech.voice_similarity}
    return row


class RowWriter:
    """Writer of one local Parquet file; holds at most one row group of ROW_GROUP rows."""

    def __init__(self, path: Path, schema: pa.Schema = CLIPS) -> None:
        self.path, self.rows = path, 0
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False, write_statistics=False)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self._rows.append(row)
        self.rows += 1
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._flush()
        self._writer.close()


# ---------------------------------------------------------------------------------------------------------- row -> clip


def _unpack(row: dict[str, Any], name: str) -> Tensor | None:
    data = row.get(f"{name}_bytes")
    if data is None:
        return None
    array = np.frombuffer(data, dtype=row[f"{name}_dtype"]).reshape(row[f"{name}_shape"])
    return torch.from_numpy(array.astype(np.float32))


def _time_first(latents: Tensor | None) -> Tensor | None:
    return None if latents is None else latents.transpose(0, 1).contiguous()


def from_row(row: dict[str, Any], chunks: int) -> ClipTensors:
    """Return the clip of a row as float32 tensors with time first; columns not read are None."""
    words = tuple(Word(**word) for word in row["transcript"] or [])
    caption_embedding = _unpack(row, "text_embedding")
    words_embedding = _unpack(row, "transcript_embedding")
    assert caption_embedding is not None
    assert words_embedding is not None
    return ClipTensors(
        id=row["id"],
        video=_time_first(_unpack(row, "vae_latent")),
        audio=_time_first(_unpack(row, "audio_latent")),
        chunks=chunks,
        caption=row["caption"],
        caption_embedding=caption_embedding,
        words=words_embedding,
        word_times=torch.tensor([[w.start, w.end] for w in words], dtype=torch.float64).reshape(-1, 2),
        transcript=words,
        first_frame_png=row.get("first_frame_png"),
        source_uri=row["source_uri"],
        span_start_sec=row["span_start_sec"],
        world=row.get("world"),  # older datasets lack the column
    )


def latent_counts(row: dict[str, Any]) -> dict[str, int]:
    """Return the latents per modality among the columns read, with the first-frame latent."""
    shapes = {VIDEO: row.get("vae_latent_shape"), AUDIO: row.get("audio_latent_shape")}
    return {modality: int(shape[1]) for modality, shape in shapes.items() if shape is not None}
