"""An exchange that decides what to write under the locks that keep others out.

It goes like this::

    BEGIN
    lock the studies that are wanted, then the trials
    read what is wanted; the caller decides
    write as any other exchange does, COMMIT, and read what is wanted

A study's lock keeps out every new trial of it, every attribute, its deletion and every other
conditional exchange; a trial's lock every write on that trial. So nothing comes between what the
caller was told and its records, but that a trial which it neither named nor writes on may change
meanwhile: that change counts as a later one. Where the records turn out to write on trials that
are not locked yet, these are locked, and the caller is told what is new and asked again.

Source: docs/formats/tables.md.
"""

from __future__ import annotations

from collections.abc import Set

from trialstore.log import Batch, Decide, Wanted
from trialstore.logs.relational.callers import Callers
from trialstore.logs.relational.connection import Connection
from trialstore.logs.relational.cursor import Studies
from trialstore.logs.relational.exchange import Exchange
from trialstore.logs.relational.limits import check_values
from trialstore.logs.relational.reading import Reading, Written
from trialstore.logs.relational.session import Session, Step
from trialstore.logs.relational.verdicts import Touched


class _Undecided(Exception):
    """Carries what ``decide`` raised past those who would take it for the database's."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class ConditionalExchange(Exchange):
    """One conditional exchange, from its first attempt to its answer."""

    def __init__(
        self,
        connection: Connection,
        leased: Set[str],
        callers: Callers,
        decide: Decide,
        before: Studies,
        wanted: Wanted,
    ) -> None:
        super().__init__(connection, leased, callers, [], before, wanted)
        self.splits = False  # what is decided on is the whole truth
        self._decide = decide

    def run(self) -> Batch:
        try:
            return super().run()
        except _Undecided as undecided:
            error = undecided.error
        raise error

    def _attempt(self) -> Batch:
        session = self.connection.session(puts_mark=not self.sent)
        if self.sent:
            self._recover(session)
        if self.outcomes is None:
            self._settle_records(session)
            if not self.records:
                session.run([self.dialect.commit])
                return Batch(outcomes=[], news=[], cursor=self.before)
        return super()._attempt()

    def _write_stepwise(self, session: Session) -> Reading:
        if not self.has_begun:
            # The message that was refused took the locks with it.
            self._settle_records(session)
        return super()._write_stepwise(session)

    def _settle_records(self, session: Session) -> None:
        """Begin, and have it decided what to write; the transaction stays open."""
        d, w = self.dialect, self.wanted
        studies = {*w.studies, *w.trials_of, *w.waiting_of, *w.next_of}
        studies |= {one for one, _ in (*w.numbers, *w.params)}
        locked = set(w.trials)
        self.has_begun = False
        self.connection.be_durable(session, True)
        locks = [d.begin_write, *self._locks(studies, locked)]
        while True:
            reading = self._look(session, locks)
            self.has_begun = True
            self.before = reading.cursor()
            try:
                self.records = list(self._decide(reading.news(), self.before))
            except Exception as error:
                raise _Undecided(error) from error
            check_values(d, self.records)
            more = set(Touched(self.records).trials) - locked
            locks = self._locks(set(), more)
            if not locks:
                return
            locked |= more

    def _look(self, session: Session, locks: list[Step]) -> Reading:
        self.written, self.gone = Written(), set()
        if self.dialect.ids_reused:
            session.run(locks)
            self._find_gone(session)
            locks = []
        reading = self._answer(session, locks)
        self.written, self.gone = Written(), set()
        return reading
