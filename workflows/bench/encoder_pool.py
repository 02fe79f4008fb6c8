"""Share of the time that an encoder of known cost is busy behind CPU decoders (``mfctl bench preprocess --encoder``).

The stand-in sleeps for a fixed time per clip, as a process that waits for a GPU does, and returns the latents of the
embedded codecs. The pool reserves a logical GPU of Ray: no GPU is needed.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from mfcore.codecs.base import Codec
from mfcore.types import VIDEO
from preprocessing.config import PreprocessConfig
from preprocessing.dataset.units import plan_units
from preprocessing.io.lease import Lease
from preprocessing.io.storage import Store
from preprocessing.pipeline import build_encoders
from preprocessing.runner import run_encoder_pool
from preprocessing.sources.discovery import find_sources
from preprocessing.steps.encode import Encoders
from workflows.utils.ray_runtime import ray_session

MIN_BUSY_SHARE = 0.9
LOG_NAME = "encoder.jsonl"


class EncoderBenchRow(TypedDict):
    """Result of ``mfctl bench preprocess --encoder``."""

    decoders: int
    clips: int
    encoder_seconds: float  # of the stand-in per clip
    busy_share: float  # between its first and its last clip
    bar: float  # least accepted busy_share
    decode_seconds: float  # of one decoder per clip
    wall_s: float  # with the start of the workers


@dataclass(frozen=True)
class _SleepingCodec:
    """Codec that takes at least `seconds` per clip and logs the begin and the end of its work."""

    codec: Codec
    seconds: float
    log: Path

    def __getattr__(self, name: str) -> Any:
        return getattr(self.codec, name)

    def encode(self, signal: Tensor) -> Tensor:
        """Return the latents of the wrapped codec."""
        began = time.time()
        latents = self.codec.encode(signal)
        time.sleep(max(0.0, began + self.seconds - time.time()))
        with self.log.open("a") as file:
            file.write(json.dumps([began, time.time()]) + "\n")
        return latents


def sleeping_encoders(config: PreprocessConfig, seconds: float, log: Path) -> Encoders:
    """Return the embedded codecs of a configuration; video takes at least `seconds` per clip."""
    encoders = build_encoders(config)
    codecs: dict[str, Any] = {**encoders.codecs, VIDEO: _SleepingCodec(encoders.codecs[VIDEO], seconds, log)}
    return replace(encoders, codecs=codecs)


def bench_encoder_pool(folder: str, *, config: PreprocessConfig, decoders: int, seconds: float) -> EncoderBenchRow:
    """Return how busy one encoder of `seconds` per clip is behind `decoders`. Raise ValueError without media files."""
    config = replace(
        config, workers=decoders, sources_per_unit=1, keep_duplicates=True, encoder=replace(config.encoder, gpus=1.0)
    )
    sources = list(find_sources([folder]))
    units = plan_units([], sources, config.sources_per_unit, config.fingerprint, keep_duplicates=True)
    with tempfile.TemporaryDirectory(prefix="mfctl-bench-") as out, ray_session(decoders, gpus=1):
        log, store = Path(out, LOG_NAME), Store(f"{out}/set")
        load = partial(sleeping_encoders, seconds=seconds, log=log)
        started = time.perf_counter()
        with Lease(store) as lease:
            results = list(run_encoder_pool(units, store, lease.token, config, load=load))
        wall_s = time.perf_counter() - started
        work = list(_read_log(log))
    spent = [json.loads(result["spent"]) for result in results]
    return {
        "decoders": decoders,
        "clips": len(work),
        "encoder_seconds": seconds,
        "busy_share": busy_share(work),
        "bar": MIN_BUSY_SHARE,
        "decode_seconds": sum(each.get("decode", 0.0) for each in spent) / max(1, len(work)),
        "wall_s": wall_s,
    }


def _read_log(path: Path) -> Iterator[tuple[float, float]]:
    for line in path.read_text().splitlines():
        began, ended = json.loads(line)
        yield began, ended


def busy_share(work: list[tuple[float, float]]) -> float:
    """Return the covered share of the time from the first begin to the last end; NaN for fewer than two intervals."""
    if len(work) < 2:
        return float("nan")
    began, ended = min(b for b, _ in work), max(e for _, e in work)
    return sum(e - b for b, e in work) / (ended - began)


def format_table(result: EncoderBenchRow) -> str:
    """Format the result as text."""
    return (
        f"{result['clips']} clips, {result['decoders']} decoder(s), encoder of {result['encoder_seconds']:g} s per "
        f"clip: busy {result['busy_share']:.1%} of the time, threshold {result['bar']:.0%}\n"
        f"one decoder takes {result['decode_seconds']:.2f} s per clip; {result['wall_s']:.1f} s in all"
    )
