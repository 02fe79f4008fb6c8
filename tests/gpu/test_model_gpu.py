"""Tests on a CUDA device, the checks and targets of `mfctl bench gpu`: `pytest -m gpu tests/gpu`."""

import math

import pytest
import torch

from workflows.bench.gpu import parity, streaming, training
from workflows.bench.gpu.targets import TARGETS, check_targets
from workflows.utils.case_worker import WorkerOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(1200),
]
OPTIONS = WorkerOptions(device=torch.device("cuda", 0), deadline=math.inf)
PARTS = {"stream": streaming, "train": training}


@pytest.mark.parametrize("name", parity.CHECKS)
def test_parity_with_the_reference(name):
    assert parity.CHECKS[name].run(OPTIONS.device)


@pytest.fixture(scope="module")
def measured():
    """Return a function that measures a case once."""
    found, cases = {}, {}

    def measure(part, name):
        if part not in cases:
            cases[part] = {case.name: case for case in PARTS[part].cases(OPTIONS)}
        if (part, name) not in found:
            result = cases[part][name].run()
            found[part, name] = {"part": part, "case": name, "status": "done", "result": result}
        return found[part, name]

    return measure


@pytest.mark.parametrize("name", TARGETS)
def test_target_is_met(measured, name):
    target = TARGETS[name]
    records = [measured(target.part, case) for case in (target.case, target.over) if case]
    assert check_targets(records)[name]["met"], check_targets(records)[name]
