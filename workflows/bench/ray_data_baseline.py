"""Baseline on plain Ray Data: read bytes, decode in a map, write Parquet.

It encodes the same windows to the same latents, without probe, filters, scene cuts or checks.
"""

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mfcore.types import AUDIO, VIDEO
from preprocessing.config import PreprocessConfig
from preprocessing.pipeline import build_encoders, span_plan


def baseline_pipeline(paths: Sequence[str], out: str, config: PreprocessConfig) -> int:
    """Write the clips of ``paths`` to ``out``; return the number of rows."""
    import ray
    from ray.data import TaskPoolStrategy

    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.read_binary_files(list(paths), override_num_blocks=len(paths))
    clips = data.flat_map(partial(_clips, config=config), num_cpus=1, compute=TaskPoolStrategy(config.workers))
    clips.write_parquet(out)
    return sum(_rows(path) for path in Path(out).iterdir())


def _rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows


def _clips(row: dict[str, Any], config: PreprocessConfig) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    encoders = build_encoders(config)
    plan = span_plan(config, encoders.timeline)
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(row["bytes"])
        file.flush()
        frames, waveform = _decode(file.name, config)
    for first in range(0, len(frames) - plan.frames[-1] + 1, plan.step):
        samples = waveform[round(first * config.sample_rate / config.fps) :][: plan.samples[-1]]
        latents = {
            VIDEO: encoders.codecs[VIDEO].encode(torch.from_numpy(frames[first : first + plan.frames[-1]])),
            AUDIO: encoders.codecs[AUDIO].encode(torch.from_numpy(samples)),
        }
        yield {name: x.numpy().tobytes() for name, x in latents.items()} | {"first": first}


def _decode(path: str, config: PreprocessConfig) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    height, width = config.sizes[0]
    command = ["ffmpeg", "-v", "error", "-nostdin", "-threads", "1", "-i", path]
    video = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-vf", f"fps={config.fps},scale={width}:{height}", "-"]
    audio = ["-f", "f32le", "-ac", "1", "-ar", str(config.sample_rate), "-vn", "-"]
    frames = subprocess.run([*command, *video], capture_output=True, check=True).stdout
    waveform = subprocess.run([*command, *audio], capture_output=True, check=True).stdout
    shape = (-1, height, width, 3)
    return np.frombuffer(bytearray(frames), np.uint8).reshape(shape), np.frombuffer(bytearray(waveform), np.float32)
