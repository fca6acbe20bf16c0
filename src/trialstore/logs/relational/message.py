"""What psycopg2 sends: all steps of an exchange in one message, as one text.

libpq gives this driver only the last answer of a message, so all that is read is one statement,
the last, which returns an element of a JSON array for each step. (It comes after COMMIT.)

A text that comes again and again is prepared, at the head of a message, and from then on named:
the server spends more on understanding most of them than on doing what they say. The name is a
hash of the text, so that it can't be taken for another, whoever prepared it. Whether a message
that failed has prepared what it should is not known; another attempt takes another name.

One value of PostgreSQL ends at 1 GB. What is read and makes a longer array is asked for again, a
statement at a time and an array for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
import hashlib
import re
from typing import Any, Final

import msgspec

from trialstore.logs.relational.session import POOLED, Rows, Server, Session, Step, is_wide

_USES_BEFORE: Final = 2
"""Uses of a text before it is prepared; many are used once, by who opens a study."""

_PREPARED_MAX: Final = 100
"""Statements that the server keeps for a connection."""

_ARGUMENT: Final = re.compile(r"\$(\d+)")
_ARGUMENT_BYTES: Final = re.compile(rb"\$(\d+)")
_TOO_LONG: Final = "54000"
"""A limit of the server's was exceeded: it can't make so long a value."""

_READ_ROWS: Final = "SELECT json_build_array({0})::text FROM ({1}) AS s({0})"
_READ: Final = "(SELECT coalesce(json_agg(json_build_array({0})),'[]') FROM ({1}) AS s({0}))"


class MessageSession(Session):
    """psycopg2: one text of many statements, whose last answers for all that read."""

    def __init__(self, raw: Any, server: Server) -> None:
        super().__init__(raw, server)
        self._n_uses: dict[str, int] = {}
        self._names: dict[str, str] = {}
        """Of the statements that are prepared, by their text."""
        self._n_failed = 0
        self._joined: dict[tuple[str, ...], str] = {}

    def run(self, steps: Sequence[Step]) -> list[Rows]:
        try:
            return self._run_together(steps)
        except Exception as error:
            # One that wrote is looked after by the exchange, which then reads what it was to read.
            only_reads = all(step.statement.columns for step in steps)
            is_over = not self.raw.info.transaction_status
            if getattr(error, "pgcode", None) == _TOO_LONG and only_reads and is_over:
                return [self._read_by_row(step) for step in steps]
            raise

    def _read_by_row(self, step: Step) -> Rows:
        statement, args = step
        cursor = self.raw.cursor()
        sql = _READ_ROWS.format(_names_of(statement.columns), statement.sql)
        cursor.execute(_whole_text(cursor, sql, args))
        rows = [msgspec.json.decode(text) for (text,) in cursor]
        cursor.close()
        return rows

    def _run_together(self, steps: Sequence[Step]) -> list[Rows]:
        cursor = self.raw.cursor()
        reads = [step for step in steps if step.statement.columns]
        written: list[tuple[str, Sequence[Any]]] = [
            (statement.sql, args) for statement, args in steps if not statement.columns
        ]
        if reads:
            written.append((self._join(reads), [arg for step in reads for arg in step.args]))
        prepared = set(self._names)
        texts = [self._text(cursor, sql, args) for sql, args in written]
        new = [sql for sql in self._names if sql not in prepared]
        prepares = [f"PREPARE {self._names[sql]} AS {sql}".encode() for sql in new]
        try:
            cursor.execute(b";".join([*prepares, *texts]))
        except Exception as error:
            self._n_failed += 1
            for sql in new:
                del self._names[sql]
            if getattr(error, "pgcode", None) in POOLED:
                self.server.prepares = False
            raise
        answered = msgspec.json.decode(cursor.fetchone()[0]) if reads else []
        cursor.close()
        rest = iter(answered)
        return [next(rest) if step.statement.columns else [] for step in steps]

    def _join(self, reads: Sequence[Step]) -> str:
        """The one statement that answers for all that read, with their arguments in a row."""
        key = tuple([step.statement.sql for step in reads])
        found = self._joined.get(key)
        if found is None:
            parts = []
            n_args = 0
            for statement, args in reads:
                names = _names_of(statement.columns)
                parts.append(_READ.format(names, _numbered_from(n_args, statement.sql)))
                n_args += len(args)
            found = self._joined[key] = f"SELECT json_build_array({','.join(parts)})::text"
        return found

    def _text(self, cursor: Any, sql: str, args: Sequence[Any]) -> bytes:
        """What is sent for a statement: its name, or the whole of it."""
        if not args:
            return sql.encode()
        name = None if is_wide(args) else self._names.get(sql) or self._name_for(sql)
        if name is None:
            return _whole_text(cursor, sql, args)
        self._names[sql] = name
        called: bytes = cursor.mogrify(f"EXECUTE {name}({','.join(['%s'] * len(args))})", args)
        return called

    def _name_for(self, sql: str) -> str | None:
        """The name to prepare a statement under; None where it is not to be prepared."""
        if not self.server.prepares:
            return None
        n = self._n_uses[sql] = self._n_uses.get(sql, 0) + 1
        if n <= _USES_BEFORE or len(self._names) >= _PREPARED_MAX:
            return None
        digest = hashlib.blake2b(sql.encode(), digest_size=12).hexdigest()
        return f"trialstore_{digest}_{self._n_failed}"


def _whole_text(cursor: Any, sql: str, args: Sequence[Any]) -> bytes:
    literals: list[bytes] = [cursor.mogrify("%s", (arg,)) for arg in args]
    return _ARGUMENT_BYTES.sub(lambda n: literals[int(n[1]) - 1], sql.encode())


def _names_of(n_columns: int) -> str:
    return ",".join([f"c{i}" for i in range(n_columns)])


def _numbered_from(first: int, sql: str) -> str:
    return _ARGUMENT.sub(lambda n: f"${int(n[1]) + first}", sql)
