"""Time the pipeline against ffmpeg and plain Ray Data (``mfctl bench preprocess``).

The limit is ffmpeg that decodes and scales the same files to the null muxer, one process per worker. Ratios compare
measurements of one round, so that other load on the machine affects both. CPU seconds exclude other load.
"""

import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, TypedDict

from preprocessing.config import PreprocessConfig
from preprocessing.io.storage import local_path
from preprocessing.media.mp4_writer import file_url
from preprocessing.media.probe import MediaError, probe
from preprocessing.sources.discovery import find_sources
from workflows.bench.process_monitor import ProcessTreeMonitor
from workflows.bench.ray_data_baseline import baseline_pipeline
from workflows.data.build import build_dataset
from workflows.utils.ray_runtime import ray_session

MIN_SPEED_RATIO = 0.75  # speed over the limit, for sources of a minute or more


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Cost of one pass over the files."""

    wall_s: float
    cpu_s: float  # of all processes involved
    counts: Mapping[str, Any]
    spent: Mapping[str, float]  # seconds by step
    peak_rss_bytes: int


class PreprocessBenchRow(TypedDict):
    """Result of ``mfctl bench preprocess``, as printed by ``--json``; ratios are costs of others over ours."""

    workers: int
    rounds: int
    clips: int
    clips_per_s: float
    source_seconds_per_s: float
    ratio_to_limit: float
    ratio_to_limit_spread: list[float]  # least and most
    ratio_to_limit_cpu: float
    ratio_to_plain_ray_data: float | None
    ratio_to_plain_ray_data_cpu: float | None
    bar: float  # least accepted ratio_to_limit
    wall_s: dict[str, float]  # by variant
    cpu_s: dict[str, float]  # by variant
    peak_rss_bytes: int
    share_by_step: dict[str, float]


def bench_preprocess(
    folder: str, *, config: PreprocessConfig, workers: int, rounds: int, with_plain: bool = True
) -> PreprocessBenchRow:
    """Return medians over the rounds, as in ``--json``. Raises ValueError without media files."""
    paths = [local_path(source.uri) for source in find_sources([folder])]
    config = replace(config, workers=workers, sources_per_unit=1, keep_duplicates=True)
    variants: dict[str, Callable[[], Measurement]] = {
        "limit": lambda: _measure_ffmpeg(paths, config),
        "ours": lambda: _measure_pipeline(folder, config),
    }
    if with_plain:
        readable = [path for path in paths if _has_audio_and_video(path)]  # that pipeline fails on other files
        variants["plain"] = lambda: _measure_ray_data(readable, config)
    measured: dict[str, list[Measurement]] = {name: [] for name in variants}
    with ray_session(workers):
        warm_up = replace(config, window_seconds=config.chunk_seconds, min_chunks=1)
        _measure_pipeline(folder, warm_up)  # starts the workers and fills the page cache
        for _ in range(rounds):
            for name, measure in variants.items():
                measured[name].append(measure())
    return _summary(measured, workers, rounds)


def _has_audio_and_video(path: str) -> bool:
    try:
        found = probe(path)
    except MediaError:
        return False
    return found.video is not None and found.audio is not None


def _measure_ffmpeg(paths: Sequence[str], config: PreprocessConfig) -> Measurement:
    height, width = config.sizes[0]

    def decode(path: str) -> None:
        command = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", "-i", file_url(path)]
        subprocess.run(
            [*command, "-vf", f"scale={width}:{height}", "-f", "null", "-"], check=False, capture_output=True
        )

    def decode_all() -> dict[str, Any]:
        with ThreadPoolExecutor(config.workers) as pool:
            list(pool.map(decode, paths))
        return {}

    return _timed(decode_all, {})


def _measure_pipeline(folder: str, config: PreprocessConfig) -> Measurement:
    spent: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="mfctl-bench-") as out:
        return _timed(
            lambda: build_dataset([folder], f"{out}/set", config, progress=lambda *_: None, spent=spent), spent
        )


def _measure_ray_data(paths: Sequence[str], config: PreprocessConfig) -> Measurement:
    with tempfile.TemporaryDirectory(prefix="mfctl-bench-") as out:
        return _timed(lambda: {"rows": baseline_pipeline(paths, f"{out}/rows", config)}, {})


def _timed(work: Callable[[], Mapping[str, Any]], spent: Mapping[str, float]) -> Measurement:
    with ProcessTreeMonitor() as monitor:
        started = time.perf_counter()
        counts = work()
        wall_s = time.perf_counter() - started
    return Measurement(
        wall_s=wall_s, cpu_s=monitor.cpu_s, counts=counts, spent=spent, peak_rss_bytes=max(monitor.rss, default=0)
    )


def _summary(measured: Mapping[str, Sequence[Measurement]], workers: int, rounds: int) -> PreprocessBenchRow:
    ours = measured["ours"]
    wall = median(each.wall_s for each in ours)
    spent = {name: sum(each.spent.get(name, 0.0) for each in ours) for name in ours[0].spent}
    seconds = ours[-1].counts["hours"] * 3600

    def ratios(other: str, metric: str) -> list[float]:
        """Return cost of the other variant over ours, per round."""
        pairs = zip(measured.get(other, ()), ours, strict=False)
        return [getattr(theirs, metric) / getattr(own, metric) for theirs, own in pairs]

    limit, plain = ratios("limit", "wall_s"), ratios("plain", "wall_s")
    return {
        "workers": workers,
        "rounds": rounds,
        "clips": ours[-1].counts["accepted"],
        "clips_per_s": ours[-1].counts["accepted"] / wall,
        "source_seconds_per_s": seconds / wall,
        "ratio_to_limit": median(limit),
        "ratio_to_limit_spread": [min(limit), max(limit)],
        "ratio_to_limit_cpu": median(ratios("limit", "cpu_s")),
        "ratio_to_plain_ray_data": median(plain) if plain else None,
        "ratio_to_plain_ray_data_cpu": median(ratios("plain", "cpu_s")) if plain else None,
        "bar": MIN_SPEED_RATIO,
        "wall_s": {name: median(each.wall_s for each in own) for name, own in measured.items()},
        "cpu_s": {name: median(each.cpu_s for each in own) for name, own in measured.items()},
        "peak_rss_bytes": max(each.peak_rss_bytes for each in ours),
        "share_by_step": {name: value / sum(spent.values()) for name, value in spent.items()},
    }


def format_table(result: PreprocessBenchRow) -> str:
    """Format the result as a text table."""
    low, high = result["ratio_to_limit_spread"]
    lines = [
        f"{result['clips']} clips, {result['workers']} worker(s), {result['rounds']} round(s): "
        f"{result['clips_per_s']:.2f} clips/s, {result['source_seconds_per_s']:.1f} seconds of source a second",
        f"speed over the limit (ffmpeg alone): {result['ratio_to_limit']:.2f} ({low:.2f}..{high:.2f}), "
        f"in CPU seconds {result['ratio_to_limit_cpu']:.2f}; threshold {result['bar']}",
    ]
    if result["ratio_to_plain_ray_data"] is not None:
        lines.append(
            f"speed over a plain Ray Data pipeline: {result['ratio_to_plain_ray_data']:.2f}, "
            f"in CPU seconds {result['ratio_to_plain_ray_data_cpu']:.2f}"
        )
    lines += [f"{name:8} {result['wall_s'][name]:8.2f} s  CPU {cpu:8.2f} s" for name, cpu in result["cpu_s"].items()]
    lines.append(f"peak memory of all processes {result['peak_rss_bytes'] / 1e6:.0f} MB, without the object store")
    shares = sorted(result["share_by_step"].items(), key=lambda item: -item[1])
    return "\n".join([*lines, "time by step: " + ", ".join(f"{name} {share:.1%}" for name, share in shares)])
