"""Reading Parquet on the calling thread.

A thread of Arrow could release the file object during interpreter shutdown, which aborts the process.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def read_table(source: Any, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns (default: all) of a path or open file. Raise pyarrow.ArrowInvalid for another format."""
    names = None if columns is None else list(columns)
    return pq.read_table(source, columns=names, use_threads=False, pre_buffer=False)
