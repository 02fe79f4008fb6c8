"""End-to-end demo on the toy world in one folder, through the functions of the public commands.

First the packaged model speaks. Then all stages are trained from scratch for minutes on fresh clips. ``summary.json``
and ``index.html`` show both models and their training times. Rerun the demo to resume: each command resumes.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jinja2

from preprocessing.config import PreprocessConfig
from preprocessing.dataset.reader import open_dataset
from preprocessing.media.mp4_writer import write_mp4
from preprocessing.toyworld.world import ToyConfig, render_frames, sample_truth, write_toyworld
from workflows.checkpoints.packaged import DEFAULT_MODEL, model_card, packaged_folder
from workflows.config.run import DEFAULT_HELD_OUT_SHARE
from workflows.config.stage_names import Stage
from workflows.config.stages import STAGES
from workflows.data.build import build_dataset
from workflows.data.inspect import inspect_dataset
from workflows.evaluation.evaluate import evaluate_checkpoints
from workflows.inference.generate import ClipPrompt, generate_clip
from workflows.training.samples import final_samples
from workflows.training.train import train_stage
from workflows.utils import environment
from workflows.utils.json_io import read_json, write_json
from workflows.utils.progress import progress_bar

SENTENCE = "Hello! I learned to speak on a laptop. Nice to meet you."  # of the packaged model
DEMO_MODEL = "demo"  # name of the model that the demo trains
MODELS_NOTE = (
    f"Two models. {DEFAULT_MODEL} is part of the package and was trained for hours. {DEMO_MODEL} was trained from "
    "scratch by this demo, each stage for a minute or two: its clips show the path, not the limit of the method. Each "
    "model is measured on clips of its world: English sentences, and syllables."
)
METRICS = ("sync", "syllable_error", "frechet", "seam", "valid", "seconds_per_second")  # of a row of the sweep
FEW_STEPS = 4  # of the samples in few-step mode
TRAINING_SECTIONS = tuple(f"train {stage}" for stage in STAGES)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Size and folders of one demo."""

    out: Path
    clips_made: int = 128  # number of source files
    seconds: float = 10.0  # length of a source file
    window: float = 5.0  # longest training clip in seconds: two per source file
    seed: int = 7
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 50)  # of the sweep
    sweep_clips: int = 6
    sets: tuple[str, ...] = ()  # configuration overrides of every stage

    @property
    def clips(self) -> Path:
        """Folder of the toy clips."""
        return self.out / "clips"

    @property
    def broken_files(self) -> Path:
        """Folder of files that preprocessing rejects."""
        return self.out / "damaged"

    @property
    def dataset(self) -> Path:
        """Folder of the dataset."""
        return self.out / "dataset"

    @property
    def samples(self) -> Path:
        """Folder of the generated clips."""
        return self.out / "samples"


def demo(out: str) -> dict[str, Any]:
    """Run the demo at its default size; return the content of ``summary.json``."""
    return run_demo(DemoConfig(out=Path(out)))


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run all parts of the demo, write ``summary.json`` and return its content."""
    config.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", environment.tracking_uri())
    took: dict[str, float] = {}
    with section("packaged talker", took):
        talker = talk(config)
    with section("toy world", took):
        make_clips(config)
    with section("preprocess", took):
        sources = [str(config.clips), str(config.broken_files)]
        counts = build_dataset(sources, str(config.dataset), PreprocessConfig(window_seconds=Fraction(config.window)))
        sheet = config.out / "contact_sheet.png"
        inspect_dataset(str(config.dataset), verify=True, sheet=None if sheet.exists() else str(sheet))
    stages: dict[str, Any] = {}
    for stage in STAGES:
        with section(f"train {stage}", took):
            stages[stage] = run_stage(config, stage)
    with section("samples", took):
        samples = make_samples(config, stages)
    with section("sweep", took):
        sweep = evaluate_checkpoints(
            [stages["mutual"]["run_dir"]],
            data=str(config.dataset),
            steps=config.steps,
            modes=["few", "multi"],
            clips=config.sweep_clips,
            windows=f"0-{config.window / 2},{config.window / 2}-{config.window}",
            out=str(config.out / "sweep"),
        )
    with section("the joint checkpoint, for comparison", took):
        joint_sweep = evaluate_checkpoints(
            [stages["joint"]["run_dir"]],
            data=str(config.dataset),
            steps=[4],
            modes=["multi"],
            guidance=[1.0],  # one evaluation per step, as in few-step mode
            clips=config.sweep_clips,
            out=str(config.out / "sweep_joint"),
        )
    summary = summarize(counts, stages=stages, sweep=sweep, joint_sweep=joint_sweep, samples=samples, took=took)
    summary["models"] = compare_models(config, summary, talker)
    write_json(config.out / "summary.json", summary)
    write_page(config, summary)
    print(closing_message(config, summary), file=sys.stderr, flush=True)
    return summary


@contextmanager
def section(title: str, took: dict[str, float]) -> Iterator[None]:
    """Print the title of a part and store its duration in seconds in ``took``."""
    print(f"== {title}", file=sys.stderr, flush=True)
    began = time.monotonic()
    yield
    took[title] = round(time.monotonic() - began, 1)
    print(f"== {title}: {took[title]:.0f} s", file=sys.stderr, flush=True)


def talk(config: DemoConfig) -> dict[str, Any] | None:
    """Generate a sentence with the packaged model; return the facts of the clip, None without a packaged model."""
    if packaged_folder(DEFAULT_MODEL) is None:
        print(f"{DEFAULT_MODEL} is not part of this installation: skipped", file=sys.stderr, flush=True)
        return None
    target = config.out / f"{DEFAULT_MODEL}.mp4"
    facts = generate_clip(
        DEFAULT_MODEL, ClipPrompt(transcript=SENTENCE), out=str(target), seed=config.seed, overwrite=True
    )
    print(f"{DEFAULT_MODEL} speaks {SENTENCE!r} in {target}", file=sys.stderr, flush=True)
    return facts


def make_clips(config: DemoConfig) -> None:
    """Write the toy clips, one file without audio and one file that is not media."""
    with progress_bar("clips") as show:
        write_toyworld(
            config.clips,
            clips=config.clips_made,
            seconds=config.seconds,
            size=64,
            fps=Fraction(24),
            sample_rate=16000,
            seed=config.seed,
            jobs=os.cpu_count() or 1,
            progress_callback=show,
        )
    config.broken_files.mkdir(exist_ok=True)
    silent, pointer = config.broken_files / "no_sound.mp4", config.broken_files / "pointer.mp4"
    if not silent.exists():
        world = ToyConfig(seconds=config.seconds, seed=config.seed)
        write_mp4(silent, render_frames(sample_truth(world, config.clips_made)), world.fps)
    if not pointer.exists():
        pointer.write_text("version 1: a pointer, not a clip\n")


def run_stage(config: DemoConfig, stage: Stage) -> dict[str, Any]:
    """Train one stage, from the runs of its parent stages."""
    return train_stage(
        stage,
        data=str(config.dataset),
        init_from=[str(config.out / parent) for parent in STAGES[stage].parents],
        sets=config.sets,
        run=stage,
        runs_dir=config.out,
        sample=final_samples,
    )


def make_samples(config: DemoConfig, stages: Mapping[str, Any]) -> list[str]:
    """Generate a sample of every stage, and one four times as long as any training clip."""
    for stage, facts in stages.items():
        steps = FEW_STEPS if stage == "mutual" else 16
        make_sample(config, Path(facts["run_dir"]), f"{stage}-{steps}-steps.mp4", seconds=config.window, steps=steps)
    make_sample(
        config, Path(stages["mutual"]["run_dir"]), "mutual-4-steps-long.mp4", seconds=2 * config.seconds, steps=4
    )
    return sorted(str(path) for path in config.samples.glob("*.mp4"))


def make_sample(config: DemoConfig, run_dir: Path, name: str, *, seconds: float, steps: int) -> Path:
    """Generate a clip from the first frame and the repeated transcript of a held-out clip."""
    target = config.samples / name
    if target.exists():
        return target
    source = held_out_source(config)
    words = json.loads(source.with_suffix(".json").read_text())
    repeated = repeat_words(words["transcript"], config.seconds, seconds)
    generate_clip(
        str(run_dir),
        ClipPrompt(
            first_frame=str(source),
            transcript=json.dumps(repeated),
            caption=words["caption"],
            voice=str(source),
            seconds=seconds,
        ),
        out=str(target),
        steps=steps,
    )
    return target


def repeat_words(words: Sequence[Mapping[str, Any]], period: float, seconds: float) -> list[dict[str, Any]]:
    """Repeat the transcript every ``period`` seconds, for at least ``seconds``."""
    repeated: list[dict[str, Any]] = []
    for i in range(int(-(-seconds // period))):
        start = i * period
        repeated += [{"word": w["word"], "start": w["start"] + start, "end": w["end"] + start} for w in words]
    return repeated


def held_out_source(config: DemoConfig) -> Path:
    """Return the source file of the first held-out clip."""
    _, held_out = open_dataset(str(config.dataset)).split(DEFAULT_HELD_OUT_SHARE)
    return Path(unquote(held_out.clip(0).source_uri.removeprefix("file://")))


def summarize(
    counts: Mapping[str, Any],
    *,
    stages: Mapping[str, Any],
    sweep: Mapping[str, Any],
    joint_sweep: Mapping[str, Any],
    samples: list[str],
    took: Mapping[str, float],
) -> dict[str, Any]:
    """Return the content of ``summary.json``; losses are on held-out clips with fixed noise."""
    return {
        "clips": counts["sources"],
        "accepted": counts["accepted"],
        "rejected": counts["rejected"],
        "rejects_by_reason": counts["rejects_by_reason"],
        "stages": {
            name: {
                "loss_first": facts["losses"]["first"],
                "loss_last": facts["losses"]["last"],
                "samples_seen": facts["samples_seen"],
                "run_dir": facts["run_dir"],
                "mlflow_run": facts["mlflow_run"],
            }
            for name, facts in stages.items()
        },
        "sweep": [sweep_row(row) for row in whole_clip_rows(sweep) if row["mode"] != "real"],
        "real": [sweep_row(row) for row in whole_clip_rows(sweep) if row["mode"] == "real"],
        "joint": [sweep_row(row) for row in whole_clip_rows(joint_sweep) if row["mode"] != "real"],
        "mlflow_uri": environment.hide_passwords(os.environ["MLFLOW_TRACKING_URI"]),
        "mlflow_parent_run": sweep["mlflow_parent_run"],
        "samples": samples,
        "plots": [str(p) for p in sweep["plots"]],
        "seconds": dict(took),
    }


def whole_clip_rows(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a sweep for whole clips, without those for windows."""
    return [row for row in json.loads(Path(sweep["results"]).read_text()) if row["window"] == "all"]


def sweep_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the setting and the main metrics of one row."""
    facts = {key: row.get(key) for key in ("checkpoint", "mode", "steps", "nfe", "guidance")}
    return facts | {name: row["metrics"].get(name) for name in METRICS}


def compare_models(
    config: DemoConfig, summary: Mapping[str, Any], talker: Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """Return the packaged model, if there is one, and the model of the demo: training, sample and metrics by name."""
    found: dict[str, dict[str, Any]] = {}
    if talker is not None:
        card = model_card(DEFAULT_MODEL)
        found[DEFAULT_MODEL] = {
            "training": f"packaged, trained for {card.training_hours:g} hours on {card.training_machine}",
            "speech": SENTENCE,
            "sample": talker["path"],
            "metrics": {name: metric.value for name, metric in card.metrics.items()},
            "real": {name: metric.real for name, metric in card.metrics.items() if metric.real is not None},
        }
    minutes = _training_minutes(config, summary)
    row = next((row for row in summary["sweep"] if (row["mode"], row["steps"]) == ("few", FEW_STEPS)), {})
    real = next(iter(summary["real"]), {})
    found[DEMO_MODEL] = {
        "training": f"trained from scratch by this demo in {minutes:.1f} minutes",
        "training_minutes": minutes,
        "speech": "It speaks the syllables of the toy world.",
        "sample": str(config.samples / f"mutual-{FEW_STEPS}-steps.mp4"),
        "metrics": {name: row[name] for name in METRICS if row.get(name) is not None},
        "real": {name: real[name] for name in METRICS if real.get(name) is not None},
    }
    return found


def _training_minutes(config: DemoConfig, summary: Mapping[str, Any]) -> float:
    """Return the training time, also of an earlier run: a rerun finds finished stages."""
    before = read_json(config.out / "summary.json", default={})
    seconds = sum(summary["seconds"].get(name, 0.0) for name in TRAINING_SECTIONS)
    return max(round(seconds / 60, 1), before.get("models", {}).get(DEMO_MODEL, {}).get("training_minutes", 0.0))


def write_page(config: DemoConfig, summary: Mapping[str, Any]) -> Path:
    """Write ``index.html`` with both models side by side and links to the files of the demo."""
    template = jinja2.Template(Path(__file__).with_name("demo.html.jinja").read_text(), autoescape=True)
    models = [
        {
            "name": name,
            "training": facts["training"],
            "speech": facts["speech"],
            "file": os.path.relpath(facts["sample"], config.out),
            "rows": [(k, f"{v:.3g}", _number(facts["real"].get(k))) for k, v in facts["metrics"].items()],
        }
        for name, facts in summary["models"].items()
    ]
    files = [*summary["samples"], *summary["plots"], str(config.out / "sweep" / "report.html")]
    note = MODELS_NOTE if DEFAULT_MODEL in summary["models"] else f"{DEFAULT_MODEL} is not part of this installation."
    page = config.out / "index.html"
    page.write_text(template.render(models=models, note=note, files=[os.path.relpath(f, config.out) for f in files]))
    return page


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def closing_message(config: DemoConfig, summary: Mapping[str, Any]) -> str:
    """Return the closing message: the files to open and the next command."""
    plots = "\n".join(f"  {path}" for path in summary["plots"])
    samples = "\n".join(f"  {path}" for path in summary["samples"])
    models = "\n".join(
        f"  {name:<12}{facts['training']}\n  {'':<12}{facts['sample']}" for name, facts in summary["models"].items()
    )
    return (
        f"\nDone in {sum(summary['seconds'].values()) / 60:.1f} minutes.\n"
        f"Models:\n{models}\n"
        f"Samples:\n{samples}\nImages:\n  {config.out / 'contact_sheet.png'}\n{plots}\n"
        f"Summary:\n  {config.out / 'summary.json'}\n  {config.out / 'index.html'}\n"
        "MLflow UI of all runs:\n  .venv/bin/mfctl mlflow      then http://127.0.0.1:5000"
    )
