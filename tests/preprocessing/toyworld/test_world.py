"""Toy world: readers recover the ground truth from mp4 and codecs, and reject mixtures."""

import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import ffmpeg
import numpy as np
import pytest
import torch

from mfcore.codecs.dct import DctCodec, DctConfig
from mfcore.codecs.mel import MelCodec
from mfcore.metrics.av_sync import SyncEstimate, sound_envelope, sync_offset
from mfcore.metrics.distributions import mode_entropy
from mfcore.timeline import video_clock
from preprocessing.toyworld.audio_reader import mouth_correlation, read_audio
from preprocessing.toyworld.choices import valid_fraction
from preprocessing.toyworld.video_reader import read_video
from preprocessing.toyworld.voice import VOICES, TranscriptWord, speech_envelope
from preprocessing.toyworld.world import (
    CHOICES,
    PERSISTENT,
    STAY_PROBABILITY,
    ToyConfig,
    ToyTruth,
    caption_of,
    frame_half_seconds,
    render_audio,
    render_frames,
    sample_truth,
    write_toyworld,
)
from tests.helpers.error_rate import error_rate

CONFIG = ToyConfig(seconds=6.0, seed=5)
CLIPS = 8


def decoded(path: Path, size: int, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames and sound as ffmpeg decodes them."""
    source = ffmpeg.input(str(path))
    picture, _ = source.output("pipe:", format="rawvideo", pix_fmt="rgb24", vsync=0).run(quiet=True)
    sound, _ = source.output("pipe:", format="f32le", ac=1, ar=sample_rate).run(quiet=True)
    return np.frombuffer(picture, np.uint8).reshape(-1, size, size, 3), np.frombuffer(sound, np.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[ToyTruth, np.ndarray, np.ndarray]]:
    out = tmp_path_factory.mktemp("world") / "toy"
    paths = write_toyworld(out, clips=CLIPS, seconds=CONFIG.seconds, seed=CONFIG.seed)
    return [(sample_truth(CONFIG, i), *decoded(path, 64, 16000)) for i, path in enumerate(paths)]


@cache
def rendered(index: int) -> tuple[ToyTruth, np.ndarray, np.ndarray]:
    truth = sample_truth(CONFIG, index)
    return truth, render_frames(truth), render_audio(truth)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def syllable_error(read: Sequence[TranscriptWord], transcript: Sequence[TranscriptWord]) -> float:
    return error_rate([[w["word"] for w in read]], [[w["word"] for w in transcript]])


def lateness(opening: np.ndarray, fps: float, sound: np.ndarray, rate: int) -> SyncEstimate:
    """Return the estimated delay of the audio against the mouth."""
    return sync_offset(opening, fps, sound_envelope(sound, rate, 100), 100, max_lag=0.4)


def with_other_choices(truth: ToyTruth, names: tuple[str, ...], step: int) -> ToyTruth:
    other = {name: tuple((m + step) % CHOICES[name] for m in truth.choices[name]) for name in names}
    return replace(truth, choices={**truth.choices, **other})


def check_picture(truth: ToyTruth, frames: np.ndarray) -> None:
    read = read_video(frames, truth.config)
    assert read.look == truth.look
    for name, choice in read.choices.items():
        np.testing.assert_array_equal(choice.mode, truth.choices[name][: len(choice.mode)], err_msg=name)
        assert choice.valid.all(), (name, choice.residual.max())


# --- the encoded file ------------------------------------------------------------


def test_video_and_audio_survive_the_mp4_and_stay_aligned(world):
    for truth, frames, sound in world:
        assert len(frames) == CONFIG.frames == 6 * 24 + 1
        assert psnr(frames, render_frames(truth)) > 28  # color is stored at half the resolution
        reference = render_audio(truth)
        spectrum = np.fft.rfft(sound[: len(reference)]) * np.conj(np.fft.rfft(reference))
        lag = int(np.fft.irfft(spectrum).argmax())
        assert min(lag, len(reference) - lag) <= 0.002 * 16000


def test_video_is_read_exactly(world):
    for truth, frames, _ in world:
        check_picture(truth, frames)


def test_flat_frames_do_not_divide_by_zero():
    with np.errstate(divide="raise", invalid="raise"):
        for level in (0, 128, 250, 255):
            read = read_video(np.full((24, 64, 64, 3), level, np.uint8), CONFIG)
            assert np.isfinite(read.head).all()
            assert not any(read.choices[name].valid.any() for name in ("gaze", "brows"))


def test_head_mouth_and_face_color_are_measured(world):
    for truth, frames, _ in world:
        read = read_video(frames, CONFIG)
        at = truth.frame_times
        head = sum(np.sin(2 * np.pi * s.frequency * at + s.phase)[:, None] * [s.x, s.y] for s in truth.sway)
        assert np.abs(read.head * 64 - head).max() < 0.5  # 64ths of the side; the head sways by two
        assert np.abs(read.opening - speech_envelope(truth.transcript, at)[0]).mean() < 0.05
        assert np.ptp(read.face_color, axis=0).max() < 16
        assert len(read.face_color) == CONFIG.half_seconds


def test_mouth_follows_the_audio_and_a_shift_is_detected(world):
    for _, frames, sound in world:
        opening = read_video(frames, CONFIG).opening
        assert mouth_correlation(opening, 24, sound, 16000) > 0.9
        assert abs(lateness(opening, 24, sound, 16000).offset_sec) <= 0.005
        late = np.concatenate([np.zeros(1920, np.float32), sound])
        for moved, planted in ((late, 0.12), (sound[1920:], -0.12)):
            offset, correlation = lateness(opening, 24, moved, 16000)
            assert abs(offset - planted) <= 0.01
            assert correlation > 0.9


def test_audio_is_read_exactly(world):
    errors, times = [], []
    for truth, _, sound in world:
        read = read_audio(sound, 16000, CONFIG)
        errors.append(syllable_error(read.syllables, truth.transcript))
        times += [abs(a["start"] - b["start"]) for a, b in zip(read.syllables, truth.transcript, strict=False)]
        assert read.tone.mode[: CONFIG.half_seconds].tolist() == list(truth.choices["tone"])
        assert read.tone.valid.all()
        assert read.voice == truth.voice
        assert read.pitch == pytest.approx(VOICES[truth.voice], rel=0.02)
    assert np.mean(errors) < 0.02
    assert np.median(times) < 0.02


# --- the codecs ------------------------------------------------------------


def test_codec_reconstructions_are_read():
    video, audio = DctCodec(DctConfig(channels=48)), MelCodec()
    errors, quality = [], []
    for index in range(6):
        truth, frames, sound = rendered(index)
        again = video.decode(video.encode(torch.from_numpy(frames))).numpy()
        quality.append(psnr(again, frames[: len(again)]))
        check_picture(truth, again)
        heard = read_audio(audio.decode(audio.encode(torch.from_numpy(sound))).numpy(), 16000, CONFIG)
        errors.append(syllable_error(heard.syllables, truth.transcript))
        assert heard.tone.mode[: CONFIG.half_seconds].tolist() == list(truth.choices["tone"])
    assert min(quality) > 26
    assert np.mean(errors) < 0.05


def test_no_group_of_frames_straddles_a_choice():
    clock, half = video_clock(Fraction(24), group=4), frame_half_seconds(CONFIG.frames, CONFIG.fps)
    assert half[0] == -1
    for latent in range((CONFIG.frames - 1) // 4):
        group = half[1 + 4 * latent : 5 + 4 * latent]
        assert set(group) == {int(clock.start(latent) * 2)}


# --- validity ------------------------------------------------------------


@pytest.mark.parametrize("names", [("gaze", "brows", "hand", "tone"), ("light",)])
@pytest.mark.parametrize("step", [1, 2])
def test_a_mixture_of_two_modes_is_not_valid(names, step):
    """Mix in pixels, and the tone in codec latents, as a model would."""
    codec, invalid = MelCodec(), {name: [] for name in names}
    for index in range(2):
        truth, frames, sound = rendered(index)
        other = with_other_choices(truth, names, step)
        mixed = ((frames.astype(np.float32) + render_frames(other)) / 2).astype(np.uint8)
        choices = dict(read_video(mixed, CONFIG).choices)
        if "tone" in names:
            latents = [codec.encode(torch.from_numpy(s)) for s in (sound, render_audio(other))]
            choices["tone"] = read_audio(codec.decode((latents[0] + latents[1]) / 2).numpy(), 16000, CONFIG).tone
        for name in names:
            invalid[name] += (~choices[name].valid[: CONFIG.half_seconds]).tolist()
    assert {name: share for name, marks in invalid.items() if (share := np.mean(marks)) < 0.95} == {}


def test_noise_is_not_valid():
    noise = np.random.default_rng(0).integers(0, 256, (73, 64, 64, 3)).astype(np.uint8)
    choices = read_video(noise, CONFIG).choices
    assert valid_fraction(choices) == 0
    assert max(c.valid.mean() for name, c in choices.items() if name != "light") < 0.1


def test_silence_has_no_readings():
    read = read_audio(np.zeros(32000, np.float32), 16000, CONFIG)
    assert read.syllables == ()
    assert not read.tone.present.any()
    assert read.voice == -1


# --- the world ------------------------------------------------------------


def test_a_clip_is_a_function_of_seed_and_index():
    truth, frames, sound = rendered(3)
    again = sample_truth(CONFIG, 3)
    assert again == truth
    assert np.array_equal(render_frames(again), frames)
    assert np.array_equal(render_audio(again), sound)
    assert sample_truth(CONFIG, 4).transcript != truth.transcript
    assert sample_truth(replace(CONFIG, seed=6), 3).transcript != truth.transcript


def test_choices_are_spread_evenly_and_some_persist():
    truths = [sample_truth(ToyConfig(seconds=20), i) for i in range(100)]
    for name, count in CHOICES.items():
        chains = np.asarray([t.choices[name] for t in truths])
        assert mode_entropy(chains.ravel(), count) > 0.99 * np.log(count)
        stays = np.mean(chains[:, 1:] == chains[:, :-1])
        assert stays == pytest.approx(STAY_PROBABILITY if name in PERSISTENT else 1 / count, abs=0.05)


def test_every_half_second_has_speech_and_ordered_syllables():
    for index in range(50):
        truth = sample_truth(CONFIG, index)
        starts, ends = (np.asarray([w[key] for w in truth.transcript]) for key in ("start", "end"))
        assert (starts[1:] >= ends[:-1]).all()
        assert ends[-1] <= CONFIG.seconds
        _, entry, _ = speech_envelope(truth.transcript, np.arange(0, 6, 0.005))
        assert (entry >= 0).reshape(12, -1).mean(1).min() > 0.3
        assert {w["word"] for w in truth.transcript} <= set(CONFIG.vocabulary)


@pytest.mark.parametrize(
    ("size", "fps", "rate"), [(32, Fraction(25), 16000), (48, Fraction(12), 16000), (128, Fraction(30000, 1001), 22050)]
)
def test_other_sizes_and_rates_are_read(size, fps, rate):
    config = ToyConfig(size=size, fps=fps, sample_rate=rate, seconds=3, syllables=24)
    for index in range(2):
        truth = sample_truth(config, index)
        frames, sound = render_frames(truth), render_audio(truth)
        assert frames.shape == (config.frames, size, size, 3)
        assert len(sound) == 3 * rate
        check_picture(truth, frames)
        assert syllable_error(read_audio(sound, rate, config).syllables, truth.transcript) == 0
        assert abs(lateness(read_video(frames, config).opening, float(fps), sound, rate).offset_sec) <= 0.005


@pytest.mark.parametrize(
    "wrong", [{"size": 63}, {"size": 16}, {"fps": 0}, {"sample_rate": 8000}, {"seconds": 0}, {"syllables": 99}]
)
def test_invalid_configurations_raise(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ToyConfig(**wrong)


# --- the folder ------------------------------------------------------------


def test_rerun_adds_only_missing_clips(tmp_path):
    seen = []
    first = write_toyworld(tmp_path / "w", clips=1, seconds=1)
    before = first[0].stat().st_mtime_ns
    paths = write_toyworld(tmp_path / "w", clips=2, seconds=1, progress_callback=lambda *done: seen.append(done))
    assert [p.name for p in paths] == ["toy00000.mp4", "toy00001.mp4"]
    assert seen == [(1, 2), (2, 2)]
    assert paths[0].stat().st_mtime_ns == before
    assert not [p.name for p in (tmp_path / "w").iterdir() if p.name.startswith(".")]


def test_sidecar_has_caption_transcript_and_truth(tmp_path):
    path = write_toyworld(tmp_path / "w", clips=1, seconds=2, seed=9)[0]
    truth, note = sample_truth(ToyConfig(seconds=2, seed=9), 0), json.loads(path.with_suffix(".json").read_text())
    assert note["caption"] == caption_of(truth)
    assert note["transcript"] == list(truth.transcript)
    assert {k: tuple(v) for k, v in note["truth"]["choices"].items()} == dict(truth.choices)
    assert str(VOICES[truth.voice]) not in note["caption"]
    assert note["truth"]["pitch_hz"] == VOICES[truth.voice]


def test_other_folders_raise_and_stay_unchanged(tmp_path):
    write_toyworld(tmp_path / "w", clips=1, seconds=1)
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        write_toyworld(tmp_path / "w", clips=1, seconds=1, seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match="new or empty folder"):
        write_toyworld(tmp_path / "mine", clips=1, seconds=1)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
