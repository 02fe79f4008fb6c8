"""Restarts by Ray Train: preemptions do not count as failures."""

from pathlib import Path
from typing import Any

import pytest

from workflows.training.loop import TrainingInterrupted
from workflows.training.ray_launcher import preemption_error
from workflows.utils.ray_runtime import ray_session, train_run_config


def run_with_errors(folder: Path, error: Exception, times: int) -> int:
    """Run a worker that raises ``error`` in its first attempts, without a budget for failures; return the attempts."""
    from ray.train import FailureConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    attempts = folder / "attempts"
    attempts.mkdir()

    def train(settings: dict[str, Any]) -> None:
        number = len(list(attempts.iterdir()))
        (attempts / str(number)).touch()
        if number < settings["times"]:
            raise settings["error"]

    with ray_session(1):
        TorchTrainer(
            train,
            train_loop_config={"error": error, "times": times},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=train_run_config("a", str(folder), failure_config=FailureConfig(max_failures=0)),
        ).fit()
    return len(list(attempts.iterdir()))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_preemptions_do_not_count_as_failures(tmp_path: Path) -> None:
    from ray.train import TrainingFailedError

    stopped = TrainingInterrupted("stopped after step 3 of 8 (a machine of ranks [0] is about to be reclaimed)")
    (tmp_path / "plain").mkdir()
    (tmp_path / "preempted").mkdir()
    with pytest.raises(TrainingFailedError, match="stopped after step 3"):
        run_with_errors(tmp_path / "plain", stopped, 1)
    assert run_with_errors(tmp_path / "preempted", preemption_error(stopped), 1) == 2
