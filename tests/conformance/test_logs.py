"""Every log keeps the contract of ``Log``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa

from ageing import age_beats
from backends import ListBackend
from servers import new_database
from trialstore.logs.backend import BackendLog
from trialstore.logs.file import FileLog
from trialstore.logs.file.filelock import JournalFileOpenLock
from trialstore.logs.memory import MemoryLog
from trialstore.logs.relational.log import TablesLog
from trialstore.testing.capability_suites import AgeLeases
from trialstore.testing.faults import ManualClock
from trialstore.testing.log_suite import LogSuite, OpenLog


class TestMemoryLog(LogSuite):
    crosses_processes = False

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    def open_log(self, clock: ManualClock) -> OpenLog:
        log = MemoryLog(clock=clock)
        return lambda: log

    @pytest.fixture
    def age_leases(self, clock: ManualClock) -> AgeLeases:
        return clock.advance


class TestFileLog(LogSuite):
    # The kernel makes one write visible page by page, and a reader holds no lock: of a batch that
    # crosses a page it may see the first records before the others.
    shows_whole_batches = False

    @pytest.fixture
    def open_log(self, tmp_path: Path) -> OpenLog:
        return lambda: FileLog(str(tmp_path / "journal.log"))

    @pytest.fixture
    def age_leases(self, tmp_path: Path) -> AgeLeases:
        return lambda duration_s: age_beats(tmp_path / "journal.log.beats", duration_s)


class TestFileLogWithOpenLock(TestFileLog):
    @pytest.fixture
    def open_log(self, tmp_path: Path) -> OpenLog:
        path = str(tmp_path / "journal.log")
        return lambda: FileLog(path, JournalFileOpenLock(path))


class TestBackendLogOfAList(LogSuite):
    crosses_processes = False
    is_conditional = False
    keeps_leases = False

    @pytest.fixture
    def open_log(self) -> OpenLog:
        backend = ListBackend()
        return lambda: BackendLog(backend)


class TestBackendLogOfOptunasFile(LogSuite):
    is_conditional = False
    shows_whole_batches = False

    @pytest.fixture
    def open_log(self, tmp_path: Path) -> OpenLog:
        path = str(tmp_path / "journal.log")
        return lambda: BackendLog(optuna.storages.journal.JournalFileBackend(path))

    @pytest.fixture
    def age_leases(self, tmp_path: Path) -> AgeLeases:
        return lambda duration_s: age_beats(tmp_path / "journal.log.beats", duration_s)


class OnTables(LogSuite):
    """Time passes for beats by what each database adds to a time."""

    kind: str
    earlier: str
    keeps_negative_zero = False
    keeps_every_key = False

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return new_database(self.kind, tmp_path)

    @pytest.fixture
    def open_log(self, url: str) -> OpenLog:
        return lambda: TablesLog(url)

    @pytest.fixture
    def age_leases(self, url: str) -> Iterator[AgeLeases]:
        engine = sa.create_engine(url)

        def age(duration_s: float) -> None:
            with engine.begin() as connection:
                statement = f"UPDATE trial_heartbeats SET heartbeat = {self.earlier}"
                connection.execute(sa.text(statement), {"s": int(duration_s)})

        yield age
        engine.dispose()


class TestTablesLogOnSQLite(OnTables):
    kind = "sqlite"
    earlier = "datetime(heartbeat, '-' || :s || ' seconds')"


@pytest.mark.servers
class TestTablesLogOnPsycopg(OnTables):
    kind = "psycopg"
    earlier = "heartbeat - make_interval(secs => :s)"
    keeps_every_text = False


@pytest.mark.servers
class TestTablesLogOnPsycopg2(TestTablesLogOnPsycopg):
    kind = "psycopg2"


@pytest.mark.servers
class TestTablesLogOnMariaDB(OnTables):
    kind = "pymysql"
    earlier = "heartbeat - INTERVAL :s SECOND"
    keeps_every_text = False
    attribute_bytes_max = 65_535
