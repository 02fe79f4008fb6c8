"""Manifests of known corpora: rows of uri, caption, transcript, start and end.

Media files are not copied; paths in a manifest are absolute. For text without times (Emilia, SpeakerVid-5M), words
share the duration of the clip in proportion to their letters. Run a speech recognizer first if exact times matter.
"""

import ast
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mfcore.errors import UserInputError
from preprocessing.records import Word
from preprocessing.sources.discovery import SOUND_SUFFIXES, VIDEO_SUFFIXES
from preprocessing.sources.subtitles import distribute_words

Row = dict[str, Any]


def emilia(folder: Path) -> Iterator[Row]:
    """Yield the rows of Emilia: audio files with ``text`` and ``duration`` in a ``.json``."""
    for sound, facts in _with_json(folder, SOUND_SUFFIXES):
        yield _row(sound, transcript=_timed_words(facts, ("text",), sound))


def panda70m(folder: Path) -> Iterator[Row]:
    """Yield the rows of Panda-70M.

    ``*.csv`` have videoID and lists of timestamps and captions; videos are ``<videoID>.mp4``. Missing
    videos are skipped, as many of this corpus are no longer available.
    """
    videos = {path.stem: path for path in _media(folder, VIDEO_SUFFIXES)}
    for table in sorted(folder.glob("*.csv")):
        csv.field_size_limit(1 << 28)
        with table.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                if (video := videos.get(row.get("videoID") or "")) is not None:
                    yield from _panda_rows(video, row, f"{table}, line {number}")


def _panda_rows(video: Path, row: Mapping[str, str], where: str) -> Iterator[Row]:
    try:
        times, captions = ast.literal_eval(row["timestamp"]), ast.literal_eval(row["caption"])
        spans = [(_seconds(start), _seconds(end)) for start, end in times]
    except (KeyError, SyntaxError, TypeError, ValueError) as error:
        raise UserInputError(f"{where}: timestamp and caption are not lists as in Panda-70M ({error})") from None
    for (start, end), caption in zip(spans, captions, strict=True):
        yield _row(video, caption=caption, start=start, end=end)


def _seconds(clock: str) -> float:
    hours, minutes, seconds = clock.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def speakervid(folder: Path) -> Iterator[Row]:
    """Yield the rows of SpeakerVid-5M: videos with a ``.json`` of the same name.

    Keys: text in ``asr``, ``transcript`` or ``text``, caption in ``caption`` or ``description``, and ``duration``.
    """
    for video, facts in _with_json(folder, VIDEO_SUFFIXES):
        caption = next((facts[key] for key in ("caption", "description") if isinstance(facts.get(key), str)), None)
        yield _row(video, caption=caption, transcript=_timed_words(facts, ("asr", "transcript", "text"), video))


def seamless(folder: Path) -> Iterator[Row]:
    """Yield the rows of Seamless Interaction: timed words are in ``metadata:transcript``."""
    for video, facts in _with_json(folder, VIDEO_SUFFIXES):
        lines = facts.get("metadata:transcript") or []
        words = [w for line in lines for w in line.get("words") or []]
        timed = [
            Word(word=str(w["word"]).strip(), start=float(w["start"]), end=float(w["end"]))
            for w in words
            if str(w.get("word", "")).strip() and w.get("start") is not None and w.get("end") is not None
        ]
        yield _row(video, transcript=timed if "metadata:transcript" in facts else None)


CORPORA: dict[str, Callable[[Path], Iterator[Row]]] = {
    "emilia": emilia,
    "panda70m": panda70m,
    "speakervid": speakervid,
    "seamless": seamless,
}


def write_manifest(layout: str, folder: str, out: str) -> int:
    """Write the manifest of a corpus to a new ``.jsonl`` and return its row count."""
    if layout not in CORPORA:
        raise UserInputError(f"unknown layout {layout!r}: use one of {', '.join(CORPORA)}")
    if not Path(folder).is_dir() or not out.endswith(".jsonl") or Path(out).exists():
        raise UserInputError(f"expected a folder ({folder}) and a .jsonl file that does not exist yet ({out})")
    rows = [json.dumps(row, ensure_ascii=False) for row in CORPORA[layout](Path(folder).resolve())]
    if not rows:
        raise UserInputError(
            f"{folder} has no files in the layout {layout}. See docs/guides/prepare-data.md for the layouts"
        )
    Path(out).write_text("\n".join(rows) + "\n", encoding="utf-8", errors="surrogateescape")
    return len(rows)


def _media(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)


def _with_json(folder: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield media files with the JSON object of the same name; files without one are skipped."""
    for path in _media(folder, suffixes):
        sidecar = path.with_suffix(".json")
        if not sidecar.is_file():
            continue
        try:
            facts = json.loads(sidecar.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserInputError(f"{sidecar} is not JSON: {error}") from None
        if isinstance(facts, dict):
            yield path, facts


def _timed_words(facts: Mapping[str, Any], keys: tuple[str, ...], path: Path) -> list[Word] | None:
    """Return the words of the first text, spread over ``duration``; None without a text."""
    text = next((facts[key] for key in keys if isinstance(facts.get(key), str) and facts[key].strip()), None)
    if text is None:
        return None
    if not isinstance(facts.get("duration"), int | float):
        raise UserInputError(f"{path.with_suffix('.json')} has a text and no duration: add `duration` in seconds")
    return distribute_words(text, 0.0, float(facts["duration"]))


def _row(path: Path, *, transcript: list[Word] | None = None, **more: Any) -> Row:
    words = None if transcript is None else [asdict(word) for word in transcript]
    return {k: v for k, v in {"uri": str(path), **more, "transcript": words}.items() if v is not None}
