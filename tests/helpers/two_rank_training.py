"""Training of all stages in milliseconds, to compare engines number by number."""

import copy
from dataclasses import dataclass, replace

import torch

from mfcore.ema import Ema, EmaConfig
from mfcore.flow import TimeConfig
from mfcore.model.lora import FakeScoreConfig, LoRAModel
from mfcore.objectives.flow_matching import FlowMatchingConfig, FlowMatchingObjective
from mfcore.objectives.losses import StepInfo, total_loss
from mfcore.objectives.mutual import MutualForcingObjective
from mfcore.objectives.mutual_config import MutualConfig
from mfcore.optim import OptimConfig
from mfcore.types import AUDIO, VIDEO, AVBatch
from tests.helpers.tiny_model import batch, network
from workflows.config.run import EngineConfig
from workflows.training.engines.base import build_engine
from workflows.utils import distributed

TIME = TimeConfig(shift={VIDEO: 2.0, AUDIO: 1.0})
STAGES = {"video": (VIDEO,), "audio": (AUDIO,), "joint": (VIDEO, AUDIO), "mutual": (VIDEO, AUDIO)}
OBJECTIVE = MutualConfig(time=TIME, finest=3, strengths=(1, 2), rollout_steps=(1, 2), guidance=2.0)
ROWS, CHUNKS = 8, 2  # of the global batch


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run: a stage, its engine and its fake score."""

    stage: str
    engine: EngineConfig
    rank: int | None = None  # of the fake score; None: full copy
    micros: int = 1  # backward passes per step
    optim: OptimConfig = OptimConfig(lr=1e-3, clip=0.5, warm_up=0)
    objective: MutualConfig = OBJECTIVE  # of the mutual stage


def rows_of_step(spec: RunSpec, step: int) -> list[AVBatch]:
    """Return this rank's micro-batches: whole cycles of row kinds each."""
    whole = batch(ROWS, CHUNKS, *STAGES[spec.stage], seed=step)
    whole = replace(whole, samples=torch.arange(ROWS) + step * ROWS)
    share = ROWS // distributed.get_world_size() // spec.micros
    first = distributed.get_rank() * share * spec.micros
    return [whole.rows(slice(first + i * share, first + (i + 1) * share)) for i in range(spec.micros)]


class RunTrainer:
    """Networks of a run, and its steps."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        student = network(*STAGES[spec.stage], layers=1)
        student.recompute = spec.engine.recompute
        self.ema = Ema(student, EmaConfig(decay=0.9), spec.engine.autocast)
        nets = {"student": student}
        if spec.stage == "mutual":
            low = FakeScoreConfig(rank=spec.rank, gain=4)
            nets["fake"] = LoRAModel(self.ema.module, low, 0) if spec.rank else copy.deepcopy(student)
        self.nets = nets
        self.engines = {name: build_engine(net, spec.optim, spec.engine) for name, net in nets.items()}
        if spec.rank:
            self.ema.storage = self.engines["fake"].frozen_weight_access
        flow = FlowMatchingObjective(FlowMatchingConfig(time=TIME))
        self.objective = MutualForcingObjective(spec.objective) if spec.stage == "mutual" else flow

    def step(self, step: int) -> list[float]:
        """Run one step; return mean losses over the ranks and gradient norms by network."""
        models = {"ema": self.ema.model} | {name: e.module for name, e in self.engines.items()}
        info = StepInfo(seed=0, step=step, stage_step=step)
        losses = dict.fromkeys(self.engines, torch.zeros(()))
        micros = rows_of_step(self.spec, step)
        rounds = [self.objective.rounds(models, micro, info) for micro in micros]
        for turn in range(self.spec.objective.fake_updates):
            if turn:
                self.engines["fake"].step(self.spec.optim.lr)
            for mine in rounds:
                for name, terms in next(mine).items():
                    loss = total_loss(terms) / self.spec.micros
                    self.engines[name].backward(loss)
                    losses[name] = losses[name] + loss.detach()
        numbers = [float(distributed.all_reduce_mean(loss.double())) for loss in losses.values()]
        numbers += [engine.step(self.spec.optim.lr) for engine in self.engines.values()]
        self.ema.update(self.engines["student"].weights(), step)
        return numbers


def train(spec: RunSpec, steps: int) -> torch.Tensor:
    """Return losses and gradient norms, (steps, 2 * networks)."""
    trainer = RunTrainer(spec)
    return torch.tensor([trainer.step(i) for i in range(steps)], dtype=torch.float64)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest relative difference."""
    return float(((a - b).abs() / b.abs()).max())
