"""One connection to a database, and the steps that run on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple


class Compiled(NamedTuple):
    """The text of a statement for a driver, and the names of its arguments in their order."""

    sql: str
    names: tuple[str, ...]
    columns: int
    """How many columns it answers; 0 for a write."""


class Step(NamedTuple):
    """One statement of an exchange with its arguments."""

    statement: Compiled
    args: tuple[Any, ...]

    def unread(self) -> Step:
        """The same for its effect alone, in its place, whatever it answers."""
        return Step(self.statement._replace(columns=0), self.args)


def plain(sql: str) -> Step:
    return Step(Compiled(sql, (), 0), ())


Rows = list[Any]


class Server:
    """What sessions find out about their server, for those that come after them."""

    prepares = True
    """Whether statements may be prepared, which a pooler loses."""


class Session:
    """One connection, in the driver's autocommit; transactions are statements like others."""

    def __init__(self, raw: Any, server: Server) -> None:
        self.raw = raw
        self.server = server

    def run(self, steps: Sequence[Step]) -> list[Rows]:
        """The rows that each step answers (none for writes), one step after the other."""
        answers: list[Rows] = []
        cursor = self.raw.cursor()
        for statement, args in steps:
            cursor.execute(statement.sql, args)
            answers.append(cursor.fetchall() if statement.columns else [])
        cursor.close()
        return answers

    def rollback(self) -> None:
        """End a transaction that failed; nothing of it stays."""
        self.raw.cursor().execute("ROLLBACK")

    def close(self) -> None:
        self.raw.close()


# --- what the sessions on PostgreSQL share -------------------------------------------------------

INTEGER_MAX: Final = 2**31 - 1

POOLED: Final = ("26000", "42P05")
"""A statement that was prepared is missing, or one that was not is there: this is not always the
same session of the server, but a pooler's, who does not know about prepared statements."""


def is_wide(args: Sequence[Any]) -> bool:
    """Whether an integer is too large for the type that the server infers from a column, which
    would be an error where a comparison finds no row."""
    return any(type(x) is int and not -INTEGER_MAX <= x <= INTEGER_MAX for x in args)
