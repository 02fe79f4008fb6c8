"""Facts of the machine, and the rates that every floor is computed with: products, copies, launches."""

import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
from torch import Tensor

from workflows.utils.case_worker import BenchCase, CaseSkippedError, WorkerOptions, missing_device
from workflows.utils.timing import time_call

CHECKED_TORCH = ((2, 11), (2, 13))  # oldest and newest checked release
PACKAGES = ("torch", "triton", "transformers", "numpy", "einops", "jaxtyping", "safetensors", "pyarrow", "typer")
COPY_BYTES = 2 << 30  # many times the L2 cache
SAMPLES = 20
LAUNCHES = 2000


def cases(options: WorkerOptions) -> Iterator[BenchCase]:
    """Yield the cases of the part."""
    yield BenchCase(name="machine", run=lambda: machine_facts(options.device))
    for edge in (8192, 4096, 2048):
        run = lambda edge=edge: product_rate(options, edge, torch.bfloat16)
        yield BenchCase(name=f"bf16 products {edge}", run=run)
    yield BenchCase(name="copy bandwidth", run=lambda: copy_bandwidth(options))
    yield BenchCase(name="launch time", run=lambda: launch_time(options))
    yield BenchCase(name="fp32 products 4096", run=lambda: product_rate(options, 4096, torch.float32))


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return versions and sizes of the machine, and the reason why the device cannot be used."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "cuda": torch.version.cuda or "none",
        "warning": version_warning(torch.__version__),
        "missing_device": missing_device(device),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if device.type == "cuda" and not found["missing_device"]:
        gpu: Any = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        found |= {
            "gpu": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "l2_bytes": getattr(gpu, "L2_cache_size", None),
            "memory_bytes": total,
            "free_memory_bytes": free,
        }
    return found


def version_warning(torch_version: str) -> str:
    """Return a warning for a release of torch that the command was not checked with, else ""."""
    oldest, newest = CHECKED_TORCH
    release = tuple(int(part) for part in torch_version.split("+")[0].split(".")[:2] if part.isdecimal())
    if oldest <= release <= newest:
        return ""
    checked = " to ".join(".".join(map(str, release)) for release in CHECKED_TORCH)
    return f"torch {torch_version}: checked with {checked}. Cases that need another release fail alone"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def product_rate(options: WorkerOptions, edge: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the FLOPs per second of square products of random matrices, checked against float64."""
    _require_device(options)
    if options.rehearsal:
        edge //= 16
    a, b = _random(options.device, (edge, edge), dtype), _random(options.device, (edge, edge), dtype)
    error = relative_error(torch.mm(a, b)[:256], torch.mm(a[:256].double(), b.double()))
    times = sample_seconds(options, lambda: torch.mm(a, b))
    return {"relative_error": error, "flops_per_s": 2 * edge**3 / median(times), **spread(times)}


def copy_bandwidth(options: WorkerOptions) -> dict[str, Any]:
    """Return the bytes per second of a copy on the device, read and written bytes counted."""
    _require_device(options)
    size = COPY_BYTES // (64 if options.rehearsal else 1)
    source = _random(options.device, (size // 4,), torch.float32)
    target = torch.empty_like(source)
    times = sample_seconds(options, lambda: target.copy_(source))
    assert torch.equal(source, target)
    return {"bytes_per_s": 2 * size / median(times), **spread(times)}


def launch_time(options: WorkerOptions) -> dict[str, Any]:
    """Return the seconds from one small kernel to the next, launched from Python."""
    _require_device(options)
    small = _random(options.device, (32,), torch.float32)

    def work() -> None:
        for _ in range(LAUNCHES):
            small.mul_(1.0)

    work()
    times = [time_call(options.device, work)[0] / LAUNCHES for _ in range(3 if options.rehearsal else 9)]
    return {"launch_s": median(times), **spread(times)}


def _require_device(options: WorkerOptions) -> None:
    if reason := missing_device(options.device):
        raise CaseSkippedError(reason)


def _random(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return standard normal values; products of zeros are faster."""
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference over the norm of the float64 reference."""
    return float((found.double() - reference).norm() / reference.norm())


def sample_seconds(options: WorkerOptions, work: Callable[[], object]) -> list[float]:
    """Return the seconds of repeated calls after a warm-up, by CUDA events on a GPU."""
    count = 3 if options.rehearsal else SAMPLES
    for _ in range(3):
        work()
    if options.device.type != "cuda":
        return [time_call(options.device, work)[0] for _ in range(count)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize(options.device)
    return [one.elapsed_time(other) / 1e3 for one, other in zip(events, events[1:], strict=False)]


def spread(times: list[float]) -> dict[str, float]:
    """Return the least and the most of some seconds."""
    return {"least_s": min(times), "most_s": max(times)}
