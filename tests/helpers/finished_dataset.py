"""A complete dataset of many units without decoding anything."""

from fractions import Fraction
from pathlib import Path

from preprocessing.config import PreprocessConfig
from preprocessing.dataset.units import WorkUnit, plan_units
from preprocessing.io.hashing import canonical_json
from preprocessing.io.lease import Lease
from preprocessing.io.storage import Store
from preprocessing.sources.discovery import find_sources
from workflows.data import build

ONE_SOURCE_PER_UNIT = PreprocessConfig(workers=0, window_seconds=Fraction(2), sources_per_unit=1, keep_duplicates=True)


def write_finished_dataset(media: Path, place: str, units: int) -> list[WorkUnit]:
    """Write sources of a few bytes, and the dataset that rejects each of them, with one unit per source.

    Args:
        media: Folder of the sources, created.
        place: Local folder or s3:// prefix of the dataset.
        units: Number of sources.
    """
    media.mkdir()
    for number in range(units):
        (media / f"{number:06d}.mp4").write_bytes(b"%d" % number)
    config, store = ONE_SOURCE_PER_UNIT, Store(place)
    with Lease(store) as lease:
        planned = plan_units([], find_sources([str(media)]), 1, config.fingerprint)
        for unit in planned:
            name = f"rejects/{unit.name}.parquet"
            store.write(name, b"rows")
            marker = {"unit": unit.name, "fingerprint": config.fingerprint, "sources": 1, "accepted": 0}
            marker |= {"rejected_sources": 1, "rejects_by_reason": {"unreadable": 1}, "seconds": 0.0, "sums": {}}
            marker |= {"files": [{"kind": "rejects", "name": name, "rows": 1, "bytes": 4, "sha256": ""}]}
            store.write(unit.marker, canonical_json(marker).encode())
        build._write_metadata(store, config, {"complete": False}, token=lease.token)
        build.write_units(store, planned, lease.token)
        assert build._finish(store, config, planned, token=lease.token) == set()
    return planned
