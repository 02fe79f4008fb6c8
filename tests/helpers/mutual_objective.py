"""Networks, batches and recorded calls for tests of the mutual objective."""

import itertools
from dataclasses import dataclass, field, replace

import torch

from mfcore.flow import TimeConfig
from mfcore.model.transformer import AVTransformer
from mfcore.objectives.losses import LossTerm, StepInfo
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.types import AUDIO, VIDEO, AVBatch, Condition, NoiseLevels, Streams, VelocityModel
from tests.helpers.tiny_model import batch, network

CONFIG = MutualConfig(
    time=TimeConfig(shift={VIDEO: 2.0, AUDIO: 1.0}), finest=3, strengths=(1, 2), rollout_steps=(1, 2), guidance=2.0
)
Models = dict[str, AVTransformer]


def trio() -> Models:
    return {name: network(layers=1, seed=i) for i, name in enumerate(("student", "ema", "fake"))}


def four(first: int = 0) -> AVBatch:
    """Return one row of each kind of the cycle: real, free, coupled, free."""
    data = batch(rows=4, chunks=3)
    return replace(data, samples=data.samples + first)


def at_step(step: int) -> StepInfo:
    return StepInfo(seed=0, step=step, stage_step=step)


def found(terms: list[LossTerm]) -> dict[str, int]:
    """Return the number of rows of each term by name."""
    return {t.name: t.values.shape[0] for t in terms}


@dataclass(frozen=True)
class Call:
    """Arguments of a network call; without ``x``, the call writes the sink."""

    x: Streams
    t: NoiseLevels
    r: NoiseLevels
    cond: Condition
    store: bool
    trust: torch.Tensor | None

    @property
    def rows(self) -> int:
        return self.cond.caption.shape[0]

    @property
    def chunks(self) -> int:
        return len(self.x[AUDIO].chunk.unique()) if self.x else 0

    def inputs(self) -> list[tuple]:
        """Return the inputs of every row and chunk as comparable values."""
        if not self.x:
            return [("sink", as_numbers(self.cond.first_frame[i])) for i in range(self.rows)]
        flags = as_numbers(self.cond.caption_mask, self.cond.words_mask)
        inputs = []
        for row, chunk in itertools.product(range(self.rows), range(self.chunks)):
            parts = itertools.chain(*(self._chunk(m, row, chunk) for m in self.x))
            inputs.append((self.store, flags, as_numbers(*parts)))
        return inputs

    def _chunk(self, m: str, row: int, chunk: int) -> tuple[torch.Tensor, ...]:
        stream = self.x[m]
        in_chunk = stream.chunk == stream.chunk[0] + chunk
        return stream.latents[row, in_chunk], self.t[m][row, chunk], self.r[m][row, chunk]


@dataclass
class Watched:
    """Network that records its calls."""

    inner: VelocityModel
    calls: list[Call] = field(default_factory=list)

    def __call__(
        self, x: Streams, t: NoiseLevels, r: NoiseLevels, cond: Condition, *, cache=None, store=False, trust=None
    ) -> tuple:
        assert not (store and any(s.latents.requires_grad for s in x.values()))  # history is data
        self.calls.append(Call(x=x, t=t, r=r, cond=cond, store=store, trust=trust))
        return self.inner(x, t, r, cond, cache=cache, store=store, trust=trust)

    @property
    def history(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Written history of whole clips: latents and labels (rollouts write chunk by chunk)."""
        return [(c.x[VIDEO].latents, c.trust) for c in self.calls if c.store and c.chunks > 1]

    @property
    def sinks(self) -> int:
        """Number of rows with a written sink."""
        return sum(c.rows for c in self.calls if not c.x)

    @property
    def written(self) -> int:
        """Number of rows x chunks with written keys and values."""
        return sum(c.rows * c.chunks for c in self.calls if c.x and c.store)

    @property
    def asked(self) -> int:
        """Number of rows x chunks with an evaluated velocity."""
        return sum(c.rows * c.chunks for c in self.calls if c.x and not c.store)


def rows_of(terms: list[LossTerm]) -> dict[str, torch.Tensor]:
    return {t.key: t.values.detach() for t in terms}


def as_numbers(*tensors: torch.Tensor) -> tuple:
    return tuple(float(v) for tensor in tensors for v in tensor.detach().flatten())
