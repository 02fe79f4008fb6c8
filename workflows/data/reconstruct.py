"""Decode one row of a dataset to an mp4 file."""

from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from mfcore.types import AUDIO, VIDEO
from preprocessing.dataset.reader import ClipDataset, open_dataset
from preprocessing.media.mp4_writer import write_mp4
from workflows.utils.output_file import check_output_file


def reconstruct_clip(dataset: str, clip_id: str, out: str, overwrite: bool = False) -> dict[str, Any]:
    """Decode one row to an mp4, the upper bound of the quality of generated clips; returns its length.

    Raises ValueError if ``out`` exists and ``overwrite`` is false.
    """
    check_output_file(out, suffix=".mp4", overwrite=overwrite)
    clips = open_dataset(dataset)
    clip = clips.clip(clips.index(clip_id))
    frames, sound = decode_latents(clips, clip.video, VIDEO), decode_latents(clips, clip.audio, AUDIO)
    fps, rate = Fraction(clips.meta.config["video"]["fps"]), int(clips.meta.config["audio"]["sample_rate"])
    seconds = len(frames) / fps if frames is not None else Fraction(0 if sound is None else len(sound), rate)
    sound = None if sound is None else sound[: round(seconds * rate)]
    Path(out).resolve().parent.mkdir(parents=True, exist_ok=True)
    write_mp4(out, frames, fps, sound, sample_rate=rate)
    return {"path": out, "seconds": float(seconds), "frames": 0 if frames is None else len(frames), "fps": float(fps)}


def decode_latents(clips: ClipDataset, latents: Tensor | None, modality: str) -> Any:
    """Return the frames (n, H, W, 3) or samples of dataset latents, None without latents."""
    if latents is None:
        return None
    return clips.meta.codec(modality).decode(latents).numpy()
