"""Every statement of the tables log, named; written in Core, compiled once per dialect and shape.

A function takes the dialect and the *shape* (how many ids, how many studies) and returns the
statement; ``Dialect.compiled`` keeps the text. Numbers of ids are rounded up (``padded``) so that
few shapes exist and the database's own statement caches hit.

Writes are conditional, so that they never fail and never change a finished trial, whatever was
decided from facts read before: the condition and the verdict come from the same locked row.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

import sqlalchemy as sa

from trialstore.logs.relational import tables as t
from trialstore.logs.relational.dialects import Dialect, IdOf

Item = TypeVar("Item")

_SIZES: Final = (0, 1, 4, 16, 64, 256, 1024, 4096, 8192)
IDS_MAX: Final = _SIZES[-1]
"""Of one kind in a statement, of which there are three at most with so many: SQLite takes 32,766
parameters, PostgreSQL 65,535."""
_IDS_REPEATED_MAX: Final = 16
"""So many ids are said to each table anew, which spares the database a table of them."""

# Kinds of rows in the answer of `trials_selected`.
TRIAL, PARAM, USER_ATTR, SYSTEM_ATTR, VALUE, INTERMEDIATE = range(6)
# Kinds of rows in the answer of `studies_selected`.
NAME, DIRECTION = 0, 1

# The types of Core follow every column, which is more than a type checker bears here.
_select: Any = sa.select
_insert: Any = sa.insert
_update: Any = sa.update
_delete: Any = sa.delete
_union_all: Any = sa.union_all
_union: Any = sa.union

_WAITING: Any = sa.literal_column("'WAITING'")
_RUNNING: Any = sa.literal_column("'RUNNING'")
_ZERO: Any = sa.literal_column("0")
_ONE: Any = sa.literal_column("1")
_ID_MAX: Any = sa.literal_column(str(2**63 - 1))
_NOW: Any = sa.func.now()
_UNFINISHED: Final = ("RUNNING", "WAITING")


def padded(n: int) -> int:
    """The next size for which statements are compiled."""
    return _SIZES[bisect_left(_SIZES, n)]


def chunks(items: Sequence[Item]) -> list[Sequence[Item]]:
    """Runs of items of which each fits a statement; none of none."""
    return [items[i : i + IDS_MAX] for i in range(0, len(items), IDS_MAX)]


def pad(name: str, items: Sequence[Item], args: dict[str, Any]) -> int:
    """Put ``items`` into ``args`` under ``name_0`` …, the last repeated up to the padded size."""
    size = padded(len(items))
    last = len(items) - 1
    for i in range(size):
        args[f"{name}_{i}"] = items[min(i, last)]
    return size


def pad_ranges(name: str, ranges: Sequence[tuple[int, int, int]], args: dict[str, Any]) -> int:
    """The same for ranges of ids: study, from, to."""
    n = pad(name, ranges, args)
    for i in range(n):
        of = args.pop(f"{name}_{i}")
        args[f"{name}_study_{i}"], args[f"{name}_from_{i}"], args[f"{name}_to_{i}"] = of
    return n


def _in_range(name: str, i: int) -> Any:
    """Whether a trial is in the ``i``-th range of this name."""
    c = t.trials.c
    between = c.trial_id.between(_p(f"{name}_from_{i}"), _p(f"{name}_to_{i}"))
    return sa.and_(c.study_id == _p(f"{name}_study_{i}"), between)


def _params(name: str, n: int) -> list[Any]:
    return [_p(f"{name}_{i}") for i in range(n)]


def _p(name: str) -> Any:
    # The prefix, because Core keeps the names of columns for itself; `compiled` takes it off.
    return sa.bindparam(f"p_{name}", type_=sa.types.NullType())


# --- locks and facts -----------------------------------------------------------------------------


def lock_studies(d: Dialect, n: int) -> Any:
    """Hold the studies' rows until the commit; in order of id, so that two can't deadlock."""
    query = _select(t.studies.c.study_id).where(t.studies.c.study_id.in_(_params("id", n)))
    return query.order_by(t.studies.c.study_id).with_for_update()


def lock_trials(d: Dialect, n: int) -> Any:
    """Hold the trials' rows until the commit, in order of id; as (id, study id, state) then."""
    c = t.trials.c
    query = _select(c.trial_id, c.study_id, d.as_text(c.state))
    query = query.where(c.trial_id.in_(_params("id", n)))
    return query.order_by(c.trial_id).with_for_update()


def _above(column: Any, low: Any) -> Any:
    """Ids above one, in words that a plan made without the values can be good for: what has one
    end only is taken for a third of the table, what has two for a two-hundredth."""
    return sa.and_(column > low, column <= _ID_MAX)


def _newest_from(study_id: Any, known: Any) -> Any:
    """Id of the newest trial of a study, which is not below a known one; NULL if all that are not
    are gone: a failover may have lost them."""
    c = t.trials.alias().c
    newest = _select(sa.func.max(c.trial_id)).where(c.study_id == study_id, c.trial_id >= known)
    return newest.scalar_subquery()


def _newest(study_id: Any, known: Any) -> Any:
    """The same, wherever it is. All of the study is looked at only where nothing was found."""
    c = t.trials.alias().c
    of_all = _select(sa.func.max(c.trial_id)).where(c.study_id == study_id)
    return sa.func.coalesce(_newest_from(study_id, known), of_all.scalar_subquery())


def _greatest_number(study_id: Any, known: Any) -> Any:
    """Number of the newest trial, -1 without one; the greatest of the study where the newest has
    none, or the known one is gone.

    Only in a statement that runs *after* the one that locks the study: merged with the lock, READ
    COMMITTED counts by a snapshot older than the lock and hands out numbers twice.
    """
    c, every = t.trials.alias().c, t.trials.alias().c
    newest = _newest_from(study_id, known)
    number = _select(sa.func.max(c.number)).where(c.study_id == study_id, c.trial_id >= newest)
    of_all = _select(sa.func.max(every.number)).where(every.study_id == study_id)
    return sa.func.coalesce(
        number.scalar_subquery(), of_all.scalar_subquery(), sa.literal_column("-1")
    )


def facts(d: Dialect, trials: int, studies: int, names: int) -> Any:
    """What decides the verdicts, as one text: ``trials;studies;new studies``."""
    parts: list[Any] = []
    if trials:
        c = t.trials.c
        row = d.join_text(c.trial_id, c.study_id, c.state)
        parts.append(
            _select(d.aggregate(row))
            .where(c.trial_id.in_(_params("trial", trials)))
            .scalar_subquery()
        )
    else:
        parts.append(sa.literal_column("''"))
    if studies:
        ids = t.studies.c.study_id
        parts.append(
            _select(d.aggregate(d.join_text(ids)))
            .where(ids.in_(_params("study", studies)))
            .scalar_subquery()
        )
    else:
        parts.append(sa.literal_column("''"))
    if names:
        # A study without directions in our own transaction is one that we have just inserted:
        # everybody writes a study and its directions in one transaction.
        bare = ~sa.exists().where(t.study_directions.c.study_id == t.studies.c.study_id)
        parts.append(
            _select(d.aggregate(d.join_text(t.studies.c.study_id)))
            .where(t.studies.c.study_name.in_(_params("name", names)), bare)
            .scalar_subquery()
        )
    else:
        parts.append(sa.literal_column("''"))
    return d.concat(*parts)


def read_facts(d: Dialect, trials: int, studies: int, names: int) -> Any:
    """The facts, where an exchange goes statement by statement."""
    return _select(facts(d, trials, studies, names))


def mark(d: Dialect, trials: int, studies: int, names: int, numbered: bool) -> Any:
    """Claim a number of the session's and keep the facts; fails if it or a greater one is taken,
    or if the session's row is gone.

    The failure is meant: a transaction whose answer was given up for lost, and which the server
    runs after all once we have tried again, or gone on, comes to an error here and takes back
    everything. Without the row nobody could be told what became of it, nor have a number.
    """
    found = d.int_arg(sa.null())
    if numbered:
        found = _greatest_number(_p("numbered_study"), _p("known"))
    return _claim(d, {"number": found, "facts": facts(d, trials, studies, names)})


def mark_known(d: Dialect) -> Any:
    """Like ``mark``, with outcomes known already, where we went statement by statement."""
    return _claim(d, {"facts": d.text_arg(_p("facts"))})


def _claim(d: Dialect, values: dict[str, Any]) -> Any:
    # An UPDATE that finds no row is no error, which an INSERT can be.
    there = t.sessions.alias("told").c.session_id
    seq = d.value_if(sa.exists().where(there == _p("session")), _p("seq"))
    row = {"session_id": d.text_arg(_p("session")), "seq": seq, **values, "updated_at": _NOW}
    source = _select(*row.values()).where(_ONE == _ONE)
    return d.upsert(t.sessions, list(row), source, 1, fence="seq")


def read_mark(d: Dialect) -> Any:
    c = t.sessions.c
    return _select(c.seq, c.facts, c.number).where(c.session_id == _p("session"))


def read_mark_and_created(d: Dialect) -> Any:
    """The mark, with (id, number, start) of each trial that was created under it in a study."""
    c, m = t.trials.c, t.sessions.c
    made = sa.and_(
        c.study_id == _p("study_id"),
        c.trial_id.between(_p("known"), _ID_MAX),
        c.number > m.number,
        c.number <= m.number + _p("count"),
    )
    return (
        _select(m.seq, m.facts, m.number, c.trial_id, c.number, d.time_as_text(c.datetime_start))
        .select_from(t.sessions.outerjoin(t.trials, made))
        .where(m.session_id == _p("session"))
    )


def await_mark(d: Dialect) -> Any:
    """The mark, once no transaction of ours is still under way in the server."""
    return read_mark(d).with_for_update()


def keep_marks(d: Dialect, n: int, with_facts: bool) -> Any:
    """What became of the records of ``n`` callers; fails if one's number is not its greatest.

    With the facts that the session's own mark holds, or with outcomes that are known already.
    """
    c = t.sessions.alias("told").c  # MySQL knows the row that stands by the table's own name

    def row(i: int) -> Any:
        caller, number = d.text_arg(_p(f"caller_{i}")), _p(f"number_{i}")
        kept: Any = d.text_arg(_p(f"kept_{i}"))
        if with_facts:
            facts = _select(caller, d.int_arg(number), c.number, d.concat(kept, c.facts), _NOW)
            return facts.where(c.session_id == _p("session"))
        nothing = d.int_arg(sa.null())
        return _select(caller, d.int_arg(number), nothing, kept, _NOW).where(_ONE == _ONE)

    rows = [row(i) for i in range(n)]
    source = _union_all(*rows) if n > 1 else rows[0]
    names = ["session_id", "seq", "number", "facts", "updated_at"]
    return d.upsert(t.sessions, names, source, 1, fence="seq")


def pass_number(d: Dialect) -> Any:
    """Let no exchange of a caller's be taken any more that has not a greater number."""
    c = t.sessions.c
    later = sa.case((c.seq < _p("seq"), _p("seq")), else_=c.seq)
    return (
        _update(t.sessions).where(c.session_id == _p("session")).values(seq=later, updated_at=_NOW)
    )


def forget_callers(d: Dialect, prefix: str, days: int) -> Any:
    """Marks of callers that nobody can be waiting to hear of any more."""
    c = t.sessions.c
    is_caller = sa.func.substr(c.session_id, _ONE, sa.literal_column(str(len(prefix))))
    return _delete(t.sessions).where(
        is_caller == sa.literal_column(f"'{prefix}'"), c.updated_at < d.days_ago(days)
    )


def insert_session(d: Dialect) -> Any:
    row = {"session_id": _p("session"), "seq": _p("seq")}
    return d.or_ignore(t.sessions, row, t.sessions.c.session_id)


def forget_abandoned(d: Dialect, days: int) -> Any:
    """Sessions that wrote nothing for so long; their storages were killed."""
    return _delete(t.sessions).where(t.sessions.c.updated_at < d.days_ago(days))


def forget_session(d: Dialect) -> Any:
    return _delete(t.sessions).where(t.sessions.c.session_id == _p("session"))


def schema_version(d: Dialect) -> Any:
    return _select(t.alembic_version.c.version_num)


# --- writes --------------------------------------------------------------------------------------


def insert_study(d: Dialect) -> Any:
    return d.or_ignore(t.studies, {"study_name": _p("name")}, t.studies.c.study_name)


def insert_directions(d: Dialect, n: int) -> Any:
    """Directions of a study that has none yet, which only one just inserted by us has not."""
    source = t.studies
    have = t.study_directions.alias()
    bare = ~sa.exists().where(have.c.study_id == source.c.study_id)
    rows: list[Any] = [
        _select(
            d.enum_arg(_p(f"direction_{i}"), t.direction_type),
            source.c.study_id,
            sa.literal_column(str(i)),
        ).where(source.c.study_name == _p("name"), bare)
        for i in range(n)
    ]
    query = _union_all(*rows) if n > 1 else rows[0]
    return _insert(t.study_directions).from_select(["direction", "study_id", "objective"], query)


def _set_study_attr(d: Dialect, table: sa.Table) -> Any:
    source = _select(t.studies.c.study_id, d.text_arg(_p("key")), d.text_arg(_p("value"))).where(
        t.studies.c.study_id == _p("study_id")
    )
    return d.upsert(table, ["study_id", "key", "value_json"], source, 2)


def set_study_user_attr(d: Dialect) -> Any:
    return _set_study_attr(d, t.study_user_attributes)


def set_study_system_attr(d: Dialect) -> Any:
    return _set_study_attr(d, t.study_system_attributes)


def insert_trial(d: Dialect, marked: bool) -> Any:
    """The next trial of a study whose row is locked.

    Where the mark of this message has the greatest number before it, the ``nth`` after that.
    """
    s = t.studies
    if marked:
        of = t.sessions.c
        found = _select(of.number + d.int_arg(_p("nth"))).where(of.session_id == _p("session"))
        number = found.scalar_subquery()
    else:
        number = _greatest_number(_p("study_id"), _p("known")) + _ONE
    source = _select(
        number,
        s.c.study_id,
        d.enum_arg(_p("state"), t.state_type),
        d.time_arg(_p("start")),
        d.time_arg(_p("complete")),
    ).where(s.c.study_id == _p("study_id"))
    return _insert(t.trials).from_select(
        ["number", "study_id", "state", "datetime_start", "datetime_complete"], source
    )


def newest_trial(d: Dialect) -> Any:
    """Id and number of the trial just inserted into a locked study."""
    c = t.trials.c
    return _select(c.trial_id, c.number).where(c.trial_id == _newest(_p("study_id"), _p("known")))


def _owner(columns: Sequence[Any], of: str, states: Sequence[str] = _UNFINISHED) -> Any:
    """A row of ``columns`` for a trial: by id and in ``states``, or the newest of a study."""
    c = t.trials.c
    if of == "newest":
        newest = _newest(_p("study_id"), _p("known"))
        made = _select(newest.label("trial_id")).subquery()
        return _select(made.c.trial_id, *columns).where(made.c.trial_id.is_not(None))
    texts: list[Any] = [sa.literal_column(f"'{state}'") for state in states]
    return _select(c.trial_id, *columns).where(c.trial_id == _p("trial_id"), c.state.in_(texts))


def _rows(columns: Callable[[int], list[Any]], of: str, n: int) -> Any:
    """``n`` rows for one trial, in order, so that their row ids are in order as well."""
    rows = [_owner(columns(i), of) for i in range(n)]
    return _union_all(*rows) if n > 1 else rows[0]


def set_params(d: Dialect, of: str, n: int) -> Any:
    def columns(i: int) -> list[Any]:
        name, value = d.text_arg(_p(f"name_{i}")), d.float_arg(_p(f"value_{i}"))
        return [name, value, d.text_arg(_p(f"distribution_{i}"))]

    names = ["trial_id", "param_name", "param_value", "distribution_json"]
    return d.upsert(t.trial_params, names, _rows(columns, of, n), 2)


def _set_trial_attrs(d: Dialect, table: sa.Table, of: str, n: int) -> Any:
    def columns(i: int) -> list[Any]:
        return [d.text_arg(_p(f"key_{i}")), d.text_arg(_p(f"value_{i}"))]

    return d.upsert(table, ["trial_id", "key", "value_json"], _rows(columns, of, n), 2)


def set_trial_user_attrs(d: Dialect, of: str, n: int) -> Any:
    return _set_trial_attrs(d, t.trial_user_attributes, of, n)


def set_trial_system_attrs(d: Dialect, of: str, n: int) -> Any:
    return _set_trial_attrs(d, t.trial_system_attributes, of, n)


def set_value(d: Dialect, of: str = "id") -> Any:
    """One objective's value; of a trial still WAITING where ``of`` is "claim"."""
    columns = [
        d.int_arg(_p("objective")),
        d.float_arg(_p("value")),
        d.enum_arg(_p("type"), t.value_type),
    ]
    names = ["trial_id", "objective", "value", "value_type"]
    states = ("WAITING",) if of == "claim" else _UNFINISHED
    return d.upsert(t.trial_values, names, _owner(columns, of, states), 2)


def set_intermediate_values(d: Dialect, of: str, n: int) -> Any:
    def columns(i: int) -> list[Any]:
        step, value = d.int_arg(_p(f"step_{i}")), d.float_arg(_p(f"value_{i}"))
        return [step, value, d.enum_arg(_p(f"type_{i}"), t.intermediate_type)]

    names = ["trial_id", "step", "intermediate_value", "intermediate_value_type"]
    return d.upsert(t.trial_intermediate_values, names, _rows(columns, of, n), 2)


def claim_trial(d: Dialect) -> Any:
    """WAITING to RUNNING; nobody else's claim can lie between the lock and this."""
    c = t.trials.c
    return (
        _update(t.trials)
        .where(c.trial_id == _p("trial_id"), c.state == _WAITING)
        .values(state=_RUNNING, datetime_start=_p("start"))
    )


def finish_trial(d: Dialect) -> Any:
    c = t.trials.c
    states = [_RUNNING, _WAITING]
    return (
        _update(t.trials)
        .where(c.trial_id == _p("trial_id"), c.state.in_(states))
        .values(state=_p("state"), datetime_complete=_p("complete"))
    )


def requeue_trial(d: Dialect) -> Any:
    c = t.trials.c
    return (
        _update(t.trials)
        .where(c.trial_id == _p("trial_id"), c.state.in_([_RUNNING, _WAITING]))
        .values(state=_WAITING)
    )


# --- leases --------------------------------------------------------------------------------------


def first_beat(d: Dialect, of: str) -> Any:
    """Of the newest trial of a study, or of one that is still WAITING and about to be claimed."""
    source = _owner([d.beat_time()], of, ("WAITING",))
    return d.upsert(t.trial_heartbeats, ["trial_id", "heartbeat"], source, 1)


def beat(d: Dialect, n: int) -> Any:
    """Renew what there is. Not by inserting anew: each try would use up a row id."""
    c, h = t.trials.c, t.trial_heartbeats.c
    running = sa.exists().where(c.trial_id == h.trial_id, c.state == _RUNNING)
    return (
        _update(t.trial_heartbeats)
        .where(h.trial_id.in_(_params("id", n)), running)
        .values(heartbeat=d.beat_time())
    )


def missing_beat(d: Dialect, n: int) -> Any:
    """A beat for those RUNNING trials that have none."""
    c, h = t.trials.c, t.trial_heartbeats.c
    source = _select(c.trial_id, d.beat_time()).where(
        c.trial_id.in_(_params("id", n)),
        c.state == _RUNNING,
        ~sa.exists().where(h.trial_id == c.trial_id),
    )
    return d.upsert(t.trial_heartbeats, ["trial_id", "heartbeat"], source, 1)


def forget_beats(d: Dialect, n: int) -> Any:
    return _delete(t.trial_heartbeats).where(t.trial_heartbeats.c.trial_id.in_(_params("id", n)))


def expired(d: Dialect) -> Any:
    """Those RUNNING trials of a study whose last beat is longer ago than the grace period."""
    c, h = t.trials.c, t.trial_heartbeats.c
    # SQLite would go over all trials and look for the beat of each; so it can't look for beats.
    beating = h.trial_id if d.counts_rows else h.trial_id + _ZERO
    return (
        _select(c.trial_id)
        .select_from(t.trials.join(t.trial_heartbeats, beating == c.trial_id))
        .where(
            d.since_beat_s(h.heartbeat) > d.float_arg(_p("grace_s")),
            # Not by the index of the study, which may have a hundred thousand trials: there are
            # about as many beats as there are running ones.
            c.study_id + _ZERO == _p("study_id"),
            c.state == _RUNNING,
        )
    )


# --- deletions -----------------------------------------------------------------------------------


def delete_children(d: Dialect, table: sa.Table) -> Any:
    """Rows that belong to the trials of a study."""
    theirs = _select(t.trials.c.trial_id).where(t.trials.c.study_id == _p("study_id"))
    return _delete(table).where(table.c.trial_id.in_(theirs))


def delete_of_study(d: Dialect, table: sa.Table) -> Any:
    return _delete(table).where(table.c.study_id == _p("study_id"))


# --- reads ---------------------------------------------------------------------------------------


def first_param(d: Dialect) -> Any:
    """The distribution of a parameter in the oldest trial of a study that has it."""
    c, p = t.trials.c, t.trial_params.c
    return (
        _select(p.distribution_json)
        .select_from(t.trials.join(t.trial_params, p.trial_id == c.trial_id))
        .where(c.study_id == _p("study_id"), d.same_text(p.param_name, _p("name")))
        .order_by(c.trial_id)
        .limit(_ONE)
        .offset(_ZERO)
    )


def studies_selected(d: Dialect, ids: int, names: int, everything: bool) -> Any:
    """Rows (study id, kind, row id, key, value): names, directions and attributes of studies."""
    kinds: list[tuple[Any, str, Any, Any]] = [
        (t.studies, "study_id", t.studies.c.study_name, None),
        (
            t.study_directions,
            "objective",
            d.as_text(t.study_directions.c.direction),
            None,
        ),
    ]
    for table in (t.study_user_attributes, t.study_system_attributes):
        kinds.append((table, f"{table.name[:-1]}_id", table.c.key, table.c.value_json))
    branches: list[Any] = []
    for kind, (table, row_id, key, value) in enumerate(kinds):
        branch = _select(
            table.c.study_id,
            sa.literal_column(str(kind)).label("kind"),
            table.c[row_id].label("row_id"),
            key.label("key"),
            (sa.null() if value is None else value).label("value"),
        )
        if not everything:
            conditions = []
            if ids:
                conditions.append(table.c.study_id.in_(_params("study", ids)))
            if names:
                named = t.studies.alias()
                found = _select(named.c.study_id).where(
                    named.c.study_name.in_(_params("name", names))
                )
                conditions.append(table.c.study_id.in_(found))
            branch = branch.where(sa.or_(*conditions))
        branches.append(branch)
    return _union_all(*branches)


class Selection(NamedTuple):
    """How many of each kind of condition select trials; see ``trials_selected``."""

    ids: int = 0
    """Trials by id."""
    above: int = 0
    """All trials of a study above an id."""
    bounded: bool = False
    """Of those above, the oldest only, and as many others as ``others``."""
    within: int = 0
    """Those of a range of ids in a study."""
    left: int = 0
    """Those of a range of ids in a study that are not WAITING any more."""
    queued: int = 0
    """The WAITING ones of a study above an id."""
    turned: int = 0
    """Trials by id that have become WAITING."""
    ended: int = 0
    """Trials by id that are not RUNNING any more."""
    numbers: int = 0
    """A trial by study and number."""
    created: int = 0
    """The trials that the session's last exchange created in a study."""


def _newer(i: int, bounded: bool, id_of: IdOf) -> Any:
    """Ids of the ``i``-th of the trials above an id, all of them or the oldest."""
    c, study_id, low = t.trials.c, _p(f"above_study_{i}"), _p(f"above_{i}")
    query = _select(c.trial_id).where(c.study_id == study_id)
    if not bounded:
        return query.where(_above(id_of(c), low))
    b = t.trials.alias().c
    last = _select(b.trial_id).where(b.study_id == study_id, _above(id_of(b), low))
    last = last.order_by(id_of(b)).limit(_ONE).offset(_p("others")).scalar_subquery()
    return query.where(id_of(c) > low, id_of(c) <= sa.func.coalesce(last, _ID_MAX))


def _queued(i: int, id_of: IdOf) -> Any:
    c = t.trials.c
    return _select(c.trial_id).where(
        c.study_id == _p(f"queued_study_{i}"),
        _above(id_of(c), _p(f"queued_{i}")),
        c.state == _WAITING,
    )


def _selected(d: Dialect, n: Selection) -> Any:
    c = t.trials.c
    branches: list[Any] = []
    if n.ids:
        branches.append(_select(c.trial_id).where(c.trial_id.in_(_params("id", n.ids))))
    for i in range(n.above):
        branches += d.whichever(partial(_newer, i, n.bounded), _p(f"above_{i}"))
    for i in range(n.within):
        branches.append(_select(c.trial_id).where(_in_range("within", i)))
    for i in range(n.left):
        branches.append(_select(c.trial_id).where(_in_range("left", i), c.state != _WAITING))
    for i in range(n.queued):
        branches += d.whichever(partial(_queued, i), _p(f"queued_{i}"))
    if n.turned:
        branches.append(
            _select(c.trial_id).where(
                c.trial_id.in_(_params("turned", n.turned)), c.state == _WAITING
            )
        )
    if n.ended:
        branches.append(
            _select(c.trial_id).where(
                c.trial_id.in_(_params("ended", n.ended)), c.state != _RUNNING
            )
        )
    for i in range(n.numbers):
        # An id is greater than its trial's number: ids count from 1 and over all studies.
        branches.append(
            _select(c.trial_id).where(
                c.study_id == _p(f"number_study_{i}"),
                c.number == _p(f"number_{i}"),
                c.trial_id > _p(f"number_{i}"),
            )
        )
    for i in range(n.created):
        s = t.sessions.c
        branches.append(
            _select(c.trial_id).where(
                s.session_id == _p("session"),
                c.study_id == _p(f"created_study_{i}"),
                c.trial_id.between(_p(f"created_known_{i}"), _ID_MAX),
                c.number > s.number,
                c.number <= s.number + _p(f"created_count_{i}"),
            )
        )
    return branches


def trials_selected(d: Dialect, n: Selection) -> Any:
    """Whole trials, as rows (kind, trial id, row id, name, number, text, text).

    A trial's own row is (TRIAL, id, number, start, study id, state, completion). One statement,
    because a statement is a snapshot: a trial's row and its children read one after the other
    may belong to different moments.
    """
    branches = _selected(d, n)
    by_id = len(branches) == 1 and 0 < n.ids <= _IDS_REPEATED_MAX
    chosen = d.chosen(_union(*branches) if len(branches) > 1 else branches[0])

    def of(table: Any, *columns: Any) -> Any:
        query = _select(*columns)
        if by_id:
            return query.where(table.c.trial_id.in_(_params("id", n.ids)))
        return d.of_chosen(query, table, chosen)

    def kind(number: int) -> Any:
        return sa.literal_column(str(number)).label("kind")

    c = t.trials.c
    rows: list[Any] = [
        of(
            t.trials,
            kind(TRIAL),
            c.trial_id,
            c.number.label("row_id"),
            d.time_as_text(c.datetime_start).label("a"),
            d.as_float(c.study_id).label("b"),
            d.as_text(c.state).label("c"),
            d.time_as_text(c.datetime_complete).label("d"),
        )
    ]
    p = t.trial_params.c
    rows.append(
        of(
            t.trial_params,
            kind(PARAM),
            p.trial_id,
            p.param_id,
            p.param_name,
            p.param_value,
            p.distribution_json,
            sa.null(),
        )
    )
    attributes: Any = (
        (USER_ATTR, t.trial_user_attributes),
        (SYSTEM_ATTR, t.trial_system_attributes),
    )
    for number, table in attributes:
        rows.append(
            of(
                table,
                kind(number),
                table.c.trial_id,
                table.c[f"{table.name[:-1]}_id"],
                table.c.key,
                sa.null(),
                table.c.value_json,
                sa.null(),
            )
        )
    v = t.trial_values.c
    rows.append(
        of(
            t.trial_values,
            kind(VALUE),
            v.trial_id,
            v.objective,
            sa.null(),
            v.value,
            d.as_text(v.value_type),
            sa.null(),
        )
    )
    i = t.trial_intermediate_values.c
    rows.append(
        of(
            t.trial_intermediate_values,
            kind(INTERMEDIATE),
            i.trial_id,
            i.step,
            sa.null(),
            i.intermediate_value,
            d.as_text(i.intermediate_value_type),
            sa.null(),
        )
    )
    return _union_all(*rows)


def ids_above(d: Dialect) -> Any:
    """The least ids of a study's trials above an id."""
    c = t.trials.c
    chosen = _select(c.trial_id).where(c.study_id == _p("study_id"), c.trial_id > _p("above"))
    return chosen.order_by(c.trial_id).limit(_p("count")).offset(_ZERO)


def watch(d: Dialect, held: int) -> Any:
    """Rows (id, state) of a study's unfinished trials above an id and of the held; greatest id.

    The greatest id in the same statement, hence of the same snapshot: one read later would pass
    over a trial that became WAITING in between.
    """
    c = t.trials.c
    state = d.as_text(c.state)

    def unfinished(id_of: IdOf) -> Any:
        return _select(c.trial_id, state).where(
            c.study_id == _p("study_id"),
            _above(id_of(c), _p("seen")),
            c.state.in_([_RUNNING, _WAITING]),
        )

    branches = d.whichever(unfinished, _p("seen"))
    if held:
        branches.append(
            _select(c.trial_id, state).where(
                c.trial_id.in_(_params("held", held)), c.study_id == _p("study_id")
            )
        )

    def greatest(id_of: IdOf) -> Any:
        return _select(sa.func.max(id_of(c))).where(c.study_id == _p("study_id"))

    branches.append(_select(d.one_of(greatest, _p("seen")), sa.null()))
    return _union_all(*branches)


def incarnations(d: Dialect, studies: int, trials: int) -> Any:
    """Rows (study id, name, directions, trial id, number, start), to see whether studies are
    still the same ones; the last three are of the trials given, NULL without one."""
    c, of = t.trials.c, t.study_directions.c
    directions = (
        _select(d.aggregate(d.join_text(of.objective, of.direction)))
        .where(of.study_id == t.studies.c.study_id)
        .scalar_subquery()
    )
    columns = [t.studies.c.study_id, t.studies.c.study_name, directions]
    source: Any = t.studies
    if trials:
        probed = sa.and_(
            c.study_id == t.studies.c.study_id, c.trial_id.in_(_params("trial", trials))
        )
        source = t.studies.outerjoin(t.trials, probed)
        columns += [c.trial_id, c.number, c.datetime_start]
    else:
        columns += [sa.null(), sa.null(), sa.null()]
    query = _select(*columns).select_from(source)
    return query.where(t.studies.c.study_id.in_(_params("study", studies)))


# --- catalogue -----------------------------------------------------------------------------------


def counts(d: Dialect) -> Any:
    """Rows (state, how many) of a study; one without a state that counts the study itself."""
    c = t.trials.c
    query = _select(d.as_text(c.state), sa.func.count()).where(c.study_id == _p("study_id"))
    study = _select(sa.null(), sa.func.count()).where(t.studies.c.study_id == _p("study_id"))
    return _union_all(query.group_by(c.state), study)


def _readable() -> Any:
    """Of the first value of a COMPLETE trial: rows that others wrote may lack the value."""
    v = t.trial_values.c
    return sa.and_(
        t.trials.c.state == sa.literal_column("'COMPLETE'"),
        v.objective == _ZERO,
        sa.or_(v.value.is_not(None), v.value_type != sa.literal_column("'FINITE'")),
    )


def _rank() -> Any:
    """Infinities are a type beside a NULL, which databases order each in their own way."""
    kind = t.trial_values.c.value_type
    return sa.case(
        (kind == sa.literal_column("'INF_NEG'"), -_ONE),
        (kind == sa.literal_column("'INF_POS'"), _ONE),
        else_=_ZERO,
    )


def best_trial(d: Dialect, maximize: bool) -> Any:
    """The COMPLETE trial with the best first value, the oldest of equals."""
    c, v = t.trials.c, t.trial_values.c
    rank = _rank()
    order = [rank.desc(), v.value.desc()] if maximize else [rank.asc(), v.value.asc()]
    return (
        _select(c.trial_id)
        .select_from(t.trials.join(t.trial_values, v.trial_id == c.trial_id))
        .where(c.study_id == _p("study_id"), _readable())
        .order_by(*order, c.trial_id)
        .limit(_ONE)
        .offset(_ZERO)
    )


def times(d: Dialect) -> Any:
    """The first start and the last completion in a study."""
    c = t.trials.c
    ends = (
        d.time_as_text(sa.func.min(c.datetime_start)),
        d.time_as_text(sa.func.max(c.datetime_complete)),
    )
    return _select(*ends).where(c.study_id == _p("study_id"))


def beats(d: Dialect) -> Any:
    """How many trials have ever beaten, and the newest beat."""
    c = t.trial_heartbeats.c
    return _select(sa.func.count(), d.time_as_text(sa.func.max(c.heartbeat)))


def best_trials(d: Dialect, of_one: bool) -> Any:
    """Rows (study id, trial id): the best trial of a study, or all, that has one objective."""
    c, v, direction = t.trials.c, t.trial_values.c, t.study_directions.c
    several = t.study_directions.alias()
    sign = sa.case((direction.direction == sa.literal_column("'MAXIMIZE'"), -_ONE), else_=_ONE)
    place = sa.func.row_number().over(
        partition_by=c.study_id, order_by=[_rank() * sign, v.value * sign, c.trial_id]
    )
    ranked: Any = (
        _select(c.study_id, c.trial_id, place.label("place"))
        .select_from(
            t.trials.join(t.trial_values, v.trial_id == c.trial_id).join(
                t.study_directions, direction.study_id == c.study_id
            )
        )
        .where(
            _readable(),
            direction.objective == _ZERO,
            ~sa.exists().where(several.c.study_id == c.study_id, several.c.objective > _ZERO),
        )
    )
    if of_one:
        ranked = ranked.where(c.study_id == _p("study_id"))
    found = ranked.subquery()
    return _select(found.c.study_id, found.c.trial_id).where(found.c.place == _ONE)


def summaries(d: Dialect, of_one: bool) -> Any:
    """Rows (study id, state, how many, first start, last completion) of a study, or of all."""
    c = t.trials.c
    start = d.time_as_text(sa.func.min(c.datetime_start))
    end = d.time_as_text(sa.func.max(c.datetime_complete))
    query = _select(c.study_id, d.as_text(c.state), sa.func.count(), start, end)
    if of_one:
        query = query.where(c.study_id == _p("study_id"))
    return query.group_by(c.study_id, c.state)


# --- pieces of operations, for callers of older methods ------------------------------------------


def directions(d: Dialect) -> Any:
    """Rows (study id, objective, direction); one without the latter two if there are none."""
    c = t.study_directions.c
    return (
        _select(t.studies.c.study_id, c.objective, d.as_text(c.direction))
        .select_from(t.studies.outerjoin(t.study_directions, c.study_id == t.studies.c.study_id))
        .where(t.studies.c.study_id == _p("study_id"))
        .order_by(c.objective)
    )


def insert_direction(d: Dialect) -> Any:
    return _insert(t.study_directions).values(
        direction=_p("direction"), study_id=_p("study_id"), objective=_p("objective")
    )


def state(d: Dialect) -> Any:
    return _select(d.as_text(t.trials.c.state)).where(t.trials.c.trial_id == _p("trial_id"))


def delete_values(d: Dialect) -> Any:
    return _delete(t.trial_values).where(t.trial_values.c.trial_id == _p("trial_id"))
