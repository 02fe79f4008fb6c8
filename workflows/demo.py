"""``make demo``: the whole row as one story on the toy world, in one folder. Every part is the verb a user calls.

The same command again goes on where the last one stopped: each verb resumes.
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
    clips_made: int = 128
    seconds: float = 10.0  # of a clip
    window: float = 5.0  # longest training clip: two are cut from every file
    seed: int = 7
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 50)  # of the sweep
    sweep_clips: int = 6
    sets: tuple[str, ...] = ()  # changes to the configuration of every stage

    @property
    def clips(self) -> Path:
        return self.out / "clips"

    @property
    def broken_files(self) -> Path:
        return self.out / "damaged"

    @property
    def dataset(self) -> Path:
        return self.out / "dataset"

    @property
    def samples(self) -> Path:
        return self.out / "samples"


def demo(out: str) -> dict[str, Any]:
    """The story at its usual size; returns what ``summary.json`` holds."""
    return run_demo(DemoConfig(out=Path(out)))


def run_demo(story: DemoConfig) -> dict[str, Any]:
    """Run the story and write ``summary.json``."""
    story.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", environment.tracking_uri())
    took: dict[str, float] = {}
    with section("toy world", took):
        make_clips(story)
    with section("preprocess", took):
        config = PreprocessConfig(window_seconds=Fraction(story.window))
        counts = build_dataset([str(story.clips), str(story.broken_files)], str(story.dataset), config)
        sheet = story.out / "contact_sheet.png"
        inspect_dataset(str(story.dataset), verify=True, sheet=None if sheet.exists() else str(sheet))
    stages: dict[str, Any] = {}
    for stage in STAGES:
        with section(f"train {stage}", took):
            stages[stage] = run_stage(story, stage)
    with section("samples", took):
        samples = make_samples(story, stages)
    with section("sweep", took):
        sweep = evaluate_checkpoints(
            [stages["mutual"]["run_dir"]],
            data=str(story.dataset),
            steps=story.steps,
            modes=["few", "multi"],
            clips=story.sweep_clips,
            windows=f"0-{story.window / 2},{story.window / 2}-{story.window}",
            out=str(story.out / "sweep"),
        )
    with section("the joint checkpoint, for comparison", took):
        before = evaluate_checkpoints(
            [stages["joint"]["run_dir"]],
            data=str(story.dataset),
            steps=[4],
            modes=["multi"],
            guidance=[1.0],  # four Euler steps are then four evaluations, as four few steps are
            clips=story.sweep_clips,
            out=str(story.out / "sweep_joint"),
        )
    summary = summarize(counts, stages, sweep, before, samples, took)
    write_json(story.out / "summary.json", summary)
    print(closing_message(story, summary), file=sys.stderr, flush=True)
    return summary


@contextmanager
def section(title: str, took: dict[str, float]) -> Iterator[None]:
    """Announce a part of the story and keep how long it took."""
    print(f"== {title}", file=sys.stderr, flush=True)
    began = time.monotonic()
    yield
    took[title] = round(time.monotonic() - began, 1)
    print(f"== {title}: {took[title]:.0f} s", file=sys.stderr, flush=True)


def make_clips(story: DemoConfig) -> None:
    """The toy world, and beside it two files such as every collection has: one without sound, one that is no media."""
    with progress_bar("clips") as show:
        write_toyworld(
            story.clips,
            clips=story.clips_made,
            seconds=story.seconds,
            size=64,
            fps=Fraction(24),
            sample_rate=16000,
            seed=story.seed,
            jobs=os.cpu_count() or 1,
            progress_callback=show,
        )
    story.broken_files.mkdir(exist_ok=True)
    silent, pointer = story.broken_files / "no_sound.mp4", story.broken_files / "pointer.mp4"
    if not silent.exists():
        world = ToyConfig(seconds=story.seconds, seed=story.seed)
        write_mp4(silent, render_frames(sample_truth(world, story.clips_made)), world.fps)
    if not pointer.exists():
        pointer.write_text("version 1: a pointer, not a clip\n")


def run_stage(story: DemoConfig, stage: Stage) -> dict[str, Any]:
    return train_stage(
        stage,
        data=str(story.dataset),
        init_from=[str(story.out / parent) for parent in STAGES[stage].parents],
        sets=story.sets,
        run=stage,
        runs_dir=story.out,
        sample=final_samples,
    )


def make_samples(story: DemoConfig, stages: Mapping[str, Any]) -> list[str]:
    """A sample of every stage, and one four times as long as any training clip."""
    for stage, facts in stages.items():
        steps = 4 if stage == "mutual" else 16
        make_sample(story, Path(facts["run_dir"]), f"{stage}-{steps}-steps.mp4", seconds=story.window, steps=steps)
    make_sample(story, Path(stages["mutual"]["run_dir"]), "mutual-4-steps-long.mp4", seconds=2 * story.seconds, steps=4)
    return sorted(str(path) for path in story.samples.glob("*.mp4"))


def make_sample(story: DemoConfig, run_dir: Path, name: str, *, seconds: float, steps: int) -> Path:
    """Continue a held-out clip's first frame with its transcript (repeated for as long as it takes)."""
    target = story.samples / name
    if target.exists():
        return target
    source = held_out_source(story)
    words = json.loads(source.with_suffix(".json").read_text())
    repeated = repeat_words(words["transcript"], story.seconds, seconds)
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
    """The transcript again and again, every ``period`` seconds."""
    rounds = range(int(-(-seconds // period)))
    return [
        {"word": w["word"], "start": w["start"] + i * period, "end": w["end"] + i * period}
        for i in rounds
        for w in words
    ]


def held_out_source(story: DemoConfig) -> Path:
    """The file of the first clip that no stage was trained on."""
    _, held_out = open_dataset(str(story.dataset)).split(DEFAULT_HELD_OUT_SHARE)
    return Path(unquote(held_out.clip(0).source_uri.removeprefix("file://")))


def summarize(
    counts: Mapping[str, Any],
    stages: Mapping[str, Any],
    sweep: Mapping[str, Any],
    before: Mapping[str, Any],
    samples: list[str],
    took: Mapping[str, float],
) -> dict[str, Any]:
    """The contract of ``summary.json``; losses are held-out, with fixed noise and the same terms at both ends."""
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
        "joint": [sweep_row(row) for row in whole_clip_rows(before) if row["mode"] != "real"],
        "mlflow_uri": os.environ["MLFLOW_TRACKING_URI"],
        "mlflow_parent_run": sweep["mlflow_parent_run"],
        "samples": samples,
        "plots": [str(p) for p in sweep["plots"]],
        "seconds": dict(took),
    }


def whole_clip_rows(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a sweep that are about clips as a whole, not about a window of them."""
    return [row for row in json.loads(Path(sweep["results"]).read_text()) if row["window"] == "all"]


def sweep_row(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("sync", "syllable_error", "frechet", "seam", "valid", "seconds_per_second")
    facts = {key: row.get(key) for key in ("checkpoint", "mode", "steps", "nfe", "guidance")}
    return facts | {name: row["metrics"].get(name) for name in names}


def closing_message(story: DemoConfig, summary: Mapping[str, Any]) -> str:
    """What to look at, and how."""
    plots = "\n".join(f"  {path}" for path in summary["plots"])
    samples = "\n".join(f"  {path}" for path in summary["samples"])
    return (
        f"\nDone in {sum(summary['seconds'].values()) / 60:.1f} minutes.\n"
        f"Watch and listen:\n{samples}\nLook at:\n  {story.out / 'contact_sheet.png'}\n{plots}\n"
        f"All numbers:\n  {story.out / 'summary.json'}\n"
        "Open MLflow on all runs:\n  .venv/bin/mfctl mlflow      then http://127.0.0.1:5000"
    )
