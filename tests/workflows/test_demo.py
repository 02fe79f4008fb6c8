"""A small `make demo`: every command runs for real, in the order of the demo."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from preprocessing.media.probe import probe
from tests.helpers.packaged_talker import package_talker
from workflows.checkpoints import packaged
from workflows.demo import DemoConfig, closing_message, compare_models, repeat_words, run_demo, talk, write_page

SMALL = ("steps=6", "eval_every=6", "log_every=3", "data.batch=8", "model.dim=32", "model.heads=2")


def test_a_transcript_is_repeated_in_time():
    words = repeat_words([{"word": "ba", "start": 0.5, "end": 0.7}], period=2.0, seconds=5.0)
    assert [w["start"] for w in words] == [0.5, 2.5, 4.5]
    assert all(w["end"] - w["start"] == pytest.approx(0.2) for w in words)


def small_summary(config: DemoConfig, **seconds: float) -> dict:
    """Return the part of a summary that the comparison of models reads."""
    row = {"mode": "few", "steps": 4, "sync": 0.5, "valid": 0.25, "seconds_per_second": None}
    return {
        "sweep": [row | {"steps": 1, "sync": 0.1}, row],
        "real": [{"sync": 0.95, "valid": None}],
        "seconds": {"train video": 60.0, "train mutual": 90.0} | seconds,
        "samples": [str(config.samples / "mutual-4-steps.mp4")],
        "plots": [],
    }


def test_the_packaged_talker_speaks_first_and_both_models_are_named(tmp_path, monkeypatch):
    package_talker(tmp_path, monkeypatch)
    config = DemoConfig(out=tmp_path / "demo")
    config.out.mkdir()
    talker = talk(config)
    assert probe(config.out / "toy-talker.mp4").duration > 2
    summary = small_summary(config)
    summary["models"] = compare_models(config, summary, talker)
    assert list(summary["models"]) == ["toy-talker", "demo"]
    assert summary["models"]["demo"]["metrics"] == {"sync": 0.5, "valid": 0.25}
    page = write_page(config, summary).read_text()
    for text in (page, closing_message(config, summary)):
        assert "trained for 9.5 hours on 2 CPU cores" in text
        assert "trained from scratch by this demo in 2.5 minutes" in text
    assert 'src="toy-talker.mp4"' in page
    assert 'src="samples/mutual-4-steps.mp4"' in page
    (config.out / "summary.json").write_text(json.dumps(summary))
    again = compare_models(config, small_summary(config, **{"train video": 0.1, "train mutual": 0.1}), talker)
    assert again["demo"]["training_minutes"] == 2.5  # a rerun trains nothing


def test_without_a_packaged_talker_its_part_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packaged, "MODELS_DIR", tmp_path)
    config = DemoConfig(out=tmp_path)
    assert talk(config) is None
    assert "skipped" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    summary = small_summary(config)
    summary["models"] = compare_models(config, summary, None)
    assert list(summary["models"]) == ["demo"]
    assert "toy-talker is not part of this installation" in write_page(config, summary).read_text()


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
    assert summary["models"]["demo"]["metrics"]["seconds_per_second"] > 0
    assert (config.out / "index.html").exists()
    resumed = run_demo(replace(config))
    assert resumed["sweep"] == summary["sweep"]  # the sweep was not repeated
