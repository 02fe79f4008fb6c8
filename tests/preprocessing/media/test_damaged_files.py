"""Damaged files are accepted or rejected with a reason, without crashes, hangs or leftovers."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest

from preprocessing.config import PreprocessConfig
from preprocessing.pipeline import build_encoders
from preprocessing.records import Clip
from preprocessing.sources.discovery import find_sources
from preprocessing.toyworld.world import write_toyworld
from tests.helpers.media_folder import write_clip
from tests.helpers.source_processing import process_source

SEED = 20260425
CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(1), stall_seconds=20)


def flipped(data: bytes, draw: np.random.Generator) -> bytes:
    """Flip some bits, scattered or close together."""
    out = bytearray(data)
    first = int(draw.integers(len(out)))
    width = int(draw.choice([64, 4096, len(out)]))
    for _ in range(int(2 ** draw.uniform(0, 8))):
        out[(first + int(draw.integers(width))) % len(out)] ^= 1 << int(draw.integers(8))
    return bytes(out)


def truncated(data: bytes, draw: np.random.Generator) -> bytes:
    return data[: int(draw.integers(len(data)))]


def swapped(data: bytes, draw: np.random.Generator) -> bytes:
    """Swap two boxes of an mp4, of the file or inside its moov."""
    boxes = list(_boxes(data))
    a, b = sorted(draw.choice(len(boxes), 2, replace=False))
    boxes[a], boxes[b] = boxes[b], boxes[a]
    return b"".join(boxes)


def _boxes(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        size = size if 8 <= size <= len(data) - at else len(data) - at
        yield data[at : at + size]
        at += size


def overwritten(data: bytes, draw: np.random.Generator) -> bytes:
    """Overwrite a range with zeros, ones or noise."""
    start, length = int(draw.integers(len(data))), int(2 ** draw.uniform(3, 13))
    filling = draw.choice([0, 255, -1])
    some = draw.bytes(length) if filling < 0 else bytes([filling]) * length
    return data[:start] + some[: len(data) - start] + data[start + length :]


CHANGES = (flipped, truncated, swapped, overwritten)


def check(folder: Path, count: int) -> dict[str, int]:
    """Damage the fixtures `count` times and count outcomes by reason."""
    write_toyworld(folder / "toy", clips=1, seconds=1.2, jobs=1)
    write_clip(folder / "numbers.mp4", 1.3)
    whole = [path.read_bytes() for path in sorted([*folder.glob("toy/*.mp4"), folder / "numbers.mp4"])]
    encoders, outcomes = build_encoders(CONFIG), dict[str, int]()
    for number in range(count):
        draw = np.random.default_rng([SEED, number])
        path = folder / f"damaged-{number}.mp4"
        path.write_bytes(CHANGES[number % len(CHANGES)](whole[number // len(CHANGES) % len(whole)], draw))
        (source,) = find_sources([str(path)])
        found = list(process_source(source, CONFIG, encoders))
        assert found, f"file {number} is neither accepted nor rejected"
        for clip in found:
            reason = "accepted" if isinstance(clip, Clip) else clip.reason
            assert reason != "error", f"file {number}: {clip}"  # no step may fail in a way that it does not know
            outcomes[reason] = outcomes.get(reason, 0) + 1
        path.unlink()
    left = [child for child in psutil.Process().children(recursive=True) if "ff" in child.name()]
    assert left == []
    return outcomes


def test_a_few_damaged_files_each_have_an_outcome(tmp_path):
    outcomes = check(tmp_path, 16)
    assert len(outcomes) > 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_damaged_files_each_have_an_outcome(tmp_path):
    outcomes = check(tmp_path, 1000)
    print(outcomes)
    assert outcomes["accepted"] > 50
    assert sum(outcomes.values()) >= 1000
