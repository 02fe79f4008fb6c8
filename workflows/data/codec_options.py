"""Options of ``mfctl preprocess`` that select codecs, the sync filter, transcription and filters of people."""

from dataclasses import replace
from typing import Any

from mfcore.codecs.oobleck import oobleck_config_from_folder
from mfcore.codecs.t5 import t5_config_from_folder
from mfcore.codecs.wan import wan_config_from_folder
from mfcore.errors import UserInputError
from preprocessing.config import PreprocessConfig
from preprocessing.people.config import PeopleConfig
from preprocessing.people.packages import models_digest
from preprocessing.steps.av_sync import syncnet_config
from preprocessing.steps.caption import MEASURED, CaptionConfig, caption_config
from preprocessing.steps.transcribe import whisper_config
from workflows.utils.environment import resolve_path


def apply_codec_options(
    config: PreprocessConfig, video: str | None = None, audio: str | None = None, text: str | None = None
) -> PreprocessConfig:
    """Return ``config`` with the named codecs, such as ``wan:DIR``. Raises ValueError for an unknown name."""
    parts: dict[str, Any] = {}
    for option, name, embedded, readers in (
        ("video", video, "dct", {"wan": wan_config_from_folder}),
        ("audio", audio, "mel", {"oobleck": oobleck_config_from_folder}),
        ("text", text, "words", {"t5": t5_config_from_folder, "umt5": t5_config_from_folder}),
    ):
        kind, _, folder = (name or embedded).partition(":")
        if kind in readers and folder:
            parts[option] = readers[kind](resolve_path(folder))
        elif name not in (None, embedded):
            known = ", ".join([embedded, *(f"{kind}:DIR" for kind in readers)])
            raise UserInputError(f"--{'text' if option == 'text' else f'codec-{option}'} {name}: choose one of {known}")
    return replace(config, **parts)


def apply_sync_option(config: PreprocessConfig, sync: str | None) -> PreprocessConfig:
    """Return ``config`` with the named sync filter. Raises ValueError for an unknown name."""
    kind, _, file = (sync or "motion").partition(":")
    if kind == "syncnet" and file:
        return replace(config, sync=syncnet_config(resolve_path(file)))
    if sync not in (None, "motion", "off"):
        raise UserInputError(f"--sync {sync}: choose motion, syncnet:FILE or off")
    return replace(config, sync=replace(config.sync, estimator=None)) if sync == "off" else config


def apply_transcript_option(config: PreprocessConfig, transcribe: str | None) -> PreprocessConfig:
    """Return ``config`` with the named source of missing transcripts. Raises ValueError for an unknown name."""
    kind, _, folder = (transcribe or "off").partition(":")
    if kind == "whisper" and folder:
        return replace(config, whisper=whisper_config(resolve_path(folder)))
    if transcribe not in (None, "off"):
        raise UserInputError(f"--transcribe {transcribe}: choose whisper:DIR or off")
    return config


def apply_caption_option(config: PreprocessConfig, caption: str | None) -> PreprocessConfig:
    """Return ``config`` with the named source of missing captions. Raises UserInputError for an unknown one."""
    if caption is None:
        return config
    if caption != MEASURED:
        return replace(config, caption=caption_config(resolve_path(caption)))
    return replace(config, caption=CaptionConfig())


def apply_people_option(config: PreprocessConfig, people: bool) -> PreprocessConfig:
    """Return ``config`` with the filters of people. Raises UserInputError if their packages are missing."""
    return replace(config, people=PeopleConfig(models=models_digest())) if people else config
