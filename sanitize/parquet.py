"""Parquet is read by the calling thread alone: Arrow's own threads may still hold a Python file when the interpreter ends, which then
aborts the process (1 of 150 programs that read a table and ended at once, pyarrow 26)."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def read_table(file: Any, columns: Sequence[str] | None = None) -> pa.Table:
    """Chosen columns (None = all) of an open file. Raises pa.ArrowException when it is no Parquet file, or damaged.

    Many files are read at a time by `storage.read_ahead`, so that no core waits.
    """
    wanted = None if columns is None else list(columns)
    return pq.ParquetFile(file, pre_buffer=False).read(wanted, use_threads=False)
