"""A small finished dataset on disk with random latents, in the format of preprocessing."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from mfcore.timeline import Timeline, audio_clock, video_clock
from mfcore.types import AUDIO, VIDEO
from preprocessing.dataset.schema import SCHEMA_VERSION, RowWriter, to_row
from preprocessing.records import Clip, Source, Word

CLOCKS = {VIDEO: video_clock(Fraction(24), 4), AUDIO: audio_clock(16000, 1024)}
TIMELINE = Timeline(clocks=CLOCKS, chunk_seconds=Fraction(1, 2))
CHANNELS = {VIDEO: 3, AUDIO: 4}


def write_dataset(folder: Path, clips: int = 24, chunks: int = 5, *, channels: int = 3, fingerprint: str = "f1") -> str:
    """Write ``clips`` clips of as many sources; return the folder as text."""
    for name in ("clips", "_done"):
        (folder / name).mkdir(parents=True)
    with RowWriter(folder / "clips" / "u0.parquet") as writer:
        for i in range(clips):
            writer.add(_row(i, chunks, channels))
    marker = {"unit": "u0", "files": [{"kind": "clips", "name": "clips/u0.parquet"}]}
    (folder / "_done" / "u0.json").write_text(json.dumps(marker))
    stats = {
        VIDEO: {
            "mean": [0.1] * channels,
            "std": [1.1] * channels,
            "head_mean": [0] * channels,
            "head_std": [1] * channels,
        },
        AUDIO: {"mean": [0.2] * CHANNELS[AUDIO], "std": [0.9] * CHANNELS[AUDIO], "head_mean": [], "head_std": []},
    }
    facts = {
        "schema_version": SCHEMA_VERSION,
        "complete": True,
        "config": {"modality": "paired", "text_width": 8},
        "fingerprint": fingerprint,
        "text_codec": "test-words",
        "codecs": {VIDEO: f"dct-v1/c{channels}/b8/g4", AUDIO: f"mel-v1/r16000/w1024/h256/m80/g4/c{CHANNELS[AUDIO]}"},
        "clocks": {m: {"rate": str(c.rate), "offset": str(c.offset), "head": c.head} for m, c in CLOCKS.items()},
        "stats": stats,
        "chunk_seconds": "1/2",
        "counts": {},
    }
    (folder / "_dataset.json").write_text(json.dumps(facts))
    return str(folder)


def _row(number: int, chunks: int, channels: int) -> dict[str, object]:
    draw = torch.Generator().manual_seed(number)
    phase = torch.rand((), generator=draw) * 6.28
    n = {m: TIMELINE.count(m, chunks) for m in CLOCKS}
    angle = phase + torch.arange(1 + n[VIDEO])[:, None, None, None] / 6
    video = torch.sin(angle).expand(-1, channels, 4, 4) + 0.1 * torch.randn(
        1 + n[VIDEO], channels, 4, 4, generator=draw
    )
    sound = torch.sin(phase + torch.arange(n[AUDIO])[:, None] / 15).expand(-1, CHANNELS[AUDIO])
    words = tuple(Word(word=w, start=0.4 * i, end=0.4 * i + 0.3) for i, w in enumerate("abc"))
    clip = Clip(
        source=Source(uri=f"file:///clip-{number}.mp4", size=1, fingerprint="x"),
        span=(0.0, chunks / 2),
        frames=np.zeros((1, 4, 4, 3), np.uint8),
        waveform=None,
        content=f"file:///clip-{number}.mp4",
        caption="a caption",
        transcript=words,
        latents={VIDEO: video, AUDIO: sound + 0.1 * torch.randn(n[AUDIO], CHANNELS[AUDIO], generator=draw)},
        caption_embedding=torch.randn(2, 8, generator=draw),
        words_embedding=torch.randn(3, 8, generator=draw),
    )
    return to_row(
        clip, id=f"clip-{number:03d}", file_name="x.mp4", fps=24.0, sample_rate=16000, times={}, dtype="float32"
    )
