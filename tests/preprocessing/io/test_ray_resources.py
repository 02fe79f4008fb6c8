"""How many workers a cluster gets that starts machines when they are asked for, and what is said while none come."""

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
from preprocessing.runner import worker_count
from preprocessing.steps.encode import EncoderConfig

PLAIN = PreprocessConfig()
SHARED = replace(PLAIN, encoder=EncoderConfig(gpus=0.25))


def test_what_the_file_promises_counts_beside_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PROMISED_RESOURCES_ENV, raising=False)
    assert max_resources({"CPU": 2.0}) == {"CPU": 2.0}
    monkeypatch.setenv(PROMISED_RESOURCES_ENV, json.dumps({"CPU": 512, "GPU": 32}))
    assert max_resources({"CPU": 600.0, "memory": 5.0}) == {"CPU": 600.0, "GPU": 32.0, "memory": 5.0}


@pytest.mark.parametrize(
    ("config", "room", "workers"),
    [
        (PLAIN, {"CPU": 8.0}, 8),
        (PLAIN, {"CPU": 512.0}, 100),  # no more than units
        (replace(PLAIN, workers=3), {"CPU": 8.0}, 3),
        (replace(PLAIN, workers=64), {}, 64),  # a head alone: they come when asked for
        (SHARED, {"CPU": 8.0, "GPU": 1.0}, 4),
        (SHARED, {"CPU": 512.0, "GPU": 8.0}, 32),
        (replace(SHARED, workers=8), {}, 8),
        (PLAIN, {"CPU": float("inf")}, 100),
    ],
)
def test_workers(config: PreprocessConfig, room: dict[str, float], workers: int) -> None:
    assert worker_count(100, config, room) == workers


def test_what_is_not_known_or_not_there_is_said() -> None:
    with pytest.raises(ValueError, match=r"no CPU yet.*set workers=N"):
        worker_count(100, PLAIN, {})
    with pytest.raises(ValueError, match=r"Ray sees no such share of a GPU"):
        worker_count(100, SHARED, {"CPU": 8.0})


def test_waiting_is_told_until_it_has_begun(capsys: pytest.CaptureFixture[str]) -> None:
    told = 0
    with report_while_waiting("four machines", lambda: {"CPU": 2.0}, every=0.01) as begun:
        while told < 2:
            told += capsys.readouterr().err.count("waiting for four machines, 0 s so far; Ray has CPU 2, GPU 0.")
        begun()
    capsys.readouterr()
    with report_while_waiting("none", dict, every=0.001, seen=lambda: True):
        pass
    with report_while_waiting("none", dict):
        pass
    assert capsys.readouterr().err == ""


def test_slow_work_is_no_waiting(capsys: pytest.CaptureFixture[str]) -> None:
    """A unit may take minutes; what is waited for is a machine."""
    here: dict[str, float] = {}
    come = resources_available({"CPU": 1.0, "GPU": 0.25}, lambda: here)
    assert not come()
    here["CPU"] = 8.0
    assert not come()
    here["GPU"] = 1.0
    assert come()
    with report_while_waiting("machines", lambda: here, seen=come, every=0.01):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
