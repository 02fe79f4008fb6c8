"""Training of one study network in plain PyTorch, resumable at any step."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mfcore.ema import Ema
from mfcore.model.lora import LoRAModel
from mfcore.objectives.losses import Objective, StepInfo, summarize_terms, total_loss
from mfcore.optim import OptimConfig, learning_rate
from mfcore.rng import uniform_rows
from mfcore.types import AVBatch, VelocityModel
from workflows.config.run import EngineConfig
from workflows.study import latent_world
from workflows.study.config import StudyConfig
from workflows.training.engines.base import Engine, NonFiniteError, build_engine
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
        self.objective = objective
        self.seed = seed
        self.steps = steps
        self.ema = Ema(student, config.ema)
        self._teacher = teacher
        self.device = next(student.parameters()).device
        self.optims = {"student": optim}
        nets = {"student": student}
        if "fake" in objective.needs:
            nets["fake"] = copy.deepcopy(student)
            if config.fake.rank is not None:
                nets["fake"] = LoRAModel(self.ema.module, config.fake, seed)
            self.optims["fake"] = replace(optim, lr=optim.lr * config.fake_ratio, final=config.fake_final)
        plain = EngineConfig(kind="torch", workers=1)
        self.engines: dict[str, Engine] = {n: build_engine(net, self.optims[n], plain) for n, net in nets.items()}
        self.models: Mapping[str, VelocityModel] = {n: e.module for n, e in self.engines.items()} | {
            "ema": teacher or self.ema.model  # pyright: ignore[reportAssignmentType]
        }
        self.step = 0

    def train_step(self, *, with_metrics: bool = True) -> dict[str, float]:
        """Run one step of every network; return term means and gradient norms before clipping.

        ``with_metrics=False`` skips the means; each one synchronizes with the GPU.
        """
        batch = training_batch(self.config, self.seed, self.step).to(self.device)
        info = StepInfo(seed=self.seed, step=self.step, stage_step=self.step)
        metrics: dict[str, float] = {}
        student_moves = False
        for terms in self.objective.rounds(self.models, batch, info):
            for name, own in terms.items():
                if not own:  # in the first DMD phase, only the fake score is trained
                    continue
                loss = total_loss(own)
                if not torch.isfinite(loss):
                    raise NonFiniteError(f"step {self.step}: loss of network {name!r} is {float(loss)}")
                self.engines[name].backward(loss)
                if with_metrics:
                    means = summarize_terms(own)
                    metrics |= {key: value for key, value in means.items() if key.count("/") == 1}
            student_moves = student_moves or bool(terms.get("student"))
            if terms.get("fake"):
                metrics |= self._move("fake")
        if student_moves:
            metrics |= self._move("student")
        self.ema.update(self.engines["student"].weights(), self.step)
        self.step += 1
        return metrics

    def _move(self, name: str) -> dict[str, float]:
        lr = learning_rate(self.optims[name], self.step, self.steps)
        return {f"gradient_norm/{name}": self.engines[name].step(lr)}

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


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
