"""A timed stream of chunks from random conditions, for ``mfctl bench stream``."""

from collections.abc import Iterator, Mapping
from statistics import median

import torch

from mfcore.codecs.dct import DctCodec
from mfcore.codecs.mel import MelCodec
from mfcore.model.config import ModelConfig
from mfcore.model.ring_cache import to_ring_cache
from mfcore.model.transformer import AVTransformer
from mfcore.rollout import GeneratedChunk, noise_starts, rollout
from mfcore.solver import DenoiserContext, schedule
from mfcore.timeline import Timeline
from mfcore.types import AUDIO, VIDEO, Condition, Stream, VelocityModel
from workflows.config.latent_shapes import CAPTION_TOKENS, EMBEDDED, VISIBLE_WORDS, LatentGeometry
from workflows.utils import timing

NO_END = 1 << 30  # chunks
SHIFT = {VIDEO: 5.0, AUDIO: 1.0}


def latent_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of one latent per modality."""
    return {m: (b.channels, *(b.size if m == VIDEO else ())) for m, b in model.branches.items()}


def noise_condition(model: ModelConfig, timeline: Timeline, device: torch.device, *, rows: int = 1) -> Condition:
    """Return random conditions of ``rows`` streams with ``VISIBLE_WORDS`` words within reach of every chunk."""
    shapes, draw = latent_shapes(model), torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=draw)
    always = torch.tensor([-1e9, 1e9], dtype=torch.float64).expand(rows, VISIBLE_WORDS, 2)  # the midpoint counts
    return Condition(
        caption=normal(rows, CAPTION_TOKENS, model.text_dim),
        caption_mask=torch.ones(rows, CAPTION_TOKENS, dtype=torch.bool),
        words=normal(rows, VISIBLE_WORDS, model.text_dim),
        words_mask=torch.ones(rows, VISIBLE_WORDS, dtype=torch.bool),
        word_times=always,
        first_frame=normal(rows, *shapes[VIDEO]),
        voice=normal(rows, timeline.count(AUDIO, 1), *shapes[AUDIO]),
        voice_mask=torch.ones(rows, dtype=torch.bool),
    ).to(device)


class StreamRunner:
    """Stream of chunks; state is kept between calls."""

    def __init__(
        self,
        net: AVTransformer,
        cond: Condition,
        timeline: Timeline,
        *,
        steps: int,
        model: VelocityModel | None = None,
    ) -> None:
        """``model`` is evaluated in place of ``net`` (compiled or with CUDA graphs)."""
        self._model = model or net
        self._cond = cond
        self._device = cond.caption.device
        branches = net.config.branches
        self._ring_tokens = sum(timeline.max_count(m) * b.tokens for m, b in branches.items())
        self.plan = schedule(steps, {m: SHIFT[m] for m in branches})
        self.starts = noise_starts(
            timeline,
            latent_shapes(net.config),
            range(NO_END),
            seed=0,
            samples=torch.arange(len(cond.caption)),
            like=cond.caption,
        )
        self._rollout: Iterator[GeneratedChunk] | None = None
        self._last: GeneratedChunk | None = None

    @property
    def context(self) -> DenoiserContext:
        """Return the context with the KV cache of all chunks so far."""
        assert self._last is not None
        return self._last.context

    @property
    def chunk(self) -> dict[str, Stream]:
        """Return the streams of the latest chunk."""
        assert self._last is not None
        return self._last.clean

    def fork(self, context: DenoiserContext) -> DenoiserContext:
        """Return a copy of ``context`` with a separate ring KV cache."""
        return context.map_caches(lambda cache: to_ring_cache(cache, self._ring_tokens))

    def generate(self, count: int) -> Iterator[GeneratedChunk]:
        """Yield the next ``count`` chunks."""
        for _ in range(count):
            if self._rollout is None:
                context = DenoiserContext(model=self._model, cond=self._cond).prefill()
                self._rollout = rollout(self.fork(context), self.starts, self.plan)
            self._last = next(self._rollout)
            yield self._last

    def time_chunks(self, count: int) -> list[float]:
        """Return the seconds of each of the next chunks: writing the previous one and denoising."""
        chunks = self.generate(count)
        return [timing.time_call(self._device, next, chunks)[0] for _ in range(count)]


def measure_decode_ms(
    geometry: LatentGeometry, shapes: Mapping[str, tuple[int, ...]], timeline: Timeline, *, rounds: int
) -> dict[str, float] | None:
    """Return median milliseconds per chunk and modality; None for pretrained codecs."""
    if geometry != EMBEDDED:
        return None
    codecs = {VIDEO: DctCodec(), AUDIO: MelCodec()}
    draw = torch.Generator().manual_seed(0)
    decode_ms: dict[str, float] = {}
    for m, shape in shapes.items():
        decoder = codecs[m].decoder()
        decoder.push(torch.randn((1, *shape), generator=draw))  # the first frame
        times: list[float] = []
        for k in range(rounds):
            latents = torch.randn((timeline.count(m, 1, k), *shape), generator=draw)
            times.append(timing.time_call(torch.device("cpu"), decoder.push, latents)[0])
        decode_ms[m] = 1e3 * median(times)
    return decode_ms
