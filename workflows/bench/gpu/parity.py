"""Parity of the fast paths with the reference on one device: each check raises AssertionError if they differ.

The tests in ``tests/gpu`` run the same checks.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mfcore.model.attention import AttentionVisibility, additive_mask, attend
from mfcore.model.compile import EAGER, BlockKernels, check_compiler, compile_block
from mfcore.model.cuda_graphs import CUDAGraphModel
from mfcore.model.transformer import AVTransformer
from mfcore.rollout import join_chunks, rollout
from mfcore.solver import DenoiserContext, constant_levels, denoise
from mfcore.types import Stream
from workflows.bench.gpu.facts import relative_error
from workflows.bench.gpu.small_model import (
    SCHEDULE,
    chunk_starts,
    ring_context,
    small_batch,
    small_network,
    small_stream,
)
from workflows.utils.case_worker import BenchCase, WorkerOptions

EXACT = 1e-4  # same operators, other order
TF32 = 2e-3  # products in TF32 on one side
TF32_GRADIENT = 1e-2
CHUNKS = 14  # of a stream: the window fills, then the text changes
GRAPHS = "CUDA graphs need a GPU"
FLEX = "FlexAttention is used on a GPU"
COMPILED = "compiled blocks take minutes without a GPU"
Result = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Check:
    """Check of one device. ``needs_cuda``: why it has no meaning elsewhere."""

    run: Callable[[torch.device], Result]
    least_seconds: float = 1.0
    needs_cuda: str = ""


def cases(options: WorkerOptions) -> Iterator[BenchCase]:
    """Yield the cases of the part."""
    for name, check in CHECKS.items():
        yield BenchCase(
            name=name,
            run=partial(check.run, options.device),
            least_seconds=0.0 if options.rehearsal else check.least_seconds,
            needs_cuda=check.needs_cuda,
        )


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> Result:
    """Raise AssertionError if a tensor differs by more than the tolerance; return the largest difference."""
    assert found.keys() == wanted.keys()
    gap = 0.0
    for name, tensor in found.items():
        other = wanted[name].to(tensor.device)
        torch.testing.assert_close(
            tensor, other, atol=tolerance, rtol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
        gap = max(gap, float((tensor - other).abs().max()))
    return {"largest_difference": gap, "tolerance": tolerance}


def _latents(streams: Mapping[str, Stream]) -> dict[str, Tensor]:
    return {m: s.latents for m, s in streams.items()}


def check_attention(device: torch.device) -> Result:
    """Compare attention kernels, with and without mask, in bfloat16 and float32, with float64."""
    visible = noisy_visibility()
    worst: Result = {}
    for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 1e-2)):
        q, k, v = random_qkv(visible, groups=2)
        for name, mask in (("masked", additive_mask(visible.dense())), ("whole", None)):
            reference = attend(q.double(), k.double(), v.double(), mask)
            here = [x.to(device, dtype) for x in (q, k, v)]
            found = attend(here[0], here[1], here[2], None if mask is None else mask.to(device))
            key = f"{name}_{str(dtype).removeprefix('torch.')}"
            worst[key] = relative_error(found.cpu(), reference)
            assert worst[key] < bound, f"{key}: relative error {worst[key]:.1e}, bound {bound:g}"
    return worst


@torch.no_grad()
def check_cached_stream(device: torch.device) -> Result:
    """Compare the last chunk of a stream with the same chunk after a recomputed prefix."""
    data, net = small_batch(device, chunks=1), small_network(device)
    chunks = [c.clean for c in rollout(ring_context(net, data.cond), chunk_starts(data, CHUNKS), SCHEDULE)]
    context = DenoiserContext(model=net, cond=data.cond).append_history(join_chunks(chunks[:-1]), None)
    *_, start = chunk_starts(data, CHUNKS)
    uncached, _ = denoise(context, start, SCHEDULE)
    return assert_close(_latents(uncached), _latents(chunks[-1]), EXACT)


@torch.no_grad()
def check_parallel_pass(device: torch.device) -> Result:
    """Compare the velocities of all chunks in one pass with those of one chunk after another."""
    data, net = small_batch(device, chunks=6), small_network(device)
    levels = constant_levels(data.streams, dict.fromkeys(data.streams, 0.6))
    parallel = DenoiserContext(model=net, cond=data.cond).append_history(data.streams, None)
    whole = parallel.velocity(data.streams, levels, levels)
    context, parts = ring_context(net, data.cond), []
    for k in range(6):
        chunk = {m: s.chunks(k, k + 1) for m, s in data.streams.items()}
        level = constant_levels(chunk, dict.fromkeys(chunk, 0.6))
        parts.append(context.velocity(chunk, level, level))
        context = context.append_history(chunk, None).evict_before(k + 1)
    return assert_close({m: torch.cat([p[m] for p in parts], dim=1) for m in whole}, whole, EXACT)


@torch.no_grad()
def check_stream_on_cpu(device: torch.device) -> Result:
    """Compare a stream with the same stream on the CPU."""
    made = [
        _latents(small_stream(small_network(place), small_batch(place, chunks=1), chunks=8))
        for place in (torch.device("cpu"), device)
    ]
    return assert_close(made[1], made[0], 1e-3)


def check_gradients_on_cpu(device: torch.device) -> Result:
    """Compare the gradients of a training pass with those on the CPU."""
    made = [_gradients(small_network(place), rows=2, chunks=4) for place in (torch.device("cpu"), device)]
    return assert_close(made[1], made[0], 1e-2)


@torch.no_grad()
def check_bfloat16_stream(device: torch.device) -> Result:
    """Compare two chunks in bfloat16 with float32: the deviation is at most a tenth of the standard deviation."""
    data, net, made = small_batch(device, chunks=1), small_network(device), []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            made.append(_latents(small_stream(net, data, chunks=2)))
    gaps: Result = {}
    for m, exact in made[0].items():
        gaps[m] = float((exact - made[1][m]).square().mean().sqrt() / exact.std())
        assert gaps[m] < 0.1, f"{m}: deviation {gaps[m]:.2f} of the standard deviation, bound 0.1"
    return gaps


@torch.no_grad()
def check_graphs(device: torch.device, *, dtype: torch.dtype | None) -> Result:
    """Compare streams with CUDA graphs with the eager stream: every shape of the filling window is captured once."""
    data, net = small_batch(device, chunks=1), small_network(device, window=3)
    graphed: Any = CUDAGraphModel(net)
    result: Result = {}
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        plain = _latents(small_stream(net, data, chunks=CHUNKS))
        for _ in range(2):  # a freed ring must leave no graph behind
            result = assert_close(_latents(small_stream(graphed, data, chunks=CHUNKS)), plain, EXACT)
    assert 0 < graphed.num_captures < 2 * 3 * CHUNKS, f"{graphed.num_captures} captures"
    return result | {"captures": graphed.num_captures}


@torch.no_grad()
def check_graph_memory(device: torch.device) -> Result:
    """Check that memory stops growing while graphs replay."""
    data, net = small_batch(device, rows=1, chunks=1), small_network(device, window=3)
    graphed: Any = CUDAGraphModel(net)
    allocated: list[int] = []
    for _ in rollout(ring_context(graphed, data.cond), chunk_starts(data, 200), SCHEDULE):
        torch.cuda.synchronize(device)
        allocated.append(torch.cuda.memory_allocated(device))
    assert max(allocated[100:]) <= max(allocated[30:100]), "memory grows along the stream"
    return {"bytes": allocated[-1]}


def check_flex_attention(device: torch.device, *, groups: int) -> Result:
    """Compare FlexAttention and its gradients with the dense mask."""
    visible, results = noisy_visibility(chunks=20, tokens=33), []
    for backend in ("sdpa", "flex"):
        q, k, v = (x.to(device).requires_grad_() for x in random_qkv(visible, groups=groups))
        out = attend(q, k, v, visible.mask(backend, device))
        out.square().sum().backward()
        results.append({"out": out.detach()} | {n: x.grad for n, x in zip("qkv", (q, k, v), strict=True)})
    return assert_close(results[1], results[0], TF32)


def check_flex_gradients(device: torch.device) -> Result:
    """Compare the gradients of a training pass with FlexAttention with those with a dense mask."""
    made = [_gradients(small_network(device, attention=a), rows=2, chunks=6) for a in ("sdpa", "flex")]
    return assert_close(made[1], made[0], TF32_GRADIENT)


@torch.no_grad()
def check_compiled_stream(device: torch.device) -> Result:
    """Compare streams with compiled blocks, with and without CUDA graphs, with the eager stream."""
    check_compiler(device)
    data, net = small_batch(device, chunks=1), small_network(device, window=3)
    plain = _latents(small_stream(net, data, chunks=CHUNKS))
    net.code = compile_block()
    graphed: Any = CUDAGraphModel(net)
    gaps = [
        assert_close(_latents(small_stream(model, data, chunks=CHUNKS)), plain, TF32)["largest_difference"]
        for model in (net, graphed)
    ]
    return {"compiled": gaps[0], "compiled_graphs": gaps[1], "tolerance": TF32}


def check_compiled_gradients(device: torch.device) -> Result:
    """Compare the gradients of compiled blocks with those of eager blocks."""
    check_compiler(device)
    made = [_gradients(small_network(device), rows=2, chunks=4, code=code()) for code in (lambda: EAGER, compile_block)]
    return assert_close(made[1], made[0], TF32_GRADIENT)


def _gradients(net: AVTransformer, *, rows: int, chunks: int, code: BlockKernels = EAGER) -> dict[str, Tensor]:
    net.code = code
    data = small_batch(next(net.parameters()).device, rows=rows, chunks=chunks)
    levels = constant_levels(data.streams, dict.fromkeys(data.streams, 0.6))
    context = DenoiserContext(model=net, cond=data.cond).append_history(data.streams, None)
    velocities = context.velocity(data.streams, levels, levels)
    torch.stack([u.square().sum() for u in velocities.values()]).sum().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def noisy_visibility(chunks: int = 5, window: int = 2, tokens: int = 7) -> AttentionVisibility:
    """Return the visibility of noisy chunks of ``tokens`` tokens; keys are their history, then themselves."""
    chunk = torch.arange(chunks).repeat_interleave(tokens)
    track = torch.zeros_like(chunk)
    return AttentionVisibility(
        chunk=chunk,
        first=torch.cat([chunk + 1, chunk]),
        last=torch.cat([chunk + window, chunk]),
        track=track,
        key_track=torch.cat([track, track]),
    )


def random_qkv(visible: AttentionVisibility, dtype: torch.dtype = torch.float32, *, groups: int = 4) -> list[Tensor]:
    """Draw queries, keys and values for ``visible``: (2, 4, n, 16), keys and values with ``groups`` heads."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 4, len(visible.chunk), 16), *[(2, groups, len(visible.first), 16)] * 2]
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


CHECKS: dict[str, Check] = {
    "attention = float64": Check(run=check_attention),
    "cached = uncached": Check(run=check_cached_stream),
    "parallel = chunk by chunk": Check(run=check_parallel_pass),
    "stream on the device = on a CPU": Check(run=check_stream_on_cpu),
    "gradients on the device = on a CPU": Check(run=check_gradients_on_cpu),
    "bf16 stream near fp32": Check(run=check_bfloat16_stream),
    "graphs = eager, fp32": Check(run=partial(check_graphs, dtype=None), needs_cuda=GRAPHS),
    "graphs = eager, bf16": Check(run=partial(check_graphs, dtype=torch.bfloat16), needs_cuda=GRAPHS),
    "memory of graphs is constant": Check(run=check_graph_memory, needs_cuda=GRAPHS),
    "flex = dense, 4 groups": Check(run=partial(check_flex_attention, groups=4), least_seconds=10, needs_cuda=FLEX),
    "flex = dense, gradients of a pass": Check(run=check_flex_gradients, least_seconds=10, needs_cuda=FLEX),
    "compiled = eager, stream and graphs": Check(run=check_compiled_stream, least_seconds=15, needs_cuda=COMPILED),
    "compiled = eager, gradients": Check(run=check_compiled_gradients, least_seconds=15, needs_cuda=COMPILED),
    "flex = dense, 2 groups": Check(run=partial(check_flex_attention, groups=2), least_seconds=10, needs_cuda=FLEX),
}
"""Checks by name, by value."""
