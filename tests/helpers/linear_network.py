"""Linear network and batches for many steps, with the difficulties of real ones.

Two calls in one graph, a call without gradient between them, and a parameter outside all losses.
"""

import torch
from torch import Tensor, nn

from mfcore.objectives.losses import LossTerm, SingleRound, StepInfo, chunk_means
from mfcore.rng import generator, normal_rows
from mfcore.types import AVBatch, Condition, NoiseLevels, Stream, Streams

CHUNKS, LATENTS_PER_CHUNK, CHANNELS = 2, 4, 3


class LinearVelocity(nn.Module):
    """u = W [x, t, r] + b, the same for every latent of every modality."""

    def __init__(self, channels: int = CHANNELS, seed: int = 0) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels + 2, 7)
        self.out = nn.Linear(7, channels)
        self.unused = nn.Parameter(torch.ones(5, 3))
        g = generator(seed, "toy", 0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g) * 0.3

    def forward(
        self,
        x: Streams,
        t: NoiseLevels,
        r: NoiseLevels,
        cond: Condition,
        *,
        cache: None = None,
        store: bool = False,
        trust: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], None]:
        del cond, cache, store, trust
        return {m: self._one(s, t[m], r[m]) for m, s in x.items()}, None

    def _one(self, s: Stream, t: Tensor, r: Tensor) -> Tensor:
        times = torch.stack([t, r], -1)[:, s.chunk]
        return self.out(torch.tanh(self.hidden(torch.cat([s.latents, times], -1))))


class SelfTaught(SingleRound):
    """Regression with a call under no_grad and two calls with gradient before one backward; "fake" has its own loss."""

    needs = ("fake", "ema")

    def __call__(self, models, batch: AVBatch, info: StepInfo) -> dict[str, list[LossTerm]]:
        s = batch.streams["audio"]
        eps = normal_rows(info.seed, "eps", batch.samples, s.latents)
        t = {"audio": torch.full((len(batch.samples), batch.chunks), 0.5)}
        x = {"audio": s.with_latents(0.5 * s.latents + 0.5 * eps)}
        zero = {"audio": torch.zeros_like(t["audio"])}
        with torch.no_grad():
            taught = models["ema"](x, t, zero, batch.cond)[0]["audio"] + models["fake"](x, t, t, batch.cond)[0]["audio"]
            models["student"](x, t, t, batch.cond)
        u = models["student"](x, t, t, batch.cond)[0]["audio"]
        again = models["student"]({"audio": s.with_latents(u)}, t, zero, batch.cond)[0]["audio"]
        fake = models["fake"]({"audio": s.with_latents(u.detach())}, t, t, batch.cond)[0]["audio"]
        values = chunk_means((u - (eps - s.latents)) ** 2, s.chunk)
        return {
            "student": [
                LossTerm(name="fm", modality="audio", values=values, level=t["audio"]),
                LossTerm(name="self", modality="audio", values=chunk_means((again - taught) ** 2, s.chunk), weight=0.5),
            ],
            "fake": [LossTerm(name="fake", modality="audio", values=chunk_means((fake - eps) ** 2, s.chunk))],
        }


class FlowOnly(SingleRound):
    """Plain regression of the velocity."""

    needs = ()

    def __call__(self, models, batch: AVBatch, info: StepInfo) -> dict[str, list[LossTerm]]:
        s = batch.streams["audio"]
        eps = normal_rows(info.seed, "eps", batch.samples, s.latents)
        t = {"audio": torch.full((len(batch.samples), batch.chunks), 0.5)}
        u = models["student"]({"audio": s.with_latents(0.5 * (s.latents + eps))}, t, t, batch.cond)[0]["audio"]
        values = chunk_means((u - (eps - s.latents)) ** 2, s.chunk)
        return {"student": [LossTerm(name="fm", modality="audio", values=values, level=t["audio"])]}


def toy_batch(first: int, rows: int) -> AVBatch:
    """Return rows ``first`` to ``first + rows - 1`` of an endless sequence of samples."""
    samples = torch.arange(first, first + rows)
    n = CHUNKS * LATENTS_PER_CHUNK
    latents = normal_rows(1, "toy data", samples, torch.empty(1, n, CHANNELS)) * 0.5 + 1
    stream = Stream(
        latents=latents,
        times=torch.arange(n, dtype=torch.float64) / 8,
        chunk=torch.arange(CHUNKS).repeat_interleave(LATENTS_PER_CHUNK),
    )
    none = torch.zeros(rows, 0, 4)
    cond = Condition(
        caption=none,
        caption_mask=torch.zeros(rows, 0, dtype=torch.bool),
        words=none,
        words_mask=torch.zeros(rows, 0, dtype=torch.bool),
        word_times=torch.zeros(rows, 0, 2, dtype=torch.float64),
        first_frame=None,
        voice=latents[:, :LATENTS_PER_CHUNK],
        voice_mask=torch.zeros(rows, dtype=torch.bool),
    )
    return AVBatch(streams={"audio": stream}, cond=cond, samples=samples)
