"""Pieces of operations, each a transaction of its own: what Optuna's methods before version 3 set.

Both may be made again after a lost answer to COMMIT: the second time changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trialstore.logs.relational import statements as s, tables as t
from trialstore.logs.relational.dialects import Dialect
from trialstore.logs.relational.session import Rows, Session, Step
from trialstore.logs.relational.writing import number_and_type
from trialstore.records import Verdict


def set_directions(
    session: Session, d: Dialect, study_id: int, directions: Sequence[int]
) -> Verdict:
    """See ``Piecewise``."""
    wanted = [t.DIRECTIONS[direction] for direction in directions]

    def judge(rows: Rows) -> Verdict:
        known = [direction for _, _, direction in rows if direction is not None]
        if not rows:
            return Verdict.NO_STUDY
        is_set = known and known[0] != t.DIRECTIONS[0]
        return Verdict.INCOMPATIBLE if is_set and known != wanted else Verdict.ACCEPTED

    writes = [d.step(s.delete_of_study, t.study_directions, study_id=study_id)]
    writes += [
        d.step(s.insert_direction, study_id=study_id, objective=objective, direction=direction)
        for objective, direction in enumerate(wanted)
    ]
    lock = d.step(s.lock_studies, 1, id_0=study_id)
    return _judged(session, d, lock, d.step(s.directions, study_id=study_id), judge, writes)


def set_values(session: Session, d: Dialect, trial_id: int, values: Sequence[float]) -> Verdict:
    """See ``Piecewise``."""

    def judge(rows: Rows) -> Verdict:
        if not rows:
            return Verdict.NO_TRIAL
        unfinished = rows[0][0] in ("RUNNING", "WAITING")
        return Verdict.ACCEPTED if unfinished else Verdict.FINISHED

    writes = [d.step(s.delete_values, trial_id=trial_id)]
    for objective, one in enumerate(values):
        value, kind = number_and_type(one)
        row = {"trial_id": trial_id, "objective": objective, "value": value, "type": kind}
        writes.append(d.step(s.set_value, "id", **row))
    lock = d.step(s.lock_trials, 1, id_0=trial_id)
    return _judged(session, d, lock, d.step(s.state, trial_id=trial_id), judge, writes)


def _judged(
    session: Session,
    d: Dialect,
    lock: Step,
    look: Step,
    judge: Callable[[Rows], Verdict],
    writes: Sequence[Step],
) -> Verdict:
    verdict = judge(session.run([d.begin_write, lock, look])[-1])
    if verdict is Verdict.ACCEPTED:
        session.run([*writes, d.commit])
    else:
        session.rollback()
    return verdict
