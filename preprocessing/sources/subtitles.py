"""Subtitles -> words with times: SubRip (.srt) and WebVTT (.vtt), as bytes of a file beside a source.

A subtitle gives the time of a line, not of its words: a line's time is shared out over its words by their letters.
WebVTT may mark words inside a line (``<00:00:01.500>``); then those times are used.
"""

import html
import re

from preprocessing.records import Word

_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{2})[,.](\d{1,3})"
_LINE = re.compile(rf"{_TIME}\s*-->\s*{_TIME}")
_MARK = re.compile(rf"<{_TIME}>")
_TAG = re.compile(r"<[^>]*>|\{\\[^}]*\}")


def parse_subtitles(data: bytes) -> tuple[Word, ...]:
    """The words of a file in the order of their times. ValueError when it holds no line with times."""
    text = data.decode("utf-8-sig", "replace").replace("\r\n", "\n").replace("\r", "\n")
    words: list[Word] = []
    found = False
    for block in re.split(r"\n\s*\n", text):
        head, _, said = _split(block)
        if head is None:
            continue
        found = True
        start, end = _seconds(head.groups()[:4]), _seconds(head.groups()[4:])
        if end < start:
            raise ValueError(f"a line ends before it starts: {head.group()}")
        words += _words(said, start, end)
    if not found:
        raise ValueError("no line with times, such as 00:00:01,000 --> 00:00:02,500")
    return tuple(sorted(words, key=lambda word: (word.start, word.end)))


def _split(block: str) -> tuple[re.Match[str] | None, str, str]:
    """The line of times in a block of lines, what stands before and behind it."""
    found = _LINE.search(block)
    if found is None:
        return None, block, ""
    return found, block[: found.start()], block[found.end() :].partition("\n")[2]  # behind: settings of the line


def _seconds(parts: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, fraction = parts
    assert minutes is not None
    assert seconds is not None
    assert fraction is not None
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction.ljust(3, "0")) / 1000


def _words(said: str, start: float, end: float) -> list[Word]:
    """Between two marks words share the time."""
    words: list[Word] = []
    at = [start, *(_seconds(mark.groups()) for mark in _MARK.finditer(said)), end]
    parts = _MARK.sub("\0", said).split("\0")
    for part, begin, stop in zip(parts, at, at[1:], strict=False):
        words += distribute_words(html.unescape(_TAG.sub(" ", part)), begin, stop)
    return words


def distribute_words(text: str, start: float, end: float) -> list[Word]:
    """The words of a text, each with the share of the time that its letters are of all."""
    names = text.split()
    letters, words, at = sum(len(name) for name in names), list[Word](), start
    for name in names:
        length = max(0.0, end - start) * len(name) / letters
        words.append(Word(word=name, start=round(at, 6), end=round(min(end, at + length), 6)))
        at += length
    return words
