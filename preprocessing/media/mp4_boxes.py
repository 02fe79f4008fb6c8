"""Boxes of fragmented mp4 bytes: times of fragments, and the bytes that describe the streams."""

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

_HEADER = 8  # bytes of size and type


@dataclass(frozen=True)
class _Box:
    kind: bytes
    start: int  # of the header
    end: int

    @property
    def content(self) -> int:
        return self.start + _HEADER


def _boxes(data: bytes | bytearray, start: int, end: int) -> Iterator[_Box]:
    """Yield the boxes in a range. Raises RuntimeError if the last one is cut."""
    while start < end:
        size, kind = struct.unpack_from(">I4s", data, start) if start + _HEADER <= end else (0, b"")
        if size < _HEADER or start + size > end:
            raise RuntimeError(f"the mp4 box at byte {start} of {end} is not complete")
        yield _Box(kind, start, start + size)
        start += size


def _track_fragments(data: bytes | bytearray) -> Iterator[tuple[int, dict[bytes, _Box]]]:
    """Yield track number and boxes of each track fragment (traf)."""
    for moof in _boxes(data, 0, len(data)):
        for traf in _boxes(data, moof.content, moof.end) if moof.kind == b"moof" else ():
            if traf.kind == b"traf":
                parts = {box.kind: box for box in _boxes(data, traf.content, traf.end)}
                yield struct.unpack_from(">I", data, parts[b"tfhd"].content + 4)[0], parts


def number_fragments(data: bytes, counts: dict[int, int], time_of: Mapping[int, Callable[[int], int]]) -> bytes:
    """Return whole fragments with the times of their frames and packets set by number.

    Args:
        data: Bytes of a muxer.
        counts: Frames or packets before these bytes, by track number; changed to those after them.
        time_of: Ticks of the time base of a track at which frame or packet n starts.
    """
    numbered = bytearray(data)
    for track, parts in _track_fragments(data):
        at = parts[b"tfdt"].content
        assert data[at] == 1, "a time of 64 bits"
        struct.pack_into(">Q", numbered, at + 4, time_of[track](counts[track]))
        counts[track] += struct.unpack_from(">I", data, parts[b"trun"].content + 4)[0]
    return bytes(numbered)


def without_description(data: bytes) -> bytes:
    """Return the bytes without the boxes that describe the streams, to append them to an earlier part of the clip."""
    return b"".join(data[b.start : b.end] for b in _boxes(data, 0, len(data)) if b.kind not in (b"ftyp", b"moov"))
