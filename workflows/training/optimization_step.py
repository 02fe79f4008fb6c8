"""One optimizer step of all networks of a stage, shared by training runs and the study."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from mfcore.ema import Ema
from mfcore.objectives.losses import LossTerm, Objective, StepInfo, total_loss
from mfcore.optim import OptimConfig, learning_rate
from mfcore.types import AVBatch, VelocityModel
from workflows.training.engines.base import Engine

STUDENT = "student"  # the network that is trained; the others help to train it

Models = Mapping[str, VelocityModel]


@dataclass(frozen=True, kw_only=True)
class MicroBatchResult:
    """Losses of one round of a micro-batch."""

    micro: AVBatch
    terms: dict[str, list[LossTerm]]  # detached, by network; only networks with a loss

    @property
    def non_finite_losses(self) -> list[str]:
        """Keys of the losses that are not finite."""
        return [t.key for own in self.terms.values() for t in own if not torch.isfinite(t.values).all()]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Losses and updates of one optimizer step."""

    is_finite: bool  # False: no network was updated after the last round, and its gradients are kept
    rounds: list[list[MicroBatchResult]]
    norms: dict[str, float]  # of the gradients before clipping, by network; latest update
    rates: dict[str, float]  # learning rates by network


@dataclass(frozen=True, kw_only=True)
class OptimizationStep:
    """Networks and objective of a stage, and the order of their updates.

    The fake score is updated after each round of the objective. The student is updated once, and its EMA last.
    """

    engines: Mapping[str, Engine]
    optims: Mapping[str, OptimConfig]
    ema: Ema
    objective: Objective
    models: Models  # as the objective expects them
    steps: int  # of the stage
    batch: int  # clips per step over all ranks
    shards: int = 1  # ranks with different clips

    def run(
        self, micros: Sequence[AVBatch], info: StepInfo, is_finite: Callable[[list[MicroBatchResult]], bool]
    ) -> StepResult:
        """Compute losses and gradients of this rank's micro-batches, and update the networks.

        Args:
            micros: Micro-batches of this rank.
            info: Position in the run.
            is_finite: Called after each round with its losses; must return the same on all ranks. False ends the step.
        """
        running = [(micro, self.objective.rounds(self.models, micro, info)) for micro in micros]
        rounds: list[list[MicroBatchResult]] = []
        norms, rates = dict[str, float](), dict[str, float]()
        while results := [found for micro, later in running if (found := self._backward(micro, later))]:
            rounds.append(results)
            if not is_finite(results):
                return StepResult(is_finite=False, rounds=rounds, norms=norms, rates=rates)
            self._update([name for name in results[0].terms if name != STUDENT], info, norms, rates)
        if any(STUDENT in results[0].terms for results in rounds):
            self._update([STUDENT], info, norms, rates)
        self.ema.update(self.engines[STUDENT].weights(), info.stage_step)
        return StepResult(is_finite=True, rounds=rounds, norms=norms, rates=rates)

    def _backward(self, micro: AVBatch, rounds: Iterator[dict[str, list[LossTerm]]]) -> MicroBatchResult | None:
        """Compute the next round of a micro-batch; None if there is none.

        Engines average gradients over the ranks, and shards may differ in size. So each micro-batch is weighted by
        its part of the global batch. Where rows differ in kind, each micro-batch has them in equal parts. Ranks with
        the same clips count as one: the mean over them is the gradient of a whole clip.
        """
        if (found := next(rounds, None)) is None:
            return None
        terms = {name: own for name, own in found.items() if own}  # the student has none in the first DMD phase
        weight = len(micro.samples) * self.shards / self.batch
        for name, own in terms.items():
            self.engines[name].backward(total_loss(own) * weight)
        detached = {name: [replace(t, values=t.values.detach()) for t in own] for name, own in terms.items()}
        return MicroBatchResult(micro=micro, terms=detached)

    def _update(self, names: Sequence[str], info: StepInfo, norms: dict[str, float], rates: dict[str, float]) -> None:
        """Run one optimizer step of each of these networks; record norms and rates."""
        for name in names:
            rates[name] = learning_rate(self.optims[name], info.stage_step, self.steps)
            norms[name] = self.engines[name].step(rates[name])

    def has_non_finite(self, results: Sequence[MicroBatchResult]) -> Tensor:
        """Return a boolean scalar: a loss of the round or a gradient of this rank is not finite."""
        values = [t.values for found in results for own in found.terms.values() for t in own if t.values.numel()]
        flags = [~torch.isfinite(each).all() for each in values]
        return reduce(or_, [*flags, *(engine.has_non_finite_gradient for engine in self.engines.values())])
