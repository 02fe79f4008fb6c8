"""Read captions and transcripts from sidecar files if the manifest has none.

``NAME.json`` = {"caption": text, "transcript": [{"word", "start", "end"}]}, times in seconds since the source's origin.
A synthetic clip has "world", the name of its world.
``NAME.vtt`` or ``NAME.srt``: the transcript if the JSON has none. ``NAME.txt``: the caption.
"""

import json
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Any
from urllib.parse import unquote

from preprocessing.io.errors import translate_storage_errors
from preprocessing.io.storage import filesystem_for, is_remote, local_path
from preprocessing.records import Clip, Rejected, Source, SourceLimits, Word
from preprocessing.sources.discovery import parse_transcript, split_fragment
from preprocessing.sources.subtitles import parse_subtitles
from preprocessing.sources.text import decode_text, text_of


def _read_sidecar_file(uri: str, suffix: str, max_bytes: int) -> bytes | None:
    """Return the content of the file with the name of the source and another suffix, or None.

    Raise Rejected if it has more than `max_bytes`.
    """

    def check(size: int) -> None:
        if size > max_bytes:
            raise Rejected("text", "too_long", f"NAME{suffix} has {size} bytes, at most {max_bytes}")

    if is_remote(uri):
        fs, path = filesystem_for(unquote(uri))
        path = os.path.splitext(path)[0] + suffix
        with translate_storage_errors(uri):
            if not fs.exists(path):
                return None
            check(int(fs.size(path) or 0))
            return fs.cat_file(path)
    path = os.path.splitext(local_path(uri))[0] + suffix
    if not os.path.isfile(path):
        return None
    check(os.path.getsize(path))
    with open(path, "rb") as file:
        return file.read()


def read_sidecar(source: Source, limits: SourceLimits | None = None) -> Source:
    """Add caption and transcript from sidecar files; words are sorted by time.

    Raise Rejected if a file is malformed, or if a file or the caption is too long.
    """
    limits = limits or SourceLimits()
    caption, words, world = source.caption, source.transcript, source.world
    if caption is None or words is None:
        uri, _ = split_fragment(source.uri)
        facts = _read_json(uri, limits.sidecar_bytes)
        world = str(facts.get("world") or "")
        try:
            caption = text_of(facts.get("caption")) if caption is None else caption
            words = parse_transcript(facts.get("transcript"), "sidecar") if words is None else words
            for suffix in (".vtt", ".srt"):
                if words is None and (data := _read_sidecar_file(uri, suffix, limits.sidecar_bytes)) is not None:
                    words = parse_subtitles(data)
        except TypeError as error:
            raise Rejected("transcript", "bad_sidecar", f"the caption is not text: {error}") from error
        except ValueError as error:
            raise Rejected("transcript", "bad_sidecar", str(error)) from error
        if caption is None and (data := _read_sidecar_file(uri, ".txt", limits.sidecar_bytes)) is not None:
            caption = decode_text(data).strip()
    if caption is not None and len(caption) > limits.caption_letters:
        raise Rejected("text", "too_long", f"a caption of {len(caption)} letters, at most {limits.caption_letters}")
    return replace(source, caption=caption, transcript=None if words is None else _sorted(words), world=world)


def _sorted(words: Sequence[Word]) -> tuple[Word, ...]:
    """Return the words with finite times, sorted by their middle."""
    return tuple(sorted((w for w in words if isfinite(_middle(w))), key=_middle))


def _middle(word: Word) -> float:
    return (word.start + word.end) / 2


def _read_json(uri: str, max_bytes: int) -> dict[str, Any]:
    data = _read_sidecar_file(uri, ".json", max_bytes)
    if data is None:
        return {}
    try:
        facts = json.loads(decode_text(data))
    except (ValueError, RecursionError) as error:
        raise Rejected("transcript", "bad_sidecar", f"not JSON: {error}") from error
    return facts if isinstance(facts, dict) else {}


def attach_text(clip: Clip, max_letters: int = SourceLimits.transcript_letters) -> Clip:
    """Add the caption, and the words with their middle in the span at times relative to it.

    The words of the source are sorted by their middle. Raise Rejected for a clip with more than `max_letters`.
    """
    start, end = clip.span[0] + clip.moved, clip.span[1] + clip.moved  # times in the audio of the source
    spoken = clip.source.transcript or ()
    first, last = (bisect_left(spoken, time, key=_middle) for time in (start, end))
    if (letters := sum(len(w.word) for w in spoken[first:last])) > max_letters:
        raise Rejected("text", "too_long", f"a transcript of {letters} letters, at most {max_letters}")
    words = tuple(
        Word(word=w.word, start=max(0.0, w.start - start), end=min(end - start, w.end - start))
        for w in spoken[first:last]
    )
    return replace(clip, caption=clip.source.caption or "", transcript=words)
