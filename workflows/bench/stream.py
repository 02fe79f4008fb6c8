"""Time streaming with a randomly initialized network (``mfctl bench stream``).

One run measures on one device, in this order: the rate of large matrix products, the first chunk, every chunk of a long
stream, late against early chunks (interleaved), and one chunk with against without the KV cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import Literal, NotRequired, TypedDict

import torch

from mfcore.errors import UserInputError
from mfcore.model.compile import EAGER
from mfcore.model.config import ModelConfig
from mfcore.model.cuda_graphs import apply_inference_optimizations, check_inference_optimizations
from mfcore.model.flops import ChunkWorkload, chunk_flops
from mfcore.model.transformer import AVTransformer
from mfcore.rollout import join_chunks
from mfcore.solver import DenoiserContext, denoise
from mfcore.timeline import Timeline
from mfcore.types import VIDEO, Condition, Stream, VelocityModel
from workflows.bench import roofline
from workflows.bench.random_network import random_network, random_network_bytes
from workflows.bench.stream_runner import (
    StreamRunner,
    latent_shapes,
    measure_decode_ms,
    noise_condition,
)
from workflows.config import presets
from workflows.config.latent_shapes import (
    CAPTION_TOKENS,
    FPS,
    VISIBLE_WORDS,
    LatentGeometry,
    default_size,
    geometry_for_preset,
)
from workflows.inference.precision import DTYPES, Precision, default_precision
from workflows.training.memory_check import available_memory, require_memory
from workflows.utils import timing

PAPER_FPS = {(192, 336): 30.0, (480, 768): 12.0, (704, 1280): 3.5}  # 7B + 7B parameters, 4 to 8 evaluations, one GPU
EARLY_CHUNKS = 20  # chunks until the window is full
CACHED_AT = 40  # chunks before the one that is generated with and without the cache
MAX_PREFIX_TOKENS = 16_000  # a dense mask of the prefix grows with the square


@dataclass(frozen=True, kw_only=True)
class StreamBenchPlan:
    """Resolved options of one benchmark run."""

    preset: str
    size: tuple[int, int]  # height, width in pixels, before padding
    steps: int
    chunks: int  # of the long stream
    rounds: int  # of interleaved measurements
    model: ModelConfig
    geometry: LatentGeometry
    device: torch.device
    dtype: torch.dtype
    compile: bool = False  # blocks
    graphs: bool = False  # passes over a chunk, as CUDA graphs

    @property
    def timeline(self) -> Timeline:
        """Return the timeline of the model's modalities."""
        return self.geometry.timeline(tuple(self.model.branches))


class SwitchSpeedup(TypedDict):
    """Speedup of --compile and --graphs."""

    switch_speedup: float | None  # None: neither is given
    switch_gap: NotRequired[float]  # largest difference of latents


class CacheSpeedup(TypedDict):
    """Speedup of the KV cache over recomputing the prefix."""

    cached_speedup: float | None  # None: not measured
    cached_speedup_prefix_once: NotRequired[float]
    cached_gap: NotRequired[float]  # largest difference of latents
    not_compared: NotRequired[str]  # reason


class StreamBenchRow(SwitchSpeedup, CacheSpeedup):
    """Result of ``mfctl bench stream``, as printed by ``--json``."""

    preset: str
    device: str
    precision: str
    threads: int
    size: list[int]  # height, width in pixels
    padded: list[int]
    steps: int
    compile: bool
    graphs: bool
    cache_passes: int
    chunks: int
    window_chunks: int
    tokens_per_chunk: int
    fps: float
    fps_ceiling: float  # at the rate of large matrix products
    paper_fps: float | None
    over_paper: float | None
    seconds_per_second: float
    first_chunk_s: float
    chunk_ms_p50: float
    chunk_ms_p99: float
    late_over_early: float
    memory_late_over_early: float
    peak_memory_bytes: int
    gflop_per_chunk: float
    flops_per_s: float
    matmul_flops_per_s: float
    ratio_to_matmul: float
    decode_ms: dict[str, float] | None  # by modality


@dataclass(frozen=True, kw_only=True)
class StreamTimings:
    """Seconds and rates of all measurements of a stream."""

    first: list[float]  # seconds of the first chunk
    chunks: list[float]  # seconds per chunk after the window is full
    ratios: list[float]  # late over early chunk
    rates: list[float]  # FLOPs per second of large matrix products
    memory_growth: float  # bytes at the end over bytes after EARLY_CHUNKS


def bench_stream(
    *,
    preset: str = "tiny",
    size: tuple[int, int] | None = None,
    steps: int = 4,
    chunks: int = 500,
    rounds: int = 15,
    device: Literal["cpu", "cuda"] | None = None,
    precision: Precision | None = None,
    compile: bool = False,
    graphs: bool = False,
    sets: Sequence[str] = (),
) -> StreamBenchRow:
    """Return what ``--json`` prints. Raises ValueError for bad options or too little memory."""
    plan = plan_stream_bench(
        preset=preset,
        size=size,
        steps=steps,
        chunks=chunks,
        rounds=rounds,
        device=device,
        precision=precision,
        sets=sets,
    )
    plan = replace(plan, compile=compile, graphs=graphs)
    check_feasible(plan)
    with torch.no_grad(), torch.autocast(plan.device.type, plan.dtype, enabled=plan.dtype != torch.float32):
        return measure(plan)


def plan_stream_bench(
    *,
    preset: str,
    size: tuple[int, int] | None,
    steps: int,
    chunks: int,
    rounds: int,
    device: Literal["cpu", "cuda"] | None,
    precision: Precision | None,
    sets: Sequence[str],
) -> StreamBenchPlan:
    """Resolve the options. Raises ValueError for counts that are too small or a missing GPU."""
    if min(steps, rounds) < 1 or chunks < EARLY_CHUNKS + 2:
        raise UserInputError(
            f"--steps and --rounds must be at least 1, --chunks at least {EARLY_CHUNKS + 2}, "
            f"got {steps}, {rounds}, {chunks}"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserInputError("--device cuda: torch finds no CUDA device here. Omit --device to measure the CPU")
    chosen_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = size or default_size(preset)
    geometry = geometry_for_preset(preset)
    config = presets.build_preset(preset, "joint", geometry.shapes(size))
    if sets:
        from workflows.config import serialization  # pydantic: not needed by `mfctl bench gpu`

        config = serialization.apply_overrides(config, serialization.parse_overrides(sets))
    return StreamBenchPlan(
        preset=preset,
        size=size,
        steps=steps,
        chunks=chunks,
        rounds=rounds,
        model=replace(config.model, attention="sdpa"),  # the reference backend
        geometry=geometry,
        device=chosen_device,
        dtype=DTYPES[precision or default_precision(chosen_device)],
    )


def memory_parts(plan: StreamBenchPlan) -> dict[str, int]:
    """Return the bytes of weights and of two KV caches (late and early stream)."""
    load = chunk_workload(plan)
    keys = plan.model.key_heads * plan.model.head_dim
    return {
        "weights": random_network_bytes(plan.model, plan.dtype),
        "keys and values": 2 * 2 * plan.model.layers * load.seen * keys * plan.dtype.itemsize,
    }


def check_feasible(plan: StreamBenchPlan) -> None:
    """Raise ValueError if a switch does not apply or weights and caches exceed memory."""
    check_inference_optimizations(plan.device, compile=plan.compile, graphs=plan.graphs)
    order = [name for name in reversed(presets.PRESETS) if name != plan.preset]
    smaller = order[list(reversed(presets.PRESETS)).index(plan.preset) :]
    options = [(f"--precision bf16 --preset {plan.preset}", replace(plan, dtype=torch.bfloat16))]
    for name in smaller:
        geometry = geometry_for_preset(name)
        model = presets.build_preset(name, "joint", geometry.shapes(plan.size)).model
        options.append((f"--preset {name}", replace(plan, preset=name, model=model, geometry=geometry)))
    require_memory(
        f"streaming preset {plan.preset} at {plan.size[0]}x{plan.size[1]}",
        memory_parts(plan),
        available_memory(plan.device),
        [(typed, lambda other=other: sum(memory_parts(other).values())) for typed, other in options],
    )


def chunk_workload(plan: StreamBenchPlan) -> ChunkWorkload:
    """Return the workload of a typical chunk; latent counts are averaged over chunks."""
    timeline, branches = plan.timeline, plan.model.branches
    tokens: dict[str, int] = {}
    sink = 0
    for m, branch in branches.items():
        mean_count = round(timeline.count(m, EARLY_CHUNKS, EARLY_CHUNKS) / EARLY_CHUNKS)
        tokens[m] = mean_count * branch.tokens
        sink += branch.tokens * (1 if m == VIDEO else timeline.count(m, 1))
    seen = sink + (plan.model.window_chunks + 1) * sum(tokens.values())
    return ChunkWorkload(tokens=tokens, seen=seen, caption=CAPTION_TOKENS, words=VISIBLE_WORDS)


def measure(plan: StreamBenchPlan) -> StreamBenchRow:
    """Run all measurements; return the result."""
    rates = [roofline.matmul_flops_per_s(plan.device, plan.dtype)]
    net = random_network(plan.model, plan.device, plan.dtype)
    cond = noise_condition(plan.model, plan.timeline, plan.device)
    model = apply_inference_optimizations(net, compile=plan.compile, graphs=plan.graphs)
    new_stream = lambda: StreamRunner(net, cond, plan.timeline, steps=plan.steps, model=model)
    new_stream().time_chunks(2)  # warms up
    first_s = [new_stream().time_chunks(1)[0] for _ in range(3)]
    late = new_stream()
    early = new_stream()
    times = late.time_chunks(EARLY_CHUNKS)
    bytes_early = roofline.allocated_bytes(plan.device)
    times += late.time_chunks(plan.chunks - EARLY_CHUNKS)
    growth = roofline.allocated_bytes(plan.device) / bytes_early
    early.time_chunks(EARLY_CHUNKS)
    turns = [(late.time_chunks(1)[0], early.time_chunks(1)[0]) for _ in range(plan.rounds)]
    del late, early
    rates.append(roofline.matmul_flops_per_s(plan.device, plan.dtype))
    timings = StreamTimings(
        first=first_s,
        chunks=times[EARLY_CHUNKS:],
        ratios=[a / b for a, b in turns],
        rates=rates,
        memory_growth=growth,
    )
    switches = measure_switch_speedup(plan, net, model, cond)
    return summarize(plan, timings, switches, measure_cache_speedup(plan, net, cond))


def measure_switch_speedup(
    plan: StreamBenchPlan, net: AVTransformer, model: VelocityModel, cond: Condition
) -> SwitchSpeedup:
    """Return the speedup of --compile and --graphs, and the largest difference of latents."""
    if not (plan.compile or plan.graphs):
        return {"switch_speedup": None}
    code = net.code
    ratios: list[float] = []
    gap = 0.0
    optimized = StreamRunner(net, cond, plan.timeline, steps=plan.steps, model=model)
    eager = StreamRunner(net, cond, plan.timeline, steps=plan.steps)
    for chunk in range(EARLY_CHUNKS + plan.rounds):
        optimized_s = optimized.time_chunks(1)[0]
        net.code = EAGER
        eager_s = eager.time_chunks(1)[0]
        net.code = code
        gap = max(gap, _max_difference(optimized.chunk, eager.chunk))
        if chunk >= EARLY_CHUNKS:
            ratios.append(eager_s / optimized_s)
    return {"switch_speedup": median(ratios), "switch_gap": gap}


def measure_cache_speedup(plan: StreamBenchPlan, net: AVTransformer, cond: Condition) -> CacheSpeedup:
    """Return the speedup of the KV cache over recomputing the prefix, at chunk ``CACHED_AT``."""
    prefix = sum(plan.timeline.count(m, CACHED_AT) * b.tokens for m, b in plan.model.branches.items())
    if prefix > MAX_PREFIX_TOKENS:
        return {
            "cached_speedup": None,
            "not_compared": f"cache speedup not measured: a prefix of {prefix} tokens is too long for a dense mask",
        }
    stream = StreamRunner(net, cond, plan.timeline, steps=plan.steps)
    before = [chunk.clean for chunk in stream.generate(CACHED_AT - 1)]
    snapshot = stream.context.snapshot()
    (last,) = [chunk.clean for chunk in stream.generate(1)]
    history = join_chunks([*before, last])
    start = next(stream.starts)
    empty = DenoiserContext(model=net, cond=cond).prefill()
    ratios: list[float] = []  # the prefix is run for every evaluation
    ratios_once: list[float] = []  # the prefix is run once for all evaluations of the chunk
    gap = 0.0
    for _ in range(max(3, plan.rounds // 3)):
        prefix_s, context = timing.time_call(plan.device, empty.append_history, history, None)
        uncached_s, (uncached, _) = timing.time_call(plan.device, denoise, context, start, stream.plan)
        forked = stream.fork(snapshot).append_history(last, None)  # with a cached caption, as a stream has
        denoise_s, (cached, _) = timing.time_call(plan.device, denoise, forked, start, stream.plan)
        write_s, _ = timing.time_call(plan.device, forked.append_history, cached, None)
        ratios.append((plan.steps * prefix_s + uncached_s) / (denoise_s + write_s))
        ratios_once.append((prefix_s + uncached_s) / (denoise_s + write_s))
        gap = max(gap, _max_difference(uncached, cached))
    return {
        "cached_speedup": median(ratios),
        "cached_speedup_prefix_once": median(ratios_once),
        "cached_gap": gap,
    }


def _max_difference(one: Mapping[str, Stream], other: Mapping[str, Stream]) -> float:
    return max(float((s.latents - other[m].latents).abs().max()) for m, s in one.items())


def summarize(
    plan: StreamBenchPlan, timings: StreamTimings, switches: SwitchSpeedup, cache: CacheSpeedup
) -> StreamBenchRow:
    """Return the result as printed by ``--json``: medians over the rounds."""
    chunk_s, rate = median(timings.chunks), median(timings.rates)
    frames = float(FPS) * plan.model.chunk_seconds
    flops = chunk_flops(plan.model, chunk_workload(plan), plan.steps)
    paper = PAPER_FPS.get(plan.size)
    return {
        "preset": plan.preset,
        "device": torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else "cpu",
        "precision": str(plan.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "size": list(plan.size),
        "padded": list(plan.geometry.padded(plan.size)),
        "steps": plan.steps,
        "compile": plan.compile,
        "graphs": plan.graphs,
        "cache_passes": 1,
        "chunks": plan.chunks,
        "window_chunks": plan.model.window_chunks,
        "tokens_per_chunk": sum(chunk_workload(plan).tokens.values()),
        "fps": frames / chunk_s,
        "fps_ceiling": frames * rate / flops,
        "paper_fps": paper,
        "over_paper": None if paper is None else frames / chunk_s / paper,
        "seconds_per_second": plan.model.chunk_seconds / chunk_s,
        "first_chunk_s": median(timings.first),
        "chunk_ms_p50": 1e3 * chunk_s,
        "chunk_ms_p99": 1e3 * quantiles(timings.chunks, n=100)[98],
        "late_over_early": median(timings.ratios),
        "memory_late_over_early": timings.memory_growth,
        "peak_memory_bytes": timing.peak_bytes(),
        "gflop_per_chunk": flops / 1e9,
        "flops_per_s": flops / chunk_s,
        "matmul_flops_per_s": rate,
        "ratio_to_matmul": flops / chunk_s / rate,
        **switches,
        **cache,
        "decode_ms": measure_decode_ms(plan.geometry, latent_shapes(plan.model), plan.timeline, rounds=plan.rounds),
    }
