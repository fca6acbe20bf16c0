"""Records in Optuna's tables: SQLite, PostgreSQL, MySQL and MariaDB."""

from trialstore.logs.relational.log import TablesLog

__all__ = ["TablesLog"]
