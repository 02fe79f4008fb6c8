"""Extract features of clips: toy readers, pretrained networks and signal statistics."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from mfcore.metrics.av_sync import block_statistics, motion_energy, sound_envelope
from mfcore.metrics.continuity import step_energy
from mfcore.metrics.feature_extractors import SEGMENT
from mfcore.metrics.lip_sync_error import FPS as LIP_SYNC_FPS
from mfcore.metrics.signal_quality import rms, sharpness, to_decibels
from mfcore.metrics.speech import normalize_words
from mfcore.types import AUDIO, VIDEO
from preprocessing.records import Word
from preprocessing.speech import recognizer
from preprocessing.speech.phonemes import is_phoneme_transcript, mouth_track, spoken_text
from preprocessing.toyworld.audio_reader import read_audio
from preprocessing.toyworld.video_reader import read_video
from workflows.evaluation.clip_features import (
    ENVELOPE_RATE_HZ,
    HALF_SECOND,
    Array,
    ChunkBoundaryEnergy,
    ClipFeatures,
    FeatureTrack,
    SpeechSegment,
    ToyAudioFeatures,
    ToyVideoFeatures,
)
from workflows.evaluation.feature_models import FeatureModels
from workflows.evaluation.held_out import EvaluationSet, frame_rate_of
from workflows.evaluation.signals import DecodedClip

SEGMENT_SECONDS = 5.0  # approximate length of a speech segment; time windows need separate segments
_BAND_EDGES_HZ = (60.0, 400.0, 1200.0, 3000.0, 8000.0)  # frequency bands of the audio features
_MAX_RESIDUAL = 2.0  # upper limit of the residual of a choice


class FeatureExtractor:
    """Extracts features from clips of one dataset."""

    def __init__(self, evaluation_set: EvaluationSet, feature_models: FeatureModels | None = None) -> None:
        self._evaluation_set, self._toy = evaluation_set, evaluation_set.toy
        self._has_syllables = self._toy is not None and self._toy.voice == "syllables"
        self._is_english = self._toy is not None and self._toy.voice == "english"
        self._feature_models = feature_models or FeatureModels()
        self._fps = float(frame_rate_of(evaluation_set.meta))
        codec: Any = evaluation_set.codecs.get(AUDIO)
        self.sample_rate = codec.config.sample_rate if codec else 16000

    def extract(self, clip: DecodedClip) -> ClipFeatures:
        """Return the features of one clip."""
        frames = None if clip.frames is None else clip.frames.numpy()
        sound = None if clip.sound is None else clip.sound.numpy()
        picture = self._toy_video(frames, clip.words) if frames is not None and self._toy else None
        motion = None if frames is None else motion_energy(frames)
        features: dict[str, Array] = {}
        if picture is not None and motion is not None and frames is not None:
            features[VIDEO] = _video_vectors(picture, motion, frames, self._fps)
        if sound is not None and self._toy:
            features[AUDIO] = _audio_vectors(sound, self.sample_rate)
        features_of_clip = ClipFeatures(
            finite=clip.finite,
            fps=self._fps,
            sample_rate=self.sample_rate,
            motion=motion,
            sharpness=None if frames is None else sharpness(frames),
            blocks=None if frames is None else block_statistics(frames),
            sound=sound,
            seams=self._boundary_energies(clip, frames, sound),
            features=features,
            picture=picture,
            speech=self._toy_audio(sound, clip.words) if sound is not None and self._has_syllables else None,
            phonemes=self._correct_phonemes(sound, clip.words) if sound is not None and self._is_english else None,
            words=not self._has_syllables and bool(clip.words),
            tracks=self._tracks(frames, sound),
            utterances=self._speech_segments(sound, clip.words)
            if sound is not None and not self._has_syllables
            else (),
        )
        _ = features_of_clip.mouth_sync, features_of_clip.motion_sync  # computed here, in parallel on the workers
        return features_of_clip

    def _tracks(self, frames: NDArray[np.uint8] | None, sound: NDArray[np.float32] | None) -> dict[str, FeatureTrack]:
        """Return the embeddings of all loaded networks."""
        tracks: dict[str, FeatureTrack] = {}
        if frames is not None:
            for name, extract in self._feature_models.video_encoders.items():
                rows = extract(frames, self._fps)
                first = rows[0] if name == "faces" else None
                tracks[name] = FeatureTrack(
                    values=rows if first is None else rows[1:], rate=1 / SEGMENT, reference=first
                )
        if sound is not None:
            for name, extract in self._feature_models.audio_encoders.items():
                tracks[name] = FeatureTrack(values=extract(sound, self.sample_rate), rate=1 / SEGMENT)
        if people := self._feature_models.people_models:
            tracks |= people.tracks(frames, self._fps, sound, self.sample_rate)
        if frames is not None and sound is not None and self._feature_models.lip_sync_model is not None:
            lips, voice = self._feature_models.lip_sync_model(frames, self._fps, sound, self.sample_rate)
            tracks |= {
                "lips": FeatureTrack(values=lips, rate=LIP_SYNC_FPS),
                "voice": FeatureTrack(values=voice, rate=LIP_SYNC_FPS),
            }
        return tracks

    def _speech_segments(self, sound: NDArray[np.float32], words: Sequence[Word]) -> tuple[SpeechSegment, ...]:
        if not self._feature_models.speech_recognizers or not words:
            return ()
        rate = self.sample_rate
        segments: list[SpeechSegment] = []
        for start, end in split_speech(words, len(sound) / rate):
            part = sound[round(start * rate) : round(end * rate)]
            segments.append(
                SpeechSegment(
                    at=(start + end) / 2,
                    expected=tuple(
                        normalize_words(spoken_text(w for w in words if start <= (w.start + w.end) / 2 < end))
                    ),
                    detected={
                        n: tuple(normalize_words(transcribe(part, rate)))
                        for n, transcribe in self._feature_models.speech_recognizers.items()
                    },
                )
            )
        return tuple(segments)

    def _toy_video(self, frames: NDArray[np.uint8], words: Sequence[Word]) -> ToyVideoFeatures:
        assert self._toy is not None
        # The first frame is repeated for half a second, the duration of one observation.
        still = np.repeat(frames[:1], int(self._fps * HALF_SECOND) + 1, axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):  # generated frames may have no contrast
            seen, first = read_video(frames, self._toy), read_video(still, self._toy)
        times = np.arange(len(frames)) / self._fps
        return ToyVideoFeatures(
            opening=seen.opening,
            head=seen.head,
            face=seen.face_color / 255,
            first_face=first.face_color[0] / 255,
            choices=seen.choices,
            spoken_opening=mouth_track(words, times)["opening"] if is_phoneme_transcript(words) else None,
        )

    def _toy_audio(self, sound: NDArray[np.float32], words: Sequence[Word]) -> ToyAudioFeatures:
        assert self._toy is not None
        detected = read_audio(sound, self.sample_rate, self._toy)
        return ToyAudioFeatures(
            detected=tuple((w["word"], (w["start"] + w["end"]) / 2) for w in detected.syllables),
            expected=tuple((w.word, (w.start + w.end) / 2) for w in words),
            tone=detected.tone,
        )

    def _correct_phonemes(self, sound: NDArray[np.float32], words: Sequence[Word]) -> NDArray[np.bool_]:
        if self.sample_rate != recognizer.SAMPLE_RATE:
            sound = resample_poly(sound, recognizer.SAMPLE_RATE, self.sample_rate).astype(np.float32)
        return recognizer.correct_frames(words, sound)

    def _boundary_energies(
        self, clip: DecodedClip, frames: NDArray[np.uint8] | None, sound: NDArray[np.float32] | None
    ) -> dict[str, ChunkBoundaryEnergy]:
        chunk, seams = float(self._evaluation_set.meta.chunk_seconds), {}
        if frames is not None:
            # The first frame precedes chunk 0: frame j shows time j / fps, and a chunk ends with its last frame.
            seams["pixels"] = _boundary_energy(frames, (np.arange(len(frames)) - 1) / self._fps, chunk)
        if sound is not None:
            envelope = sound_envelope(sound, self.sample_rate, ENVELOPE_RATE_HZ)
            seams["sound"] = _boundary_energy(envelope, np.arange(len(envelope)) / ENVELOPE_RATE_HZ, chunk)
        timeline = self._evaluation_set.meta.timeline()
        for m, latents in clip.latents.items():
            whitened = self._evaluation_set.meta.stats[m].whiten(latents.float(), space=latents.ndim - 2).numpy()
            chunks = -(-len(latents) // timeline.count(m, 1)) + 1
            clock = timeline.clocks[m]
            times = timeline.times(m, chunks).numpy()[: len(latents)] - float(clock.offset)
            index = timeline.chunk_index(m, chunks).numpy()[: len(latents)]
            seams[f"{m}_latents"] = ChunkBoundaryEnergy(
                energy=step_energy(whitened), times=times[1:], border=np.diff(index) != 0
            )
        return seams


def _boundary_energy(values: Array | NDArray[np.uint8], times: Array, chunk: float) -> ChunkBoundaryEnergy:
    index = np.floor(times / chunk + 1e-6)
    return ChunkBoundaryEnergy(energy=step_energy(values), times=np.maximum(times[1:], 0), border=np.diff(index) != 0)


def _split_half_seconds(values: Array, per_half: float, count: int) -> list[Array]:
    """Split ``values`` into half seconds; the last part may be short."""
    edges = np.round(np.arange(count + 1) * per_half).astype(int)
    return [values[a : max(b, a + 1)] for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _video_vectors(picture: ToyVideoFeatures, motion: Array, frames: NDArray[np.uint8], fps: float) -> Array:
    """Return [K, 8]: mouth (mean, std), head (x, y), motion, sharpness, color drift, residual of the choices."""
    count = len(picture.face)

    def parts(values: Array) -> list[Array]:
        return _split_half_seconds(values[1:], fps * HALF_SECOND, count)

    gray = frames[..., 1].astype(np.float32)
    sharp = np.abs(np.diff(gray, axis=2)).mean((1, 2))
    residuals = np.mean([np.minimum(c.residual[:count], _MAX_RESIDUAL) for c in picture.choices.values()], axis=0)
    return np.stack(
        [
            np.array([part.mean() for part in parts(picture.opening)]),
            np.array([part.std() for part in parts(picture.opening)]),
            *np.array([part.mean(0) for part in parts(picture.head)]).T,
            np.log(1e-2 + np.array([part.mean() for part in parts(motion)])),
            np.log(1e-2 + np.array([part.mean() for part in parts(sharp)])),
            np.sqrt(np.square(picture.face - picture.first_face).mean(1)),
            residuals,
        ],
        axis=1,
    )


def _audio_vectors(sound: NDArray[np.float32], sample_rate: int) -> Array:
    """Return [K, 6]: loudness and its std in dB, shares of four frequency bands in dB."""
    rows: list[list[float]] = []
    for part in _split_half_seconds(
        sound.astype(np.float64), sample_rate * HALF_SECOND, max(1, round(len(sound) / sample_rate / HALF_SECOND))
    ):
        power = np.square(np.abs(np.fft.rfft(part * np.hanning(len(part)))))
        at = np.fft.rfftfreq(len(part), 1 / sample_rate)
        bands = [
            power[(at >= a) & (at < b)].sum() for a, b in zip(_BAND_EDGES_HZ[:-1], _BAND_EDGES_HZ[1:], strict=True)
        ]
        envelope = to_decibels(sound_envelope(part, sample_rate, ENVELOPE_RATE_HZ))
        shares = 10 * np.log10(1e-4 + np.array(bands) / (sum(bands) + 1e-12))
        rows.append([to_decibels(rms(part)), float(envelope.std()), *shares])
    return np.array(rows)


def split_speech(words: Sequence[Word], seconds: float) -> list[tuple[float, float]]:
    """Return start and end of segments of about ``SEGMENT_SECONDS``, cut between words, that cover a clip."""
    gaps = [(a.end + b.start) / 2 for a, b in pairwise(words)]
    wanted = np.arange(SEGMENT_SECONDS, seconds - SEGMENT_SECONDS / 2, SEGMENT_SECONDS)
    cuts = sorted({min(gaps, key=lambda gap: abs(gap - at)) for at in wanted}) if gaps else []
    return list(pairwise([0.0, *cuts, seconds]))
