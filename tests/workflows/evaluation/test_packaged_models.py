"""Evaluate the packaged models again, with the commands of their cards on fewer clips, and compare the metrics."""

import importlib.util
import shlex
from collections.abc import Mapping
from math import sqrt
from pathlib import Path

import pytest
from typer.testing import CliRunner

from workflows.checkpoints import card_sweep, packaged
from workflows.checkpoints.packaged import CardMetric, ModelCard
from workflows.cli.app import app

CLIPS = 16
DEPENDENT = {"seconds_per_second", "frechet"}  # on the machine, on the number of clips


def fewer_clips(command: str, clips: int) -> list[str]:
    """Return the words of a command of a card, with fewer clips, one noise seed and the models that are installed."""
    words = shlex.split(command)
    assert words[0] == "mfctl"
    for option, value in (("--clips", str(clips)), ("--seeds", "1")):
        if option in words:
            words[words.index(option) + 1] = value
    if "pocketsphinx=en" in words and importlib.util.find_spec("pocketsphinx") is None:
        at = words.index("pocketsphinx=en")
        del words[at - 1 : at + 1]
    return words[1:]


def differences(card: ModelCard, measured: Mapping[str, CardMetric], clips: int) -> dict[str, tuple[float, float]]:
    """Return the metrics that differ by more than four times the interval of so few clips: card, measured."""
    found: dict[str, tuple[float, float]] = {}
    for name, metric in card.metrics.items():
        if metric.low is None or metric.high is None or name not in measured or name in DEPENDENT:
            continue
        allowed = 0.01 + 2 * (metric.high - metric.low) * sqrt(max(1.0, card.evaluation.clips / clips))  # pyright: ignore
        if abs(measured[name].value - metric.value) > allowed:
            found[name] = (metric.value, measured[name].value)
    return found


def small_card(**metrics: CardMetric) -> ModelCard:
    return ModelCard(
        name="m", summary="", language="", stage="mutual", license="", parameters=1, data="", commands=(),
        training_hours=1.0, training_machine="", limits=(), metrics=metrics,
        evaluation=packaged.CardEvaluation(commands=(), clips=64, mode="few", steps=4, seeds=3),
    )  # fmt: skip


def test_metrics_within_the_interval_of_fewer_clips_agree():
    card = small_card(sync=CardMetric(value=0.9, low=0.89, high=0.91), frechet=CardMetric(value=5, low=4, high=6))
    agreeing, other = {"sync": CardMetric(value=0.84)}, {"sync": CardMetric(value=0.7), "frechet": CardMetric(value=90)}
    assert differences(card, agreeing, 16) == {}
    assert differences(card, other, 16) == {"sync": (0.9, 0.7)}


def test_commands_of_a_card_get_fewer_clips():
    words = fewer_clips("mfctl evaluate toy-talker --clips 64 --seeds 3 --data 'held out'", 8)
    assert words == ["evaluate", "toy-talker", "--clips", "8", "--seeds", "1", "--data", "held out"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", packaged.packaged_names() or [pytest.param("", marks=pytest.mark.skip("no models"))])
def test_packaged_weights_have_the_metrics_of_their_card(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    card = packaged.model_card(name)
    assert card.evaluation is not None
    assert card.metrics
    for command in card.evaluation.commands:
        result = CliRunner().invoke(app, fewer_clips(command, CLIPS))
        assert result.exit_code == 0, f"{command}: {result.output}"
    (results,) = (file for file in tmp_path.rglob("results.json") if (file.parent / "rows").is_dir())
    assert card.evaluation is not None
    measured = card_sweep.metrics_at(card_sweep.read_rows(results), card.evaluation, str(results))
    assert differences(card, measured, CLIPS) == {}
    compared = {metric for metric in card.metrics if card.metrics[metric].low is not None} - DEPENDENT
    assert compared >= {"sync", "valid", "identity_error"}
