"""Training of one study network in plain PyTorch, resumable at any step."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mfcore.ema import Ema
from mfcore.model.lora import LoRAModel
from mfcore.objectives.losses import Objective, StepInfo, summarize_terms
from mfcore.optim import OptimConfig
from mfcore.rng import uniform_rows
from mfcore.types import AVBatch
from workflows.config.run import EngineConfig
from workflows.study import latent_world
from workflows.study.config import StudyConfig
from workflows.training.engines.base import Engine, NonFiniteError, build_engine
from workflows.training.optimization_step import OptimizationStep, StepResult
from workflows.utils.json_io import read_json, write_json

STEP_FILE = "step.json"  # last saved step
NO_TRANSCRIPT_SHARE = 0.15  # share of clips without transcript, for guidance


def training_batch(config: StudyConfig, seed: int, step: int) -> AVBatch:
    """Return the clips of a step, a function of (seed, step); every clip is used once."""
    samples = torch.arange(config.batch) + step * config.batch
    pick = float(uniform_rows(seed, "study/length", [step], 1))
    batch = latent_world.sample_clips(seed, samples, config.chunks[int(pick * len(config.chunks))], config.voices).batch
    without_words = uniform_rows(seed, "study/silent", samples, 1)[:, 0] < NO_TRANSCRIPT_SHARE
    return AVBatch(
        streams=batch.streams, cond=batch.cond.drop(caption=without_words, words=without_words), samples=samples
    )


class Trainer:
    """Student, its EMA, and a fake score if the objective needs one.

    ``teacher`` replaces the EMA weights as the objective's "ema" network.
    """

    def __init__(
        self,
        config: StudyConfig,
        objective: Objective,
        student: nn.Module,
        *,
        seed: int,
        steps: int,
        optim: OptimConfig,
        teacher: nn.Module | None = None,
    ) -> None:
        self.config = config
        self.seed = seed
        self.steps = steps
        self.ema = Ema(student, config.ema)
        self._teacher = teacher
        self.device = next(student.parameters()).device
        optims = {"student": optim}
        nets = {"student": student}
        if "fake" in objective.needs:
            nets["fake"] = copy.deepcopy(student)
            if config.fake.rank is not None:
                nets["fake"] = LoRAModel(self.ema.module, config.fake, seed)
            optims["fake"] = replace(optim, lr=optim.lr * config.fake_ratio, final=config.fake_final)
        plain = EngineConfig(kind="torch", workers=1)
        self.engines: dict[str, Engine] = {n: build_engine(net, optims[n], plain) for n, net in nets.items()}
        average: Any = teacher or self.ema.model
        self._optimization = OptimizationStep(
            engines=self.engines,
            optims=optims,
            ema=self.ema,
            objective=objective,
            models={"ema": average} | {n: e.module for n, e in self.engines.items()},
            steps=steps,
            batch=config.batch,
        )
        self.step = 0

    def train_step(self, *, with_metrics: bool = True) -> dict[str, float]:
        """Run one step of every network; return term means and gradient norms before clipping.

        ``with_metrics=False`` returns nothing: each mean synchronizes with the GPU. Raises NonFiniteError.
        """
        batch = training_batch(self.config, self.seed, self.step).to(self.device)
        info = StepInfo(seed=self.seed, step=self.step, stage_step=self.step)
        result = self._optimization.run([batch], info, lambda results: not self._optimization.has_non_finite(results))
        if not result.is_finite:
            losses = ", ".join(result.rounds[-1][0].non_finite_losses)
            raise NonFiniteError(f"step {self.step}: {losses or 'a gradient'} is not finite. Lower the learning rate")
        self.step += 1
        return _metrics(result) if with_metrics else {}

    def state_bytes(self) -> int:
        """Return the bytes of weights, gradients and moments of all networks.

        All are float32. A low-rank fake score counts its low-rank terms only.
        """
        trained = sum(w.numel() for e in self.engines.values() for _, w in e.weights())
        frozen = [self.ema.module, *([self._teacher] if self._teacher is not None else [])]
        return 4 * (4 * trained + sum(p.numel() for net in frozen for p in net.parameters()))

    def save(self, folder: Path) -> None:
        """Write the state of all networks, then the step file; delete the previous state."""
        state = folder / f"state-{self.step:06d}"
        state.mkdir(parents=True, exist_ok=True)
        for name, engine in self.engines.items():
            engine.state_shard().write(state, name)
        save_file({n: w.detach().cpu().contiguous() for n, w in self.ema.weights()}, state / "ema.safetensors")
        write_json(folder / STEP_FILE, {"step": self.step})
        for old in folder.glob("state-*"):
            if old != state:
                _remove(old)

    def resume(self, folder: Path) -> None:
        """Restore the last saved state in ``folder``, if there is one."""
        if not (folder / STEP_FILE).exists():
            return
        step = read_json(folder / STEP_FILE)["step"]
        state = folder / f"state-{step:06d}"
        if not (state / "ema.safetensors").exists():
            return  # the large files were deleted
        self.step = step
        self.ema.load_state_dict(load_file(state / "ema.safetensors", device=str(self.device)))
        for name, engine in self.engines.items():
            engine.load(state, name)


def _metrics(result: StepResult) -> dict[str, float]:
    """Return the means of all terms, of the latest round with each term, and the gradient norms."""
    metrics: dict[str, float] = {}
    for (found,) in result.rounds:
        for own in found.terms.values():
            metrics |= {key: value for key, value in summarize_terms(own).items() if key.count("/") == 1}
    return metrics | {f"gradient_norm/{name}": norm for name, norm in result.norms.items()}


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
