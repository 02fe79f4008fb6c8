"""Number of workers on autoscaling clusters, and reports while waiting for machines."""

import json
import time
from dataclasses import replace

import pytest

from preprocessing.config import PreprocessConfig
from preprocessing.io.ray_resources import (
    PROMISED_RESOURCES_ENV,
    max_resources,
    report_while_waiting,
    resources_available,
)
from preprocessing.runner import encoder_count, worker_count
from preprocessing.steps.encode import EncoderConfig

PLAIN = PreprocessConfig()
SHARED = replace(PLAIN, encoder=EncoderConfig(gpus=0.25))


def test_promised_resources_count_next_to_present_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PROMISED_RESOURCES_ENV, raising=False)
    assert max_resources({"CPU": 2.0}) == {"CPU": 2.0}
    monkeypatch.setenv(PROMISED_RESOURCES_ENV, json.dumps({"CPU": 512, "GPU": 32}))
    assert max_resources({"CPU": 600.0, "memory": 5.0}) == {"CPU": 600.0, "GPU": 32.0, "memory": 5.0}


@pytest.mark.parametrize(
    ("config", "limits", "workers"),
    [
        (PLAIN, {"CPU": 8.0}, 8),
        (PLAIN, {"CPU": 512.0}, 100),  # no more than units
        (replace(PLAIN, workers=3), {"CPU": 8.0}, 3),
        (replace(PLAIN, workers=64), {}, 64),  # a head node alone: workers start machines
        (SHARED, {"CPU": 8.0, "GPU": 1.0}, 8),  # decoders in front of the encoder pool
        (replace(SHARED, workers=8), {}, 8),
        (PLAIN, {"CPU": float("inf")}, 100),
    ],
)
def test_worker_count(config: PreprocessConfig, limits: dict[str, float], workers: int) -> None:
    assert worker_count(100, config, limits) == workers


@pytest.mark.parametrize(
    ("limits", "encoders"),
    [
        ({"CPU": 8.0, "GPU": 1.0}, 4),
        ({"CPU": 512.0, "GPU": 8.0}, 32),
        ({"CPU": 512.0, "GPU": 80.0}, 100),  # no more than units
        ({}, 100),  # a head node alone: the pool starts machines
    ],
)
def test_encoder_count(limits: dict[str, float], encoders: int) -> None:
    assert encoder_count(100, SHARED, limits) == encoders


def test_unknown_or_missing_resources_raise() -> None:
    with pytest.raises(ValueError, match=r"no CPU yet.*set workers=N"):
        worker_count(100, PLAIN, {})
    with pytest.raises(ValueError, match=r"Ray sees no such share of a GPU"):
        encoder_count(100, SHARED, {"CPU": 8.0})


def test_waiting_is_reported_until_machines_are_present(capsys: pytest.CaptureFixture[str]) -> None:
    reports = 0
    with report_while_waiting("four machines", lambda: {"CPU": 2.0}, every=0.01) as finish:
        while reports < 2:
            reports += capsys.readouterr().err.count("waiting for four machines, 0 s so far; Ray has CPU 2, GPU 0.")
        finish()
    capsys.readouterr()
    with report_while_waiting("none", dict, every=0.001, seen=lambda: True):
        pass
    with report_while_waiting("none", dict):
        pass
    assert capsys.readouterr().err == ""


def test_slow_work_is_not_reported_as_waiting(capsys: pytest.CaptureFixture[str]) -> None:
    """Reports concern missing machines only; a unit may take minutes."""
    present: dict[str, float] = {}
    available = resources_available({"CPU": 1.0, "GPU": 0.25}, lambda: present)
    assert not available()
    present["CPU"] = 8.0
    assert not available()
    present["GPU"] = 1.0
    assert available()
    with report_while_waiting("machines", lambda: present, seen=available, every=0.01):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
