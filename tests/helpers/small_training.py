import pytest
import torch

from workflows.training import worker
from workflows.training.train import train_stage

SMALL = (
    "model.dim=32",
    "model.layers=1",
    "model.heads=2",
    "model.window_chunks=2",
    "data.batch=4",
    "data.chunks=[2,3]",
    "data.held_out=0.2",
    "engine.kind=torch",
    "engine.workers=1",
    "steps=8",
    "optim.lr=3e-3",
    "optim.warm_up=2",
    "log_every=2",
    "eval_every=4",
    "checkpoint.every=16",
)
EVERY_PART_AT_ONCE = (
    "steps=4",
    "objective.real_until=1",
    "objective.free_from=2",
    "objective.fake_from=2",
    "objective.dmd_from=3",
    "objective.rollout_steps=[2]",
)


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch):
    """Log to JSON lines only: MLflow has separate tests."""
    monkeypatch.setenv("MFCTL_TRACKER", "json")
    torch.set_num_threads(1)


def run(stage, runs, data, *extra, sets=(), **kwargs):
    return train_stage(stage, data=data, sets=(*SMALL, *sets), runs_dir=runs, launch=worker.run_worker, **kwargs)


def killed_at(step: int):
    """Return a launcher that dies while it prepares the batch of ``step``."""

    def launch(job):
        class Dying(worker.TrainingBatchLoader):
            def micro_batches(self, number):
                if number == step:
                    raise KeyboardInterrupt
                return super().micro_batches(number)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker, "TrainingBatchLoader", Dying)
            worker.run_worker(job)

    return launch
