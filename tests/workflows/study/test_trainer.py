"""Golden losses, gradient norms and weights of study trainings, to detect any change of numbers.

Four steps of each method, in full (``float.hex``), in ``tests/golden/study.json``. After an intended change, check the
size of the difference, write a new file and explain the reason:

    python -m tests.workflows.study.test_trainer
"""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mfcore.model.transformer import build_model
from mfcore.objectives.flow_matching import FlowMatchingConfig, FlowMatchingObjective
from tests.helpers.small_study import small_study
from workflows.study.methods import METHODS, Method
from workflows.study.trainer import Trainer

GOLDEN = Path(__file__).parents[2] / "golden" / "study.json"
TOLERANCE = 1e-5  # relative: processors sum in different orders, and networks run on their own output
MORE_UPDATES = "two updates of the fake score"
NAMES = ("joint", *(name for name in METHODS if METHODS[name].key < "h"), "mutual", "low_rank", MORE_UPDATES)


def build(name: str) -> Trainer:
    """Return the trainer of a method from a random network."""
    config = small_study()
    student = build_model(config.model, 0)
    if name == "joint":
        objective = FlowMatchingObjective(FlowMatchingConfig(time=config.method.time))
        return Trainer(config, objective, student, seed=0, steps=config.steps, optim=config.joint_optim)
    method: Method = METHODS["mutual" if name == MORE_UPDATES else name]
    config = method.change(config)
    if name == MORE_UPDATES:
        config = replace(config, method=replace(config.method, fake_updates=2))
    frozen = copy.deepcopy(student).requires_grad_(False) if method.teacher == "frozen" else None
    objective = method.objective(config.method)
    return Trainer(config, objective, student, seed=1, steps=config.steps, optim=config.optim, teacher=frozen)


def numbers(name: str) -> list[dict[str, str]]:
    """Return the metrics of each step, then the norms of the final weights."""
    torch.set_num_threads(1)
    trainer = build(name)
    steps = [trainer.train_step() for _ in range(trainer.steps)]
    final = {n: sum(float(w.norm()) for _, w in e.weights()) for n, e in trainer.engines.items()}
    final["ema"] = sum(float(w.norm()) for _, w in trainer.ema.weights())
    return [{key: float(value).hex() for key, value in row.items()} for row in (*steps, final)]


@pytest.mark.parametrize("name", NAMES)
def test_numbers_equal_the_stored_ones(name):
    kept, now = json.loads(GOLDEN.read_text())[name], numbers(name)
    for expected, row in zip(kept, now, strict=True):
        assert {k: float.fromhex(v) for k, v in row.items()} == pytest.approx(
            {k: float.fromhex(v) for k, v in expected.items()}, rel=TOLERANCE
        ), f"{name} moved. If it was meant to: python -m tests.workflows.study.test_trainer"


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: numbers(name) for name in NAMES}, indent=1) + "\n")
    print(f"wrote {GOLDEN}")
