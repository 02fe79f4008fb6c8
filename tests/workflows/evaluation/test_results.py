"""Check the storage of sweep results."""

import pickle
from pathlib import Path

import pytest

from workflows.evaluation.results import ResultStore


@pytest.mark.parametrize(
    "content",
    [b"cworkflows.examiner\nOutcome\n.", b"cworkflows.evaluation.worker\nOutcome\n.", b"", b"no pickle"],
    ids=["old module", "old class", "empty", "other bytes"],
)
def test_a_batch_that_cannot_be_read_is_sampled_again(tmp_path: Path, content: bytes) -> None:
    store = ResultStore(tmp_path, "scope")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "key-0.pickle").write_bytes(content)
    assert store.load_batch("key", 0) is None


def test_a_stored_batch_is_read_again(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, "scope")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "key-0.pickle").write_bytes(pickle.dumps({"clips": 3}))
    assert store.load_batch("key", 0) == {"clips": 3}
    assert store.load_batch("key", 1) is None
