"""``trialstore repair``."""

from __future__ import annotations

from pathlib import Path
import shutil
import sqlite3
from typing import Annotated

import msgspec
import typer

from trialstore.cli.output import Exit, Json, Url, command, fail, print_json, stdout
from trialstore.cli.stores import existing_log
from trialstore.log import Entries
from trialstore.logs.file import FileLog
from trialstore.logs.relational.log import TablesLog, sqlite_path
from trialstore.stores.check import check
from trialstore.stores.repair import Repaired, mend_tables, repair_journal
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

    A journal in Redis is repaired into a file, which `trialstore copy` brings back. Exit code 1 if
    something is lost or still wrong.
    """
    with existing_log(url, any_version=True) as log:
        if isinstance(log, TablesLog):
            where, repaired = _tables(url, log, in_place, output)
        elif isinstance(log, Entries):
            where, repaired = _journal(log, in_place, output)
        else:
            fail("Repair the store itself, not what a server shows of it.")
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
            stdout.print(f"Still wrong: {finding.kind} at {finding.where}: {finding.message}")
        stdout.print(f"Repaired: {where}", markup=False)
    return Exit.FINDINGS if repaired.given_up or still else None


def _journal(log: Entries, in_place: bool, output: Path | None) -> tuple[str, Repaired]:
    if not isinstance(log, FileLog):
        if in_place or output is None:
            fail("A journal that is no file is repaired into one: name it with --output.")
        return str(output), repair_journal(log, output)
    path = Path(log.path)
    target = output or path.with_name(path.name + ".repaired")
    repaired = repair_journal(log, target)
    if in_place:
        path.replace(path.with_name(path.name + ".damaged"))
        target.replace(path)
        target = path
    return str(target), repaired


def _tables(url: str, log: TablesLog, in_place: bool, output: Path | None) -> tuple[str, Repaired]:
    path = sqlite_path(url)
    if in_place:
        if path is not None:
            shutil.copy2(path, path + ".damaged")
        return url, Repaired(mend_tables(log.engine), [])
    if path is None:
        fail("Tables on a server are repaired --in-place; make a backup first.")
    target = output or Path(path + ".repaired")
    if target.exists():
        raise FileExistsError(f"{target} exists already; name another file with --output.")
    with sqlite3.connect(path) as source, sqlite3.connect(target) as copy:
        source.backup(copy)
    copy.close()
    copy_url = f"sqlite:///{target}"
    mended = TablesLog(copy_url, skip_compatibility_check=True, skip_table_creation=True)
    done = mend_tables(mended.engine)
    mended.close()
    return copy_url, Repaired(done, [])
