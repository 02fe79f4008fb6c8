"""Detect that a dataset changed since its run began: samples of a step are positions in the order of its clips."""

from collections.abc import Mapping
from typing import Any

from preprocessing.dataset.reader import ClipDataset


class DatasetChangedError(RuntimeError):
    """The dataset of a run has other clips, or cannot be read any more. Raised on all ranks."""


def dataset_record(dataset: ClipDataset) -> dict[str, Any]:
    """Return what identifies the data of a run: its configuration, the number of clips and their digest."""
    return {"fingerprint": dataset.meta.fingerprint, "clips": len(dataset), "digest": dataset.digest}


def describe_changed_clips(data: str, before: Mapping[str, Any], now: Mapping[str, Any], *, since: str) -> str | None:
    """Return a message with the fix if two dataset records differ in their clips, else None.

    Records of earlier versions have no digest; theirs are compared by the number of clips. ``since``: what recorded
    ``before``.
    """
    keys = [key for key in ("clips", "digest") if key in before]
    if all(before[key] == now[key] for key in keys):
        return None
    digests = f", digest {before['digest']} -> {now['digest']}" if "digest" in before else ""
    return (
        f"the clips of {data} changed ({before['clips']} -> {now['clips']}{digests}) since {since}. "
        "Restore the dataset to resume, or use another --run name for a new run"
    )
