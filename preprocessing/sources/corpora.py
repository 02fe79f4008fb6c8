"""Known corpora -> the project's manifest: rows of uri, caption, transcript, start and end.

The media stay where they are; paths in a manifest are absolute. Only what a corpus says is passed on. Where it gives a
text without times (Emilia, SpeakerVid-5M) the clip's time is shared out over the words by their letters, as for a line
of subtitles; run a recogniser first where exact times matter.
"""

import ast
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preprocessing.records import Word
from preprocessing.sources.discovery import SOUND_SUFFIXES, VIDEO_SUFFIXES
from preprocessing.sources.subtitles import distribute_words

Row = dict[str, Any]


def emilia(folder: Path) -> Iterator[Row]:
    """Speech: a sound file and a ``.json`` of its name with ``text`` and ``duration``, at any depth."""
    for sound, facts in _with_json(folder, SOUND_SUFFIXES):
        yield _row(sound, transcript=_spread(facts, ("text",), sound))


def panda70m(folder: Path) -> Iterator[Row]:
    """Video: ``*.csv`` with videoID, timestamp and caption lists, and whole videos ``<videoID>.mp4`` (or other endings)
    at any depth. Videos that are not there are left out: many of the corpus are gone."""
    videos = {path.stem: path for path in _media(folder, VIDEO_SUFFIXES)}
    for table in sorted(folder.glob("*.csv")):
        csv.field_size_limit(1 << 28)
        with table.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                if (video := videos.get(row.get("videoID") or "")) is not None:
                    yield from _parts(video, row, f"{table}, line {number}")


def _parts(video: Path, row: Mapping[str, str], where: str) -> Iterator[Row]:
    try:
        times, captions = ast.literal_eval(row["timestamp"]), ast.literal_eval(row["caption"])
        spans = [(_seconds(start), _seconds(end)) for start, end in times]
    except (KeyError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: timestamp and caption must be lists, as Panda-70M has them ({error})") from None
    for (start, end), caption in zip(spans, captions, strict=True):
        yield _row(video, caption=caption, start=start, end=end)


def _seconds(clock: str) -> float:
    hours, minutes, seconds = clock.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def speakervid(folder: Path) -> Iterator[Row]:
    """Talking video, cut: a video and a ``.json`` of its name; text under ``asr``, ``transcript`` or ``text``, caption
    under ``caption`` or ``description``, length under ``duration``."""
    for video, facts in _with_json(folder, VIDEO_SUFFIXES):
        caption = next((facts[key] for key in ("caption", "description") if isinstance(facts.get(key), str)), None)
        yield _row(video, caption=caption, transcript=_spread(facts, ("asr", "transcript", "text"), video))


def seamless(folder: Path) -> Iterator[Row]:
    """Seamless Interaction: a video and a ``.json`` of its name with timed words under ``metadata:transcript``."""
    for video, facts in _with_json(folder, VIDEO_SUFFIXES):
        words = [w for line in facts.get("metadata:transcript") or [] for w in line.get("words") or []]
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
    """Put the manifest of a corpus into a new ``.jsonl``; its rows. ValueError when there is nothing to put in it."""
    if layout not in CORPORA:
        raise ValueError(f"unknown layout {layout!r}: choose one of {', '.join(CORPORA)}")
    if not Path(folder).is_dir() or not out.endswith(".jsonl") or Path(out).exists():
        raise ValueError(f"name a folder ({folder}) and a .jsonl that does not exist yet ({out})")
    rows = [json.dumps(row, ensure_ascii=False) for row in CORPORA[layout](Path(folder).resolve())]
    if not rows:
        raise ValueError(
            f"{folder} holds nothing in the layout {layout}: see docs/guides/prepare-data.md for what is expected"
        )
    Path(out).write_text("\n".join(rows) + "\n", encoding="utf-8", errors="surrogateescape")
    return len(rows)


def _media(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)


def _with_json(folder: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Media files with the JSON object beside them; those without one are left out."""
    for path in _media(folder, suffixes):
        beside = path.with_suffix(".json")
        if not beside.is_file():
            continue
        try:
            facts = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{beside} is not JSON: {error}") from None
        if isinstance(facts, dict):
            yield path, facts


def _spread(facts: Mapping[str, Any], keys: tuple[str, ...], path: Path) -> list[Word] | None:
    """Words of the first text there is, over the clip's ``duration``; None without a text."""
    text = next((facts[key] for key in keys if isinstance(facts.get(key), str) and facts[key].strip()), None)
    if text is None:
        return None
    if not isinstance(facts.get("duration"), int | float):
        raise ValueError(f"{path.with_suffix('.json')} has a text and no duration in seconds: add it")
    return distribute_words(text, 0.0, float(facts["duration"]))


def _row(path: Path, *, transcript: list[Word] | None = None, **more: Any) -> Row:
    words = None if transcript is None else [asdict(word) for word in transcript]
    return {k: v for k, v in {"uri": str(path), **more, "transcript": words}.items() if v is not None}
