"""Streaming on one GPU: frames per second, first chunk, latency and memory, next to the counted floor."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

from mfcore.model.compile import EAGER, check_compiler
from mfcore.model.cuda_graphs import apply_inference_optimizations
from mfcore.model.transformer import AVTransformer
from mfcore.types import VelocityModel
from workflows.bench import roofline
from workflows.bench.gpu.floors import Rates, chunk_work, count_launches, measured_rates
from workflows.bench.gpu.memory import require_device_memory
from workflows.bench.random_network import random_network, random_network_bytes
from workflows.bench.stream import StreamBenchPlan, chunk_workload, memory_parts, plan_stream_bench
from workflows.bench.stream_runner import StreamRunner, noise_condition
from workflows.config.latent_shapes import FPS, default_size
from workflows.utils.case_worker import BenchCase, WorkerOptions

STEPS = 4  # evaluations per chunk, and the pass that writes the cache
SHORT = 40  # timed chunks of a usual case
LONG = 480  # timed chunks of a long stream: chunk 500 against chunk 20
EARLY = 20  # chunks before the timed ones of a long stream
ROUNDS = 15  # of late against early chunks
SIZES = ((192, 336), (480, 768), (704, 1280))
ROWS = (2, 4, 8)  # streams in one pass
COMPILE_SECONDS = 30.0
GRAPHS, COMPILE = "CUDA graphs need a GPU", "compiled blocks take minutes without a GPU"


@dataclass(frozen=True, kw_only=True)
class StreamCase:
    """One setting to measure."""

    preset: str
    size: tuple[int, int]  # height, width in pixels
    compile: bool = False
    graphs: bool = False
    rows: int = 1  # streams in one pass
    chunks: int = SHORT
    least_seconds: float = 8.0

    @property
    def name(self) -> str:
        """Return the unique name, e.g. ``full 192x336 compile-graphs``."""
        switches = [name for name in ("compile", "graphs") if getattr(self, name)]
        rows = f" {self.rows} streams" if self.rows > 1 else ""
        return f"{self.preset} {self.size[0]}x{self.size[1]} {'-'.join(switches) or 'eager'}{rows}"


def stream_cases(preset: str | None) -> list[StreamCase]:
    """Return all settings by value; with ``preset`` those of one network at its usual size."""
    if preset:
        small = partial(StreamCase, preset=preset, size=default_size(preset))
        return [small(), small(graphs=True), small(compile=True), *(small(rows=rows) for rows in ROWS)]
    full = partial(StreamCase, preset="full", graphs=True)
    base = partial(StreamCase, preset="base", graphs=True)
    smallest = SIZES[0]
    return [
        full(size=smallest, chunks=LONG, least_seconds=40.0),
        full(size=smallest, graphs=False),
        full(size=SIZES[1], least_seconds=15.0),
        full(size=SIZES[2], least_seconds=25.0),
        *(full(size=smallest, rows=rows) for rows in ROWS),
        base(size=smallest),
        base(size=smallest, graphs=False),
        full(size=smallest, compile=True, least_seconds=COMPILE_SECONDS),
        full(size=smallest, compile=True, graphs=False, least_seconds=COMPILE_SECONDS),
        base(size=SIZES[1], least_seconds=15.0),
        base(size=SIZES[2], least_seconds=25.0),
        *(full(size=size, graphs=False, least_seconds=20.0) for size in SIZES[1:]),
        base(size=smallest, compile=True, least_seconds=COMPILE_SECONDS),
        *(base(size=smallest, rows=rows) for rows in ROWS),
    ]


def cases(options: WorkerOptions) -> Iterator[BenchCase]:
    """Yield the cases of the part. They share the network of the previous case if its setting is equal."""
    bench = StreamBench(options)
    for case in stream_cases(options.preset):
        yield BenchCase(
            name=case.name,
            run=partial(bench.measure, case),
            least_seconds=0.0 if options.rehearsal else case.least_seconds,
            needs_cuda=GRAPHS if case.graphs else COMPILE if case.compile else "",
        )


@dataclass(kw_only=True)
class StreamTimes:
    """Seconds of the chunks of a stream."""

    first: list[float] = field(default_factory=list[float])
    chunks: list[float] = field(default_factory=list[float])  # after the window is full
    late_over_early: list[float] = field(default_factory=list[float])
    memory_growth: float | None = None  # bytes after the last chunk over those after chunk ``EARLY``


class StreamBench:
    """Measurements that share a network and the rates of the device."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._network: tuple[tuple[str, tuple[int, int]], AVTransformer] | None = None
        self._rates: Rates | None = None

    def measure(self, case: StreamCase) -> dict[str, Any]:
        """Return the numbers of one setting."""
        device = self._options.device
        plan = plan_stream_bench(
            preset=case.preset,
            size=case.size,
            steps=STEPS,
            chunks=SHORT,
            rounds=1,
            device="cuda" if device.type == "cuda" else "cpu",
            precision=None,
            sets=(),
        )
        if case.compile:
            check_compiler(device)
        with torch.no_grad(), torch.autocast(device.type, plan.dtype, enabled=plan.dtype != torch.float32):
            self._rates = self._rates or measured_rates(device, plan.dtype)
            net = self._load_network(plan, case)
            model = apply_inference_optimizations(net, compile=case.compile, graphs=case.graphs)
            times = self._time_stream(case, plan, net, model)
            peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else roofline.live_tensor_bytes()
            launches = count_chunk_launches(plan, net, device)
        work = chunk_work(
            plan.model,
            chunk_workload(plan),
            steps=STEPS,
            element=plan.dtype.itemsize,
            rows=case.rows,
            launches=launches,
        )
        return summarize(case, plan, times, floor=work.floor(self._rates)) | {
            "launches": launches,
            "tflop": work.flops / 1e12,
            "gigabytes": work.bytes / 1e9,
            "peak_memory_bytes": peak,
        }

    def _load_network(self, plan: StreamBenchPlan, case: StreamCase) -> AVTransformer:
        """Return the network of the last case if it is equal, else a new one. Raises CaseSkippedError."""
        key = (case.preset, case.size)
        if self._network is None or self._network[0] != key:
            self._network = None
            needed = random_network_bytes(plan.model, plan.dtype)
            cache = memory_parts(plan)["keys and values"] * case.rows
            require_device_memory(self._options.device, needed + cache)
            self._network = key, random_network(plan.model, self._options.device, plan.dtype)
        return self._network[1]

    def _time_stream(
        self, case: StreamCase, plan: StreamBenchPlan, net: AVTransformer, model: VelocityModel
    ) -> StreamTimes:
        device = self._options.device
        cond = noise_condition(plan.model, plan.timeline, device, rows=case.rows)
        new_stream = lambda: StreamRunner(net, cond, plan.timeline, steps=STEPS, model=model)
        new_stream().time_chunks(2)  # compiles, and loads kernels
        times = StreamTimes(first=[new_stream().time_chunks(1)[0] for _ in range(1 if self._options.rehearsal else 3)])
        stream = new_stream()
        until_full = plan.model.window_chunks + 1
        stream.time_chunks(EARLY if case.chunks == LONG else until_full)
        early_bytes = roofline.allocated_bytes(device)
        wanted = 3 if self._options.rehearsal else case.chunks
        half = time.monotonic() + max(5.0, 0.5 * self._options.seconds_left)
        while len(times.chunks) < wanted and (len(times.chunks) < 5 or time.monotonic() < half):
            times.chunks += stream.time_chunks(1)
        if case.chunks == LONG:
            times.memory_growth = roofline.allocated_bytes(device) / early_bytes
            early = new_stream()
            early.time_chunks(EARLY)
            for _ in range(ROUNDS):
                times.late_over_early.append(stream.time_chunks(1)[0] / early.time_chunks(1)[0])
        return times


@torch.no_grad()
def count_chunk_launches(plan: StreamBenchPlan, net: AVTransformer, device: torch.device) -> int:
    """Return the kernels of one chunk with a filling window, launched by the eager network."""
    code, net.code = net.code, EAGER
    cond = noise_condition(plan.model, plan.timeline, device)
    stream = StreamRunner(net, cond, plan.timeline, steps=plan.steps)
    list(stream.generate(2))
    try:
        return count_launches(device, lambda: list(stream.generate(1)))
    finally:
        net.code = code


def summarize(
    case: StreamCase, plan: StreamBenchPlan, times: StreamTimes, *, floor: Mapping[str, float]
) -> dict[str, Any]:
    """Return the numbers of one case: times, and the share of the floor that is reached."""
    chunk_s = median(times.chunks)
    frames = float(FPS) * plan.model.chunk_seconds * case.rows
    found: dict[str, Any] = {
        "fps": frames / chunk_s,
        "fps_ceiling": frames / floor["floor_s"],
        "share_of_ceiling": floor["floor_s"] / chunk_s,
        "first_chunk_s": median(times.first),
        "chunk_ms_p50": 1e3 * chunk_s,
        "chunk_ms_p99": 1e3 * (quantiles(times.chunks, n=100)[98] if len(times.chunks) > 1 else chunk_s),
        "chunks": len(times.chunks),
        "floor": dict(floor),
    }
    if times.late_over_early:
        found |= {
            "late_over_early": median(times.late_over_early),
            "memory_late_over_early": times.memory_growth,
        }
    return found
