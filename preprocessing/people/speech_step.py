"""Step: measure the speech of a clip, and reject clips without it, with noise or with several voices."""

from dataclasses import replace

from preprocessing.people.config import PeopleConfig
from preprocessing.people.speech import speech_quality, speech_seconds, to_model_rate, voice_activity, voice_similarity
from preprocessing.records import Clip, Rejected, SpeechFacts

STEP = "voice"


def check_speech(clip: Clip, config: PeopleConfig, *, sample_rate: int) -> Clip:
    """Return the clip with what was measured of its speech.

    Raise Rejected with the reason no_speech, several_voices or noisy.
    """
    if clip.waveform is None:
        return clip
    sound = to_model_rate(clip.waveform, sample_rate)
    active = voice_activity(sound)
    seconds = speech_seconds(active)
    if config.min_speech_seconds is not None and seconds < config.min_speech_seconds:
        raise Rejected(STEP, "no_speech", f"{seconds:.2f} s of speech, at least {config.min_speech_seconds:g} s")
    similarity = voice_similarity(sound, active)
    if config.min_voice_similarity is not None and similarity is not None and similarity < config.min_voice_similarity:
        detail = f"similarity of both halves {similarity:.2f}, at least {config.min_voice_similarity:g}"
        raise Rejected(STEP, "several_voices", detail)
    quality = None
    if config.min_speech_quality is not None:
        quality = speech_quality(sound)
        if quality is not None and quality < config.min_speech_quality:
            raise Rejected(STEP, "noisy", f"DNSMOS {quality:.2f}, at least {config.min_speech_quality:g}")
    return replace(clip, speech=SpeechFacts(seconds=seconds, quality=quality, voice_similarity=similarity))
