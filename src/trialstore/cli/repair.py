"""``trialstore repair``."""

from __future__ import annotations

import contextlib
from pathlib import Path
import sqlite3
from typing import Annotated

import msgspec
import sqlalchemy as sa
import typer

from trialstore.cli.output import Exit, Json, Url, command, fail, print_json, stdout
from trialstore.cli.stores import existing_log
from trialstore.errors import LogCorruptError, LogUnavailableError
from trialstore.log import Entries, Log
from trialstore.logs.file import FileLog
from trialstore.logs.relational.connection import sqlite_path
from trialstore.logs.relational.log import TablesLog
from trialstore.stores.check import check
from trialstore.stores.repair import (
    Repaired,
    make_like,
    repair_journal,
    repair_tables,
    replace_journal,
)
from trialstore.urls import open_log

InPlace = Annotated[
    bool,
    typer.Option("--in-place", help="Repair the store itself. Stop all workers and back it up."),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="The repaired copy; by default beside the store."),
]


@command
def repair(
    url: Url, in_place: InPlace = False, output: Output = None, as_json: Json = False
) -> Exit | None:
    """Bring back what was not destroyed: in a copy, unless --in-place.

    A journal in Redis is repaired into a file, which `trialstore copy` brings back. Of a store
    that is whole, nothing is written. Exit code 1 if something is lost or still wrong.
    """
    if in_place and output is not None:
        fail("--in-place repairs the store itself; --output names a copy. Leave out one of them.")
    with existing_log(url, any_version=True) as log:
        if not isinstance(log, TablesLog | Entries):
            fail("Repair the store itself, not what a server shows of it.")
        if _is_healthy(log):
            if as_json:
                print_json({"repaired": None, "done": [], "given_up": [], "still": []})
            else:
                stdout.print("Nothing to repair.")
            return None
        if isinstance(log, TablesLog):
            where, repaired = _tables(url, log, in_place, output)
        else:
            where, repaired = _journal(log, in_place, output)
    mended = open_log(where, any_version=True)
    still = [finding for finding in check(mended).findings if finding.severity != "note"]
    mended.close()
    if as_json:
        print_json(
            {
                "repaired": where,
                **msgspec.to_builtins(repaired),
                "still": msgspec.to_builtins(still),
            }
        )
    else:
        for text in repaired.done:
            stdout.print(text, markup=False)
        for text in repaired.given_up:
            stdout.print(f"Given up: {text}", markup=False, style="yellow")
        for finding in still:
            text = f"Still wrong: {finding.kind} at {finding.where}: {finding.message}"
            stdout.print(text, markup=False)
        stdout.print(f"Repaired: {where}", markup=False)
    return Exit.FINDINGS if repaired.given_up or still else None


def _is_healthy(log: Log) -> bool:
    """Whether a check finds nothing, also a deep one where there is such a thing."""
    try:
        report = check(log)
        if isinstance(log, TablesLog):
            return not report.findings and not check(log, deep=True).findings
    except LogCorruptError:
        return False
    is_there = report.n_records or report.n_studies or isinstance(log, FileLog)
    if not is_there and not report.findings:
        raise LogUnavailableError("There is no journal of this prefix.")
    return not report.findings


def _journal(log: Entries, in_place: bool, output: Path | None) -> tuple[str, Repaired]:
    if not isinstance(log, FileLog):
        if in_place or output is None:
            fail("A journal that is no file is repaired into one: name it with --output.")
        return str(output), repair_journal(log, output)
    if in_place:
        path, repaired = replace_journal(log)
        return str(path), repaired
    target = output or Path(f"{log.path}.repaired")
    return str(target), repair_journal(log, target)


def _tables(url: str, log: TablesLog, in_place: bool, output: Path | None) -> tuple[str, Repaired]:
    path = sqlite_path(url)
    if path is None:
        if not in_place:
            fail("Tables on a server are repaired --in-place; make a backup first.")
        return url, repair_tables(log)
    copy = Path(f"{path}.damaged") if in_place else output or Path(f"{path}.repaired")
    if copy.exists():
        raise FileExistsError(f"{copy} exists already; move it away, or name another --output.")
    make_like(copy, Path(path))
    is_done = False
    try:
        # Not the file alone: the newest transactions may be beside it.
        with (
            contextlib.closing(sqlite3.connect(path)) as source,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
        where = url if in_place else f"sqlite:///{copy}"
        with contextlib.closing(open_log(where, any_version=True)) as mended:
            assert isinstance(mended, TablesLog)
            repaired = repair_tables(mended)
        is_done = True
        return where, repaired
    except (sqlite3.DatabaseError, sa.exc.DatabaseError) as error:
        raise LogCorruptError(
            f"SQLite itself can't read it: {error}. `sqlite3 FILE .recover` may.", source=path
        ) from error
    finally:
        if not is_done:
            copy.unlink(missing_ok=True)
