"""A study to a file and back: csv, json, jsonl, parquet, arrow.

csv and json are for other programs; JSON has no infinities, which are text there (``"inf"``). The
other three hold everything and can be read back: they have the two columns of ``frames.WHOLE``
and say what the study is beside its trials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import csv
from datetime import datetime
import json
import math
import os
from pathlib import Path
from typing import Any, Final

from optuna.trial import TrialState

from trialstore import records as r
from trialstore.stores.frames import MISSING, WHOLE, Frame, as_json, describe_study, parsed

FORMATS: Final = ("csv", "json", "jsonl", "parquet", "arrow")


def kind_of(path: Path) -> str:
    """One of ``FORMATS``, if the file's name ends in one."""
    return path.suffix.removeprefix(".").lower()


def write(frame: Frame, path: Path, kind: str, progress: Callable[[int], None]) -> None:
    """Write a frame to a file, which appears when it is whole.

    Raises:
        ValueError: ``kind`` is none of ``FORMATS``.
        OSError: The file can't be written.
        ImportError: ``parquet`` and ``arrow`` need pyarrow.
    """
    if kind not in FORMATS:
        raise ValueError(f"{kind!r} is none of {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent}.")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if kind in ("parquet", "arrow"):
            from trialstore.stores import arrow

            arrow.write(frame, unfinished, kind, progress)
        else:
            with unfinished.open("w", newline="", encoding="utf-8") as file:
                {"csv": _write_csv, "json": _write_json, "jsonl": _write_jsonl}[kind](
                    frame, file, progress
                )
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_csv(frame: Frame, file: Any, progress: Callable[[int], None]) -> None:
    writer = csv.writer(file)
    writer.writerow([column.name for column in frame.columns])
    for row in _rows(frame, progress):
        writer.writerow(
            [
                as_json(_finite(cell)) if isinstance(cell, (dict, list)) else _plain(cell)
                for cell in row
            ]
        )


def _write_json(frame: Frame, file: Any, progress: Callable[[int], None]) -> None:
    separator = "[\n"
    for row in _rows(frame, progress):
        file.write(separator + json.dumps(_finite(_dict(frame, row))))
        separator = ",\n"
    file.write("\n]\n" if separator != "[\n" else "[]\n")


def _write_jsonl(frame: Frame, file: Any, progress: Callable[[int], None]) -> None:
    """The first line tells of the study as well."""
    about: dict[str, Any] = {"study": describe_study(frame.study)}
    for row in _rows(frame, progress):
        file.write(json.dumps({**_dict(frame, row), **about}) + "\n")
        about = {}
    if about:
        file.write(json.dumps(about) + "\n")


def _rows(frame: Frame, progress: Callable[[int], None]) -> Iterator[list[Any]]:
    n = 0
    for portion in frame.portions():
        yield from portion
        n += len(portion)
        progress(n)


def _dict(frame: Frame, row: list[Any]) -> dict[str, Any]:
    """Without the cells of fields that the trial has no value in."""
    return {
        column.name: _plain(cell)
        for column, cell in zip(frame.columns, row, strict=True)
        if cell is not MISSING
    }


def _finite(value: Any) -> Any:
    """With text in place of the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _plain(cell: Any) -> Any:
    if cell is MISSING:
        return None
    if isinstance(cell, datetime):
        return cell.isoformat()
    return cell.total_seconds() if hasattr(cell, "total_seconds") else cell


# --- and back ------------------------------------------------------------------------------------


def read(path: Path, name: str | None = None) -> tuple[r.PutStudy, Iterator[r.PutTrial]]:
    """What ``write`` wrote: the study, and its trials one after the other.

    Args:
        path: A ``.jsonl``, ``.parquet`` or ``.arrow`` file.
        name: Of the study instead of its own.

    Raises:
        ValueError: The file was not written by ``write``, or with some columns only.
    """
    kind = kind_of(path)
    if kind == "jsonl":
        about, rows = _read_jsonl(path)
    elif kind in ("parquet", "arrow"):
        from trialstore.stores import arrow

        about, rows = arrow.read(path, kind)
    else:
        raise ValueError(f"{path}: only jsonl, parquet and arrow files can be imported.")
    if not isinstance(about, dict) or "directions" not in about:
        raise ValueError(f"{path} was not written by `trialstore export`.")
    study = r.PutStudy(
        study_id=0,
        study_name=about["name"] if name is None else name,
        directions=about["directions"],
        user_attrs=about["user_attrs"],
        system_attrs=about["system_attrs"],
    )
    return study, (_image(row, path) for row in rows)


def _read_jsonl(path: Path) -> tuple[Any, Iterable[dict[str, Any]]]:
    def rows() -> Iterator[dict[str, Any]]:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = _object(line, path, number)
                row.pop("study", None)
                if row:
                    yield row

    with path.open(encoding="utf-8") as file:
        line = file.readline()
    return (_object(line, path, 1) if line.strip() else {}).get("study"), rows()


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is cut or damaged: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}, line {number}: this was not written by `trialstore export`.")
    return found


def _image(row: dict[str, Any], path: Path) -> r.PutTrial:
    missing = {"number", "state", "datetime_start", "datetime_complete", *WHOLE} - row.keys()
    if missing:
        raise ValueError(
            f"{path} has no column {sorted(missing)[0]!r}; a file that is to be imported must be "
            "exported without --columns."
        )
    distributions: dict[str, str] = row["distributions"]
    params, user_attrs, system_attrs, values = {}, {}, {}, []
    for name, cell in row.items():
        if name.startswith("user_attrs_"):
            user_attrs[name.removeprefix("user_attrs_")] = cell
        elif name.startswith("system_attrs_"):
            system_attrs[name.removeprefix("system_attrs_")] = cell
        elif name == "value" or name.startswith(("value_", "values_")):
            values.append(cell)
    for name, text in distributions.items():
        params[name] = float(parsed(text).to_internal_repr(row[f"params_{name}"]))
    return r.PutTrial(
        trial_id=0,
        study_id=0,
        number=row["number"],
        state=int(TrialState[row["state"]]),
        values=values or None,
        datetime_start=_text(row["datetime_start"]),
        datetime_complete=_text(row["datetime_complete"]),
        params=params,
        distributions=list(distributions.values()),
        user_attrs=user_attrs,
        system_attrs=system_attrs,
        intermediate_values={
            int(step): value for step, value in row["intermediate_values"].items()
        },
    )


def _text(time: str | datetime | None) -> str | None:
    if time is None:
        return None
    return r.format_time(datetime.fromisoformat(time) if isinstance(time, str) else time)
