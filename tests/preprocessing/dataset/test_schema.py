"""Rows round-trip and have the columns of the t2va schema of FastVideo."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from preprocessing.dataset.schema import CLIPS, ROW_GROUP, RowWriter, columns_for, from_row, to_row
from preprocessing.records import Clip, Source, Word

T2VA = {
    "id": pa.string(),
    "vae_latent_bytes": pa.binary(),
    "vae_latent_shape": pa.list_(pa.int64()),
    "vae_latent_dtype": pa.string(),
    "audio_latent_bytes": pa.binary(),
    "audio_latent_shape": pa.list_(pa.int64()),
    "audio_latent_dtype": pa.string(),
    "text_embedding_bytes": pa.binary(),
    "text_embedding_shape": pa.list_(pa.int64()),
    "text_embedding_dtype": pa.string(),
    "file_name": pa.string(),
    "caption": pa.string(),
    "media_type": pa.string(),
    "width": pa.int64(),
    "height": pa.int64(),
    "num_frames": pa.int64(),
    "duration_sec": pa.float64(),
    "fps": pa.float64(),
    "audio_sample_rate": pa.int64(),
}


def clip(modalities: tuple[str, ...] = ("video", "audio")) -> Clip:
    draw = torch.Generator().manual_seed(0)
    latents = {
        "video": torch.randn(4, 6, 2, 3, generator=draw),
        "audio": torch.randn(9, 5, generator=draw),
    }
    return Clip(
        source=Source(uri="file:///a%20b.mp4", size=1, fingerprint="f"),
        span=(1.5, 2.0),
        frames=np.full((13, 16, 24, 3), 7, np.uint8) if "video" in modalities else None,
        waveform=np.zeros(8000, np.float32) if "audio" in modalities else None,
        caption="a face",
        transcript=(Word(word="ba", start=0.1, end=0.2),),
        sync=(0.04, 0.5),
        latents={m: latents[m] for m in modalities},
        caption_embedding=torch.ones(2, 8),
        words_embedding=torch.zeros(1, 8),
    )


def row(of: Clip, dtype: str = "float32") -> dict:
    return to_row(of, id="x", file_name="a b.mp4", fps=24.0, sample_rate=16000, times={"video": [0.0]}, dtype=dtype)


def test_the_first_columns_are_those_of_t2va():
    assert {field.name: field.type for field in list(CLIPS)[: len(T2VA)]} == T2VA


def test_latents_are_stored_channels_first_and_come_back_time_first(tmp_path):
    with RowWriter(tmp_path / "a.parquet") as writer:
        writer.add(row(clip()))
    stored = pq.read_table(tmp_path / "a.parquet").to_pylist()[0]
    assert stored["vae_latent_shape"] == [6, 4, 2, 3]  # C, T, h, w
    assert stored["audio_latent_shape"] == [5, 9]  # C, T
    back = from_row(stored, chunks=1)
    latents = clip().latents
    assert torch.equal(back.video, latents["video"])
    assert torch.equal(back.audio, latents["audio"])
    assert back.transcript == clip().transcript
    assert back.word_times.tolist() == [[0.1, 0.2]]
    assert (back.caption_embedding.shape, back.words.shape) == ((2, 8), (1, 8))
    assert stored["num_frames"] / stored["fps"] == stored["duration_sec"]


def test_float16_latents_are_stored_if_configured():
    back = from_row(row(clip(), "float16"), chunks=1)
    assert torch.allclose(back.video, clip().latents["video"], atol=2e-3)


def test_unimodal_rows_leave_the_other_columns_null():
    assert row(clip(("audio",)))["vae_latent_bytes"] is None
    assert row(clip(("audio",)))["first_frame_png"] is None
    assert row(clip(("video",)))["audio_latent_bytes"] is None
    assert [row(clip(m))["media_type"] for m in (("video",), ("audio",), ("video", "audio"))] == [
        "video",
        "audio",
        "video_with_audio",
    ]


def test_unimodal_reading_names_no_column_of_the_other():
    assert not any("audio" in name for name in columns_for(("video",)))
    assert not any("vae" in name or "png" in name for name in columns_for(("audio",)))


def test_row_groups_are_small(tmp_path):
    with RowWriter(tmp_path / "a.parquet") as writer:
        for _ in range(2 * ROW_GROUP + 3):
            writer.add(row(clip()))
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [ROW_GROUP, ROW_GROUP, 3]
