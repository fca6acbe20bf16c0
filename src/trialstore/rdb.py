"""``RDBStorage``: a storage over Optuna's tables in a relational database."""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy.engine import Engine

from trialstore.callbacks import StaleTrialCallback
from trialstore.clock import CLOCK, Clock
from trialstore.credentials import secret
from trialstore.logs.relational.log import TablesLog
from trialstore.older import OlderMethods


class RDBStorage(OlderMethods):
    """A storage over Optuna's own tables; plain Optuna workers may use them at the same time.

    Args:
        url: SQLAlchemy's URL of the database; the literal ``{SCHEMA_VERSION}`` in it is replaced.
        engine_kwargs: Passed to ``sqlalchemy.create_engine``.
        skip_compatibility_check: Open tables of another schema version all the same, as
            ``upgrade`` needs it.
        heartbeat_interval: Seconds between two beats for the trials that this storage runs; None
            is without heartbeat. docs/heartbeats.md has this and the next three.
        grace_period: Seconds without a beat after which a trial is failed; None is twice the
            interval.
        heartbeat_stale_trial_callback: What is done about a failed trial, such as
            ``RetryHeartbeatStaleTrialCallback``.
        failed_trial_callback: The name of that until Optuna 4.9.
        skip_table_creation: Expect the tables to be there.
        linger_s: For how long a write on a running trial may wait for an exchange to ride along
            with; 0 writes everything through.
        max_staleness_s: How old an answer may be; 0 means never older than the call.
        durability: "full" survives power loss, "process" only the death of processes.
        password_file: File that holds the password, if it is not in the URL; read at each
            connection. A pickle carries the file's name, not the password.
        password_env: Environment variable that holds it, likewise.

    Raises:
        ImportError: The database driver is not installed.
        IncompatibleSchemaError: The tables are of another schema version.
        LogUnavailableError: The database was not reached.
        SecretNotFoundError: The password is not where it should be.
    """

    def __init__(
        self,
        url: str,
        engine_kwargs: dict[str, Any] | None = None,
        skip_compatibility_check: bool = False,
        *,
        heartbeat_interval: int | None = None,
        grace_period: int | None = None,
        heartbeat_stale_trial_callback: StaleTrialCallback | None = None,
        failed_trial_callback: StaleTrialCallback | None = None,
        skip_table_creation: bool = False,
        linger_s: float = 0.02,
        max_staleness_s: float = 0.0,
        durability: str = "full",
        password_file: str | None = None,
        password_env: str | None = None,
        clock: Clock = CLOCK,
    ) -> None:
        log = TablesLog(
            url,
            engine_kwargs,
            skip_compatibility_check=skip_compatibility_check,
            skip_table_creation=skip_table_creation,
            durability=durability,
            password=secret(password_file, password_env),
        )
        super().__init__(
            log,
            heartbeat_interval=heartbeat_interval,
            grace_period=grace_period,
            heartbeat_stale_trial_callback=heartbeat_stale_trial_callback,
            failed_trial_callback=failed_trial_callback,
            linger_s=linger_s,
            max_staleness_s=max_staleness_s,
            clock=clock,
        )

    # What users of Optuna's RDBStorage read from it.

    @property
    def _tables(self) -> TablesLog:
        return cast(TablesLog, self.log)

    @property
    def url(self) -> str:
        """As it was given, its template filled in; with the password, if that was in it."""
        return self._tables.url

    @property
    def engine(self) -> Engine:
        """SQLAlchemy's engine, for statements of your own."""
        return self._tables.engine

    @property
    def engine_kwargs(self) -> dict[str, Any]:
        """As they were given."""
        return self._tables.connection.engine_kwargs

    @property
    def skip_compatibility_check(self) -> bool:
        """As it was given."""
        return self._tables.connection.skip_compatibility_check
