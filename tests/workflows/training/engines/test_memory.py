"""Memory of a mutual run between steps: the low-rank fake score against a full copy of the network."""

import pytest
from torch import Tensor

from mfcore.objectives.losses import StepInfo, total_loss
from tests.helpers.two_rank_training import RunSpec, RunTrainer, rows_of_step
from workflows.config.run import EngineConfig


def state_bytes(rank: int | None) -> int:
    """Return the bytes of weights, EMA, gradients and moments after one step, each storage counted once."""
    trainer = RunTrainer(RunSpec(stage="mutual", engine=EngineConfig(kind="torch", workers=1), rank=rank))
    models = {"ema": trainer.ema.model} | {name: e.module for name, e in trainer.engines.items()}
    terms = trainer.objective(models, rows_of_step(trainer.spec, 0)[0], StepInfo(seed=0, step=0, stage_step=0))
    tensors: list[Tensor] = []
    for name, engine in trainer.engines.items():
        engine.backward(total_loss(terms[name]))
    for net in (*trainer.nets.values(), trainer.ema.module):
        for p in net.parameters():
            tensors += [p, *([p.grad] if p.grad is not None else [])]
    sizes = {t.data_ptr(): t.nbytes for t in tensors}
    for engine in trainer.engines.values():
        engine.step(1e-4)
    moments = [
        t.nbytes
        for e in trainer.engines.values()
        for k, t in e.state_shard().tensors.items()
        if k.startswith("exp_avg")
    ]
    return sum(sizes.values()) + sum(moments)


@pytest.mark.timeout(300)
def test_a_low_rank_fake_score_needs_at_most_six_tenths():
    """At width 32, rank 1 has the share of weights of the presets (rank = width / 32)."""
    assert state_bytes(1) <= 0.6 * state_bytes(None)
