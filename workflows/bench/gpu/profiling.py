"""Profiles of one streamed chunk and of one training step: kernels by time, launch gaps, kinds of kernels."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mfcore.model.cuda_graphs import apply_inference_optimizations
from workflows.bench.gpu.memory import require_device_memory
from workflows.bench.gpu.training import TOKENS, TrainCase, build_step, case_config, state_bytes
from workflows.bench.random_network import random_network, random_network_bytes
from workflows.bench.stream import plan_stream_bench
from workflows.bench.stream_runner import StreamRunner, noise_condition
from workflows.bench.variants import synthetic_batches, to_device
from workflows.config.latent_shapes import default_size
from workflows.utils.case_worker import BenchCase, WorkerOptions
from workflows.utils.timing import time_call

TOP = 15  # kernels of a table
MAX_NAME = 90  # characters of a kernel
PRODUCTS = ("gemm", "gemv", "cutlass", "cublas", "xmma", "nvjet", "wgmma", "::mm", "addmm", "bmm", "matmul")
ATTENTION = ("flash", "fmha", "attention", "flex", "sdpa", "cudnn_generated")
COPIES = ("memcpy", "memset", "copy")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of a profile, in microseconds."""

    name: str
    start: float
    duration: float


def cases(options: WorkerOptions) -> Iterator[BenchCase]:
    """Yield the cases of the part."""
    stream, train = (options.preset or usual for usual in ("full", "base"))
    least = 0.0 if options.rehearsal else 8.0
    for graphs in (False, True):
        yield BenchCase(
            name=f"{stream} chunk {'graphs' if graphs else 'eager'}",
            run=partial(profile_chunk, options, stream, graphs=graphs),
            least_seconds=least,
            needs_cuda="CUDA graphs need a GPU" if graphs else "",
        )
    yield BenchCase(name=f"{train} joint step", run=partial(profile_step, options, train), least_seconds=least)


def profile_chunk(options: WorkerOptions, preset: str, *, graphs: bool) -> dict[str, Any]:
    """Return the profile of one chunk with a full window."""
    device = options.device
    plan = plan_stream_bench(
        preset=preset,
        size=default_size(preset),
        steps=4,
        chunks=40,
        rounds=1,
        device="cuda" if device.type == "cuda" else "cpu",
        precision=None,
        sets=(),
    )
    require_device_memory(device, random_network_bytes(plan.model, plan.dtype))
    with torch.no_grad(), torch.autocast(device.type, plan.dtype, enabled=plan.dtype != torch.float32):
        net = random_network(plan.model, device, plan.dtype)
        model = apply_inference_optimizations(net, compile=False, graphs=graphs)
        cond = noise_condition(plan.model, plan.timeline, device)
        stream = StreamRunner(net, cond, plan.timeline, steps=plan.steps, model=model)
        stream.time_chunks(2 if options.rehearsal else plan.model.window_chunks + 2)
        return profile_work(device, lambda: stream.time_chunks(1))


def profile_step(options: WorkerOptions, preset: str) -> dict[str, Any]:
    """Return the profile of one step of the joint stage."""
    case = TrainCase(preset=preset)
    config = case_config(case, tokens=1 if options.rehearsal else TOKENS)
    require_device_memory(options.device, state_bytes(case, config))
    student = random_network(config.model, options.device, torch.float32).requires_grad_(True).train()
    batch = to_device(synthetic_batches(config).micro_batches(0))
    step = build_step(case, config, student, batch)
    step(0)
    return profile_work(options.device, lambda: step(1))


def profile_work(device: torch.device, work: Callable[[], object]) -> dict[str, Any]:
    """Return the kernels of ``work`` by time, the time between them, and their kinds. On a CPU, its operators."""
    on_cuda = device.type == "cuda"
    unprofiled_s, _ = time_call(device, work)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as found:
        time_call(device, work)
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    events: Any = found.events()
    kernels: list[Kernel] = []
    for event in events:
        if event.device_type != wanted or getattr(event, "is_user_annotation", False):
            continue
        duration = event.time_range.elapsed_us() if on_cuda else event.self_cpu_time_total
        kernels.append(Kernel(name=event.name, start=event.time_range.start, duration=duration))
    return {"unprofiled_s": unprofiled_s, **summarize(kernels)}


def summarize(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """Return the kernels by time, the share of gaps between them, and the shares of products, attention and copies.

    Products and attention are bound by operations at large sizes, the others by bytes.
    """
    busy = sum(kernel.duration for kernel in kernels)
    by_name: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        by_name[kernel.name].append(kernel.duration)
        kinds[kind_of(kernel.name)] += kernel.duration
    rows = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:TOP]
    gaps = list(launch_gaps(kernels))
    return {
        "kernels": len(kernels),
        "kernel_s": busy / 1e6,
        "gap_s": sum(gaps) / 1e6,
        "gap_share": sum(gaps) / (busy + sum(gaps)) if kernels else 0.0,
        "share_by_kind": {kind: seconds / busy for kind, seconds in sorted(kinds.items())} if busy else {},
        "top": [
            {"ms": sum(t) / 1e3, "share": sum(t) / busy if busy else 0.0, "calls": len(t), "name": name[:MAX_NAME]}
            for name, t in rows
        ],
    }


def launch_gaps(kernels: Sequence[Kernel]) -> Iterator[float]:
    """Yield the microseconds between the end of all earlier kernels and the start of the next one."""
    end: float | None = None
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if end is not None and kernel.start > end:
            yield kernel.start - end
        end = max(end or 0.0, kernel.start + kernel.duration)


def kind_of(name: str) -> str:
    """Return the kind of a kernel by its name."""
    lower = name.lower()
    for kind, words in (("attention", ATTENTION), ("products", PRODUCTS), ("copies", COPIES)):
        if any(word in lower for word in words):
            return kind
    return "elementwise and reductions"
