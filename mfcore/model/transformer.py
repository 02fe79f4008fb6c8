"""The network: branches coupled in self-attention (METHOD 4). A uni-modal model has one branch, same code."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mfcore.model.attention import attend, dense_or_none, history_mask, same_mask
from mfcore.model.block import TextTokens
from mfcore.model.branch import Branch
from mfcore.model.cache import KeyValue, LayeredMemory, Positions
from mfcore.model.config import ModelConfig
from mfcore.model.init import initialise
from mfcore.model.rope import angles, rotate
from mfcore.types import AUDIO, MODALITIES, VIDEO, Condition, Levels, Stream, Streams

SINK = -1  # chunk number of the sink


@dataclass(frozen=True)
class _Pass:
    """What every layer of one pass needs besides the tokens."""

    at: Positions
    sizes: list[int]  # tokens per branch
    local: dict[str, Tensor]  # chunk of each token, counted from the first chunk of the pass
    shared: dict[str, Tensor]
    text: dict[str, TextTokens]
    angle: Tensor
    mask: Tensor | None


class AVTransformer(nn.Module):
    """A causal velocity model of paired audio and video; see ``mfcore.types.VelocityModel`` for what a call means."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        names = [m for m in MODALITIES if m in config.branches]
        self.branches = nn.ModuleDict({m: Branch(config, config.branches[m]) for m in names})
        self.recompute = False  # run layers again in the backward pass instead of keeping what is inside them

    def forward(
        self,
        x: Streams,
        t: Levels,
        r: Levels,
        cond: Condition,
        memory: LayeredMemory | None = None,
        *,
        store: bool = False,
        trust: Float[Tensor, " B"] | None = None,
    ) -> tuple[dict[str, Tensor], LayeredMemory | None]:
        memory = memory if memory is not None else self._sink(cond)
        if not x:
            return {}, memory
        at = self._positions(x)
        levels = {m: self.branch(m).levels(t[m], r[m], trust if store else None) for m in x}
        step = self._prepare(x, at, {m: v[0] for m, v in levels.items()}, cond, memory, store=store)
        hidden = {m: self.branch(m).embed(self.branch(m).patches(s)) for m, s in x.items()}
        if store:
            return {}, memory.append(self._written(hidden, step, memory), at)
        hidden, _ = self._layers(hidden, step, memory)
        velocities = {
            m: self.branch(m).velocity(
                h, levels[m][1], step.local[m], x[m].latents, (t[m], r[m]), cond.first_frame if m == VIDEO else None
            )
            for m, h in hidden.items()
        }
        return velocities, memory

    def branch(self, modality: str) -> Branch:
        return cast(Branch, self.branches[modality])

    def _sink(self, cond: Condition) -> LayeredMemory:
        """Keys and values of first frame and voice: clean, before everything, reading no text."""
        streams = sink_streams(cond, self.config)
        present = {VIDEO: None, AUDIO: cond.voice_mask}
        at = self._positions(streams)
        some = next(iter(streams.values())).latents
        zero = some.new_zeros(some.shape[0], 1, dtype=torch.float32)
        shared = {m: self.branch(m).levels(zero, zero, None)[0] for m in streams}
        empty = LayeredMemory(window=self.config.window_chunks, sink=(), sink_at=at.where(at.chunk != SINK))
        step = self._prepare(streams, at, shared, cond, empty, store=True)
        hidden = {m: self.branch(m).sink_tokens(s, present[m]) for m, s in streams.items()}
        layers = self._written(hidden, step, empty, rotated=False)
        return LayeredMemory(window=self.config.window_chunks, sink=tuple(layers), sink_at=at)

    def _positions(self, x: Streams) -> Positions:
        numbers = {m: i for i, m in enumerate(MODALITIES)}
        parts = [self.branch(m).positions(s, numbers[m]) for m, s in x.items()]
        joined = parts[0]
        for part in parts[1:]:
            joined = joined.join(part)
        return joined

    def _prepare(
        self,
        x: Streams,
        at: Positions,
        shared: dict[str, Tensor],
        cond: Condition,
        memory: LayeredMemory,
        *,
        store: bool,
    ) -> _Pass:
        device = next(iter(shared.values())).device
        own = {m: self.branch(m).positions(s, 0) for m, s in x.items()}
        is_sink = bool((at.chunk == SINK).all())
        return _Pass(
            at=at,
            sizes=[len(p) for p in own.values()],
            local={m: (p.chunk - p.chunk[0]).to(device) for m, p in own.items()},
            shared=shared,
            text={m: self.branch(m).text_tokens(cond, p, silent=is_sink) for m, p in own.items()},
            angle=self._angles(at).to(device),
            mask=self._mask(at, memory, store=store),
        )

    def _angles(self, at: Positions) -> Tensor:
        return angles(at.times, at.ys, at.xs, self.config.head_dim, self.config.rope_seconds_scale)

    def _mask(self, at: Positions, memory: LayeredMemory, *, store: bool) -> Tensor | None:
        """Keys in order: a copy of the sink per chunk, the past, the tokens of this pass."""
        window, chunks = self.config.window_chunks, at.chunk.unique()
        copies = chunks.repeat_interleave(len(memory.sink_at))
        parts = [same_mask(at.chunk, copies)]
        if memory.past_at is not None:
            parts.append(history_mask(at.chunk, memory.past_at.chunk, window, inclusive=False))
        own = history_mask(at.chunk, at.chunk, window, inclusive=True) if store else same_mask(at.chunk, at.chunk)
        parts.append(own)
        mask = torch.cat(parts, dim=1)
        if not self.config.coupled:
            past = () if memory.past_at is None else (memory.past_at.branch,)
            keys = torch.cat([memory.sink_at.branch.repeat(len(chunks)), *past, at.branch])
            mask &= same_mask(at.branch, keys)
        return dense_or_none(mask)

    def _layers(
        self, hidden: dict[str, Tensor], step: _Pass, memory: LayeredMemory, *, rotated: bool = True, last: int = 0
    ) -> tuple[dict[str, Tensor], list[KeyValue]]:
        """Run all layers but the ``last`` ones; also the keys and values of this pass, rotated unless the sink's."""
        kept: list[KeyValue] = []
        sink_angle = self._sink_angles(step.at, memory)
        for layer in range(self.config.layers - last):
            run = self._recomputed if self.recompute and torch.is_grad_enabled() else self._layer
            hidden, own = run(layer, hidden, step, self._recall(memory, layer, sink_angle), rotated)
            kept.append(own)
        return hidden, kept

    def _written(
        self, hidden: dict[str, Tensor], step: _Pass, memory: LayeredMemory, *, rotated: bool = True
    ) -> list[KeyValue]:
        """Keys and values of every layer: what a memory holds. Of the last layer nothing else is computed."""
        hidden, kept = self._layers(hidden, step, memory, rotated=rotated, last=1)
        _, _, k, v = self._project(self.config.layers - 1, hidden, step)
        return [*kept, KeyValue(rotate(k, step.angle) if rotated else k, v)]

    def _project(
        self, layer: int, hidden: dict[str, Tensor], step: _Pass
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Modulation by branch; queries, keys and values of all tokens."""
        blocks = {m: self.branch(m).block(layer) for m in hidden}
        mods = {m: b.modulation(step.shared[m], step.local[m]) for m, b in blocks.items()}
        parts = zip(*(b.project(hidden[m], mods[m]) for m, b in blocks.items()), strict=True)
        q, k, v = (torch.cat(part, dim=2) for part in parts)
        return mods, q, k, v

    def _layer(
        self, layer: int, hidden: dict[str, Tensor], step: _Pass, seen: KeyValue | None, rotated: bool
    ) -> tuple[dict[str, Tensor], KeyValue]:
        blocks = {m: self.branch(m).block(layer) for m in hidden}
        mods, q, k, v = self._project(layer, hidden, step)
        own = KeyValue(rotate(k, step.angle), v)
        keys = own if seen is None else seen.join(own)
        out = attend(rotate(q, step.angle), keys.k, keys.v, step.mask).split(step.sizes, dim=2)
        hidden = {
            m: b.update(hidden[m], o, mods[m], step.text[m]) for (m, b), o in zip(blocks.items(), out, strict=True)
        }
        return hidden, own if rotated else KeyValue(k, v)

    def _recomputed(self, *args: Any) -> tuple[dict[str, Tensor], KeyValue]:
        """A layer of which only what goes in and comes out is kept until the backward pass."""
        # no early stop: engines that shard weights count entries into and exits from every module
        with set_checkpoint_early_stop(False):
            return cast(Any, checkpoint(self._layer, *args, use_reentrant=False, preserve_rng_state=False))

    def _sink_angles(self, at: Positions, memory: LayeredMemory) -> Tensor:
        """Angles of the sink's copies, one per chunk of the pass, (copies * tokens, half), at the window's edge."""
        edge = (at.chunk.unique() - self.config.window_chunks).double() * self.config.chunk_seconds
        sink, copies = memory.sink_at, edge.shape[0]
        times = (edge[:, None] + sink.times[None]).flatten()
        return angles(
            times, sink.ys.repeat(copies), sink.xs.repeat(copies), self.config.head_dim, self.config.rope_seconds_scale
        )

    def _recall(self, memory: LayeredMemory, layer: int, sink_angle: Tensor) -> KeyValue | None:
        """Remembered keys and values of a layer: the sink's copies, then the past."""
        if not memory.sink:
            return None
        sink = memory.sink[layer]
        copies = sink_angle.shape[0] // max(sink.k.shape[2], 1)
        k = rotate(sink.k.repeat(1, 1, copies, 1), sink_angle.to(sink.k.device))
        seen = KeyValue(k, sink.v.repeat(1, 1, copies, 1))
        return seen.join(memory.past[layer]) if memory.past else seen


def sink_streams(cond: Condition, config: ModelConfig) -> dict[str, Stream]:
    """First frame and reference voice as streams of the modalities that the network has, in chunk ``SINK``."""
    streams: dict[str, Stream] = {}
    if VIDEO in config.branches:
        if cond.first_frame is None:
            raise ValueError("a network with a video branch needs a first frame: pass one in the condition")
        streams[VIDEO] = _sink_stream(cond.first_frame[:, None], 0.0)
    if AUDIO in config.branches:
        if cond.voice is None:
            raise ValueError("a network with an audio branch needs voice latents (zeros with a False mask for none)")
        streams[AUDIO] = _sink_stream(cond.voice, config.chunk_seconds)
    return streams


def _sink_stream(latents: Tensor, seconds: float) -> Stream:
    n = latents.shape[1]
    return Stream(
        latents=latents,
        times=torch.arange(n, dtype=torch.float64) * (seconds / n),
        chunk=torch.full((n,), SINK),
    )


def build_model(config: ModelConfig, seed: int) -> AVTransformer:
    """A freshly initialised network; equal seeds give equal weights."""
    model = AVTransformer(config)
    initialise(model, seed)
    return model
