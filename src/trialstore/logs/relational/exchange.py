"""One exchange is one transaction, and one message where the driver allows.

An exchange that writes goes like this::

    BEGIN
    lock the studies that get trials, then the trials that are written on, each in order of id
    read the facts that decide (or have the mark keep them), and claim the mark's number
    write, each statement on the condition that the facts still say
    COMMIT
    read what was wanted

Between any two of these lines a crash leaves nothing behind but, after COMMIT, everything. What
is read comes after the commit, so that no lock is held while rows are on their way; it is a
moment after the exchange began, which is all that was promised. (On SQLite, without a way to go,
it comes before; and while nobody else writes to the file, nothing is read at all.)

A lost answer to COMMIT is settled by the mark (``trialstore_sessions``): its row is updated in
the same transaction, so it tells whether that one happened, and the facts in it tell the
outcomes. So it is if the database refuses a part of the message, which may be what is read after
COMMIT. On SQLite there is no such answer to lose.

All attempts at an exchange bear one number in the mark, and no other exchange ever bears it. So
whatever ends one, an interrupt between any two lines too, the next is not taken for it.

Source: docs/formats/tables.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
import contextlib
import itertools
from typing import Any, Final

import msgspec

from trialstore import records as r
from trialstore.errors import LogUnavailableError, OutcomeUnknownError
from trialstore.log import NOTHING, Batch, Wanted
from trialstore.logs.relational import statements as s, tables as t
from trialstore.logs.relational.callers import Callers
from trialstore.logs.relational.connection import Connection
from trialstore.logs.relational.cursor import Studies
from trialstore.logs.relational.dialects import Dialect, Fault
from trialstore.logs.relational.limits import refusal
from trialstore.logs.relational.reading import Reading, Written
from trialstore.logs.relational.session import Rows, Session, Step
from trialstore.logs.relational.undisturbed import Created, Standing
from trialstore.logs.relational.verdicts import Facts, Touched
from trialstore.logs.relational.writing import is_bare, runs, writes, writes_together
from trialstore.records import Operation, Outcome

_KNOWN: Final = "outcomes:"
"""Begins a mark that holds the outcomes themselves, not the facts that they follow from."""


_MESSAGE_LENGTH_MAX: Final = 1 << 20
"""Letters of texts. Servers refuse a longer packet than they are set to take, and hang up; MySQL's
least default is 4 MiB, and no single column of text there takes more than 64 KiB."""


_REFUSED_WHOLE: Final = (Fault.FENCED, Fault.READ_ONLY)
"""Faults of a message before its COMMIT, never of what is read after it."""


class Exchange:
    """One exchange, from its first attempt to its answer."""

    def __init__(
        self,
        connection: Connection,
        leased: Set[str],
        callers: Callers,
        records: list[Operation],
        before: Studies,
        wanted: Wanted,
    ) -> None:
        self.connection = connection
        self.leased = leased
        """Owners whose trials are covered by a lease."""
        self.callers = callers
        """For whom the records are sent."""
        self.dialect = connection.dialect
        self.records = records
        self.before = before
        self.wanted = wanted
        self.splits = not records
        """Whether a large answer may come in parts."""
        self.gone: set[int] = set()
        """Followed studies that are not there any more, where ids are used again."""
        self.outcomes: list[Outcome] | None = None
        """None until the records are known to be committed."""
        self.written = Written()
        self._numbers: list[tuple[int, int, int]] = []
        """Place among the records, study and number of trials whose ids are not known yet."""

        self.tried = False
        """Whether this is not the first attempt."""
        self.seq: int | None = None
        """The number in the mark; None until it is needed."""
        self.sent = False
        """Whether a COMMIT is out whose answer we don't have."""
        self.marked = False
        """Whether that COMMIT carried the mark."""
        self.was_lost = False
        """Whether the answer to a COMMIT of any attempt was lost."""
        self.stepwise = False
        """Whether a message was refused, so that we look for the record that was at fault."""
        self.has_begun = False
        """Whether the transaction is open already."""
        self.version: int | None = None
        """Of the file in this transaction, where the database tells."""

    def run(self) -> Batch:
        try:
            return self.connection.persistently(self._attempt)
        except LogUnavailableError as error:
            if self.outcomes is not None:
                raise OutcomeUnknownError(
                    f"{self.connection!r} has committed what was written and could not be read "
                    f"since; read again instead of repeating the write. {error.__cause__!r:.200}"
                ) from error.__cause__
            if not self.sent:
                raise
            raise OutcomeUnknownError(
                f"{self.connection!r} did not answer a COMMIT and could not be asked since "
                "whether it happened; look at the study before repeating the call. "
                f"{error.__cause__!r:.200}"
            ) from error.__cause__
        finally:
            if self.sent:
                # Its transaction may still be under way and hold the mark's row; what comes next
                # does not wait for it.
                self.connection.renew_session()

    def _attempt(self) -> Batch:
        session = self.connection.session(puts_mark=not self.sent)
        if self.sent:
            self._recover(session)
        if self.tried and self.outcomes is None:
            self.callers.check(session)
        self.tried = True
        if not self.records and not self.wanted_anything():
            return Batch(outcomes=[], news=[], cursor=self.before)
        stood, self.connection.standing = self.connection.standing, None
        self.version = None
        if stood is not None:
            batch = self._undisturbed(session, stood)
            if batch is not None:
                return batch
        if not self.records or self.outcomes is not None:
            reading = self._read(session)
        elif self._fits_one_message():
            reading = self._write_and_read(session)
        else:
            reading = self._write_stepwise(session)
        cursor = reading.cursor()
        if self.version is not None and not reading.more:
            still = None if self.records else stood
            self.connection.standing = Standing.after_reading(
                self.version, cursor, self.wanted, reading.trials.values(), still
            )
        return Batch(
            outcomes=self.outcomes or [], news=reading.news(), cursor=cursor, more=reading.more
        )

    # --- while nobody else writes ---

    def _undisturbed(self, session: Session, stood: Standing) -> Batch | None:
        """The exchange without reading anything; None if that would not be the truth.

        It has begun a transaction then, where it was to write one.
        """
        d, connection = self.dialect, self.connection
        asks = connection.others_wrote
        if asks is None or stood.cursor is not self.before or not stood.covers(self.wanted):
            return None
        if not self.records:
            if session.run([asks])[0][0][0] != stood.version:
                return None
            connection.standing = stood
            return Batch(outcomes=[], news=[], cursor=self.before)
        if not stood.allows(self.records):
            return None
        self._begin(session)
        if self.version != stood.version:
            return None
        steps: list[Step] = []
        asked: list[tuple[r.CreateTrial, int]] = []
        for run in runs(self.records):
            record, known = run[0], self._known(run[0])
            if len(run) > 1:
                steps.append(writes_together(d, run))
                continue
            steps += writes(d, record, known, self.leased)
            if isinstance(record, r.CreateTrial):
                asked.append((record, len(steps)))
                steps.append(d.step(s.newest_trial, study_id=record.study_id, known=known))
        answers = session.run(steps)
        created = [Created(record, *answers[place][0]) for record, place in asked]
        ids = iter(created)
        outcomes = [
            Outcome(r.Verdict.ACCEPTED, next(ids).trial_id)
            if isinstance(record, r.CreateTrial)
            else r.ACCEPTED
            for record in self.records
        ]
        session.run([*self.callers.keep(self.records, outcomes), d.commit])
        self._committed()
        connection.standing = stood
        return Batch(
            outcomes=outcomes,
            news=stood.advance(d, self.records, created),
            cursor=stood.cursor,
        )

    # --- the mark ---

    def _recover(self, session: Session) -> None:
        """Find out what became of a COMMIT whose answer was lost.

        Reading the mark waits for a transaction of ours that the server may still be busy with.
        One that has yet to arrive there is turned away by the fence in ``statements.mark``.
        """
        d, connection = self.dialect, self.connection
        if not self.marked:
            raise OutcomeUnknownError(
                f"{connection!r} did not answer a COMMIT, and there is no table "
                f"{t.sessions.name} to ask whether it happened; let the user create it, or look "
                "at the study."
            )
        steps = [d.begin_write, d.step(s.await_mark, session=connection.session_id), d.commit]
        rows = session.run(steps)[1]
        seq, facts, number = self._mark_in(rows)
        if seq == self.seq:
            self._settle(facts, number)
        self.sent = False

    def _number(self) -> int:
        """This exchange's own, for the mark."""
        if self.seq is None:
            self.seq = self.connection.next_seq()
        return self.seq

    def _mark_in(self, rows: Rows) -> tuple[int, str, int | None]:
        """The session's row, which nobody but an administrator removes while it is in use."""
        if not rows:
            self.connection.renew_session()
            raise OutcomeUnknownError(
                f"{self.connection!r}: the row in {t.sessions.name} that tells what became of a "
                "COMMIT is gone; look at the study before repeating the call."
            )
        seq, facts, number, *_ = rows[0]
        return seq, facts, number

    def _settle(self, facts: str, number: int | None) -> None:
        """Take the outcomes from a mark that tells that the exchange was committed."""
        if facts.startswith(_KNOWN):
            outcomes, self.written = msgspec.json.decode(
                facts[len(_KNOWN) :], type=tuple[list[Outcome], Written]
            )
            self.outcomes = outcomes
            return
        self._judge(Facts(facts), number)

    def _judge(self, facts: Facts, number: int | None) -> None:
        """Outcomes of one message; ids of created trials come with their images."""
        outcomes, wrote = [], self._message_written()
        wrote.deleted = []
        wrote.is_bare = False  # once the answer is lost, they are read like any others
        self.written = wrote
        self._numbers = []
        made = 0
        for i, record in enumerate(self.records):
            outcome = facts.judge(record)
            if outcome is r.ACCEPTED:
                if isinstance(record, r.CreateStudy):
                    outcome = Outcome(r.Verdict.ACCEPTED, facts.new_studies[0])
                elif isinstance(record, r.DeleteStudy):
                    wrote.deleted.append(record.study_id)
                elif isinstance(record, r.CreateTrial):
                    made += 1
                    found = -1 if number is None else number
                    self._numbers.append((i, record.study_id, found + made))
            outcomes.append(outcome)
        if not made:
            wrote.created = {}
        self.outcomes = outcomes

    def _name_created(self, reading: Reading) -> None:
        """Put the ids of created trials into the outcomes."""
        if not self._numbers or self.outcomes is None:
            return
        ids = {(x.study_id, x.number): x.trial_id for x in reading.trials.values()}
        for i, study_id, number in self._numbers:
            trial_id = ids.get((study_id, number))
            # Without an image the study was deleted between the commit and the read.
            self.outcomes[i] = (
                Outcome(r.Verdict.NO_STUDY)
                if trial_id is None
                else Outcome(r.Verdict.ACCEPTED, trial_id)
            )

    # --- writing, in one message ---

    def _fits_one_message(self) -> bool:
        """Whether nothing that is written depends on something read here before."""
        if not (self.dialect.one_message and self.connection.has_mark) or self.stepwise:
            return False
        touched = Touched(self.records)
        return (
            len(touched.names) <= 1
            and len(touched.numbered) <= 1
            and len(_segments(self.records)) == 1
            and not self._judged_params(self.records)
        )

    def _message_written(self) -> Written:
        """What the records do if all are accepted, which is what is asked about afterwards."""
        wrote = Written(session=self.connection.session_id)
        for record in self.records:
            if isinstance(record, r.CreateStudy):
                wrote.names.append(record.study_name)
            elif isinstance(record, r.CreateTrial):
                known, count = wrote.created.get(record.study_id, (self._known(record), 0))
                wrote.created[record.study_id] = (known, count + 1)
                wrote.is_bare = is_bare(record) and (wrote.is_bare or not count)
            elif isinstance(record, r.SetTrialStateValues) and record.state == r.RUNNING:
                wrote.trials.append(record.trial_id)
        return wrote

    def _write_and_read(self, session: Session) -> Reading:
        d, connection = self.dialect, self.connection
        touched = Touched(self.records)
        steps = [] if self.has_begun else [d.begin_write]
        steps += [d.step(s.insert_study, name=name) for name in touched.names]
        steps += self._locks(set(touched.numbered), set(touched.trials))
        # Who has nothing but trials to be told of has all facts from the rows that it locks.
        facts_at = None
        if d.answers_each and touched.trials and not (touched.studies or touched.names):
            facts_at = len(steps) - 1
            steps[facts_at] = self._lock(s.lock_trials, touched.trials)
        args: dict[str, Any] = {"session": connection.session_id, "seq": self._number()}
        if touched.numbered:
            args["numbered_study"] = touched.numbered[0]
            args["known"] = self._known(r.DeleteStudy(worker_id="", study_id=touched.numbered[0]))
        steps.append(_facts_step(d, s.mark, touched, args, bool(touched.numbered)))
        steps += self.callers.keep(self.records, None)
        nth = itertools.count(1)
        for run in runs(self.records):
            if len(run) > 1:
                steps.append(writes_together(d, run))
                continue
            numbered = None
            if isinstance(run[0], r.CreateTrial):
                numbered = connection.session_id, next(nth)
            steps += writes(d, run[0], self._known(run[0]), self.leased, numbered)
        steps.append(d.commit)
        wrote = self._message_written()
        mark: dict[str, Any] = {"session": connection.session_id}
        if wrote.is_bare:
            study_id, (known, count) = next(iter(wrote.created.items()))
            mark.update(study_id=study_id, known=known, count=count)
        if facts_at is None:
            read_mark = s.read_mark_and_created if wrote.is_bare else s.read_mark
            steps.append(d.step(read_mark, **mark))
        n_before = len(steps)
        reading = Reading(d, connection.decoder, self.before, self.wanted, wrote)
        steps += reading.plan()
        if _text_length(steps) > _MESSAGE_LENGTH_MAX:
            return self._write_stepwise(session)
        self.sent = self.marked = True
        try:
            answers = session.run(steps)
        except Exception as error:
            return self._go_on_after(error)
        self.sent = False
        connection.durable_commits += 1
        if facts_at is None:
            _, text, number = self._mark_in(answers[n_before - 1])
            self._judge(Facts(text), number)
        else:
            self._judge(Facts.of_trials(answers[facts_at]), None)
        for deleted in self.written.deleted:
            reading.forget(deleted)
        if wrote.is_bare and self._numbers:
            reading.take_created(study_id, [row[3:] for row in answers[n_before - 1]])
        reading.take(answers[n_before:])
        return self._finish(session, reading)

    def _go_on_after(self, error: Exception) -> Reading:
        """What a message that failed was to read, if it did not fail before its COMMIT."""
        connection = self.connection
        fault = connection.fault(error)
        if fault is Fault.LOST or fault in _REFUSED_WHOLE:
            self.sent = self._may_have_happened(fault)
            raise error
        connection.rollback()
        session = connection.session(puts_mark=False)
        self._recover(session)
        if self.outcomes is not None:
            return self._read(session)
        if fault is Fault.VALUE:
            self.stepwise = True
            self.has_begun = False
            return self._write_stepwise(session)
        raise error

    def _may_have_happened(self, fault: Fault) -> bool:
        """Whether the mark is to be asked after an attempt that ended so.

        Turned away by the mark, this attempt has stored nothing. Either one that was lost has
        come before it, or the mark is gone, and is put back with the next connection. Nor has
        it where nothing may be written.
        """
        self.was_lost = self.was_lost or fault is Fault.LOST
        return self.was_lost and (fault is Fault.LOST or fault in _REFUSED_WHOLE)

    def _finish(self, session: Session, reading: Reading) -> Reading:
        """The rare second plan, and the ids that came with the images."""
        for _ in range(2):
            steps = reading.plan()
            if not steps:
                break
            reading.take(session.run(steps))
        self._name_created(reading)
        return reading

    # --- writing, statement by statement ---

    def _write_stepwise(self, session: Session) -> Reading:
        """One statement at a time, because a later one depends on what an earlier one reads.

        Without a server there is no wire to hold locks for: the same transaction then reads, so
        that its answers are of the moment of its writes.
        """
        d = self.dialect
        self.written = Written()
        if not self.has_begun and self.version is None:
            self._begin(session)
        self._find_gone(session)
        outcomes: list[Outcome] = []
        for segment in _segments(self.records):
            self._write_segment(session, segment, outcomes)
        reading = self._answer(session) if d.name == "sqlite" else None
        self._commit(session, outcomes)
        self.outcomes = outcomes
        return reading or self._read(session)

    def _begin(self, session: Session) -> None:
        """Begin to write."""
        self.connection.be_durable(session, r.must_be_durable(self.records))
        self._start(session, self.dialect.begin_write)

    def _start(self, session: Session, begin: Step) -> None:
        asks = self.connection.others_wrote
        answers = session.run([begin] if asks is None else [begin, asks])
        if asks is not None:
            self.version = answers[1][0][0]

    def _commit(self, session: Session, outcomes: list[Outcome]) -> None:
        last = [*self.callers.keep(self.records, outcomes), self.dialect.commit]
        if self.connection.has_mark:
            text = msgspec.json.encode((outcomes, self.written)).decode()
            args = {"session": self.connection.session_id, "seq": self._number()}
            last.insert(0, self.dialect.step(s.mark_known, **args, facts=_KNOWN + text))
        self.sent, self.marked = self.dialect.name != "sqlite", self.connection.has_mark
        try:
            session.run(last)
        except Exception as error:
            # Nothing comes after this COMMIT: if something was refused, it did not happen.
            self.sent = self.sent and self._may_have_happened(self.connection.fault(error))
            raise
        self.sent = False
        self._committed()

    def _committed(self) -> None:
        if r.must_be_durable(self.records):
            self.connection.durable_commits += 1

    def _write_segment(
        self, session: Session, records: list[Operation], outcomes: list[Outcome]
    ) -> None:
        d = self.dialect
        touched = Touched(records)
        judged = self._judged_params(records)
        steps = [d.step(s.insert_study, name=name) for name in touched.names]
        studies = {*touched.numbered, *[study_id for study_id, _ in judged]}
        steps += self._locks(studies, set(touched.trials))
        steps.append(_facts_step(d, s.read_facts, touched, {}))
        with self._naming(touched.names):
            facts = Facts(session.run(steps)[-1][0][0])
        for trial_id in touched.trials:
            if self._is_of_gone(trial_id):
                # Whatever bears this id now, it is not what the operation was meant for.
                facts.trials.pop(trial_id, None)
        for pair in judged:
            with self._naming([pair[1]]):
                row = session.run([d.step(s.first_param, study_id=pair[0], name=pair[1])])[0]
            facts.first_params[pair] = row[0][0] if row else None
        judged_now = [facts.judge(record) for record in records]
        accepted = [x for x, told in zip(records, judged_now, strict=True) if told is r.ACCEPTED]
        if d.name == "sqlite":
            made = [told for run in runs(accepted) for told in self._write_run(session, run)]
        else:
            # One by one, so that it shows which one a column can't hold.
            made = [self._write_named(session, record) for record in accepted]
        told_of = iter(made)
        outcomes += [next(told_of) if told is r.ACCEPTED else told for told in judged_now]

    def _write_run(self, session: Session, run: Sequence[Operation]) -> list[Outcome]:
        if len(run) == 1:
            return [self._write_one(session, run[0])]
        session.run([writes_together(self.dialect, run)])
        return [r.ACCEPTED] * len(run)

    @contextlib.contextmanager
    def _naming(self, names: Sequence[str]) -> Iterator[None]:
        """Say of names that they are what a column can't hold."""
        try:
            yield
        except Exception as error:
            if self.connection.fault(error) is Fault.VALUE:
                told = ", ".join(repr(name[:40]) for name in names)
                cause = self.connection.clean(error)
                raise ValueError(
                    f"No column holds the name {told} ({cause}); nothing was stored. Use another "
                    "one, or tables of another character set."
                ) from error
            raise

    def _write_named(self, session: Session, record: Operation) -> Outcome:
        try:
            return self._write_one(session, record)
        except Exception as error:
            if self.connection.fault(error) is Fault.VALUE:
                raise ValueError(refusal(record, self.connection.clean(error))) from error
            raise

    def _write_one(self, session: Session, record: Operation) -> Outcome:
        """Write an accepted operation whose locks are held."""
        d = self.dialect
        known = self._known(record)
        steps = writes(d, record, known, self.leased)
        if isinstance(record, r.CreateTrial):
            steps.append(d.step(s.newest_trial, study_id=record.study_id, known=known))
            trial_id, _ = session.run(steps)[-1][0]
            self.written.trials.append(trial_id)
            return Outcome(r.Verdict.ACCEPTED, trial_id)
        if isinstance(record, r.CreateStudy):
            steps.append(d.step(s.studies_selected, 0, 1, False, name_0=record.study_name))
            study_id = next(row[0] for row in session.run(steps)[-1] if row[1] == s.NAME)
            self.written.studies.append(study_id)
            return Outcome(r.Verdict.ACCEPTED, study_id)
        session.run(steps)
        self._note(record)
        return r.ACCEPTED

    def _note(self, record: Operation) -> None:
        """Remember what an accepted operation owes to the news."""
        if isinstance(record, r.DeleteStudy):
            self.written.deleted.append(record.study_id)
        elif isinstance(record, r.SetTrialStateValues) and record.state == r.RUNNING:
            self.written.trials.append(record.trial_id)

    # --- what both ways of writing share ---

    def _locks(self, studies: set[int], trials: set[int]) -> list[Step]:
        d, steps = self.dialect, []
        if d.name == "sqlite":
            return []  # BEGIN IMMEDIATE holds everything.
        for name, ids in ((s.lock_studies, studies), (s.lock_trials, trials)):
            steps += [self._lock(name, some).unread() for some in s.chunks(sorted(ids))]
        return steps

    def _lock(self, statement: Callable[..., Any], ids: Sequence[int]) -> Step:
        args: dict[str, Any] = {}
        n = s.pad("id", ids, args)
        return self.dialect.step(statement, n, **args)

    def _judged_params(self, records: list[Operation]) -> list[tuple[int, str]]:
        names = {x.param_name for x in records if isinstance(x, r.SetTrialParam)}
        return sorted(pair for pair in self.wanted.params if pair[1] in names)

    def _known(self, record: Operation) -> int:
        study_id = getattr(record, "study_id", -1)
        study = self.before.get(study_id)
        return study.last_id if study and study_id not in self.gone else 0

    # --- reading ---

    def _read(self, session: Session) -> Reading:
        if not self.wanted_anything():
            return Reading(
                self.dialect, self.connection.decoder, self.before, self.wanted, self.written
            )
        begin = self.dialect.begin_read
        if begin is None:
            return self._answer(session)
        self._start(session, begin)
        try:
            self._find_gone(session)
            return self._answer(session)
        finally:
            session.run([self.dialect.commit])

    def _answer(self, session: Session, first: Sequence[Step] = ()) -> Reading:
        """Read what was wanted, in as many plans as it takes; ``first`` goes before all."""
        self.written.deleted += self.gone
        reading = Reading(
            self.dialect,
            self.connection.decoder,
            self.before,
            self.wanted,
            self.written,
            splits=self.splits,
        )
        steps = [*first, *reading.plan()]
        if steps:
            reading.take(session.run(steps)[len(first) :])
        return self._finish(session, reading)

    def wanted_anything(self) -> bool:
        wrote = self.written
        return self.wanted != NOTHING or bool(
            wrote.trials or wrote.studies or wrote.names or wrote.created
        )

    def _find_gone(self, session: Session) -> None:
        """SQLite gives the ids of a deleted study and its trials out again. A study is the one
        that we followed if it is called the same and has the trial that we know it by."""
        d = self.dialect
        followed = self._concerned() if d.ids_reused else []
        if not followed:
            return
        same: set[int] = set()
        for some in s.chunks(followed):
            args: dict[str, Any] = {}
            studies = {study_id: self.before[study_id] for study_id in some}
            trials = sorted(x.probe.trial_id for x in studies.values() if x.probe is not None)
            shape = (s.pad("study", some, args), s.pad("trial", trials, args))
            rows = session.run([d.step(s.incarnations, *shape, **args)])[0]
            same |= {row[0] for row in rows if studies[row[0]].is_still(*row[1:])}
        self.gone = set(followed) - same

    def _is_of_gone(self, trial_id: int) -> bool:
        """Whether it was last met in a study that is gone. One that was met in another study since
        is that study's: it has been given the id of a trial that went with its own."""
        if not self.gone:
            return False
        holders = {one for one, study in self.before.items() if study.holds(trial_id)}
        return bool(holders) and holders <= self.gone

    def _concerned(self) -> list[int]:
        """Followed studies that this exchange writes on, or reads by what it knows of them."""
        w = self.wanted
        ids = {*w.trials_of, *w.finished_of, *w.waiting_of, *w.next_of}
        ids |= {one for one, _ in (*w.numbers, *w.params)}
        trials = set(w.trials)
        for record in self.records:
            if (study_id := getattr(record, "study_id", None)) is not None:
                ids.add(study_id)
            elif (trial_id := getattr(record, "trial_id", None)) is not None:
                trials.add(trial_id)
        for study_id, study in self.before.items() if trials else ():
            if (study.held or study.waiting) and any(study.holds(one) for one in trials):
                ids.add(study_id)
        return sorted(ids & self.before.keys())


# --- statements of a record ----------------------------------------------------------------------


def _text_length(steps: Sequence[Step]) -> int:
    return sum(len(arg) for step in steps for arg in step.args if isinstance(arg, str))


def _segments(records: list[Operation]) -> list[list[Operation]]:
    """Runs of operations that can be judged by facts read once: a deletion changes them, which of
    several names is a new study's they do not say, and one statement asks for no more than so many
    trials or studies."""
    runs: list[list[Operation]] = [[]]
    about: set[int | str] = set()
    named = None
    for record in records:
        if isinstance(record, r.CreateStudy):
            if named not in (None, record.study_name):
                runs.append([])
                about.clear()
            named = record.study_name
        if isinstance(record, r.DeleteStudy):
            runs += [[record], []]
            about.clear()
            named = None
            continue
        about.add(_subject(record))
        if len(about) > s.IDS_MAX:
            runs.append([])
            about = {_subject(record)}
        runs[-1].append(record)
    return [run for run in runs if run]


def _subject(record: Any) -> int | str:
    """The trial, study or study's name that an operation is about."""
    for name in ("trial_id", "study_id", "study_name"):
        found: int | str | None = getattr(record, name, None)
        if found is not None:
            return found
    raise TypeError(f"{record!r} is about nothing.")


def _facts_step(
    d: Dialect, statement: Any, touched: Touched, args: dict[str, Any], *more: Any
) -> Step:
    shape = (
        s.pad("trial", touched.trials, args),
        s.pad("study", touched.studies, args),
        s.pad("name", touched.names, args),
    )
    return d.step(statement, *shape, *more, **args)
