"""What a run can do when it ends: held-out conditions continued by its checkpoint, as files for its MLflow run."""

from pathlib import Path

from preprocessing.mp4 import write_mp4
from workflows.checkpoint import read_json
from workflows.generate import sampling
from workflows.heldout import frame_rate, select
from workflows.sampler import decode, generate
from workflows.streamer import Streamer
from workflows.worker import RECORD

CLIPS = 2
MULTI_STEPS = 8  # fewer than `mfctl generate` takes: this is a look, not a measurement


def training_samples(run_dir: Path) -> list[Path]:
    """Generate the first held-out clips anew from ``run_dir``'s latest checkpoint; files in ``run_dir/samples``."""
    record = read_json(run_dir / RECORD)
    streamer = Streamer.load(run_dir)
    how = sampling(
        streamer.card.stage,
        mode=None,
        steps=None if streamer.card.stage == "mutual" else MULTI_STEPS,
        guidance=None,
        trust=None,
        seed=0,
    )
    held = select(record["data"], clips=CLIPS, seconds=None, fraction=record["config"]["data"]["held_out"])
    (run_dir / "samples").mkdir(exist_ok=True)
    paths: list[Path] = []
    for batch in generate(streamer, held.prompts, how):
        for prompt, signals in zip(batch.prompts, decode(streamer, batch), strict=True):
            path = run_dir / "samples" / f"{prompt.number}-{how.mode}-{how.steps}-steps.mp4"
            frames = None if signals.frames is None else signals.frames.numpy()
            sound = None if signals.sound is None else signals.sound.numpy()
            rate = None if sound is None else streamer.sample_rate
            write_mp4(path, frames, None if frames is None else frame_rate(held.meta), sound, rate)
            paths.append(path)
    return paths
