"""Read captions and transcripts from sidecar files if the manifest has none.

``NAME.json`` = {"caption": text, "transcript": [{"word", "start", "end"}]}, times in seconds since the source's origin.
A synthetic clip has "world", the name of its world.
``NAME.vtt`` or ``NAME.srt``: the transcript if the JSON has none. ``NAME.txt``: the caption.
"""

import json
import os
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any
from urllib.parse import unquote

from preprocessing.io.errors import translate_storage_errors
from preprocessing.io.storage import filesystem_for, is_remote, local_path
from preprocessing.records import Clip, Rejected, Source, SourceLimits, Word
from preprocessing.sources.discovery import parse_transcript, split_fragment
from preprocessing.sources.subtitles import parse_subtitles
from preprocessing.sources.text import clean_text, decode_text, replaced_row, text_of

Warn = Callable[[str], None]


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


def _sidecar_name(uri: str, suffix: str) -> str:
    """Return the path or URI of a sidecar for messages."""
    return clean_text(os.path.splitext(uri if is_remote(uri) else local_path(uri))[0] + suffix)


class _SidecarText:
    """Text of the sidecar files of a source; `warn` is called with the file and row of replaced characters."""

    def __init__(self, uri: str, max_bytes: int, warn: Warn) -> None:
        self._uri, self._max_bytes, self._warn = uri, max_bytes, warn

    def data(self, suffix: str) -> bytes | None:
        """Return the content of the file with a suffix, or None. Raise Rejected if it is too long."""
        data = _read_sidecar_file(self._uri, suffix, self._max_bytes)
        if data is not None and (row := replaced_row(data)) is not None:
            self.report(suffix, f"row {row}")
        return data

    def report(self, suffix: str, place: str) -> None:
        """Warn of replaced characters."""
        self._warn(f"{_sidecar_name(self._uri, suffix)}, {place}: characters that are not valid are replaced")

    def check(self, facts: Mapping[str, Any]) -> None:
        """Warn of halves of characters in the first part of a JSON sidecar that has one."""
        words = facts.get("transcript")
        rows = enumerate(words if isinstance(words, list) else [], start=1)
        parts = {"caption": facts.get("caption")} | {
            f"word {n}": row.get("word") for n, row in rows if isinstance(row, dict)
        }
        replaced = (name for name, text in parts.items() if isinstance(text, str) and clean_text(text) != text)
        if (name := next(replaced, None)) is not None:
            self.report(".json", name)


def _ignore(_: str) -> None: ...


def read_sidecar(source: Source, limits: SourceLimits | None = None, warn: Warn = _ignore) -> Source:
    """Add caption and transcript from sidecar files; words are sorted by time.

    `warn` is called with a message for each file in which characters are replaced. Raise Rejected if a file is
    malformed, or if a file or the caption is too long.
    """
    limits = limits or SourceLimits()
    caption, words, world = source.caption, source.transcript, source.world
    if caption is None or words is None:
        text = _SidecarText(split_fragment(source.uri)[0], limits.sidecar_bytes, warn)
        facts = _parse_json(text.data(".json"))
        world = clean_text(str(facts.get("world") or ""))
        try:
            caption = text_of(facts.get("caption")) if caption is None else caption
            words = parse_transcript(facts.get("transcript"), "sidecar") if words is None else words
            text.check(facts)
            for suffix in (".vtt", ".srt"):
                if words is None and (data := text.data(suffix)) is not None:
                    words = parse_subtitles(data)
        except TypeError as error:
            raise Rejected("transcript", "bad_sidecar", f"the caption is not text: {error}") from error
        except ValueError as error:
            raise Rejected("transcript", "bad_sidecar", str(error)) from error
        if caption is None and (data := text.data(".txt")) is not None:
            caption = decode_text(data).strip()
    if caption is not None and len(caption) > limits.caption_letters:
        raise Rejected("text", "too_long", f"a caption of {len(caption)} letters, at most {limits.caption_letters}")
    return replace(source, caption=caption, transcript=None if words is None else _sorted(words), world=world)


def _sorted(words: Sequence[Word]) -> tuple[Word, ...]:
    """Return the words with finite times, sorted by their middle."""
    return tuple(sorted((w for w in words if isfinite(_middle(w))), key=_middle))


def _middle(word: Word) -> float:
    return (word.start + word.end) / 2


def _parse_json(data: bytes | None) -> dict[str, Any]:
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
