"""Named per-sample loss terms, and the only place where they are weighted and averaged."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mfcore.device import to_device_of
from mfcore.errors import UserInputError
from mfcore.types import AVBatch, VelocityModel

LEVEL_BINS = 4
CHUNK_THIRDS = ("first", "middle", "last")  # part of the clip that contains a chunk


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One loss of one modality: mean over the elements of each chunk, not averaged over samples and chunks."""

    name: str  # e.g. "flow_matching"
    modality: str
    values: Float[Tensor, "B K"]
    weight: float = 1.0
    level: Float[Tensor, "B K"] | None = None  # noise level, for reporting by bin

    @property
    def key(self) -> str:
        """Name of the term in logs."""
        return f"{self.name}/{self.modality}"


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """Position in the run; every draw of an objective is a function of this and of sample numbers."""

    seed: int
    step: int  # optimizer steps before this one
    stage_step: int  # the same, counted from the start of the stage


class Objective(Protocol):
    """Loss terms of a stage.

    ``models`` always contains "student", and "ema" and "fake" if ``needs`` names them.
    """

    @property
    def needs(self) -> Sequence[str]:
        """Names of the networks that the objective evaluates."""
        ...

    def __call__(
        self, models: Mapping[str, VelocityModel], batch: AVBatch, info: StepInfo
    ) -> dict[str, list[LossTerm]]:
        """Return the terms of each trained network by name: "student", and "fake" for a fake score."""
        ...

    def rounds(
        self, models: Mapping[str, VelocityModel], batch: AVBatch, info: StepInfo
    ) -> Iterator[dict[str, list[LossTerm]]]:
        """Yield the terms of the call, then those of further updates of some networks in the same step.

        Each round is computed lazily, after the update of the round before it.
        """
        ...


class SingleRound:
    """Rounds of an objective with one update per network and step."""

    def rounds(
        self: Objective, models: Mapping[str, VelocityModel], batch: AVBatch, info: StepInfo
    ) -> Iterator[dict[str, list[LossTerm]]]:
        """Yield the terms of the call."""
        yield self(models, batch, info)


def chunk_means(squares: Tensor, chunk: Int64[Tensor, " n"]) -> Float[Tensor, "B K"]:
    """Return the mean over the elements of each chunk of a (B, n, C, ...) tensor, in float32."""
    per_latent = squares.float().flatten(2).mean(-1)
    counts = chunk.unique_consecutive(return_counts=True)[1]  # on the CPU, without a GPU synchronization
    if bool((counts == counts[0]).all()):
        return per_latent.unflatten(1, (len(counts), -1)).mean(-1)
    sums = per_latent.new_zeros(per_latent.shape[0], len(counts))
    return sums.index_add(1, to_device_of(chunk - chunk[0], per_latent), per_latent) / to_device_of(counts, per_latent)


def total_loss(terms: Iterable[LossTerm]) -> Tensor:
    """Return the scalar loss: sum over terms of weight * mean over samples and chunks."""
    parts = [term.weight * term.values.mean() for term in terms if term.values.numel()]
    if not parts:
        raise UserInputError("the objective returned no loss term: check its weights and rows")
    return torch.stack(parts).sum()


def summarize_terms(terms: Iterable[LossTerm]) -> dict[str, float]:
    """Return unweighted means by term and modality, noise bin (if the level is known) and third of the clip.

    ``KEY``, ``KEY/t0`` (clean) .. ``KEY/t3`` (noise), ``KEY/chunk_first``, ``KEY/chunk_middle``, ``KEY/chunk_last``.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for term in terms:
        if not term.values.numel():
            continue
        values = term.values.detach()
        parts[term.key].append(values.flatten())
        if term.level is not None:
            bins = (term.level.to(values.device) * LEVEL_BINS).long().clamp(0, LEVEL_BINS - 1)
            for b in range(LEVEL_BINS):
                parts[f"{term.key}/t{b}"].append(values[bins == b])
        third = chunk_thirds(values.shape[1]).to(values.device)
        for b, name in enumerate(CHUNK_THIRDS):
            parts[f"{term.key}/chunk_{name}"].append(values[:, third == b].flatten())
    whole = {key: torch.cat(pieces) for key, pieces in parts.items()}
    return {key: float(values.mean()) for key, values in whole.items() if values.numel()}


def chunk_thirds(chunks: int) -> Int64[Tensor, " K"]:
    """Return the index into ``CHUNK_THIRDS`` of every chunk; two chunks are the first and the last."""
    return (torch.arange(chunks) * 2 / max(1, chunks - 1)).round().long()
