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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import inf
from typing import Any
from urllib.parse import quote, unquote

import pyarrow.parquet as pq

from mfcore.errors import UserInputError
from preprocessing.io.errors import translate_storage_errors
from preprocessing.io.storage import filesystem_for, is_remote, local_path, local_uri
from preprocessing.records import Source, Word

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg"),
    *(".vob", ".wmv", ".3gp", ".ogv"),
)
SOUND_SUFFIXES = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus", ".wma")
MEDIA = frozenset(VIDEO_SUFFIXES + SOUND_SUFFIXES)
MANIFESTS = frozenset([".csv", ".jsonl", ".parquet"])
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
    with translate_storage_errors(path, bucket=False), fs.open(full, "rb") as file:
        for number, row in enumerate(_rows(file, suffix), start=1):
            where = f"{path}, row {number}"
            uri = row.get("uri") or row.get("path")
            if not uri:
                raise UserInputError(f"{where}: no `uri`. A manifest needs this column")
            yield _manifest_source(row, str(uri), folder, where=where)


def _rows(file: Any, suffix: str) -> Iterator[Mapping[str, Any]]:
    if suffix == ".parquet":
        yield from pq.read_table(file).to_pylist()
        return
    text = io.TextIOWrapper(
        file, encoding="utf-8-sig", errors="surrogateescape", newline=""
    )  # file names may have any bytes
    yield from csv.DictReader(text) if suffix == ".csv" else (json.loads(line) for line in text if line.strip())


def _manifest_source(row: Mapping[str, Any], uri: str, folder: str, *, where: str) -> Source:
    caption, words = row.get("caption") or None, parse_transcript(row.get("transcript"), where)
    if is_remote(uri) or is_remote(folder):
        source = next(_remote(uri if is_remote(uri) else f"{folder}/{uri}"), None)
        if source is None:
            raise UserInputError(f"{where}: no such object: {uri}")
    else:
        path = local_path(uri) if uri.startswith("file://") else os.path.join(folder, uri)
        if not os.path.isfile(path):
            raise UserInputError(f"{where}: no such file: {uri}")
        source = _local(path)
    return replace(source, uri=source.uri + _fragment(row, where), caption=caption, transcript=words)


def _fragment(row: Mapping[str, Any], where: str) -> str:
    """Return ``#t=start,end`` for a row about a part of a file, else an empty string."""
    bounds = [row.get("start"), row.get("end")]
    if all(value in (None, "") for value in bounds):
        return ""
    try:
        start, end = (None if value in (None, "") else float(value) for value in bounds)
    except (TypeError, ValueError):
        raise UserInputError(f"{where}: start={bounds[0]!r} and end={bounds[1]!r} must be seconds") from None
    start = start or 0.0
    if not 0 <= start < (inf if end is None else end) <= inf:
        raise UserInputError(f"{where}: start={start} and end={end} are not a span. Set 0 <= start < end")
    return f"#t={_seconds(start)},{'' if end is None else _seconds(end)}"


def _seconds(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


def parse_transcript(value: Any, where: str) -> tuple[Word, ...] | None:
    """Return the words of a transcript (JSON, list of mappings or None)."""
    if value is None or value == "":
        return None
    try:
        entries = json.loads(value) if isinstance(value, str) else value
        return tuple(Word(word=str(w["word"]), start=float(w["start"]), end=float(w["end"])) for w in entries)
    except (TypeError, KeyError, ValueError) as error:
        raise UserInputError(f"{where}: transcript {value!r:.80} is not a list of {{word, start, end}}") from error


def display_name(uri: str) -> str:
    """Return the last part of a URI, decoded if it is valid UTF-8."""
    name = uri.split("#", 1)[0].rsplit("/", 1)[-1]
    decoded = unquote(name)
    return name if "\N{REPLACEMENT CHARACTER}" in decoded else decoded
