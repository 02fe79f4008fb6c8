"""Flow matching by teacher forcing: all chunks of a clip are denoised in one pass, each after the real chunks.

Letters: B samples, K chunks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mfcore.device import to_device_of
from mfcore.flow import TimeConfig, add_noise, training_times, velocity
from mfcore.objectives.losses import LossTerm, SingleRound, StepInfo, chunk_means
from mfcore.rng import normal_rows, uniform_rows
from mfcore.solver import DenoiserContext, history_of
from mfcore.types import AVBatch, NoiseLevels, Streams, VelocityModel


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig:
    """Configuration of teacher forcing, for the stages video, audio and joint."""

    time: TimeConfig


def draw_noise(streams: Streams, seed: int, name: str, samples: Tensor) -> dict[str, Tensor]:
    """Return the noise of every modality; row i depends on (seed, name, samples[i]) only."""
    return {m: normal_rows(seed, f"{name}/{m}", samples, s.latents) for m, s in streams.items()}


def draw_noise_levels(
    config: TimeConfig, streams: Streams, *, seed: int, name: str, samples: Tensor
) -> dict[str, Float[Tensor, "B K"]]:
    """Return a training noise level for each chunk of each sample, per modality."""
    chunk = next(iter(streams.values())).chunk
    chunks = int(chunk[-1] - chunk[0]) + 1
    draws = uniform_rows(seed, name, samples, chunks, 3)
    return {m: to_device_of(training_times(config, draws, m), s.latents) for m, s in streams.items()}


def flow_matching_terms(
    context: DenoiserContext,
    clean: Streams,
    eps: dict[str, Tensor],
    t: NoiseLevels,
    *,
    name: str = "flow_matching",
    weight: float = 1.0,
) -> list[LossTerm]:
    """Return mean (u(x_t, t, t) - (eps - x_0))^2 per sample, chunk and modality, on the history of ``context``."""
    u = context.velocity(add_noise(clean, eps, t), t, t)
    return flow_matching_loss(u, clean, eps, t, name=name, weight=weight)


def flow_matching_loss(
    u: Mapping[str, Tensor],
    clean: Streams,
    eps: dict[str, Tensor],
    t: NoiseLevels,
    *,
    name: str = "flow_matching",
    weight: float = 1.0,
) -> list[LossTerm]:
    """Return the terms of :func:`flow_matching_terms` for computed velocities ``u``."""
    return [
        LossTerm(
            name=name,
            modality=m,
            values=chunk_means((u[m].float() - velocity(s.latents, eps[m])) ** 2, s.chunk),
            weight=weight,
            level=t[m],
        )
        for m, s in clean.items()
    ]


class FlowMatchingObjective(SingleRound):
    """Objective of the stages video, audio and joint."""

    needs = ("student",)

    def __init__(self, config: FlowMatchingConfig) -> None:
        self.config = config

    def __call__(
        self, models: Mapping[str, VelocityModel], batch: AVBatch, info: StepInfo
    ) -> dict[str, list[LossTerm]]:
        """Return the flow-matching terms of the student."""
        context = DenoiserContext(model=models["student"], cond=batch.cond).append_history(
            history_of(batch.streams), None
        )
        eps = draw_noise(batch.streams, info.seed, "flow_matching", batch.samples)
        t = draw_noise_levels(
            self.config.time, batch.streams, seed=info.seed, name="flow_matching/level", samples=batch.samples
        )
        return {"student": flow_matching_terms(context, batch.streams, eps, t)}
