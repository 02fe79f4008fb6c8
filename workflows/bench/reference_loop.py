"""Reference training loops in plain PyTorch, which the other variants are compared with.

They have no engine, checkpoint, log, check for non-finite numbers or data loading.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mfcore.ema import Ema, ema_decay
from mfcore.objectives.losses import LossTerm, Objective, StepInfo, total_loss
from mfcore.objectives.mutual import MutualForcingObjective
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.optim import OptimConfig, build_adamw, learning_rate
from mfcore.types import AVBatch
from workflows.config.run import RunConfig
from workflows.training.networks import build_fake_score, build_initial_network, configure_networks
from workflows.training.objectives import NEVER, build_objective
from workflows.utils import distributed

Rounds = Iterator[dict[str, list[LossTerm]]]


@dataclass(frozen=True, kw_only=True)
class FakeScoreUpdates:
    """Extra updates of the fake score before each step of the student."""

    objective: Objective
    updates: int


class ReferenceLoop:
    """Training loop with AdamW and an EMA of the student; gradients are averaged over the ranks.

    ``teacher`` replaces the EMA weights as the objective's "ema" network.
    """

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        *,
        nets: Mapping[str, nn.Module],
        ema: Ema,
        teacher: nn.Module | None = None,
        fake_score_updates: FakeScoreUpdates | None = None,
    ) -> None:
        self._config = config
        self._objective = objective
        self._fake_score_updates = fake_score_updates
        self._nets = nets
        self._ema = ema
        configure_networks([*nets.values(), teacher or ema.module], config.engine)
        self._models = {"ema": teacher or ema.module, **nets}
        self._optims: dict[str, OptimConfig] = {name: _optim_config(config, name) for name in nets}
        self._optimizers = {name: build_adamw(net, self._optims[name]) for name, net in nets.items()}

    def run(self, batches: Iterable[list[AVBatch]], first: int, steps: int) -> list[LossTerm]:
        """Train from step ``first`` of a stage of ``steps``; return the terms of the last step."""
        seen: list[LossTerm] = []
        for step, micros in enumerate(batches, first):
            if self._fake_score_updates:
                self._update_fake_score(self._fake_score_updates, micros, step, steps)
            rounds = self._start_rounds(self._objective, micros, step, 0)
            seen = more = self._backward(micros, rounds)
            while more:  # every round updates the fake score
                for name in self._nets.keys() - {"student"}:
                    self._update(name, step, steps)
                more = self._backward(micros, rounds)
            self._update("student", step, steps)
            self._update_ema(step)
        return seen

    def _update_fake_score(self, extra: FakeScoreUpdates, micros: Sequence[AVBatch], step: int, steps: int) -> None:
        for draw in range(1, extra.updates + 1):
            self._backward(micros, self._start_rounds(extra.objective, micros, step, draw), only="fake")
            self._update("fake", step, steps)

    def _start_rounds(self, objective: Objective, micros: Sequence[AVBatch], step: int, draw: int) -> list[Rounds]:
        info = StepInfo(seed=self._config.seed + draw, step=step, stage_step=step)
        return [objective.rounds(self._models, micro, info) for micro in micros]

    def _backward(self, micros: Sequence[AVBatch], rounds: Sequence[Rounds], only: str | None = None) -> list[LossTerm]:
        """Compute gradients of the next round; return its terms, empty after the last round."""
        seen: list[LossTerm] = []
        rows, dtype = sum(len(micro.samples) for micro in micros), self._config.engine.autocast
        for micro, micro_rounds in zip(micros, rounds, strict=True):
            with torch.autocast(distributed.local_device().type, dtype, enabled=dtype is not None):
                terms = next(micro_rounds, dict[str, list[LossTerm]]())
            for name, own in terms.items():
                if only in (None, name):
                    (total_loss(own) * (len(micro.samples) / rows)).backward()
                    seen += own
        return seen

    def _update(self, name: str, step: int, steps: int) -> None:
        net = self._nets[name]
        optimizer = self._optimizers[name]
        config = self._optims[name]
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        if distributed.get_world_size() > 1:
            all_reduce_mean(gradients)
        nn.utils.clip_grad_norm_(net.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, steps)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def _update_ema(self, step: int) -> None:
        decay = ema_decay(self._ema.config, step)
        student = self._nets["student"].parameters()
        for average, weight in zip(self._ema.module.parameters(), student, strict=True):
            average.lerp_(weight, 1 - decay)


def _optim_config(config: RunConfig, name: str) -> OptimConfig:
    return config.fake_optim if name == "fake" and config.fake_optim else config.optim


def all_reduce_mean(gradients: list[Tensor]) -> None:
    """Average gradients over the ranks in place, as one flat vector (one message)."""
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def reference_loop(config: RunConfig, student: nn.Module | None = None) -> ReferenceLoop:
    """Return the loop of the configured stage. ``student``: on this rank's device; None: an initialized network."""
    student = student or build_initial_network(config, {}).to(distributed.local_device())
    ema = Ema(student, config.ema)
    nets = {"student": student}
    if config.fake_optim:
        nets["fake"] = build_fake_score(config, student, ema)
    return ReferenceLoop(config, build_objective(config), nets=nets, ema=ema)


def full_copy_loop(config: RunConfig) -> RunConfig:
    """Return the mutual stage's configuration with a full copy as fake score."""
    assert isinstance(config.objective, MutualConfig)
    return replace(
        config, fake=replace(config.fake, rank=None), objective=replace(config.objective, share_history=False)
    )


def dmd_loop(config: RunConfig, updates: int, student: nn.Module | None = None) -> ReferenceLoop:
    """Return the loop of DMD with self-forcing and a separate frozen teacher.

    Every row rolls out its own history. The fake score is a full copy of the student with ``updates`` steps per
    student step (Self-Forcing: five). ShortCut and flow matching are off.
    """
    config = full_copy_loop(config)
    assert isinstance(config.objective, MutualConfig)
    rows = ("free",) * len(config.objective.rows)
    dmd = replace(config.objective, rows=rows, shortcut_weight=0.0, dmd_weight=1.0, fake_updates=1)
    student = student or build_initial_network(config, {}).to(distributed.local_device())
    return ReferenceLoop(
        config,
        MutualForcingObjective(dmd),
        nets={"student": student, "fake": copy.deepcopy(student)},
        ema=Ema(student, config.ema),
        teacher=copy.deepcopy(student).requires_grad_(False),
        fake_score_updates=FakeScoreUpdates(
            objective=MutualForcingObjective(replace(dmd, dmd_from=NEVER)), updates=updates - 1
        ),
    )
