"""A study as an Arrow table, and Arrow and Parquet files; the room of pyarrow."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
import itertools
import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import optuna

try:
    import pyarrow as pa
    import pyarrow.ipc
    import pyarrow.parquet
except ImportError as error:
    raise ImportError("Arrow and Parquet need pyarrow: pip install 'trialstore[cli]'.") from error

from trialstore.storage import Storage
from trialstore.stores.frames import MISSING, Column, Frame, Kind, as_json, describe_study

_TYPES: Final = {
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "str": pa.string(),
    "json": pa.string(),
    "time": pa.timestamp("us", tz="UTC"),
    "duration": pa.duration("us"),
}
_ABOUT: Final = b"trialstore"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND: Final = timedelta(microseconds=1)


def to_arrow(study: optuna.Study, columns: Sequence[str] | None = None) -> pa.Table:
    """The trials of a study, with the columns of ``trials_dataframe`` or those that are named.

    No ``FrozenTrial`` is built. Columns of several types, or of nested values, hold JSON text,
    which their field's metadata says. Times are in UTC.

    Args:
        study: Of a storage of trialstore's.
        columns: Names as ``trials_dataframe`` has them; also ``intermediate_values`` and
            ``distributions``.

    Raises:
        TypeError: The study is in a storage of Optuna's own.
        ValueError: There is no such column.
    """
    storage = study._storage
    if not isinstance(storage, Storage):
        raise TypeError(
            "to_arrow reads storages of trialstore; this study is in a "
            f"{type(storage).__name__} of Optuna's."
        )
    scan = storage.scan()
    image = next(one for one in scan.studies if one.study_id == study._study_id)
    frame = Frame(scan, image, columns)
    schema = _schema(frame)
    return pa.Table.from_batches(list(_batches(frame, schema)), schema)


def _schema(frame: Frame) -> pa.Schema:
    fields = [
        pa.field(
            column.name,
            _TYPES[column.kind],
            metadata={b"encoding": b"json"} if column.kind == "json" else None,
        )
        for column in frame.columns
    ]
    return pa.schema(fields, metadata={_ABOUT: json.dumps(describe_study(frame.study)).encode()})


def _batches(frame: Frame, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for rows in frame.portions():
        cells = zip(*rows, strict=True)
        yield pa.record_batch(
            [_array(column, list(one)) for column, one in zip(frame.columns, cells, strict=True)],
            schema=schema,
        )


def _array(column: Column, cells: list[Any]) -> pa.Array:
    """As ``pa.array``, which imports pandas where it is installed: 50 MB for nothing."""
    if column.kind == "json":
        cells = [as_json(cell) for cell in cells]
    elif column.key is not None:
        cells = [None if cell is MISSING else cell for cell in cells]
    buffers = [_bits([cell is not None for cell in cells]), *_buffers(column.kind, cells)]
    return pa.Array.from_buffers(_TYPES[column.kind], len(cells), buffers)


def _buffers(kind: Kind, cells: list[Any]) -> Iterator[pa.Buffer]:
    """Source: Arrow Columnar Format, "Physical Memory Layout"."""
    if kind in ("str", "json"):
        texts = [b"" if cell is None else cell.encode() for cell in cells]
        yield pa.py_buffer(array("i", itertools.accumulate(map(len, texts), initial=0)))
        yield pa.py_buffer(b"".join(texts))
    elif kind == "bool":
        yield _bits(cells)
    else:
        if kind == "time":
            cells = [None if cell is None else cell - _EPOCH for cell in cells]
        if kind in ("time", "duration"):
            cells = [None if cell is None else cell // _MICROSECOND for cell in cells]
        numbers = [0 if cell is None else cell for cell in cells]
        yield pa.py_buffer(array("d" if kind == "float" else "q", numbers))


def _bits(cells: list[Any]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(np.array(cells, bool), bitorder="little"))


def write(frame: Frame, path: Path, kind: str, progress: Callable[[int], None]) -> None:
    """Write a Parquet file, or an Arrow file (which is a Feather file of version 2)."""
    schema = _schema(frame)
    make = pa.parquet.ParquetWriter if kind == "parquet" else pa.ipc.new_file
    n = 0
    with make(str(path), schema) as writer:
        for batch in _batches(frame, schema):
            writer.write_batch(batch)
            n += batch.num_rows
            progress(n)


def read(path: Path, kind: str) -> tuple[Any, Iterator[dict[str, Any]]]:
    """What the file says of the study, and its rows."""
    opened: Any
    if kind == "parquet":
        opened = pa.parquet.ParquetFile(path)
        schema, batches = opened.schema_arrow, opened.iter_batches(batch_size=2000)
    else:
        opened = pa.ipc.open_file(str(path))
        schema = opened.schema
        batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
    about = json.loads((schema.metadata or {}).get(_ABOUT, b"null"))
    encoded = {f.name for f in schema if (f.metadata or {}).get(b"encoding") == b"json"}
    return about, (_row(row, encoded) for batch in batches for row in batch.to_pylist())


_ALWAYS: Final = ("datetime_start", "datetime_complete")


def _row(cells: dict[str, Any], encoded: set[str]) -> dict[str, Any]:
    """As a line of ``jsonl``: what the trial does not have is left out."""
    return {
        name: json.loads(cell) if name in encoded else cell
        for name, cell in cells.items()
        if cell is not None or name in _ALWAYS
    }
