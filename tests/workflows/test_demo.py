"""A small `make demo`: every command runs for real, in the order of the demo."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from preprocessing.media.probe import probe
from workflows.demo import DemoConfig, repeat_words, run_demo

SMALL = ("steps=6", "eval_every=6", "log_every=3", "data.batch=8", "model.dim=32", "model.heads=2")


def test_a_transcript_is_repeated_in_time():
    words = repeat_words([{"word": "ba", "start": 0.5, "end": 0.7}], period=2.0, seconds=5.0)
    assert [w["start"] for w in words] == [0.5, 2.5, 4.5]
    assert all(w["end"] - w["start"] == pytest.approx(0.2) for w in words)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_runs_from_clips_to_sweep_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    config = DemoConfig(
        out=tmp_path / "demo", clips_made=24, seconds=5.0, window=2.5, steps=(1, 4), sweep_clips=2, sets=SMALL
    )
    summary = run_demo(config)
    assert json.loads((config.out / "summary.json").read_text())["clips"] == summary["clips"] == 26
    assert (summary["accepted"], summary["rejected"]) == (48, 2)  # two windows per file
    assert sorted(summary["rejects_by_reason"]) == ["no_audio", "unreadable"]
    assert list(summary["stages"]) == ["video", "audio", "joint", "mutual"]
    for stage in ("video", "audio", "joint"):
        assert summary["stages"][stage]["loss_last"] < summary["stages"][stage]["loss_first"]
    assert {(row["mode"], row["steps"]) for row in summary["sweep"]} >= {("few", 1), ("few", 4), ("multi", 4)}
    assert all(row["nfe"] and row["seconds_per_second"] for row in summary["sweep"] if row["mode"] != "real")
    assert len(summary["samples"]) == 5
    for path in summary["samples"]:
        assert probe(path).duration > 2
    assert all(Path(path).stat().st_size > 1000 for path in summary["plots"])
    resumed = run_demo(replace(config))
    assert resumed["sweep"] == summary["sweep"]  # the sweep was not repeated
