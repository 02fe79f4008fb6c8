"""CUDA graphs for streaming: each kind of pass over a chunk is captured once per shape and then replayed.

A pass over a chunk is about two thousand kernels of a few microseconds. Launching each from Python takes longer than
running it. A graph reads and writes fixed tensors: inputs of a call are copied into them, and the keys and values of
the ring cache never move.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast
from weakref import ref

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.errors import UserInputError
from mfcore.model.compile import EAGER, check_compiler, compile_block
from mfcore.model.kv_cache import LayeredKVCache
from mfcore.model.prepared_pass import PreparedPass
from mfcore.model.ring_cache import RingKVCache
from mfcore.model.transformer import AVTransformer
from mfcore.types import Condition, NoiseLevels, Streams, VelocityModel

Capture = Callable[[Callable[[], Any]], tuple[Any, Callable[[], object]]]
"""Run some work. Returns its result, and a function that runs it again into the same tensors."""

MAX_GRAPHS = 32  # a filling window needs two or three per chunk; the least recently used one is dropped first
WARM_UPS = 2


def capture_cuda_graph(work: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
    """Capture ``work`` as a CUDA graph. It must not copy from the CPU or synchronize."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries create their handles and choose their kernels
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()
    graph.replay()  # capture alone runs no kernel
    return outputs, graph.replay


@dataclass
class _Graph:
    """A captured pass and the tensors that it reads and writes. Mutable: ``prepared`` changes with the chunk."""

    call_inputs: dict[str, Tensor]  # differ between the calls for a chunk
    pass_inputs: dict[str, Tensor]  # differ between chunks
    prepared: PreparedPass  # last one that was copied to pass_inputs
    ring: "ref[RingKVCache]"  # the ring that is written
    outputs: Any
    replay: Callable[[], object]


def check_inference_optimizations(device: torch.device, *, compile: bool, graphs: bool) -> None:
    """Raise ValueError if an optimization has no effect on ``device`` or lacks a requirement."""
    if graphs and device.type != "cuda":
        raise UserInputError(f"--graphs records CUDA graphs, and this stream runs on the {device.type}: leave it out")
    if compile:
        check_compiler(device)


def apply_inference_optimizations(net: AVTransformer, *, compile: bool, graphs: bool) -> VelocityModel:
    """Return a model that streams like ``net``, with compiled blocks and CUDA graphs as requested."""
    net.code = compile_block() if compile else EAGER
    return cast(VelocityModel, CUDAGraphModel(net) if graphs else net)


class CUDAGraphModel:
    """VelocityModel that runs ``net`` with CUDA graphs on a ring cache. Calls without a ring go to ``net`` itself."""

    def __init__(self, net: AVTransformer, capture: Capture = capture_cuda_graph, max_graphs: int = MAX_GRAPHS) -> None:
        self.net = net
        self.num_captures = 0
        self._capture_function = capture
        self._max_graphs = max_graphs
        self._graphs: dict[Any, _Graph] = {}

    def __call__(
        self,
        x: Streams,
        t: NoiseLevels,
        r: NoiseLevels,
        cond: Condition,
        *,
        cache: LayeredKVCache | RingKVCache | None = None,
        store: bool = False,
        trust: Float[Tensor, " B"] | None = None,
    ) -> tuple[dict[str, Tensor], LayeredKVCache | RingKVCache | None]:
        """Return what ``net`` returns for the same arguments."""
        if not isinstance(cache, RingKVCache) or not x:
            return self.net(x, t, r, cond, cache=cache, store=store, trust=trust)
        prepared, _ = self.net.prepare(x, cond, cache, store=store)
        call = {"x": {m: s.latents for m, s in x.items()}, "t": t, "r": r, "trust": trust if store else None}
        outputs = self._run(x, call, prepared=prepared, cond=cond, ring=cache, store=store)
        if store:
            return {}, cache.commit_chunk(prepared.positions)
        return {m: velocity.clone() for m, velocity in outputs.items()}, cache

    def _run(
        self,
        x: Streams,
        call: dict[str, Any],
        *,
        prepared: PreparedPass,
        cond: Condition,
        ring: RingKVCache,
        store: bool,
    ) -> Any:
        """Replay the graph of this kind of pass, or capture it on the first call."""
        call_inputs = dict(_tensors_by_path(call))
        pass_inputs = dict(_tensors_by_path(_device_inputs(prepared, cond)))
        device = next(iter(call_inputs.values())).device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        shapes = tuple((name, part.shape, part.dtype) for name, part in (*call_inputs.items(), *pass_inputs.items()))
        key = (store, id(ring), ring.used_slots, autocast, shapes)
        graph = self._graphs.pop(key, None)
        if graph is None or graph.ring() is not ring:
            graph = self._capture(x, call, prepared=prepared, cond=cond, ring=ring, store=store)
        else:
            _copy_tensors(graph.call_inputs, call_inputs)
            if graph.prepared is not prepared:
                _copy_tensors(graph.pass_inputs, pass_inputs)
                graph.prepared = prepared
            graph.replay()
        self._graphs[key] = graph  # least recently used first
        for old in list(self._graphs)[: -self._max_graphs]:
            del self._graphs[old]
        return graph.outputs

    def _capture(
        self,
        x: Streams,
        call: dict[str, Any],
        *,
        prepared: PreparedPass,
        cond: Condition,
        ring: RingKVCache,
        store: bool,
    ) -> _Graph:
        call_inputs = {name: part.clone() for name, part in _tensors_by_path(call)}
        pass_inputs = {name: part.clone() for name, part in _tensors_by_path(_device_inputs(prepared, cond))}
        static_call = _replace_tensors(call, call_inputs)
        static_pass = _replace_tensors(_device_inputs(prepared, cond), pass_inputs)
        first_frame = static_pass.pop("first_frame")
        static = replace(prepared, **static_pass)
        streams = {m: s.with_latents(static_call["x"][m]) for m, s in x.items()}
        t, r = static_call["t"], static_call["r"]

        def work() -> Any:
            if not store:
                return self.net.predict_velocity(streams, t, r, first_frame=first_frame, prepared=static, cache=ring)
            layers = self.net.write_cache(streams, t, r, trust=static_call["trust"], prepared=static, cache=ring)
            ring.write_layer(len(layers) - 1, layers[-1])
            return layers

        device = next(iter(call_inputs.values())).device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        # a replay would read a weight copy that autocast has already freed
        with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
            outputs, replay = self._capture_function(work)
        self.num_captures += 1
        self._graphs = {k: graph for k, graph in self._graphs.items() if graph.ring() is not None}
        return _Graph(call_inputs, pass_inputs, prepared, ref(ring), outputs, replay)


def _device_inputs(prepared: PreparedPass, cond: Condition) -> dict[str, Any]:
    """Return the device tensors of a pass, besides those of the call. Clocks and positions stay on the CPU."""
    return {
        "chunk_index": prepared.chunk_index,
        "level_index": prepared.level_index,
        "rank_level_index": prepared.rank_level_index,
        "phases": prepared.phases,
        "text": prepared.text,
        "text_keys": prepared.text_keys,
        "rotation": prepared.rotation,
        "mask": prepared.mask,
        "coupling": prepared.coupling,
        "first_frame": cond.first_frame,
    }


def _copy_tensors(to: Mapping[str, Tensor], origin: Mapping[str, Tensor]) -> None:
    cast(Any, torch)._foreach_copy_(list(to.values()), [origin[name] for name in to])


def _tensors_by_path(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dictionaries, lists and dataclasses, with their paths."""
    if isinstance(value, Tensor):
        yield path, value
        return
    for key, part in _children(value):
        yield from _tensors_by_path(part, f"{path}/{key}")


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from cast(dict[str, Any], value).items()
    elif isinstance(value, list | tuple):
        yield from ((str(i), part) for i, part in enumerate(cast(list[Any], value)))
    elif is_dataclass(value):
        yield from ((f.name, getattr(value, f.name)) for f in fields(value))


def _replace_tensors(value: Any, tensors: Mapping[str, Tensor], path: str = "") -> Any:
    """Return the same nested value with the tensors at each path replaced."""
    if isinstance(value, Tensor):
        return tensors[path]
    parts = {key: _replace_tensors(part, tensors, f"{path}/{key}") for key, part in _children(value)}
    if isinstance(value, dict):
        return parts
    if isinstance(value, list | tuple):
        return list(parts.values())
    return replace(cast(Any, value), **parts) if is_dataclass(value) else value
