"""End-to-end demo on the toy world in one folder, through the functions of the public commands.

Rerun the demo to resume: each command resumes.
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

from preprocessing.config import PreprocessConfig
from preprocessing.dataset.reader import open_dataset
from preprocessing.media.mp4_writer import write_mp4
from preprocessing.toyworld.world import ToyConfig, render_frames, sample_truth, write_toyworld
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
from workflows.utils.json_io import write_json
from workflows.utils.progress import progress_bar


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
    write_json(config.out / "summary.json", summary)
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
        steps = 4 if stage == "mutual" else 16
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
    names = ("sync", "syllable_error", "frechet", "seam", "valid", "seconds_per_second")
    facts = {key: row.get(key) for key in ("checkpoint", "mode", "steps", "nfe", "guidance")}
    return facts | {name: row["metrics"].get(name) for name in names}


def closing_message(config: DemoConfig, summary: Mapping[str, Any]) -> str:
    """Return the closing message: the files to open and the next command."""
    plots = "\n".join(f"  {path}" for path in summary["plots"])
    samples = "\n".join(f"  {path}" for path in summary["samples"])
    return (
        f"\nDone in {sum(summary['seconds'].values()) / 60:.1f} minutes.\n"
        f"Samples:\n{samples}\nImages:\n  {config.out / 'contact_sheet.png'}\n{plots}\n"
        f"Summary:\n  {config.out / 'summary.json'}\n"
        "MLflow UI of all runs:\n  .venv/bin/mfctl mlflow      then http://127.0.0.1:5000"
    )
