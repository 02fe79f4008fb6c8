"""Read words with times from SubRip (.srt) and WebVTT (.vtt) files.

A cue has times for its lines, not for its words. Words share the time of their cue in proportion to their letters.
WebVTT may mark words inside a line (``<00:00:01.500>``); then those times are used.
"""

import html
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import webvtt

from mfcore.errors import UserInputError
from preprocessing.records import Word
from preprocessing.sources.text import decode_text

_BLANK = r"[ \t]{0,20}"  # all repetitions are bounded: the time is linear in the size of the file
_TIME = r"(?:(\d{1,6}):)?(\d{1,2}):(\d{2})[,.](\d{1,3})"
_TIMING = re.compile(rf"^(?:\d{{1,9}}{_BLANK}\n)?{_BLANK}{_TIME}{_BLANK}-->{_BLANK}{_TIME}", re.MULTILINE)
_MARK = re.compile(rf"<{_TIME}>")
_TAG = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")
_MAX_LINE = 5000  # letters of a line
_MAX_ROLLING_LINES = 8  # lines of a rolling caption that repeat
_TOUCHING_S = 0.1  # longest pause between a cue and the rolling cue that repeats it


@dataclass(frozen=True, kw_only=True)
class _Cue:
    start: float  # seconds
    end: float
    lines: tuple[str, ...]  # with tags and marks, none empty
    texts: tuple[str, ...]  # of the lines, plain


def parse_subtitles(data: bytes) -> tuple[Word, ...]:
    """Return the words of a subtitle file, sorted by time. Raise ValueError without a cue, or with a very long line."""
    text = decode_text(data).replace("\r\n", "\n").replace("\r", "\n").lstrip()
    if (longest := max(map(len, text.split("\n")))) > _MAX_LINE:
        raise UserInputError(f"a line has {longest} letters, at most {_MAX_LINE}")
    first = _TIMING.search(text)
    if first is None:
        raise UserInputError("no line with times, such as 00:00:01,000 --> 00:00:02,500")
    if text.startswith("WEBVTT"):
        captions = webvtt.from_buffer(io.StringIO(_TIMING.sub(_timing, text)))
    else:
        numbered = _TIMING.sub(lambda found: f"1\n{_timing(found)}", text[first.start() :])
        captions = webvtt.from_buffer(io.StringIO(numbered + "\n\n"), format="srt")
    cues = _without_repeats([_cue(caption) for caption in captions])
    words = [word for cue in cues for word in _words(cue)]
    return tuple(sorted(words, key=lambda word: (word.start, word.end)))


def _timing(found: re.Match[str]) -> str:
    """Return a line of times with all digits. Raise ValueError if the end is before the start."""
    start, end = _seconds(found.groups()[:4]), _seconds(found.groups()[4:])
    if end < start:
        raise UserInputError(f"a line ends before it starts: {found.group().strip()}")
    return f"{_stamp(start)} --> {_stamp(end)}"


def _stamp(seconds: float) -> str:
    minutes, rest = divmod(round(1000 * seconds), 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}.{rest % 1000:03d}"


def _seconds(parts: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, fraction = parts
    assert minutes is not None
    assert seconds is not None
    assert fraction is not None
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction.ljust(3, "0")) / 1000


def _cue(caption: webvtt.Caption) -> _Cue:
    lines = [(line, text) for line in caption.raw_text.split("\n") if (text := _plain(line))]
    return _Cue(
        start=caption.start_time.in_milliseconds() / 1000,
        end=caption.end_time.in_milliseconds() / 1000,
        lines=tuple(line for line, _ in lines),
        texts=tuple(text for _, text in lines),
    )


def _without_repeats(cues: Sequence[_Cue]) -> list[_Cue]:
    """Remove the lines of rolling captions that repeat the end of the previous cue.

    A cue that only repeats counts as repeated speech unless another cue of the file adds lines to repeated ones.
    """
    repeated = [0, *(_repeated_lines(previous, cue) for previous, cue in pairwise(cues))]
    if not any(0 < count < len(cue.lines) for count, cue in zip(repeated, cues, strict=False)):
        return list(cues)
    return [replace(cue, lines=cue.lines[count:]) for count, cue in zip(repeated, cues, strict=True)]


def _repeated_lines(previous: _Cue, cue: _Cue) -> int:
    """Count the lines at the start of `cue` that repeat the end of the cue directly before."""
    if cue.start - previous.end > _TOUCHING_S:
        return 0
    longest = min(len(previous.lines), len(cue.lines), _MAX_ROLLING_LINES)
    counts = (count for count in range(longest, 0, -1) if previous.texts[-count:] == cue.texts[:count])
    return next(counts, 0)


def _words(cue: _Cue) -> Iterator[Word]:
    """Yield the words of a cue; those between two marks share the time between them."""
    text = "\n".join(cue.lines)
    times = [cue.start, *(_seconds(mark.groups()) for mark in _MARK.finditer(text)), cue.end]
    parts = _MARK.sub("\0", text.replace("\0", " ")).split("\0")
    for part, (start, end) in zip(parts, pairwise(times), strict=True):
        yield from distribute_words(_plain(part), start, end)


def _plain(text: str) -> str:
    """Return text without tags, entities and repeated spaces."""
    return " ".join(html.unescape(_TAG.sub(" ", text)).split())


def distribute_words(text: str, start: float, end: float) -> list[Word]:
    """Return the words of a text; each gets a share of the time in proportion to its letters."""
    names = text.split()
    letters, words, time = sum(len(name) for name in names), list[Word](), start
    for name in names:
        length = max(0.0, end - start) * len(name) / letters
        words.append(Word(word=name, start=round(time, 6), end=round(min(end, time + length), 6)))
        time += length
    return words
