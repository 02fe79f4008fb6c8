"""The optimization step that training runs and the study share."""

import math

import pytest
import torch

from mfcore.ema import Ema, EmaConfig
from mfcore.errors import UserInputError
from mfcore.model.transformer import build_model
from mfcore.objectives.losses import StepInfo
from tests.helpers.linear_network import LinearVelocity, SelfTaught, toy_batch
from tests.helpers.small_study import small_study
from tests.helpers.toy_training_run import OPTIM, Toy, toy_run
from workflows.config.run import EngineConfig
from workflows.study.methods import METHODS
from workflows.study.trainer import Trainer
from workflows.training.engines.base import NonFiniteError, build_engine
from workflows.training.optimization_step import OptimizationStep

INFO = StepInfo(seed=0, step=0, stage_step=0)


class FakeScoreOnly(SelfTaught):
    """Two rounds of the fake score; the student has no loss, as in the first DMD phase."""

    def rounds(self, models, batch, info):
        for _ in range(2):
            yield {"student": [], "fake": self(models, batch, info)["fake"]}


class NoTerms(SelfTaught):
    def rounds(self, models, batch, info):
        yield {"student": [], "fake": []}


def build(objective) -> OptimizationStep:
    nets = {name: LinearVelocity(seed=i) for i, name in enumerate(("student", "fake"))}
    ema = Ema(nets["student"], EmaConfig(decay=0.9))
    engines = {name: build_engine(net, OPTIM, EngineConfig(kind="torch", workers=1)) for name, net in nets.items()}
    models = {"ema": ema.model} | {name: engine.module for name, engine in engines.items()}
    optims = dict.fromkeys(engines, OPTIM)
    return OptimizationStep(
        engines=engines, optims=optims, ema=ema, objective=objective, models=models, steps=10, batch=4
    )


def weights(step: OptimizationStep) -> dict[str, torch.Tensor]:
    parts = {"ema": step.ema, **step.engines}
    return {name: torch.cat([w.flatten() for _, w in part.weights()]).clone() for name, part in parts.items()}


def test_networks_without_a_loss_keep_their_weights():
    step = build(FakeScoreOnly())
    before = weights(step)
    result = step.run([toy_batch(0, 2), toy_batch(2, 2)], INFO, lambda results: True)
    after = weights(step)
    assert result.is_finite and len(result.rounds) == 2
    assert result.norms.keys() == result.rates.keys() == {"fake"}
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"fake"}


def test_student_moves_after_all_rounds_and_the_average_last():
    step = build(SelfTaught())
    before = weights(step)
    result = step.run([toy_batch(0, 4)], INFO, lambda results: True)
    after = weights(step)
    assert list(result.norms) == ["fake", "student"]
    keep = 0.1  # of the first update, by the warm-up of the average
    assert torch.allclose(after["ema"], keep * before["ema"] + (1 - keep) * after["student"])


def test_a_round_that_is_not_finite_updates_nothing():
    step = build(SelfTaught())
    before = weights(step)
    batch = toy_batch(0, 4)
    batch.streams["audio"].latents[1] = math.nan
    found = []
    result = step.run([batch], INFO, lambda results: bool(found.append(step.has_non_finite(results))))
    assert bool(found[0]) and not result.is_finite and not result.norms
    assert result.rounds[0][0].non_finite_losses == ["fm/audio", "self/audio", "fake/audio"]
    assert all(torch.equal(w, before[name]) for name, w in weights(step).items())


def test_training_without_any_loss_is_rejected(tmp_path):
    error = toy_run(Toy(root=str(tmp_path), kind="torch", objective=NoTerms)).error
    assert isinstance(error, UserInputError)
    assert "stage audio, step 0: the objective returned no loss term. Check its weights and rows" in str(error)


def test_study_stops_at_a_loss_that_is_not_finite():
    config = small_study()
    student = build_model(config.model, 0)
    next(student.parameters()).data.fill_(math.nan)
    objective = METHODS["teacher_forcing"].objective(config.method)
    trainer = Trainer(config, objective, student, seed=0, steps=4, optim=config.optim)
    with pytest.raises(NonFiniteError, match=r"step 0: flow_matching/video.* not finite\. Lower"):
        trainer.train_step()
    assert trainer.step == 0
