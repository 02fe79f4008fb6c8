"""The network: branches coupled in self-attention (METHOD 4). A uni-modal model has one branch, same code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mfcore.device import to_device_of
from mfcore.model.attention import AttentionVisibility, Mask, attend, transpose_heads
from mfcore.model.block import TextKeyValues, TextTokens
from mfcore.model.branch import Branch
from mfcore.model.caption_cache import CachedCaption
from mfcore.model.compile import EAGER
from mfcore.model.config import ModelConfig
from mfcore.model.init import initialize
from mfcore.model.kv_cache import CacheView, KeyValue, LayeredKVCache, TokenPositions
from mfcore.model.ring_cache import RingKVCache
from mfcore.model.rope import Rotation, rotate, rotation, rotation_angles
from mfcore.model.sequence_parallel import SequenceGroup
from mfcore.types import AUDIO, MODALITIES, VIDEO, Condition, NoiseLevels, Stream, Streams

SINK = -1  # chunk number of the sink


@dataclass(frozen=True)
class PreparedPass:
    """What passes over the same chunks have in common, whatever the noise level."""

    cond: Condition
    times: dict[str, Tensor]
    at: TokenPositions
    here: dict[str, list[slice]]  # of each branch's tokens those of each rank, where ranks share them; else all
    sizes: list[int]  # of each branch the tokens that this rank computes
    shared: list[int]  # of all branches together the tokens that each rank computes
    local: dict[str, Tensor]  # chunk of each token, counted from the first chunk of the pass
    runs: dict[str, Tensor | None]  # the same, None where all chunks hold as many tokens of the branch
    own_runs: dict[str, Tensor | None]  # of the tokens that this rank computes
    phases: dict[str, Tensor] | None  # of the tokens that this rank computes, where the network has them
    text: dict[str, TextTokens]
    heard: dict[str, list[TextKeyValues]] | None  # by layer, where several passes will ask for it
    turn: Rotation
    mask: Mask

    def is_reusable(self, x: Streams, cond: Condition) -> bool:
        """Whether it is that of another pass too."""
        same = self.cond is cond and self.times.keys() == x.keys()
        return same and all(torch.equal(s.times, self.times[m]) for m, s in x.items())


@dataclass(frozen=True)
class _Pass:
    """What every layer of one pass needs besides the tokens."""

    scene: PreparedPass
    shared: dict[str, Tensor]  # modulation by branch
    seen: CacheView | RingKVCache


class AVTransformer(nn.Module):
    """A causal velocity model of paired audio and video; see ``mfcore.types.VelocityModel`` for what a call means.

    Memory is a ``LayeredMemory``, or a ``RingMemory`` of it (``mfcore.model.ring``) for streaming.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        names = [m for m in MODALITIES if m in config.branches]
        self.branches = nn.ModuleDict({m: Branch(config, config.branches[m]) for m in names})
        self.recompute = False  # run layers again in the backward pass instead of keeping what is inside them
        self.code = EAGER  # what runs the blocks
        self.sequence: SequenceGroup | None = None  # ranks that share the tokens of the same clips
        self.guard: Callable[[str], object] | None = None  # told what leaves a block not finite; looking takes time

    def forward(
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
        memory = memory if memory is not None else self._sink(cond)
        if not x:
            return {}, memory
        scene, seen = self.prepare(x, cond, memory, store=store)
        if store:
            return {}, memory.append(self.write_cache(x, t, r, trust, scene, seen), scene.at)
        return self.predict_velocity(x, t, r, cond.first_frame, scene, seen), memory

    def predict_velocity(
        self,
        x: Streams,
        t: NoiseLevels,
        r: NoiseLevels,
        first: Tensor | None,
        scene: PreparedPass,
        seen: CacheView | RingKVCache,
    ) -> dict[str, Tensor]:
        """Velocities, once it is known who sees whom. Nothing in here waits for the device or comes from the CPU."""
        levels = {m: self.branch(m).levels(t[m], r[m], None) for m in x}
        hidden, _ = self._layers(self._embed(x, scene), _Pass(scene, {m: v[0] for m, v in levels.items()}, seen))
        if self.sequence:
            counts = {m: [s.stop - s.start for s in spans] for m, spans in scene.here.items()}
            hidden = {m: self.sequence.all_gather_tokens(h, counts[m]) for m, h in hidden.items()}
        return {
            m: self.branch(m).velocity(
                h,
                levels[m][1],
                scene.local[m],
                scene.runs[m],
                x[m].latents,
                (t[m], r[m]),
                first if m == VIDEO else None,
            )
            for m, h in hidden.items()
        }

    def write_cache(
        self,
        x: Streams,
        t: NoiseLevels,
        r: NoiseLevels,
        trust: Tensor | None,
        scene: PreparedPass,
        seen: CacheView | RingKVCache,
    ) -> list[KeyValue]:
        """Keys and values of every layer for clean chunks, as ``evaluate`` is for noisy ones."""
        shared = {m: self.branch(m).levels(t[m], r[m], trust)[0] for m in x}
        return self._written(self._embed(x, scene), _Pass(scene, shared, seen))

    def _embed(self, x: Streams, scene: PreparedPass) -> dict[str, Tensor]:
        """The tokens that this rank computes."""
        phases = scene.phases or {}
        return {m: self.branch(m).embed_tokens(s, self._mine(scene.here[m]), phases.get(m)) for m, s in x.items()}

    def _mine(self, spans: list[slice]) -> slice:
        return spans[self.sequence.rank if self.sequence else 0]

    def branch(self, modality: str) -> Branch:
        return cast(Branch, self.branches[modality])

    def _sink(self, cond: Condition) -> LayeredKVCache:
        """Keys and values of first frame and voice: clean, before everything, reading no text."""
        streams = sink_streams(cond, self.config)
        present = {VIDEO: None, AUDIO: cond.voice_mask}
        at = self._ordered(self._places(streams))
        some = next(iter(streams.values())).latents
        zero = some.new_zeros(some.shape[0], 1, dtype=torch.float32)
        shared = {m: self.branch(m).levels(zero, zero, None)[0] for m in streams}
        empty = LayeredKVCache(window=self.config.window_chunks, sink=(), sink_at=at.select(at.chunk != SINK))
        scene, seen = self.prepare(streams, cond, empty, store=True)
        hidden = {
            m: self.branch(m).sink_tokens(s, present[m])[:, self._mine(scene.here[m])] for m, s in streams.items()
        }
        layers = self._written(hidden, _Pass(scene, shared, seen), rotated=False)
        return LayeredKVCache(window=self.config.window_chunks, sink=tuple(layers), sink_at=at)

    def _places(self, x: Streams) -> dict[str, TokenPositions]:
        """Of the tokens of a pass, by branch."""
        return {m: self.branch(m).positions(s, MODALITIES.index(m)) for m, s in x.items()}

    def _ordered(self, parts: Mapping[str, TokenPositions]) -> TokenPositions:
        """All of them in the order in which attention has them: rank by rank, branch by branch."""
        spans = {m: self._spans(len(p)) for m, p in parts.items()}
        ordered = [parts[m].select(spans[m][rank]) for rank in range(len(next(iter(spans.values())))) for m in parts]
        return reduce(TokenPositions.join, ordered)

    def _spans(self, tokens: int) -> list[slice]:
        return self.sequence.spans(tokens) if self.sequence else [slice(0, tokens)]

    def prepare(
        self, x: Streams, cond: Condition, memory: LayeredKVCache | RingKVCache, *, store: bool
    ) -> tuple[PreparedPass, CacheView | RingKVCache]:
        """What does not depend on noise levels: positions, who sees whom, the text; a ring is told of its chunk."""
        some = next(iter(x.values())).latents
        if isinstance(memory, RingKVCache):
            return self._streamed(x, some, cond, memory), memory
        gradient = torch.is_grad_enabled()
        kept = None if store or memory.passes is None else memory.passes.entries.get(gradient)
        if kept is not None and kept[0].is_reusable(x, cond):
            scene, copies, sink_turn = kept
            return scene, CacheView(memory=memory.without_passes(), copies=copies, turn=sink_turn)
        own = self._places(x)
        at = self._ordered(own)
        # the sink is short: no kernel needs to be made before a stream begins
        backend = self.config.attention if memory.sink else "sdpa"
        mask = self._sight(at, memory, store=store).mask(backend, some.device)
        copies, sink_turn = len(at.chunk.unique()), self._sink_turn(at, memory.sink_at, some)
        # where layers are run again for the backward pass, what they keep of the text would stay
        lasting = memory.passes is not None and not (self.recompute and gradient)
        scene = self._scene(x, own, at, some, cond, mask, {} if lasting else None)
        if memory.passes is not None and not store:
            # no reference to the cache itself: a cycle would keep it alive
            memory.passes.entries[gradient] = scene, copies, sink_turn
        # without the scenes: layers that are run again keep what they read until then
        return scene, CacheView(memory=memory.without_passes(), copies=copies, turn=sink_turn)

    def _streamed(self, x: Streams, like: Tensor, cond: Condition, ring: RingKVCache) -> PreparedPass:
        """All evaluations of a chunk share a scene; all that the ring holds is visible to that chunk."""
        scene = cast(PreparedPass | None, ring.scene)
        if scene is None or not scene.is_reusable(x, cond):
            own = self._places(x)
            at = self._ordered(own)
            if scene is None or ring.chunk != int(at.chunk[0]):
                ring.begin_chunk(at, self._sink_turn(at, ring.sink_at, like))
            mask = None if self.config.coupled else ring.visibility(at).mask("sdpa", like.device)
            for m in x:
                ring.captions[m] = self.branch(m).cached_caption(cond.caption, ring.captions.get(m))
            ring.scene = scene = self._scene(x, own, at, like, cond, mask, ring.captions)
        return scene

    def _scene(
        self,
        x: Streams,
        own: dict[str, TokenPositions],
        at: TokenPositions,
        like: Tensor,
        cond: Condition,
        mask: Mask,
        captions: Mapping[str, CachedCaption] | None = None,
    ) -> PreparedPass:
        """``captions``: where several passes share the scene, those that are known, by branch."""
        is_sink = bool((at.chunk == SINK).all())
        here = {m: self._spans(len(p)) for m, p in own.items()}
        mine = {m: p.select(self._mine(here[m])) for m, p in own.items()}
        about = captions or {}
        text = {m: self.branch(m).text_tokens(cond, p, silent=is_sink, caption=about.get(m)) for m, p in mine.items()}
        local = {m: to_device_of(p.chunk - p.chunk[0], like) for m, p in own.items()}
        runs = {m: None if _even(p.chunk) else local[m] for m, p in own.items()}
        return PreparedPass(
            cond=cond,
            times={m: s.times for m, s in x.items()},
            at=at,
            here=here,
            sizes=[len(p) for p in mine.values()],
            shared=[sum(s.stop - s.start for s in each) for each in zip(*here.values(), strict=True)],
            local=local,
            runs=runs,
            own_runs=runs if self.sequence is None else {m: local[m][self._mine(here[m])] for m in own},
            phases={m: self.branch(m).phases(p, like) for m, p in mine.items()} if self.config.chunk_phase else None,
            text=text,
            heard={m: self._hear(m, text[m], about.get(m)) for m in x} if captions is not None else None,
            turn=rotation(rotation_angles(at.times, at.ys, at.xs, self.config)[:, None], like),
            mask=mask,
        )

    def _hear(self, modality: str, text: TextTokens, caption: CachedCaption | None) -> list[TextKeyValues]:
        layers = [self.branch(modality).block(layer).text for layer in range(self.config.layers)]
        known = caption.layers if caption else [None] * len(layers)
        return [layer.project_text(text, about) for layer, about in zip(layers, known, strict=True)]

    def _sight(self, at: TokenPositions, memory: LayeredKVCache, *, store: bool) -> AttentionVisibility:
        """Keys in order: a copy of the sink per chunk, the past, the tokens of this pass."""
        window, chunks, past = self.config.window_chunks, at.chunk.unique(), memory.past_at
        copies = chunks.repeat_interleave(len(memory.sink_at))
        before = at.chunk[:0] if past is None else past.chunk
        branch = torch.cat(
            [memory.sink_at.branch.repeat(len(chunks)), *([] if past is None else [past.branch]), at.branch]
        )
        apart = 0 if self.config.coupled else 1
        return AttentionVisibility(
            chunk=at.chunk,
            first=torch.cat([copies, before + 1, at.chunk]),
            last=torch.cat([copies, before + window, at.chunk + (window if store else 0)]),
            track=at.branch * apart,
            key_track=branch * apart,
        )

    def _layers(
        self, hidden: dict[str, Tensor], step: _Pass, *, rotated: bool = True, last: int = 0
    ) -> tuple[dict[str, Tensor], list[KeyValue]]:
        """Run all layers but the ``last`` ones; also the keys and values of this pass, rotated unless the sink's."""
        kept: list[KeyValue] = []
        for layer in range(self.config.layers - last):
            run = self._recomputed if self.recompute and torch.is_grad_enabled() else self.run_layer
            hidden, own = run(layer, hidden, step, rotated)
            kept.append(own)
            if self.guard and (odd := find_non_finite(hidden, self._chunks(step.scene))):
                self.guard(f"activations are not finite after block {layer}: {odd}")
        return hidden, kept

    def _chunks(self, scene: PreparedPass) -> tuple[Tensor, ...]:
        """Of the tokens that this rank computes, by branch."""
        first = sum(scene.shared[: self.sequence.rank if self.sequence else 0])
        return scene.at.chunk[first : first + sum(scene.sizes)].split(scene.sizes)

    def _written(self, hidden: dict[str, Tensor], step: _Pass, *, rotated: bool = True) -> list[KeyValue]:
        """Keys and values of every layer: what a memory holds. Of the last layer nothing else is computed."""
        hidden, kept = self._layers(hidden, step, rotated=rotated, last=1)
        _, _, k, v = self._project(self.config.layers - 1, hidden, step)
        return [*kept, KeyValue(transpose_heads(rotate(k, step.scene.turn) if rotated else k), transpose_heads(v))]

    def _project(
        self, layer: int, hidden: dict[str, Tensor], step: _Pass
    ) -> tuple[dict[str, tuple[Tensor, ...]], Tensor, Tensor, Tensor]:
        """Modulation by branch; queries, keys and values (B, N, H, e) of all tokens, of this rank's heads."""
        blocks = {m: self.branch(m).block(layer) for m in hidden}
        mods = {m: b.modulation(step.shared[m], step.scene.own_runs[m]) for m, b in blocks.items()}
        parts = zip(*(self.code.project(b, hidden[m], mods[m]) for m, b in blocks.items()), strict=True)
        q, k, v = (torch.cat(part, dim=1) for part in parts)
        if self.sequence:
            shared = step.scene.shared
            q, k, v = (self.sequence.scatter_heads(transpose_heads(p), shared).transpose(1, 2) for p in (q, k, v))
        return mods, q, k, v

    def run_layer(
        self, layer: int, hidden: dict[str, Tensor], step: _Pass, rotated: bool
    ) -> tuple[dict[str, Tensor], KeyValue]:
        """One block of each branch and the attention between them; also the keys and values of the pass."""
        scene = step.scene
        mods, q, k, v = self._project(layer, hidden, step)
        own = KeyValue(transpose_heads(rotate(k, scene.turn)), transpose_heads(v))
        keys = step.seen.join(layer, own)
        answer = attend(transpose_heads(rotate(q, scene.turn)), keys.k, keys.v, scene.mask)
        answer = self.sequence.gather_heads(answer, scene.shared) if self.sequence else answer
        out = answer.split(scene.sizes, dim=2)
        hidden = {
            m: self.code.update(
                self.branch(m).block(layer),
                hidden[m],
                o,
                mods[m],
                scene.text[m],
                scene.heard[m][layer] if scene.heard else None,
            )
            for m, o in zip(hidden, out, strict=True)
        }
        return hidden, own if rotated else KeyValue(transpose_heads(k), own.v)

    def _recomputed(self, *args: Any) -> tuple[dict[str, Tensor], KeyValue]:
        """A layer of which only what goes in and comes out is kept until the backward pass."""
        # no early stop: engines that shard weights count entries into and exits from every module
        with set_checkpoint_early_stop(False):
            return cast(Any, checkpoint(self.run_layer, *args, use_reentrant=False, preserve_rng_state=False))

    def _sink_turn(self, at: TokenPositions, sink: TokenPositions, like: Tensor) -> Rotation:
        """Of the sink's copies, one per chunk of the pass, (copies, tokens, half), to the edge of its window."""
        edge = (at.chunk.unique() - self.config.window_chunks).double() * self.config.chunk_seconds
        times = edge[:, None] + sink.times
        return rotation(rotation_angles(times, sink.ys.expand_as(times), sink.xs.expand_as(times), self.config), like)


def _even(chunk: Int64[Tensor, " N"]) -> bool:
    """Whether all chunks hold as many tokens, which stand together."""
    counts = chunk.unique_consecutive(return_counts=True)[1]
    return bool((counts == counts[0]).all())


def find_non_finite(hidden: dict[str, Tensor], chunks: tuple[Tensor, ...]) -> str:
    """The branches with numbers that are not finite, and the first chunk (of ``chunks``, one for each token); or ""."""
    odd: list[str] = []
    for (m, h), chunk in zip(hidden.items(), chunks, strict=True):
        bad = ~h.isfinite().all(dim=-1).all(dim=0).cpu()
        if bool(bad.any()):
            first = int(chunk[bad][0])
            place = "the sink" if first == SINK else f"chunk {first}"
            odd.append(f"{m} {place} ({int(bad.sum())} of {len(bad)} tokens)")
    return ", ".join(odd)


def find_transformers(module: nn.Module) -> list[AVTransformer]:
    """Those that ``module`` is made of, itself among them."""
    return [part for part in module.modules() if isinstance(part, AVTransformer)]


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
    initialize(model, seed)
    return model
