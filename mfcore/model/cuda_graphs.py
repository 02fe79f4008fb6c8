"""CUDA graphs for streaming: what a chunk asks of the network is recorded once for each shape and then played.

A pass over a chunk is some two thousand kernels of a few microseconds; starting each from Python takes longer than
running it. Played, they start themselves. A recording reads and writes fixed places of memory: what differs from call
to call is copied to them, and the ring's keys and values stay where they are anyway.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast
from weakref import ref

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.model.compile import EAGER, check_compiler, compile_block
from mfcore.model.kv_cache import LayeredKVCache
from mfcore.model.ring_cache import RingKVCache
from mfcore.model.transformer import AVTransformer, PreparedPass
from mfcore.types import Condition, NoiseLevels, Streams, VelocityModel

Record = Callable[[Callable[[], Any]], tuple[Any, Callable[[], object]]]
"""Runs some work; its result, and what runs it again in the same places of memory, the result included."""

MAX_GRAPHS = 32  # a window that fills needs two or three for every chunk of it; the longest unused one goes first
WARM_UPS = 2


def capture_cuda_graph(work: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
    """The recorder for CUDA. ``work`` must not copy from the CPU, nor wait for a number."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries make their handles and choose their kernels
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work()
    graph.replay()  # recording runs nothing
    return made, graph.replay


@dataclass
class _Graph:
    """A recording and the places that it reads and writes."""

    calls: dict[str, Tensor]  # what differs between the calls for a chunk
    scenes: dict[str, Tensor]  # what differs between chunks
    scene: PreparedPass  # that was copied last
    ring: "ref[RingKVCache]"  # whose places are written
    made: Any
    play: Callable[[], object]


def check_inference_optimizations(device: torch.device, *, compile: bool, graphs: bool) -> None:
    """ValueError where a switch has no use, or not what it needs."""
    if graphs and device.type != "cuda":
        raise ValueError(f"--graphs records CUDA graphs, and this stream runs on the {device.type}: leave it out")
    if compile:
        check_compiler(device)


def apply_inference_optimizations(net: AVTransformer, *, compile: bool, graphs: bool) -> VelocityModel:
    """What streams as ``net`` does: its blocks compiled or not, its passes recorded or not."""
    net.code = compile_block() if compile else EAGER
    return cast(VelocityModel, CUDAGraphModel(net) if graphs else net)


class CUDAGraphModel:
    """``net`` for streaming: the same answers. A VelocityModel; calls without a ring go to ``net`` itself."""

    def __init__(self, net: AVTransformer, record: Record = capture_cuda_graph, most: int = MAX_GRAPHS) -> None:
        self.net, self._record, self._most = net, record, most
        self._graphs: dict[Any, _Graph] = {}
        self.recorded = 0  # how often

    def __call__(
        self,
        x: Streams,
        t: NoiseLevels,
        r: NoiseLevels,
        cond: Condition,
        memory: LayeredKVCache | RingKVCache | None = None,
        *,
        store: bool = False,
        trust: Float[Tensor, " B"] | None = None,
    ) -> tuple[dict[str, Tensor], LayeredKVCache | RingKVCache | None]:
        if not x or not isinstance(memory, RingKVCache):
            return self.net(x, t, r, cond, memory, store=store, trust=trust)
        scene, ring = self.net.prepare(x, cond, memory, store=store)[0], memory
        call = {"x": {m: s.latents for m, s in x.items()}, "t": t, "r": r, "trust": trust if store else None}
        made = self._played(x, call, scene, cond, ring, store=store)
        if store:
            return {}, ring.commit_chunk(scene.at)
        return {m: velocity.clone() for m, velocity in made.items()}, ring

    def _played(
        self, x: Streams, call: dict[str, Any], scene: PreparedPass, cond: Condition, ring: RingKVCache, *, store: bool
    ) -> Any:
        calls, scenes = dict(_leaves(call)), dict(_leaves(_on_device(scene, cond)))
        kind = next(iter(calls.values())).device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        shapes = tuple((name, part.shape, part.dtype) for name, part in (*calls.items(), *scenes.items()))
        key = (store, id(ring), ring.used_slots, autocast, shapes)
        graph = self._graphs.pop(key, None)
        if graph is None or graph.ring() is not ring:
            graph = self._recorded(x, call, scene, cond, ring, store=store)
        else:
            _copy(graph.calls, calls)
            if graph.scene is not scene:
                _copy(graph.scenes, scenes)
                graph.scene = scene
            graph.play()
        self._graphs[key] = graph  # the last one used is the last to go
        for old in list(self._graphs)[: -self._most]:
            del self._graphs[old]
        return graph.made

    def _recorded(
        self, x: Streams, call: dict[str, Any], scene: PreparedPass, cond: Condition, ring: RingKVCache, *, store: bool
    ) -> _Graph:
        calls = {name: part.clone() for name, part in _leaves(call)}
        scenes = {name: part.clone() for name, part in _leaves(_on_device(scene, cond))}
        own = _with_leaves(call, calls)
        there = _with_leaves(_on_device(scene, cond), scenes)
        first = there.pop("first")
        still = replace(scene, **there)
        streams = {m: s.with_latents(own["x"][m]) for m, s in x.items()}

        def work() -> Any:
            if not store:
                return self.net.predict_velocity(streams, own["t"], own["r"], first, still, ring)
            layers = self.net.write_cache(streams, own["t"], own["r"], own["trust"], still, ring)
            ring.write_layer(len(layers) - 1, layers[-1])
            return layers

        kind = next(iter(calls.values())).device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        # a cached copy of a weight would be gone when the recording is played
        with torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False):
            made, play = self._record(work)
        self.recorded += 1
        self._graphs = {k: graph for k, graph in self._graphs.items() if graph.ring() is not None}
        return _Graph(calls, scenes, scene, ref(ring), made, play)


def _on_device(scene: PreparedPass, cond: Condition) -> dict[str, Any]:
    """What a pass reads on its device besides the call's own tensors; clocks and positions stay on the CPU."""
    names = ("local", "runs", "own_runs", "phases", "text", "heard", "turn", "mask")
    return {name: getattr(scene, name) for name in names} | {"first": cond.first_frame}


def _copy(to: Mapping[str, Tensor], origin: Mapping[str, Tensor]) -> None:
    cast(Any, torch)._foreach_copy_(list(to.values()), [origin[name] for name in to])


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dictionaries, lists and dataclasses, by their path."""
    if isinstance(value, Tensor):
        yield name, value
        return
    for key, part in _parts(value):
        yield from _leaves(part, f"{name}/{key}")


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from cast(dict[str, Any], value).items()
    elif isinstance(value, list | tuple):
        yield from ((str(i), part) for i, part in enumerate(cast(list[Any], value)))
    elif is_dataclass(value):
        yield from ((f.name, getattr(value, f.name)) for f in fields(value))


def _with_leaves(value: Any, leaves: Mapping[str, Tensor], name: str = "") -> Any:
    """The same nest with other tensors."""
    if isinstance(value, Tensor):
        return leaves[name]
    parts = {key: _with_leaves(part, leaves, f"{name}/{key}") for key, part in _parts(value)}
    if isinstance(value, dict):
        return parts
    if isinstance(value, list | tuple):
        return list(parts.values())
    return replace(cast(Any, value), **parts) if is_dataclass(value) else value
