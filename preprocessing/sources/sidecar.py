"""Read captions and transcripts from sidecar files if the manifest has none.

``NAME.json`` = {"caption": text, "transcript": [{"word", "start", "end"}]}, times in seconds since the source's origin.
``NAME.vtt`` or ``NAME.srt``: the transcript if the JSON has none. ``NAME.txt``: the caption.
"""

import json
import os
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from preprocessing.io.errors import translate_storage_errors
from preprocessing.io.storage import filesystem_for, is_remote, local_path
from preprocessing.records import Clip, Rejected, Source, Word
from preprocessing.sources.discovery import parse_transcript, split_fragment
from preprocessing.sources.subtitles import parse_subtitles


def _read_sidecar_file(uri: str, suffix: str) -> bytes | None:
    """Return the content of the file with the name of the source and another suffix, or None."""
    if is_remote(uri):
        fs, path = filesystem_for(unquote(uri))
        path = os.path.splitext(path)[0] + suffix
        with translate_storage_errors(uri):
            return fs.cat_file(path) if fs.exists(path) else None
    path = os.path.splitext(local_path(uri))[0] + suffix
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return file.read()


def read_sidecar(source: Source) -> Source:
    """Add caption and transcript from sidecar files. Raise Rejected if one is malformed."""
    if source.caption is not None and source.transcript is not None:
        return source
    uri, _ = split_fragment(source.uri)
    facts = _read_json(uri)
    caption, words = source.caption, source.transcript
    try:
        if caption is None and "caption" in facts:
            caption = str(facts["caption"])
        if words is None:
            words = parse_transcript(facts.get("transcript"), "sidecar")
        for suffix in (".vtt", ".srt"):
            if words is None and (data := _read_sidecar_file(uri, suffix)) is not None:
                words = parse_subtitles(data)
    except ValueError as error:
        raise Rejected("transcript", "bad_sidecar", str(error)) from error
    if caption is None and (text := _read_sidecar_file(uri, ".txt")) is not None:
        caption = text.decode("utf-8", "replace").strip()
    return replace(source, caption=caption, transcript=words)


def _read_json(uri: str) -> dict[str, Any]:
    data = _read_sidecar_file(uri, ".json")
    if data is None:
        return {}
    try:
        facts = json.loads(data)
    except ValueError as error:
        raise Rejected("transcript", "bad_sidecar", f"not JSON: {error}") from error
    return facts if isinstance(facts, dict) else {}


def attach_text(clip: Clip) -> Clip:
    """Add the caption, and the words with their middle in the span at times relative to it."""
    start, end = clip.span[0] + clip.moved, clip.span[1] + clip.moved  # times in the audio of the source
    words = tuple(
        Word(word=w.word, start=max(0.0, w.start - start), end=min(end - start, w.end - start))
        for w in clip.source.transcript or ()
        if start <= (w.start + w.end) / 2 < end
    )
    return replace(clip, caption=clip.source.caption or "", transcript=words)
