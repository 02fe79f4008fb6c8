"""Golden losses of every stage, to detect any change of numbers.

Ten steps of each stage on one plain process: losses and gradient norms in full (``float.hex``), in ``tests/golden``.
After an intended change, check the size of the difference, write new files and explain the reason:

    python -m tests.workflows.training.test_golden_losses
"""

import json
from pathlib import Path

import pytest
import torch

from mfcore.optim import OptimConfig
from tests.helpers.two_rank_training import RunSpec, train
from workflows.config.run import EngineConfig

FOLDER = Path(__file__).parents[2] / "golden"
STEPS = 10
TOLERANCE = 1e-6  # relative; libraries of matrix products sum in different orders
ROLLED = 1e-5  # where a network is run on its own output: two processors were seen to differ by 3.4e-6
PLAIN = EngineConfig(kind="torch", workers=1)
OPTIM = OptimConfig(lr=2e-4, warm_up=0)  # slow: what two machines differ by must not grow
RUN_SPECS = {stage: RunSpec(stage=stage, engine=PLAIN, optim=OPTIM) for stage in ("video", "audio", "joint", "mutual")}
RUN_SPECS["mutual-low-rank"] = RunSpec(stage="mutual", engine=PLAIN, optim=OPTIM, rank=4)


def columns(spec: RunSpec) -> list[str]:
    nets = ("student", "fake") if spec.stage == "mutual" else ("student",)
    return [f"loss/{n}" for n in nets] + [f"grad_norm/{n}" for n in nets]


def numbers(name: str) -> dict[str, list[str]]:
    torch.set_num_threads(1)
    rows = train(RUN_SPECS[name], STEPS)
    return {key: [x.hex() for x in rows[:, i].tolist()] for i, key in enumerate(columns(RUN_SPECS[name]))}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", RUN_SPECS)
def test_losses_equal_the_stored_ones(name):
    kept = json.loads((FOLDER / f"{name}.json").read_text())
    now = numbers(name)
    tolerance = ROLLED if RUN_SPECS[name].stage == "mutual" else TOLERANCE
    assert now.keys() == kept.keys()
    for key, values in kept.items():
        expected = [float.fromhex(x) for x in values]
        assert [float.fromhex(x) for x in now[key]] == pytest.approx(expected, rel=tolerance), (
            f"{key} of stage {name} moved. If it was meant to: python -m tests.workflows.training.test_golden_losses"
        )


if __name__ == "__main__":
    for name in RUN_SPECS:
        (FOLDER / f"{name}.json").write_text(json.dumps(numbers(name), indent=1) + "\n")
        print(f"wrote {FOLDER / name}.json")
