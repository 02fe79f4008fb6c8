"""Test sweeps over tiny random networks on toy clips, including plots and MLflow."""

import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mfcore.model.transformer import build_model
from preprocessing.dataset.reader import open_dataset
from workflows.config import presets, serialization
from workflows.evaluation import mlflow_report
from workflows.evaluation.contamination import find_train_test_overlap, overlap_warnings
from workflows.evaluation.evaluate import evaluate_checkpoints
from workflows.evaluation.held_out import select_evaluation_set
from workflows.evaluation.metrics.registry import METRICS
from workflows.evaluation.sweep import identify_checkpoint, plan_sweep
from workflows.evaluation.worker import EvaluationWorker
from workflows.training.resolve import latent_shapes_of, make_export_metadata
from workflows.utils.json_io import write_json

QUIET = {"progress": lambda done, of: None, "clips": 2}


def export(folder: Path, data: str, stage, **card_changes) -> str:
    """Export a random network of two thin layers."""
    dataset = open_dataset(data)
    config = presets.build_preset("tiny", stage, latent_shapes_of(dataset))
    config = replace(config, model=replace(config.model, dim=32, layers=2, heads=2))
    card = replace(make_export_metadata(config, dataset.meta, {}), **card_changes)
    model = build_model(card.model, 0)
    draw = torch.Generator().manual_seed(0)
    weights = {k: v + 0.05 * torch.randn(v.shape, generator=draw) for k, v in model.state_dict().items()}
    place = folder / stage / "export"
    place.mkdir(parents=True)
    save_file(weights, place / "ema.safetensors")
    write_json(place / "model.json", serialization.to_dict(card))
    write_json(place.parent / "run.json", {"data": data, "config": {"data": {"held_out": 0.99}}})
    return str(place)


@pytest.fixture(scope="module")
def mutual(tmp_path_factory, toy_data) -> str:
    return export(tmp_path_factory.mktemp("runs"), toy_data, "mutual")


@pytest.fixture(scope="module")
def swept(tmp_path_factory, mutual):
    """Run one sweep with MLflow."""
    out = tmp_path_factory.mktemp("sweep")
    uri = f"sqlite:///{out}/mlflow.db"
    result = evaluate_checkpoints(
        [mutual], steps=[1, 2], out=str(out / "it"), windows="0-1,1-2", mlflow_uri=uri, **QUIET
    )
    return result, uri


@pytest.fixture
def numbers_only(monkeypatch):
    """Disable MLflow and plots; ``swept`` covers them."""
    monkeypatch.setattr("workflows.tracking.mlflow_tracker.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("workflows.evaluation.mlflow_report.draw_plots", lambda *_, **__: [])


def test_sweep_has_a_row_per_setting_and_window(swept, mutual):
    rows = json.loads(Path(swept[0]["results"]).read_text())
    made = [row for row in rows if row["mode"] != "real"]
    keys = {(r["mode"], r["steps"], r["nfe"], r["guidance"], r["window"]) for r in made}
    settings = {("few", 1, 1, 1.0), ("few", 2, 2, 1.0), ("multi", 1, 2, 1.5), ("multi", 2, 4, 1.5)}
    assert keys == {(*s, w) for s in settings for w in ("all", "0-1", "1-2")}
    for row in made:
        assert row["checkpoint"] == mutual
        assert row["seed"] == 0
        assert {"sync", "syllable_error", "seam", "valid", "frechet", "failed", "clipping", "sharpness"} <= row[
            "metrics"
        ].keys()
    whole = [row["metrics"] for row in made if row["window"] == "all"]
    assert all(m["seconds_per_second"] > 0 and m["first_chunk_s"] > 0 for m in whole)
    assert all(m["history_use_video"] > 0 and m["history_use_audio"] > 0 for m in whole)


def test_real_clips_score_best(swept):
    rows = json.loads(Path(swept[0]["results"]).read_text())
    real, *made = [row["metrics"] for row in rows if row["window"] == "all"]
    assert real["sync"] > 0.9
    assert real["syllable_error"] < 0.1
    assert all(m["frechet"] > 5 * real["frechet"] for m in made)
    assert all(m["syllable_error"] > 0.5 for m in made)


def test_plots_and_samples_are_files(swept):
    result, _ = swept
    assert [Path(p).name for p in result["plots"]] == [
        *("frontier.png", "seconds.png", "over_time.png", "offsets.png", "sheet.png")
    ]
    assert len(result["samples"]) == 10
    assert all(Path(p).stat().st_size > 1000 for p in [*result["plots"], *result["samples"]])


def test_report_and_table_contain_every_metric_or_its_requirement(swept):
    result, _ = swept
    page = Path(result["report"]).read_text()
    assert page.count("data:image/png;base64,") == 5
    assert page.count("data:video/mp4;base64,") == 10
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # needs no other file
    lines = list(csv.DictReader(Path(result["table"]).read_text().splitlines()))
    named = {name for metric in METRICS for name in metric.names}
    settings = {(x["mode"], x["steps"], x["window"]) for x in lines}
    for setting in settings:
        mine = {x["metric"]: x for x in lines if (x["mode"], x["steps"], x["window"]) == setting}
        assert named <= mine.keys()
        assert all((x["value"] == "") == x["note"].startswith("not measured: needs ") for x in mine.values())
    some = next(x for x in lines if (x["mode"], x["steps"], x["window"], x["metric"]) == ("few", "2", "all", "sync"))
    assert (some["clips"], some["seeds"]) == ("2", "1")
    assert float(some["low"]) <= float(some["value"]) <= float(some["high"])
    wer = next(x for x in lines if x["metric"] == "wer")
    assert "--weights whisper=" in wer["note"] and "toy syllables" in wer["note"]
    assert "--weights syncnet=" in result["not_measured"]["lse_c"]


def test_clips_of_the_training_set_are_reported(swept, mutual):
    result, _ = swept
    trained_on = json.loads((Path(mutual).parent / "run.json").read_text())["data"]
    held = select_evaluation_set(trained_on, clips=2, seconds=None, fraction=0.99)
    assert result["overlap"]["mutual"] == {"clips": [], "sources": {}}
    found = find_train_test_overlap(held, trained_on, trained_on, 0.01)  # nearly all clips are training clips
    assert set(found.clips) <= {p.clip.id for p in held.prompts} and found.clips
    assert all(len(content) > 8 for content in found.sources.values())
    assert "not a held-out evaluation" in overlap_warnings({"mutual": found})[0]
    gone = find_train_test_overlap(held, trained_on, "/nowhere/at/all", 0.1)
    assert "cannot be read" in (gone.unknown or "")


@pytest.mark.slow
def test_all_clips_of_an_unseen_dataset_are_used(tmp_path, toy_data, mutual, numbers_only):
    """Without other clips, the reference are the clips of the prompts, and the report mentions it."""
    half = select_evaluation_set(toy_data, clips=3, seconds=None, fraction=None)
    assert len(half.prompts) == 3 and not half.own_reference
    assert not {p.clip.id for p in half.prompts} & {clip.id for clip in half.reference}
    whole = select_evaluation_set(toy_data, clips=99, seconds=None, fraction=None)
    assert len(whole.prompts) == len(open_dataset(toy_data)) and whole.own_reference
    assert whole.digest() != half.digest()
    elsewhere = shutil.copytree(toy_data, tmp_path / "elsewhere")
    again = {"steps": [1], "modes": ["few"], "out": str(tmp_path / "x"), **QUIET, "clips": 99}
    result = evaluate_checkpoints([mutual], data=str(elsewhere), **again)
    assert json.loads(Path(result["results"]).read_text())[-1]["clips"] == len(whole.prompts)
    assert "against 6 of the same clips" in Path(result["report"]).read_text()
    assert result["overlap"]["mutual"]["clips"], "equal content in another folder"


def test_interrupted_sweep_resumes_at_its_batch(mutual, tmp_path, numbers_only, monkeypatch):
    """Interrupt the third of four batches: the first two are not repeated."""
    monkeypatch.setattr("workflows.evaluation.sampling.MAX_BATCH_SIZE", 1)
    made = []
    sample = EvaluationWorker.sample_batch

    def killed(self, task):
        made.append((task.point.params.steps, task.batch))
        if len(made) == 4:
            raise KeyboardInterrupt
        return sample(self, task)

    again = {"steps": [1, 2], "modes": ["few"], "out": str(tmp_path / "x"), **QUIET}
    monkeypatch.setattr(EvaluationWorker, "sample_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoints([mutual], **again)
    finished = sorted(path.name for path in (tmp_path / "x" / "rows").iterdir())
    assert len(finished) == 2  # the real clips, and the first setting
    first = made[:2]
    evaluate_checkpoints([mutual], **again)
    assert made[4:] == [task for task in ((1, 0), (1, 1), (2, 0), (2, 1)) if task not in first][-len(made[4:]) :]
    assert not [task for task in made[4:] if task in first]
    assert not list((tmp_path / "x" / "unfinished").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_workers_give_the_same_rows(swept, mutual, tmp_path, numbers_only):
    result, _ = swept
    out = {"out": str(tmp_path / "x"), "windows": "0-1,1-2", **QUIET}
    other = evaluate_checkpoints([mutual], steps=[1, 2], workers=2, **out)
    ours, theirs = (
        {(r["mode"], r["steps"], r["window"]): r["metrics"] for r in json.loads(Path(x["results"]).read_text())}
        for x in (result, other)
    )
    assert ours.keys() == theirs.keys()
    for key, metrics in ours.items():
        for name in ("sync", "seam", "frechet", "identity_error", "motion", "loudness_db"):
            if name in metrics:
                assert metrics[name] == pytest.approx(theirs[key][name], rel=1e-3), (key, name)


@pytest.mark.slow
def test_report_opens_in_a_browser(swept, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    result, _ = swept
    picture = tmp_path / "report.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,3600", f"--screenshot={picture}"]
    subprocess.run([chromium, *flags, Path(result["report"]).as_uri()], check=True, capture_output=True)
    with Image.open(picture) as image:
        assert image.size == (1280, 3600)
        assert len(image.convert("RGB").resize((320, 900)).getcolors(1 << 20)) > 500  # not a blank page


def test_mlflow_contains_the_frontier(swept):
    from mlflow import MlflowClient

    result, uri = swept
    client = MlflowClient(tracking_uri=uri)
    parent = client.get_run(result["mlflow_parent_run"])
    curve = client.get_metric_history(parent.info.run_id, "multi/sync")
    assert [point.step for point in curve] == [2, 4]
    tag = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], tag)
    assert sorted(child.data.params["nfe"] for child in children) == ["1", "2", "2", "4"]
    for child in children:
        point = client.get_metric_history(child.info.run_id, "1-2/seam")[0]
        assert point.step == int(child.data.params["nfe"])
        assert len(client.list_artifacts(child.info.run_id, "samples")) == 2
        assert child.info.status == "FINISHED"
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} >= {"frontier.png", "sheet.png", "results.json"}


def test_repeated_command_generates_only_missing_samples(swept, mutual, monkeypatch):
    result, uri = swept
    monkeypatch.setattr("workflows.evaluation.mlflow_report.draw_plots", lambda *_, **__: [])
    made = []
    sample = EvaluationWorker.sample_batch
    monkeypatch.setattr(EvaluationWorker, "sample_batch", lambda *a: made.append(a[1].point.params.steps) or sample(*a))
    again = {"out": str(Path(result["results"]).parent), "windows": "0-1,1-2", "mlflow_uri": uri, **QUIET}
    before = {path: Path(path).stat().st_mtime_ns for path in result["samples"]}
    repeated = evaluate_checkpoints([mutual], steps=[1, 2], **again)
    assert made == []
    assert repeated["rows"] == result["rows"]
    assert repeated["mlflow_parent_run"] == result["mlflow_parent_run"]
    longer = evaluate_checkpoints([mutual], steps=[1, 2, 3], modes=["few"], **again)
    assert made == [3]
    assert longer["rows"] == result["rows"] + 3
    assert {path: Path(path).stat().st_mtime_ns for path in result["samples"]} == before


def test_equal_settings_give_equal_scores(swept, mutual, tmp_path, numbers_only):
    result, _ = swept
    other = evaluate_checkpoints(
        [mutual], steps=[2], modes=["few"], out=str(tmp_path / "x"), windows="0-1,1-2", **QUIET
    )
    assert other["mlflow_parent_run"] is None
    pick = lambda path: next(r for r in json.loads(Path(path).read_text()) if (r["mode"], r["steps"]) == ("few", 2))
    ours, theirs = pick(result["results"])["metrics"], pick(other["results"])["metrics"]
    for name in ("sync", "seam", "frechet", "identity_error", "motion", "loudness_db"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_longer_sample_repeats_transcript_with_a_note(mutual, tmp_path, numbers_only):
    result = evaluate_checkpoints([mutual], steps=[1], modes=["few"], seconds=3.4, out=str(tmp_path / "x"), **QUIET)
    assert "transcripts repeat" in result["note"]
    rows = json.loads(Path(result["results"]).read_text())
    assert {row["window"] for row in rows} == {"all", "0-5"}


@pytest.mark.slow
def test_untrained_step_counts_are_measured_with_a_warning(tmp_path, toy_data, numbers_only, capsys):
    trained_for_two = export(tmp_path, toy_data, "mutual", few_steps=2)
    result = evaluate_checkpoints([trained_for_two], steps=[2, 3], out=str(tmp_path / "x"), **QUIET)
    warning = "mutual: the few-step mode was trained for up to 2 steps per chunk, and 3 steps degrade"
    assert capsys.readouterr().err.count(warning) == 1
    assert Path(result["report"]).read_text().count(warning) == 1
    modes = {(row["mode"], row["steps"]) for row in json.loads(Path(result["results"]).read_text())}
    assert modes >= {("few", 3), ("multi", 3)}


def test_checkpoint_of_one_modality_reports_unmeasured_metrics(tmp_path, toy_data, numbers_only):
    video = export(tmp_path, toy_data, "video")
    result = evaluate_checkpoints([video], steps=[1], out=str(tmp_path / "x"), **QUIET)
    assert result["not_measured"]["sync"] == "not measured: needs a checkpoint that generates audio"
    assert result["skipped"] == ["few-step mode of video: not trained in stage video"]
    metrics = json.loads(Path(result["results"]).read_text())[-1]["metrics"]
    assert "identity_error" in metrics
    assert "sync" not in metrics


def test_invalid_input_is_rejected_before_anything_is_written(tmp_path, toy_data, mutual):
    out = {"out": str(tmp_path / "x")}
    with pytest.raises(ValueError, match="does not exist"):
        evaluate_checkpoints([str(tmp_path / "none")], **out, **QUIET)
    with pytest.raises(ValueError, match="slow"):
        evaluate_checkpoints([mutual], modes=["slow"], **out, **QUIET)
    with pytest.raises(ValueError, match="start-end in seconds"):
        evaluate_checkpoints([mutual], windows="5", **out, **QUIET)
    with pytest.raises(ValueError, match="--seconds -1"):
        evaluate_checkpoints([mutual], seconds=-1, **out, **QUIET)
    with pytest.raises(ValueError, match="is not a dataset"):
        evaluate_checkpoints([mutual], data=str(tmp_path), **out, **QUIET)
    joint = export(tmp_path, toy_data, "joint")
    with pytest.raises(ValueError, match="stage joint"):
        evaluate_checkpoints([joint], modes=["few"], **out, **QUIET)
    odd = export(tmp_path / "odd", toy_data, "mutual", chunk_seconds=Fraction(1))
    with pytest.raises(ValueError, match="chunk 1 of the checkpoint, 1/2 of the dataset"):
        evaluate_checkpoints([odd], **out, **QUIET)
    assert not (tmp_path / "x").exists()


def test_plan_uses_guidance_only_in_multi_step_mode(mutual):
    settings, skipped = plan_sweep(
        [identify_checkpoint(mutual)], modes=["few", "multi"], steps=[4, 1, 4], guidance=[5.0, 1.0], seeds=(0, 1)
    )
    found = [(s.params.mode, s.params.steps, s.params.guidance, s.params.seed) for s in settings]
    few = [("few", steps, 1.0, seed) for steps in (1, 4) for seed in (0, 1)]
    assert found == few + [("multi", steps, w, seed) for steps in (1, 4) for w in (5.0, 1.0) for seed in (0, 1)]
    assert skipped == []
    assert len({s.key("scope") for s in settings}) == 12
    narrow, _ = plan_sweep(
        [identify_checkpoint(mutual, precision="bf16")],
        modes=["few", "multi"],
        steps=[4, 1],
        guidance=[5.0, 1.0],
        seeds=(0, 1),
    )
    assert len({s.key("scope") for s in [*settings, *narrow]}) == 24


@pytest.mark.slow
def test_bfloat16_samples_have_separate_rows(tmp_path, mutual, numbers_only):
    """Store rows of both precisions in one folder; the default is float32 on every device."""
    how = {"steps": [1], "modes": ["few"], "windows": "0-1", "out": str(tmp_path / "x"), **QUIET}
    evaluate_checkpoints([mutual], **how)
    result = evaluate_checkpoints([mutual], precision="bf16", **how)
    rows = [row for row in json.loads(Path(result["results"]).read_text()) if row["window"] == "all"]
    real, *made = sorted(rows, key=lambda row: (row["mode"] != "real", row["label"]))
    assert "precision" not in real
    assert [(row["label"], row["precision"]) for row in made] == [("mutual", "fp32"), ("mutual-bf16", "bf16")]
    one, other = (row["metrics"] for row in made)
    assert one["frechet"] != other["frechet"] and other["frechet"] == pytest.approx(one["frechet"], rel=0.2)
    assert one["history_use_video"] == pytest.approx(other["history_use_video"], rel=0.2)
    lines = csv.DictReader(Path(result["table"]).read_text().splitlines())
    assert {x["label"] for x in lines} == {"real", "mutual", "mutual-bf16"}
    run = RecordingTracker()
    parts = [{"digest": "one", "rows": [row]} for row in made] + [{"digest": "real", "rows": [real]}]
    for part in parts[:2]:
        mlflow_report._log_point(run, part, parts)
    curves = [{name for name in names if name.endswith("/frechet")} - {"real/frechet"} for names in run.names]
    assert curves == [{"mutual/few/frechet"}, {"mutual-bf16/few/frechet"}]


@pytest.mark.slow
def test_checkpoints_with_equal_names_are_kept_apart(tmp_path, toy_data, mutual, numbers_only):
    """Keep their metrics and sample files separate."""
    how = {"steps": [1], "modes": ["few"], "windows": "0-1", "out": str(tmp_path / "x"), **QUIET}
    alone = evaluate_checkpoints([mutual], **how)
    other = export(tmp_path / "other", toy_data, "mutual")
    weights = load_file(Path(other, "ema.safetensors"))
    save_file({name: 1.1 * w for name, w in weights.items()}, Path(other, "ema.safetensors"))
    result = evaluate_checkpoints([mutual, other, mutual], **how)
    rows = [r for r in json.loads(Path(result["results"]).read_text()) if (r["window"], r["mode"]) == ("all", "few")]
    assert len(rows) == 2
    labels = {row["label"] for row in rows}
    assert len(labels) == 2 and all(re.fullmatch(r"mutual-[0-9a-f]{6}", label) for label in labels)
    lines = list(csv.DictReader(Path(result["table"]).read_text().splitlines()))
    assert {line["label"] for line in lines} == {"real", *labels}
    assert len(set(result["samples"])) == len(result["samples"]) == 6  # two of each, and of the real clips
    assert set(alone["samples"]) < set(result["samples"])


@pytest.mark.slow
def test_other_clips_have_separate_samples(tmp_path, mutual, numbers_only):
    how = {"steps": [1], "modes": ["few"], "windows": "0-1", "out": str(tmp_path / "x"), **QUIET}
    short = evaluate_checkpoints([mutual], seconds=0.5, **how)
    before = {path: Path(path).read_bytes() for path in short["samples"]}
    long = evaluate_checkpoints([mutual], seconds=1.0, **how)
    assert not set(short["samples"]) & set(long["samples"])
    assert {path: Path(path).read_bytes() for path in before} == before
    assert (short["clips"], long["clips"]) == (2, 2)


def test_sweep_interrupted_in_its_first_samples_resumes(tmp_path, mutual, numbers_only, monkeypatch):
    how = {"steps": [1], "modes": ["few"], "windows": "0-1", "out": str(tmp_path / "x"), **QUIET}

    def killed(self, name, clips):
        (self.store.folder / "samples").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("workflows.evaluation.evaluate._Sweep._write_samples", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate_checkpoints([mutual], **how)
    assert evaluate_checkpoints([mutual], **how)["rows"] == 4


def test_foreign_folder_is_rejected(tmp_path, mutual):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("mine")
    for place in (tmp_path / "mine", tmp_path / "mine" / "report.html"):
        with pytest.raises(ValueError, match="--out"):
            evaluate_checkpoints([mutual], steps=[1], out=str(place), **QUIET)
    assert (tmp_path / "mine" / "report.html").read_text() == "mine"


class RecordingTracker:
    """Tracker that records metric names."""

    def __init__(self):
        self.names = []

    def log(self, step, values):
        self.names.append(set(values))
