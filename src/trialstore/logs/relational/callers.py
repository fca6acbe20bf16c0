"""Marks of callers: what became of the records of each, for who passes on those of many.

A server's own mark dies with its session: whoever comes after it does not know the name. So what
a client needs to be told again stands under the client's name, in the same table and the same
transaction: which records, and the outcomes, or the facts from which they follow.

*A number is taken once.* The row's number has to grow, or the transaction fails and takes back
everything. So of two attempts at one exchange, by whichever servers, one is committed; and once
a caller's outcomes have been recalled for a number, nothing with a lesser one is.

What a crash leaves: the row is of the same transaction as the records.

Source: docs/formats/tables.md, "trialstore_sessions".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import hashlib
import math
from typing import Any, Final

import msgspec
from sqlalchemy.schema import CreateTable

from trialstore import records as r
from trialstore.clock import Clock
from trialstore.log import Mark, MarkTakenError, Wanted
from trialstore.logs.relational import statements as s, tables as t
from trialstore.logs.relational.connection import Connection
from trialstore.logs.relational.session import Session, Step, plain
from trialstore.logs.relational.verdicts import Facts
from trialstore.records import AnyOperation, Operation, Outcome, PutTrial, Record, Verdict

PREFIX: Final = "client-"
DAYS_MAX: Final = 1
"""Nobody repeats a call for longer."""


class Kept(msgspec.Struct, array_like=True):
    """A caller's row, before the facts.

    Args:
        seqs: Runs of the records' numbers, first and last, in the order of the records.
        before: Trials that other callers create in the same exchange before this one's.
        outcomes: One per record; None where they follow from the facts.
        known: Of records that an earlier exchange has appended, by ``seq``.
    """

    seqs: list[tuple[int, int]]
    before: int
    outcomes: list[Outcome] | None
    known: list[tuple[int, Outcome]]


class Callers:
    """For whom the records of the next exchanges are sent.

    Args:
        connection: Over which they are.
        clock: Tells when it is time to clear away.
    """

    def __init__(self, connection: Connection, clock: Clock) -> None:
        self._connection = connection
        self._clock = clock
        self._marks: Sequence[Mark] = ()
        self._prepared_at_s = -math.inf

    @contextlib.contextmanager
    def marking(self, marks: Sequence[Mark]) -> Iterator[None]:
        """See ``Marking``."""
        self._marks = marks if self._have_a_place() else ()
        try:
            yield
        finally:
            self._marks = ()

    def keep(self, records: Sequence[Operation], outcomes: Sequence[Outcome] | None) -> list[Step]:
        """What keeps the marks in the transaction of the records.

        Args:
            records: Of the exchange.
            outcomes: Of the records; None if the session's own mark is to say.
        """
        if not self._marks or not records:
            return []
        args: dict[str, Any] = {"session": self._connection.session_id}
        # In one order for all, so that two can't deadlock.
        for i, mark in enumerate(sorted(self._marks, key=lambda one: _session(one.caller))):
            kept = Kept(
                _runs([record.seq for record in records[mark.begin : mark.end]]),
                sum(isinstance(record, r.CreateTrial) for record in records[: mark.begin]),
                None if outcomes is None else list(outcomes[mark.begin : mark.end]),
                list(mark.known.items()),
            )
            args[f"caller_{i}"] = _session(mark.caller)
            args[f"number_{i}"] = mark.number
            args[f"kept_{i}"] = msgspec.json.encode(kept).decode()
        d = self._connection.dialect
        return [d.step(s.keep_marks, len(self._marks), outcomes is None, **args)]

    def check(self, session: Session) -> None:
        """Raises MarkTakenError if a number is taken."""
        for mark in self._marks:
            step = self._connection.dialect.step(s.read_mark, session=_session(mark.caller))
            rows = session.run([step])[0]
            if rows and rows[0][0] >= mark.number:
                raise MarkTakenError(f"Exchange {mark.number} of {mark.caller} is in the log.")

    def recall(
        self,
        caller: str,
        number: int,
        records: Sequence[AnyOperation],
        read: Callable[[Wanted], Sequence[Record]],
    ) -> dict[int, Outcome] | None:
        """See ``Marking``; ``read`` tells what there is now."""
        if not self._have_a_place():
            return None
        connection, session = self._connection, _session(caller)
        d = connection.dialect
        steps = [
            d.begin_write,
            # Waits for a transaction that is about to insert the same.
            d.step(s.insert_session, session=session, seq=0),
            d.step(s.pass_number, session=session, seq=number - 1),
            d.step(s.read_mark, session=session),
            d.commit,
        ]
        answers = connection.persistently(lambda: connection.session().run(steps))
        _, text, found = answers[3][0]
        if not text:
            return {}
        kept_text, _, facts = text.partition(";")
        kept = msgspec.json.decode(kept_text, type=Kept)
        seqs = [seq for first, last in kept.seqs for seq in range(first, last + 1)]
        known = dict(kept.known)
        if kept.outcomes is not None:
            known.update(zip(seqs, kept.outcomes, strict=True))
        else:
            sent = [record for record in records if record.seq in set(seqs)]
            last = kept.before + (-1 if found is None else found)
            known.update(_judged(read, sent, Facts(facts), last))
        return {i: known[record.seq] for i, record in enumerate(records) if record.seq in known}

    def _have_a_place(self) -> bool:
        """Whether there is a table; made on SQLite, if one may be, and cleared once a day."""
        connection = self._connection
        d, now_s = connection.dialect, self._clock.now_s()
        connection.persistently(connection.session)
        if not (connection.has_mark if d.keeps_marks else not connection.skip_table_creation):
            return False
        if now_s - self._prepared_at_s > DAYS_MAX * 86_400:
            steps = [d.step(s.forget_callers, PREFIX, DAYS_MAX)]
            if not d.keeps_marks:
                made = CreateTable(t.sessions, if_not_exists=True).compile(connection.engine)
                steps.insert(0, plain(str(made)))
            connection.persistently(lambda: connection.session().run(steps))
            self._prepared_at_s = now_s
        return True


def _session(caller: str) -> str:
    digest = hashlib.blake2b(caller.encode("utf-8", "surrogatepass"), digest_size=16)
    return PREFIX + digest.hexdigest()


def _judged(
    read: Callable[[Wanted], Sequence[Record]],
    records: Sequence[AnyOperation],
    facts: Facts,
    number: int,
) -> dict[int, Outcome]:
    """Outcomes by ``seq``; ``number`` is that of the last trial before theirs."""
    outcomes: dict[int, Outcome] = {}
    created: dict[int, tuple[int, int]] = {}
    for record in records:
        outcome = facts.judge(record)
        if outcome is r.ACCEPTED and isinstance(record, r.CreateStudy):
            outcome = Outcome(Verdict.ACCEPTED, facts.new_studies[0])
        elif outcome is r.ACCEPTED and isinstance(record, r.CreateTrial):
            number += 1
            created[record.seq] = record.study_id, number
        outcomes[record.seq] = outcome
    if created:
        news = read(Wanted(numbers=frozenset(created.values())))
        ids = {(x.study_id, x.number): x.trial_id for x in news if isinstance(x, PutTrial)}
        for seq, place in created.items():
            # Not there: its study was deleted since.
            found = place in ids
            outcomes[seq] = (
                Outcome(Verdict.ACCEPTED, ids[place]) if found else Outcome(Verdict.NO_STUDY)
            )
    return outcomes


def _runs(seqs: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for seq in seqs:
        if runs and seq == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], seq
        else:
            runs.append((seq, seq))
    return runs
