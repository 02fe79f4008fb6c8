"""Memory of a dataset build, and its growth with the number of clips."""

import subprocess
import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TypedDict

from preprocessing.config import PreprocessConfig
from workflows.bench.process_monitor import ProcessTreeMonitor
from workflows.data.build import build_dataset
from workflows.utils.ray_runtime import ray_session

MAX_GROWTH = 1.10  # memory for many clips over memory for few


class DatasetBuildMemory(TypedDict):
    """Memory of one dataset build."""

    sources: int
    accepted: int
    rss_bytes: int
    object_store_bytes: int


class MemoryBenchRow(TypedDict):
    """Result of ``mfctl bench preprocess --memory``, as printed by ``--json``."""

    workers: int
    clips: dict[str, DatasetBuildMemory]  # by requested number of clips
    memory_ratio: float
    bar: float  # largest accepted memory_ratio


def bench_memory(*, few: int, many: int, workers: int) -> MemoryBenchRow:
    """Return the memory for ``few`` and ``many`` one-second clips, in bytes, and their ratio."""
    rows = {clips: _measure(clips, workers) for clips in (few, many)}
    ratio = rows[many]["rss_bytes"] / rows[few]["rss_bytes"]
    by_clips = {str(clips): row for clips, row in rows.items()}
    return {"workers": workers, "clips": by_clips, "memory_ratio": ratio, "bar": MAX_GROWTH}


def _measure(clips: int, workers: int) -> DatasetBuildMemory:
    config = PreprocessConfig(window_seconds=Fraction(1), sources_per_unit=1, workers=workers, keep_duplicates=True)
    with tempfile.TemporaryDirectory(prefix="mfctl-bench-") as folder, ray_session(workers):
        media = Path(folder, "media")
        media.mkdir()
        sources = write_test_videos(media, clips)
        warm = replace(config, min_chunks=1, window_seconds=Fraction(1, 2))
        build_dataset([str(media / "000000.mp4")], f"{folder}/warm", warm, progress=lambda *_: None)
        with ProcessTreeMonitor() as monitor:
            counts = build_dataset([str(media)], f"{folder}/set", config, progress=lambda *_: None)
    rss, store = monitor.peak_level()
    return {"sources": sources, "accepted": counts["accepted"], "rss_bytes": rss, "object_store_bytes": store}


def format_table(result: MemoryBenchRow) -> str:
    """Format the result as a text table."""
    lines = [
        f"{row['accepted']:7d} clips of {row['sources']} source(s): {row['rss_bytes'] / 1e6:.0f} MB, "
        f"object store {row['object_store_bytes'] / 1e6:.0f} MB"
        for row in result["clips"].values()
    ]
    return "\n".join(
        [*lines, f"ratio {result['memory_ratio']:.3f} (threshold {result['bar']}), {result['workers']} worker(s)"]
    )


def write_test_videos(folder: Path, clips: int, seconds: int = 100) -> int:
    """Write sources for about ``clips`` one-second clips; return the number of sources."""
    first = folder / "000000.mp4"
    picture = f"testsrc2=s=64x64:r=24:d={seconds + 1}"
    sound = f"sine=f=300:d={seconds + 1}:r=16000"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", sound]
    subprocess.run([*command, "-c:v", "libx264", "-preset", "ultrafast", "-threads", "1", str(first)], check=True)
    count = -(-clips // seconds)
    for number in range(1, count):
        (folder / f"{number:06d}.mp4").hardlink_to(first)
    return count
