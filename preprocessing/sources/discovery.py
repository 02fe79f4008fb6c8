"""Find sources: files, folders, globs, s3:// prefixes and manifests become a sorted list.

A manifest (csv, jsonl or parquet) has the column ``uri``; relative paths start at the folder of the manifest. Optional
columns are ``caption``, ``transcript`` (list of {word, start, end}, or that as JSON), ``start`` and ``end`` in seconds
since the origin of the file. A part of a file is a separate source; its URI ends in the media fragment
``#t=start,end``.
"""

import csv
import filecmp
import glob
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import inf, isnan
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

from mfcore.errors import UserInputError
from preprocessing.io.errors import translate_storage_errors
from preprocessing.io.parquet import read_table
from preprocessing.io.storage import filesystem_for, is_remote, local_path, local_uri
from preprocessing.records import Source, Word
from preprocessing.sources.text import clean_text, decode_text, text_of

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg"),
    *(".vob", ".wmv", ".3gp", ".ogv"),
)
SOUND_SUFFIXES = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus", ".wma")
MEDIA = frozenset(VIDEO_SUFFIXES + SOUND_SUFFIXES)
MANIFESTS = frozenset([".csv", ".jsonl", ".parquet"])
_COLUMNS = ("uri", "path", "start", "end", "caption", "transcript")
_FORMATS = {".csv": "CSV", ".jsonl": "JSON", ".parquet": "Parquet"}
_CSV_FIELD = 1 << 28  # bytes
_SHOWN = 5  # warnings of one manifest
_EDGE = 1 << 16  # bytes hashed at each end of a file


def split_fragment(uri: str) -> tuple[str, tuple[float, float | None] | None]:
    """Split a URI into the file and the (start, end) seconds of its fragment; None: to the end."""
    base, mark, span = uri.partition("#t=")
    if not mark:
        return uri, None
    start, _, end = span.partition(",")
    return base, (float(start), float(end) if end else None)


def find_sources(arguments: Iterable[str]) -> list[Source]:
    """Return the unique sources of all arguments. Raise ValueError if an argument has none."""
    found: dict[str, Source] = {}
    for argument in arguments:
        sources = list(_find(argument))
        if not sources:
            raise UserInputError(
                f"no media files in {argument}: expected suffixes such as {', '.join(VIDEO_SUFFIXES[:5])}"
            )
        for source in sources:
            found.setdefault(source.uri, source)
    return [found[uri] for uri in sorted(found)]


def _find(argument: str) -> Iterator[Source]:
    suffix = os.path.splitext(argument)[1].lower()
    if is_remote(argument):
        yield from _manifest(argument, suffix) if suffix in MANIFESTS else _remote(argument)
        return
    path = local_path(argument) if argument.startswith("file://") else argument
    if os.path.isdir(path):
        yield from (_local(p) for p in _walk(path))
    elif os.path.isfile(path):
        yield from _manifest(path, suffix) if suffix in MANIFESTS else [_local(path)]
    elif matches := sorted(glob.glob(path, recursive=True)):
        yield from (_local(p) for p in matches if os.path.isfile(p))
    else:
        raise UserInputError(f"no such file or folder: {argument}")


def _walk(folder: str) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (os.path.join(root, n) for n in sorted(names) if os.path.splitext(n)[1].lower() in MEDIA)


def edge_fingerprint(path: str) -> str:
    """Return a hash of the size and the first and last 64 KiB of a file."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(_EDGE))
        file.seek(max(0, size - _EDGE))
        digest.update(file.read(_EDGE))
    return digest.hexdigest()[:16]


def _local(path: str) -> Source:
    """Return the source of a path. Probing rejects unreadable and special files later."""
    try:
        if os.path.isfile(path):
            return Source(uri=local_uri(path), size=os.path.getsize(path), fingerprint=edge_fingerprint(path))
    except OSError:
        pass
    return Source(uri=local_uri(path), size=0, fingerprint="unreadable")


def has_same_content(one: Source, other: Source) -> bool:
    """Return True if two sources of equal size and fingerprint have equal content.

    Return False if one is unreadable. In object storage, the fingerprint is the ETag of the whole content.
    """
    uris = [split_fragment(source.uri)[0] for source in (one, other)]
    if any(is_remote(uri) for uri in uris):
        return all(is_remote(uri) for uri in uris)
    try:
        return filecmp.cmp(*(local_path(uri) for uri in uris), shallow=False)
    except OSError:
        return False


def _remote(prefix: str) -> Iterator[Source]:
    fs, root = filesystem_for(prefix)
    scheme = prefix.split("://", 1)[0]
    try:
        with translate_storage_errors(prefix, bucket=False):
            fs.invalidate_cache()
            if glob.has_magic(root) and not fs.exists(root):
                listed = fs.glob(root, detail=True)
            else:
                listed = fs.find(root, detail=True) or ({root: fs.info(root)} if fs.exists(root) else {})
    except FileNotFoundError:
        listed = {}
    for path, facts in sorted(listed.items()):
        if facts.get("type") == "file" and os.path.splitext(path)[1].lower() in MEDIA:
            tag = str(facts.get("ETag", facts.get("size"))).strip('"')
            yield Source(uri=f"{scheme}://{quote(path)}", size=int(facts["size"]), fingerprint=tag)


def _manifest(path: str, suffix: str) -> Iterator[Source]:
    folder = os.path.dirname(path if is_remote(path) else os.path.abspath(path))
    fs, full = filesystem_for(path if is_remote(path) else os.path.abspath(path))
    fs.invalidate_cache()
    text = _ManifestText(path)
    with translate_storage_errors(path, bucket=False), fs.open(full, "rb") as file:
        for number, row in enumerate(_rows(file, suffix, path), start=1):
            where = f"{path}, row {number}"
            uri = row.get("uri") or row.get("path")
            if not uri:
                raise UserInputError(f"{where}: no `uri`. A manifest needs this column")
            if not isinstance(uri, str | bytes):
                raise UserInputError(f"{where}: the `uri` is not text. Write the path or URI of a file")
            source = _manifest_file(os.fsdecode(uri), folder, where)
            caption, words = text.caption(row.get("caption"), where), text.transcript(row.get("transcript"), where)
            yield replace(source, uri=source.uri + _fragment(row, where), caption=caption, transcript=words)
    text.report()


class _ManifestText:
    """Captions and transcripts of a manifest; what is replaced is counted and reported as a warning."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._warnings: list[str] = []
        self._first_error: UserInputError | None = None
        self._transcripts = 0  # that are valid

    def caption(self, value: Any, where: str) -> str | None:
        """Return a caption as text; None if it is missing, or not text."""
        try:
            text = text_of(value)
        except TypeError as error:
            self._warnings.append(f"{where}: the caption is ignored: {error}")
            return None
        if text and "\N{REPLACEMENT CHARACTER}" in text:
            self._warnings.append(f"{where}: characters of the caption that are not UTF-8 are replaced")
        return text or None

    def transcript(self, value: Any, where: str) -> tuple[Word, ...] | None:
        """Return the words of a transcript; None if it is missing or malformed."""
        try:
            words = parse_transcript(value, where)
        except UserInputError as error:
            self._first_error = self._first_error or error
            self._warnings.append(f"{error}. It is ignored")
            return None
        self._transcripts += words is not None
        return words

    def report(self) -> None:
        """Print the warnings. Raise the first error if no transcript of the manifest is valid."""
        if self._first_error is not None and not self._transcripts:
            raise self._first_error
        for line in self._warnings[:_SHOWN]:
            print(f"warning: {line}", file=sys.stderr)
        if len(self._warnings) > _SHOWN:
            print(f"warning: {self._path}: {len(self._warnings) - _SHOWN} more rows likewise", file=sys.stderr)


def _rows(file: Any, suffix: str, path: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a manifest. Raise UserInputError with the number of a row that cannot be read."""
    number = 0
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(file)
            return
        # file names may have any bytes
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        if suffix == ".csv":
            csv.field_size_limit(_CSV_FIELD)
            table = csv.DictReader(text)
            for row in table:
                number += 1
                yield row
            return
        for number, line in enumerate((line for line in text if line.strip()), start=1):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UserInputError(f"{path}, row {number}: not an object. Write one JSON object per line")
            yield row
    except UserInputError:
        raise
    except (csv.Error, pa.ArrowException, ValueError, RecursionError) as error:
        place = path if suffix == ".parquet" else f"{path}, row {number + (suffix == '.csv')}"
        detail = clean_text(" ".join(str(error).split()))[:200]
        raise UserInputError(f"{place} is not valid {_FORMATS[suffix]}: {detail}") from error


def _parquet_rows(file: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a Parquet file; text is bytes, as it may not be UTF-8."""
    names = [name for name in pq.ParquetFile(file).schema_arrow.names if name in _COLUMNS]
    file.seek(0)
    table = read_table(file, names)
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(index, field.name, table[field.name].cast(field.type.value_type))
        if pa.types.is_string(table.schema[index].type) or pa.types.is_large_string(table.schema[index].type):
            table = table.set_column(index, field.name, table[field.name].cast(pa.large_binary()))
    yield from table.to_pylist()


def _manifest_file(uri: str, folder: str, where: str) -> Source:
    """Return the source of the file of a row. Raise UserInputError without one."""
    try:
        if is_remote(uri) or is_remote(folder):
            source = next(_remote(uri if is_remote(uri) else f"{folder}/{uri}"), None)
        else:
            path = local_path(uri) if uri.startswith("file://") else os.path.join(folder, uri)
            source = _local(path) if os.path.isfile(path) else None
    except UnicodeError:  # half of a character, which no file name has
        source = None
    if source is None:
        kind = "object" if is_remote(uri) or is_remote(folder) else "file"
        raise UserInputError(f"{where}: no such {kind}: {clean_text(uri)[:1000]}")
    return source


def _fragment(row: Mapping[str, Any], where: str) -> str:
    """Return ``#t=start,end`` for a row about a part of a file, else an empty string."""
    bounds = [row.get("start"), row.get("end")]
    if all(value in (None, "", b"") for value in bounds):
        return ""
    try:
        start, end = (None if value in (None, "", b"") else float(value) for value in bounds)
    except (OverflowError, TypeError, ValueError):
        start, end = (_shown(value) for value in bounds)
        raise UserInputError(f"{where}: start={start} and end={end} must be seconds") from None
    start = start or 0.0
    if not 0 <= start < (inf if end is None else end) <= inf:
        raise UserInputError(f"{where}: start={start} and end={end} are not a span. Set 0 <= start < end")
    return f"#t={_seconds(start)},{'' if end is None else _seconds(end)}"


def _shown(value: Any) -> str:
    """Return a value for a message; Python does not print integers of many digits."""
    return "a huge number" if isinstance(value, int) and abs(value) > 1 << 64 else ascii(value)[:40]


def _seconds(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


def parse_transcript(value: Any, where: str) -> tuple[Word, ...] | None:
    """Return the words of a transcript (JSON, list of mappings or None). Raise UserInputError if it is malformed."""
    if value is None or value in ("", b"") or (isinstance(value, float) and isnan(value)):
        return None
    entries: Any = decode_text(value) if isinstance(value, bytes) else value
    try:
        entries = json.loads(entries) if isinstance(entries, str) else entries
        words = [(text_of(w["word"]), float(w["start"]), float(w["end"])) for w in entries]
    except (OverflowError, TypeError, KeyError, ValueError, RecursionError) as error:
        shown = ascii(value)[:80] if isinstance(value, str | bytes) else type(value).__name__
        raise UserInputError(f"{where}: transcript ({shown}) is not a list of {{word, start, end}}") from error
    return tuple(Word(word=word, start=start, end=end) for word, start, end in words if word)


def display_name(uri: str) -> str:
    """Return the last part of a URI, decoded if it is valid UTF-8."""
    name = uri.split("#", 1)[0].rsplit("/", 1)[-1]
    decoded = unquote(name)
    return name if "\N{REPLACEMENT CHARACTER}" in decoded else decoded
