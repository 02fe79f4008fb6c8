"""Parquet is read without threads of Arrow, which can abort a process that ends."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.io.parquet import read_table

ROOT = Path(__file__).parents[3]


def test_only_the_given_columns_are_read(tmp_path):
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"]}), tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet", ["b"]).to_pydict() == {"b": ["x", "y"]}
    assert read_table(tmp_path / "t.parquet").num_columns == 2


def test_no_other_file_reads_tables_of_parquet():
    files = [p for package in ("preprocessing", "workflows") for p in (ROOT / package).rglob("*.py")]
    found = [str(p.relative_to(ROOT)) for p in files if "pq.read_table(" in p.read_text()]
    assert found == ["preprocessing/io/parquet.py"]
