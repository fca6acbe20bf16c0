"""What can be brought back of a damaged store without losing more: into a copy, or in place.

A journal is written anew from what ``salvage`` can read: whole records stay, torn ones go, and a
damaged one that created a trial is stood in for, because ids are positions. Of tables only what no
reader can make anything of is taken away or set right (``logs/relational/mending.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
import os
from pathlib import Path
import shutil
import stat

import msgspec

from trialstore import records as r
from trialstore.errors import IncompatibleSchemaError
from trialstore.log import CompactableLog, Entries
from trialstore.logs.file import FileLog, system
from trialstore.logs.modes import share_like
from trialstore.logs.relational.log import TablesLog
from trialstore.logs.relational.mending import mend_tables
from trialstore.replica import Replica
from trialstore.stores.check import Audit
from trialstore.stores.salvage import Salvaged, lost_trial, read_entry


class Repaired(msgspec.Struct, frozen=True):
    """What a repair did.

    Args:
        done: One sentence each, with the place.
        given_up: What was destroyed, or could not be made sense of.
    """

    done: list[str]
    given_up: list[str]


def repair_journal(log: Entries, path: Path) -> Repaired:
    """Write the journal that a damaged one should have been.

    Args:
        log: The damaged one; it is only read. Nobody should write to it meanwhile.
        path: Of the new file, which must not exist. Who may open a damaged file may open it.

    Raises:
        FileExistsError: It does.
        ValueError: The journal was trimmed: most of it is in a snapshot.
        LogUnavailableError: The damaged journal can't be read.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already; name another file with --output.")
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        if isinstance(log, FileLog):
            make_like(unfinished, Path(log.path))
        repaired = _write(log, unfinished)
        _link(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return repaired


def replace_journal(log: FileLog) -> tuple[Path, Repaired]:
    """Put the journal that a damaged one should have been in its place.

    The damaged one is kept as ``….damaged``. One of the two is at the path at any moment.

    Args:
        log: The damaged one. Nobody should write to it meanwhile.

    Returns:
        Where the journal is, and what was done.

    Raises:
        As ``repair_journal``; FileExistsError if there is a ``….damaged`` already.
        PermissionError: The journal's group would be locked out of the new one.
    """
    path = Path(log.path)
    damaged = path.with_name(path.name + ".damaged")
    if damaged.exists():
        raise FileExistsError(f"{damaged} exists already; move it away.")
    mended = path.with_name(f".{path.name}.{os.getpid()}.mended")
    try:
        if not make_like(mended, path):
            raise PermissionError(
                f"The group of {path} has rights that this user can't give to the new file. Let a "
                "member of the group repair it, or leave out --in-place."
            )
        repaired = _write(log, mended)
        _link(path, damaged)
        try:
            mended.replace(path)
        except OSError:
            damaged.unlink()
            raise
        system.sync_folder(str(path))
    finally:
        mended.unlink(missing_ok=True)
    return path, repaired


def make_like(path: Path, other: Path) -> bool:
    """Make an empty file that those may open who may open another, and its owner may write.

    Returns:
        False: This user can't give it to the other's group; it is the owner's alone.

    Raises:
        FileExistsError: There is one.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | system.BINARY, 0o600)
    try:
        is_shared = share_like(fd, str(other))
    finally:
        os.close(fd)
    path.chmod(path.stat().st_mode | stat.S_IRUSR | stat.S_IWUSR)  # backups are often read-only
    return is_shared


def _write(log: Entries, path: Path) -> Repaired:
    """Write to a file what is left of a journal."""
    if isinstance(log, CompactableLog) and log.load_base().snapshot is not None:
        raise ValueError("The journal was trimmed; `trialstore copy` reads what it holds.")
    fills = _lost_creations(log)
    done: list[str] = []
    given_up: list[str] = []
    audit = Audit(Replica())
    with path.open("wb") as file:
        for salvaged in map(read_entry, log.entries()):
            for line in _kept(salvaged, audit, fills, done, given_up):
                file.write(line)
        file.flush()
        os.fsync(file.fileno())
    return Repaired(done, given_up)


def _link(path: Path, name: Path) -> None:
    """Give a file another name, which must be free; unlike a rename, this replaces nothing.

    Where the file system has no links, the name is that of a copy.
    """
    try:
        os.link(path, name)
        return
    except FileExistsError:
        raise
    except OSError:
        make_like(name, path)
    try:
        with path.open("rb") as source, name.open("r+b") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
    except OSError:
        name.unlink()
        raise


def repair_tables(log: TablesLog) -> Repaired:
    """Set right in place what can be.

    Raises:
        IncompatibleSchemaError: The tables are of another version.
        ValueError: Too much is gone.
    """
    version, head = log.get_current_version(), log.get_head_version()
    if version != head:
        raise IncompatibleSchemaError(
            f"Tables of version {version} can't be repaired; `trialstore upgrade` brings them to "
            f"{head}."
        )
    with log.connection.translating():
        return Repaired(*mend_tables(log.engine))


def _kept(
    salvaged: Salvaged,
    audit: Audit,
    fills: dict[str, int],
    done: list[str],
    given_up: list[str],
) -> Iterator[bytes]:
    """The lines that take the place of an entry; a whole one stays as it is, byte for byte."""
    where = salvaged.entry.where
    kept = salvaged.kept
    if salvaged.kind in ("torn-tail", "glued-record"):
        done.append(f"{where}: took away what a crash had left.")
    elif salvaged.stands_in:
        done.append(f"{where}: put a stand-in for what was created here.")
    elif salvaged.kind and kept:
        done.append(f"{where}: kept {len(kept)} records of a damaged line.")
    if salvaged.loses:
        given_up.append(f"{where}: {_lost_of(salvaged)}")
    study = audit.newest_study
    if where in fills and study is not None:
        done.append(f"{where}: put trials in the place of those created here: {fills[where]}.")
        if not salvaged.loses:
            given_up.append(f"{where}: records before it are missing, and what they said is lost.")
        lost = (lost_trial(study),) * fills[where]
        kept = (*kept, *lost) if salvaged.stands_in else (*lost, *kept)
    for record in kept:
        wrong = [f.kind for f in audit.take(Salvaged(salvaged.entry, record))]
        if "record-double" in wrong:
            done.append(f"{where}: left out a record that is there twice.")
        elif "trial-unknown" in wrong or "study-unknown" in wrong:
            given_up.append(f"{where}: it is about something that was never created.")
        elif salvaged.kind or record is not salvaged.record or salvaged.entry.data is None:
            yield r.encode_line(record)
        else:
            yield salvaged.entry.data.lstrip(b" ") + b"\n"


def _lost_of(salvaged: Salvaged) -> str:
    if salvaged.kind == "checksum" and salvaged.kept:
        return "some field of the trial may not be what was written."
    return f"{salvaged.message} What {'else ' if salvaged.kept else ''}it said is lost."


def _lost_creations(log: Entries) -> dict[str, int]:
    """How many trials were created by what is destroyed, by place; ids are positions.

    Behind it others name them, or trials that were created later: as many more than the records
    that are left create. Where nothing is seen to be damaged, whole records are gone, and the
    place is the first that names what they created.
    """
    lost: dict[str, int] = {}
    audit = Audit(Replica())
    place = ""
    n_created = 0
    named: set[int] = set()
    for salvaged in map(read_entry, log.entries()):
        entry = salvaged.entry
        if salvaged.kind and salvaged.kind != "torn-tail":
            place = entry.where
        for record in salvaged.kept:
            n_before = audit.n_created
            wrong = [finding.kind for finding in audit.take(Salvaged(entry, record))]
            if "record-double" not in wrong:
                n_created += audit.n_created - n_before
            trial_id = getattr(record, "trial_id", -1)
            if trial_id >= n_created:
                # Where no checksum says that the id is what was written, a second record has to.
                line = (entry.data or b"").lstrip(b" ")
                if trial_id in named or r.checksum_matches(line):
                    at = place or entry.where
                    lost[at] = lost.get(at, 0) + trial_id + 1 - n_created
                    n_created = trial_id + 1
                named.add(trial_id)
    return lost
