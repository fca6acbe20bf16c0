"""What psycopg sends: all steps of an exchange in one message, through libpq's own interface.

A cursor of psycopg takes ten times as long for a statement as libpq does. What a cursor would do,
and how it is done here:

- Arguments go as text, and the server infers their types from the statement.
- Answers are read by psycopg's own loaders.
- A statement used again is prepared, after as many uses as the connection's ``prepare_threshold``
  says, never where that is None. Its name is a hash of its text, so that it can't be taken for
  another, whoever prepared it. One that a failed message did not come to is not remembered.
- ``Connection.wait`` waits, which leaves the interpreter to other threads. Whatever ends it but
  the answers, an interrupt too, ends the connection: who knows what is still under way.

Source: https://www.postgresql.org/docs/current/libpq-pipeline-mode.html.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
import hashlib
from typing import Any, Final

from psycopg import DataError, OperationalError, errors
from psycopg.adapt import Transformer
from psycopg.pq import ConnStatus, ExecStatus
from psycopg.pq.abc import PGconn, PGresult
from psycopg.waiting import Ready, Wait

from trialstore.logs.relational.session import (
    INTEGER_MAX,
    POOLED,
    Rows,
    Server,
    Session,
    Step,
    is_wide,
)

_BIGINT: Final = 20
"""The server's number for this type."""

_Args = list[bytes | None]


class PipelineSession(Session):
    """psycopg: all steps go out at once, answers come back together."""

    def __init__(self, raw: Any, server: Server) -> None:
        super().__init__(raw, server)
        self._libpq: PGconn = raw.pgconn
        self._encoding: str = raw.info.encoding
        self._loaders = Transformer(raw)
        self._n_uses: dict[str, int] = {}
        self._names: dict[str, bytes] = {}
        """Of the statements that are prepared, by their text."""

    def run(self, steps: Sequence[Step]) -> list[Rows]:
        # Before anything is sent: a value may be refused.
        texts = [self._as_texts(step.args) for step in steps]
        try:
            new = self._send(steps, texts)
            results = self.raw.wait(_results(self._libpq))
            self._libpq.exit_pipeline_mode()
        except BaseException:
            self.raw.close()
            raise
        answered = self._without_prepares(results, new)
        for result in results:
            if result.status == ExecStatus.FATAL_ERROR:
                raise self._error(result)
        return [
            self._rows(result) if step.statement.columns else []
            for step, result in zip(steps, answered, strict=True)
        ]

    def _send(self, steps: Sequence[Step], texts: Sequence[_Args]) -> dict[int, str]:
        """Returns the texts of the statements that are being prepared, by place in the results."""
        libpq, names = self._libpq, self._names
        new: dict[int, str] = {}
        libpq.enter_pipeline_mode()
        for at, (step, args) in enumerate(zip(steps, texts, strict=True)):
            sql = step.statement.sql
            types = _types(step.args) if is_wide(step.args) else None
            name = None if types else names.get(sql) or self._name_for(sql)
            if name is None:
                libpq.send_query_params(sql.encode(self._encoding), args, types)
                continue
            if sql not in names:
                libpq.send_prepare(name, sql.encode(self._encoding))
                new[at + len(new)] = sql
                names[sql] = name
            libpq.send_query_prepared(name, args)
        libpq.pipeline_sync()
        return new

    def _name_for(self, sql: str) -> bytes | None:
        """The name to prepare a statement under; None where it is not to be prepared."""
        after, at_most = self.raw.prepare_threshold, self.raw.prepared_max
        if after is None or not self.server.prepares:
            return None
        n = self._n_uses[sql] = self._n_uses.get(sql, 0) + 1
        if n <= after or (at_most is not None and len(self._names) >= at_most):
            return None
        digest = hashlib.blake2b(sql.encode(self._encoding), digest_size=12).hexdigest()
        return f"trialstore_{digest}".encode()

    def _without_prepares(
        self, results: Sequence[PGresult], new: dict[int, str]
    ) -> Sequence[PGresult]:
        """The results of the steps; forgets what the message did not come to prepare."""
        if not new:
            return results
        for at, sql in new.items():
            if results[at].status != ExecStatus.COMMAND_OK:
                del self._names[sql]
        return [result for at, result in enumerate(results) if at not in new]

    def _error(self, result: PGresult) -> Exception:
        error = errors.error_from_result(result, self._encoding)
        if error.sqlstate in POOLED:
            self.server.prepares = False
        return error

    def _rows(self, result: PGresult) -> Rows:
        n = result.ntuples
        if not n:
            return []
        self._loaders.set_pgresult(result)
        return self._loaders.load_rows(0, n, tuple)

    def _as_texts(self, args: Sequence[Any]) -> _Args:
        return [None if value is None else self._as_text(value) for value in args]

    def _as_text(self, value: Any) -> bytes:
        if isinstance(value, str):
            if "\0" in value:  # libpq would take it for the end
                raise DataError("PostgreSQL text can't hold a NUL (0x00)")
            return value.encode(self._encoding)
        # What derives from them (an enum, a number of numpy) may show itself otherwise.
        kind = float if isinstance(value, float) else int
        return kind.__repr__(value).encode()


def _types(args: Sequence[Any]) -> list[int]:
    """Of arguments among which one is wide; the server infers the others'."""
    return [_BIGINT if type(x) is int and abs(x) > INTEGER_MAX else 0 for x in args]


def _results(libpq: PGconn) -> Generator[Wait, Ready, list[PGresult]]:
    """The results of a message up to its end, as they come."""
    while libpq.flush():
        # A server that waits for its answers to be read reads no more.
        if (yield Wait.RW) & Ready.R:
            libpq.consume_input()
    results: list[PGresult] = []
    while True:
        while libpq.is_busy():
            while not (yield Wait.R):
                pass
            libpq.consume_input()
        result = libpq.get_result()
        if result is None:  # the end of a statement's
            if libpq.status == ConnStatus.BAD:
                raise OperationalError("the connection was lost in the middle of an answer")
        elif result.status == ExecStatus.PIPELINE_SYNC:
            return results
        else:
            results.append(result)
