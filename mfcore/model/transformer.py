"""Transformer of branches coupled in self-attention (METHOD 4). A uni-modal model has one branch."""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mfcore.device import to_device_of
from mfcore.model.attention import AttentionVisibility, Mask, attend, attend_with_bias, transpose_heads
from mfcore.model.block import Modulation, TextKeyValues, TextTokens
from mfcore.model.branch import Branch
from mfcore.model.caption_cache import CachedCaption
from mfcore.model.compile import EAGER
from mfcore.model.config import ModelConfig
from mfcore.model.init import initialize
from mfcore.model.kv_cache import CacheView, KeyValue, LayeredKVCache, TokenPositions
from mfcore.model.prepared_pass import Coupling, LayerInputs, PreparedPass, has_even_chunks
from mfcore.model.ring_cache import RingKVCache
from mfcore.model.rope import Rotation, rotate, rotation, rotation_angles
from mfcore.model.sequence_parallel import SequenceGroup
from mfcore.model.sink import SINK, find_non_finite, sink_streams
from mfcore.types import AUDIO, MODALITIES, VIDEO, Condition, NoiseLevels, Streams


class AVTransformer(nn.Module):
    """Causal velocity model of paired audio and video; implements ``mfcore.types.VelocityModel``.

    The cache is a ``LayeredKVCache``, or a ``RingKVCache`` for streaming.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        names = [m for m in MODALITIES if m in config.branches]
        self.branches = nn.ModuleDict({m: Branch(config, config.branches[m]) for m in names})
        self.recompute = False  # activation checkpointing of whole layers
        self.code = EAGER  # eager or compiled functions of a block
        self.sequence: SequenceGroup | None = None  # ranks that share the tokens of the same clips
        self.guard: Callable[[str], object] | None = None  # called with a message on non-finite activations; slow

    def forward(
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
        """Return velocities and the cache, or write ``x`` to the cache (``store``)."""
        cache = cache if cache is not None else self._compute_sink(cond)
        if not x:
            return {}, cache
        prepared, view = self.prepare(x, cond, cache, store=store)
        if store:
            layers = self.write_cache(x, t, r, trust=trust, prepared=prepared, cache=view)
            return {}, cache.append(layers, prepared.positions)
        return self.predict_velocity(x, t, r, first_frame=cond.first_frame, prepared=prepared, cache=view), cache

    def predict_velocity(
        self,
        x: Streams,
        t: NoiseLevels,
        r: NoiseLevels,
        *,
        first_frame: Tensor | None,
        prepared: PreparedPass,
        cache: CacheView | RingKVCache,
    ) -> dict[str, Tensor]:
        """Return the velocities of a prepared pass. Never synchronizes with the device or copies from the CPU."""
        levels = {m: self.branch(m).levels(t[m], r[m], None) for m in x}
        modulation = {m: v[0] for m, v in levels.items()}
        hidden, _ = self._run_layers(self._embed(x, prepared), LayerInputs(prepared, modulation, cache))
        if self.sequence:
            counts = {m: [s.stop - s.start for s in spans] for m, spans in prepared.rank_spans.items()}
            hidden = {m: self.sequence.all_gather_tokens(h, counts[m]) for m, h in hidden.items()}
        return {
            m: self.branch(m).velocity(
                h,
                final=levels[m][1],
                chunk_index=prepared.chunk_index[m],
                level_index=prepared.level_index[m],
                noisy=x[m].latents,
                t=t[m],
                r=r[m],
                first_frame=first_frame if m == VIDEO else None,
            )
            for m, h in hidden.items()
        }

    def write_cache(
        self,
        x: Streams,
        t: NoiseLevels,
        r: NoiseLevels,
        *,
        trust: Tensor | None,
        prepared: PreparedPass,
        cache: CacheView | RingKVCache,
    ) -> list[KeyValue]:
        """Return the keys and values of clean chunks in every layer."""
        modulation = {m: self.branch(m).levels(t[m], r[m], trust)[0] for m in x}
        return self._compute_cache(self._embed(x, prepared), LayerInputs(prepared, modulation, cache))

    def _embed(self, x: Streams, prepared: PreparedPass) -> dict[str, Tensor]:
        """Embed the tokens that this rank computes."""
        phases = prepared.phases or {}
        return {
            m: self.branch(m).embed_tokens(s, self._rank_span(prepared.rank_spans[m]), phases.get(m))
            for m, s in x.items()
        }

    def _rank_span(self, spans: list[slice]) -> slice:
        return spans[self.sequence.rank if self.sequence else 0]

    def branch(self, modality: str) -> Branch:
        """Return the branch of ``modality``."""
        return cast(Branch, self.branches[modality])

    def _compute_sink(self, cond: Condition) -> LayeredKVCache:
        """Return a cache of first frame and voice: clean, before all chunks, without text."""
        streams = sink_streams(cond, self.config)
        present = {VIDEO: None, AUDIO: cond.voice_mask}
        positions = self._join_positions(self._positions(streams))
        like = next(iter(streams.values())).latents
        zero = like.new_zeros(like.shape[0], 1, dtype=torch.float32)
        modulation = {m: self.branch(m).levels(zero, zero, None)[0] for m in streams}
        nowhere = positions.select(positions.chunk != SINK)
        empty = LayeredKVCache(window=self.config.window_chunks, sink=(), sink_positions=nowhere)
        prepared, view = self.prepare(streams, cond, empty, store=True)
        hidden: dict[str, Tensor] = {}
        for m, s in streams.items():
            tokens = self.branch(m).sink_tokens(s, present[m])
            hidden[m] = tokens[:, self._rank_span(prepared.rank_spans[m])]
        layers = self._compute_cache(hidden, LayerInputs(prepared, modulation, view), rotated=False)
        return LayeredKVCache(window=self.config.window_chunks, sink=tuple(layers), sink_positions=positions)

    def _positions(self, x: Streams) -> dict[str, TokenPositions]:
        """Return the positions of the tokens of a pass, per branch."""
        return {m: self.branch(m).positions(s, MODALITIES.index(m)) for m, s in x.items()}

    def _join_positions(self, parts: Mapping[str, TokenPositions]) -> TokenPositions:
        """Return all positions in the order of attention: rank by rank, branch by branch."""
        spans = {m: self._spans(len(p)) for m, p in parts.items()}
        ranks = len(next(iter(spans.values())))
        ordered = [parts[m].select(spans[m][rank]) for rank in range(ranks) for m in parts]
        return reduce(TokenPositions.join, ordered)

    def _spans(self, tokens: int) -> list[slice]:
        return self.sequence.spans(tokens) if self.sequence else [slice(0, tokens)]

    def prepare(
        self, x: Streams, cond: Condition, cache: LayeredKVCache | RingKVCache, *, store: bool
    ) -> tuple[PreparedPass, CacheView | RingKVCache]:
        """Return the data of a pass that does not depend on noise levels, and the cache as its layers read it.

        A ring cache starts its next chunk here. Shared passes of a layered cache return the stored data.
        """
        like = next(iter(x.values())).latents
        if isinstance(cache, RingKVCache):
            return self._prepare_streaming(x, like, cond, cache), cache
        gradient = torch.is_grad_enabled()
        stored = None if store or cache.passes is None else cache.passes.entries.get(gradient)
        if stored is not None and stored[0].is_reusable(x, cond):
            prepared, sink_copies, sink_rotation = stored
            view = CacheView(cache=cache.without_passes(), sink_copies=sink_copies, sink_rotation=sink_rotation)
            return prepared, view
        branch_positions = self._positions(x)
        positions = self._join_positions(branch_positions)
        # the sink is short: sdpa avoids compiling a kernel before a stream starts
        backend = self.config.attention if cache.sink else "sdpa"
        visibility = self._visibility(positions, cache, store=store)
        sink_copies = len(positions.chunk.unique())
        sink_rotation = self._sink_rotation(positions, cache.sink_positions, like)
        # recomputed layers would keep shared text keys until the backward pass
        share_text = cache.passes is not None and not (self.recompute and gradient)
        prepared = self._build_pass(
            x,
            cond,
            branch_positions=branch_positions,
            positions=positions,
            like=like,
            mask=visibility.mask(backend, like.device),
            coupling=self._coupling(positions, self._key_branch(positions, cache), like),
            captions={} if share_text else None,
        )
        if cache.passes is not None and not store:
            # no reference to the cache itself: a cycle would keep it alive
            cache.passes.entries[gradient] = prepared, sink_copies, sink_rotation
        # recomputed layers keep their inputs until the backward pass, so the view has no shared passes
        view = CacheView(cache=cache.without_passes(), sink_copies=sink_copies, sink_rotation=sink_rotation)
        return prepared, view

    def _prepare_streaming(self, x: Streams, like: Tensor, cond: Condition, ring: RingKVCache) -> PreparedPass:
        """Return the prepared pass of the current chunk. All evaluations of a chunk share it."""
        prepared = cast(PreparedPass | None, ring.prepared)
        if prepared is not None and prepared.is_reusable(x, cond):
            return prepared
        branch_positions = self._positions(x)
        positions = self._join_positions(branch_positions)
        if prepared is None or ring.chunk != int(positions.chunk[0]):
            ring.begin_chunk(positions, self._sink_rotation(positions, ring.sink_positions, like))
        mask = None if self.config.coupled else ring.visibility(positions).mask("sdpa", like.device)
        for m in x:
            ring.captions[m] = self.branch(m).cached_caption(cond.caption, ring.captions.get(m))
        ring.prepared = prepared = self._build_pass(
            x,
            cond,
            branch_positions=branch_positions,
            positions=positions,
            like=like,
            mask=mask,
            coupling=self._coupling(positions, ring.key_branch(positions), like),
            captions=ring.captions,
        )
        return prepared

    def _build_pass(
        self,
        x: Streams,
        cond: Condition,
        *,
        branch_positions: dict[str, TokenPositions],
        positions: TokenPositions,
        like: Tensor,
        mask: Mask,
        coupling: Coupling | None,
        captions: Mapping[str, CachedCaption] | None,
    ) -> PreparedPass:
        """Build a pass. ``captions``: cached captions per branch if several passes share it, else None."""
        is_sink = bool((positions.chunk == SINK).all())
        rank_spans = {m: self._spans(len(p)) for m, p in branch_positions.items()}
        rank_positions = {m: p.select(self._rank_span(rank_spans[m])) for m, p in branch_positions.items()}
        cached = captions or {}
        text = {
            m: self.branch(m).text_tokens(cond, p, ignore_text=is_sink, caption=cached.get(m))
            for m, p in rank_positions.items()
        }
        chunk_index = {m: to_device_of(p.chunk - p.chunk[0], like) for m, p in branch_positions.items()}
        level_index = {m: None if has_even_chunks(p.chunk) else chunk_index[m] for m, p in branch_positions.items()}
        rank_level_index: dict[str, Tensor | None] = level_index
        if self.sequence:
            rank_level_index = {m: chunk_index[m][self._rank_span(rank_spans[m])] for m in branch_positions}
        phases = None
        if self.config.chunk_phase:
            phases = {m: self.branch(m).phases(p, like) for m, p in rank_positions.items()}
        angles = rotation_angles(positions.times, positions.ys, positions.xs, self.config)
        return PreparedPass(
            cond=cond,
            times={m: s.times for m, s in x.items()},
            positions=positions,
            rank_spans=rank_spans,
            branch_tokens=[len(p) for p in rank_positions.values()],
            rank_tokens=[sum(s.stop - s.start for s in spans) for spans in zip(*rank_spans.values(), strict=True)],
            chunk_index=chunk_index,
            level_index=level_index,
            rank_level_index=rank_level_index,
            phases=phases,
            text=text,
            text_keys=None if captions is None else {m: self._project_text(m, text[m], cached.get(m)) for m in x},
            rotation=rotation(angles[:, None], like),
            mask=mask,
            coupling=coupling,
        )

    def _coupling(self, positions: TokenPositions, key_branch: Tensor, like: Tensor) -> Coupling | None:
        """Return the branches of queries and keys if the network has a bias between branches."""
        if not self.config.has_cross_bias:
            return None
        is_audio = (key_branch == MODALITIES.index(AUDIO)).float()
        return Coupling(to_device_of(positions.branch, like), to_device_of(is_audio, like))

    def _cross_bias(self, layer: int, coupling: Coupling) -> Float[Tensor, "H q"]:
        """Return the bias of queries of this rank's heads to the keys of audio, relative to the keys of video."""
        to_audio, to_video = (cast(Any, self.branch(m).block(layer).cross_bias)() for m in (VIDEO, AUDIO))
        # a softmax is unchanged if the bias to the own keys is subtracted from both
        bias = torch.stack([to_audio, -to_video], dim=1)
        if self.sequence:
            bias = bias.chunk(self.sequence.size)[self.sequence.rank]
        return bias.index_select(1, coupling.query_branch)

    def _project_text(self, modality: str, text: TextTokens, caption: CachedCaption | None) -> list[TextKeyValues]:
        layers = [self.branch(modality).block(layer).text for layer in range(self.config.layers)]
        captions = caption.layers if caption else [None] * len(layers)
        return [layer.project_text(text, keys) for layer, keys in zip(layers, captions, strict=True)]

    def _key_branch(self, positions: TokenPositions, cache: LayeredKVCache) -> Int64[Tensor, " k"]:
        """Return the branch number of every key of a pass: a copy of the sink per chunk, the past, the tokens."""
        copies = len(positions.chunk.unique())
        past = positions.branch[:0] if cache.past_positions is None else cache.past_positions.branch
        return torch.cat([cache.sink_positions.branch.repeat(copies), past, positions.branch])

    def _visibility(self, positions: TokenPositions, cache: LayeredKVCache, *, store: bool) -> AttentionVisibility:
        """Return the visibility of the keys: a copy of the sink per chunk, the past, the tokens of the pass."""
        window = self.config.window_chunks
        chunks = positions.chunk.unique()
        past = cache.past_positions
        key_branch = self._key_branch(positions, cache)
        sink_chunk = chunks.repeat_interleave(len(cache.sink_positions))
        past_chunk = positions.chunk[:0] if past is None else past.chunk
        separate = 0 if self.config.coupled else 1
        return AttentionVisibility(
            chunk=positions.chunk,
            first=torch.cat([sink_chunk, past_chunk + 1, positions.chunk]),
            last=torch.cat([sink_chunk, past_chunk + window, positions.chunk + (window if store else 0)]),
            track=positions.branch * separate,
            key_track=key_branch * separate,
        )

    def _run_layers(
        self, hidden: dict[str, Tensor], inputs: LayerInputs, *, rotated: bool = True, skip_last: int = 0
    ) -> tuple[dict[str, Tensor], list[KeyValue]]:
        """Run all layers but the ``skip_last`` ones. Returns the tokens, and the keys and values of this pass."""
        layers: list[KeyValue] = []
        for layer in range(self.config.layers - skip_last):
            run = self._checkpoint_layer if self.recompute and torch.is_grad_enabled() else self.run_layer
            hidden, keys = run(layer, hidden, inputs, rotated)
            layers.append(keys)
            if self.guard and (found := find_non_finite(hidden, self._rank_chunks(inputs.prepared))):
                self.guard(f"activations are not finite after block {layer}: {found}")
        return hidden, layers

    def _rank_chunks(self, prepared: PreparedPass) -> tuple[Tensor, ...]:
        """Return the chunk of each token that this rank computes, per branch."""
        first = sum(prepared.rank_tokens[: self.sequence.rank if self.sequence else 0])
        chunk = prepared.positions.chunk[first : first + sum(prepared.branch_tokens)]
        return chunk.split(prepared.branch_tokens)

    def _compute_cache(self, hidden: dict[str, Tensor], inputs: LayerInputs, *, rotated: bool = True) -> list[KeyValue]:
        """Return the keys and values of every layer. The last layer computes nothing else."""
        hidden, layers = self._run_layers(hidden, inputs, rotated=rotated, skip_last=1)
        _, _, k, v = self._project(self.config.layers - 1, hidden, inputs)
        k = rotate(k, inputs.prepared.rotation) if rotated else k
        return [*layers, KeyValue(transpose_heads(k), transpose_heads(v))]

    def _project(
        self, layer: int, hidden: dict[str, Tensor], inputs: LayerInputs
    ) -> tuple[dict[str, Modulation], Tensor, Tensor, Tensor]:
        """Return the modulation per branch, and queries, keys and values (B, N, H, e) of this rank's heads."""
        blocks = {m: self.branch(m).block(layer) for m in hidden}
        mods = {m: b.modulation(inputs.modulation[m], inputs.prepared.rank_level_index[m]) for m, b in blocks.items()}
        parts = zip(*(self.code.project(b, hidden[m], mods[m]) for m, b in blocks.items()), strict=True)
        q, k, v = (torch.cat(part, dim=1) for part in parts)
        if self.sequence:
            counts = inputs.prepared.rank_tokens
            q = self.sequence.scatter_heads(transpose_heads(q), counts).transpose(1, 2)
            k = self.sequence.scatter_heads(transpose_heads(k), counts).transpose(1, 2)
            v = self.sequence.scatter_heads(transpose_heads(v), counts).transpose(1, 2)
        return mods, q, k, v

    def run_layer(
        self, layer: int, hidden: dict[str, Tensor], inputs: LayerInputs, rotated: bool
    ) -> tuple[dict[str, Tensor], KeyValue]:
        """Run one block of each branch and their attention. Returns the tokens, and the keys and values of the pass."""
        prepared = inputs.prepared
        mods, q, k, v = self._project(layer, hidden, inputs)
        own = KeyValue(transpose_heads(rotate(k, prepared.rotation)), transpose_heads(v))
        keys = inputs.cache.join(layer, own)
        attended = self._attend(layer, transpose_heads(rotate(q, prepared.rotation)), keys, prepared)
        if self.sequence:
            attended = self.sequence.gather_heads(attended, prepared.rank_tokens)
        updated: dict[str, Tensor] = {}
        for m, part in zip(hidden, attended.split(prepared.branch_tokens, dim=2), strict=True):
            updated[m] = self.code.update(
                self.branch(m).block(layer),
                hidden[m],
                part,
                mods[m],
                text=prepared.text[m],
                text_keys=prepared.text_keys[m][layer] if prepared.text_keys else None,
            )
        return updated, own if rotated else KeyValue(transpose_heads(k), own.v)

    def _attend(self, layer: int, q: Tensor, keys: KeyValue, prepared: PreparedPass) -> Float[Tensor, "B H q e"]:
        """Attend to the visible keys, with the bias between branches if the network has one."""
        if prepared.coupling is None:
            return attend(q, keys.k, keys.v, prepared.mask)
        bias = self._cross_bias(layer, prepared.coupling)
        factor = prepared.coupling.key_is_audio
        return attend_with_bias(q, keys.k, keys.v, prepared.mask, query_bias=bias, key_factor=factor)

    def _checkpoint_layer(self, *args: Any) -> tuple[dict[str, Tensor], KeyValue]:
        """Run a layer with activation checkpointing."""
        # no early stop: engines that shard weights count entries into and exits from every module
        with set_checkpoint_early_stop(False):
            return cast(Any, checkpoint(self.run_layer, *args, use_reentrant=False, preserve_rng_state=False))

    def _sink_rotation(self, positions: TokenPositions, sink: TokenPositions, like: Tensor) -> Rotation:
        """Return the rotation of the sink copies, one per chunk, to the edge of its window: (copies, tokens, half)."""
        edge = (positions.chunk.unique() - self.config.window_chunks).double() * self.config.chunk_seconds
        times = edge[:, None] + sink.times
        return rotation(rotation_angles(times, sink.ys.expand_as(times), sink.xs.expand_as(times), self.config), like)


def find_transformers(module: nn.Module) -> list[AVTransformer]:
    """Return all transformers in ``module``, including itself."""
    return [part for part in module.modules() if isinstance(part, AVTransformer)]


def build_model(config: ModelConfig, seed: int) -> AVTransformer:
    """Return an initialized network. Equal seeds give equal weights."""
    model = AVTransformer(config)
    initialize(model, seed)
    return model
