"""What a column can't hold is refused by name, before anything is written, and not asked for."""

from __future__ import annotations

from collections.abc import Sequence
import math
import operator
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from trialstore import records as r
from trialstore.log import Wanted
from trialstore.logs.relational import tables as t
from trialstore.logs.relational.dialects import Dialect
from trialstore.logs.relational.writing import dumps, template_values
from trialstore.records import Operation

_LETTER_BYTES_MAX: Final = 12
"""Of a letter as JSON has it, of those beyond the 65,536 most common ones."""
_ESCAPED: Final = "\"\\'"
"""What PyMySQL puts a backslash before."""
_AROUND_BYTES: Final = 1 << 10
"""The rest of a statement with a long value, at most."""


def check_values(d: Dialect, records: Sequence[Operation]) -> None:
    """Refuse, before anything is written, what a column can't hold.

    Raises:
        ValueError: Names the study or trial, the key, and what to do.
    """
    for record in records:
        where = _where(record)
        if isinstance(record, r.CreateStudy):
            _check_text(d, record.study_name, "the study name", where)
        elif isinstance(record, r.SetTrialParam):
            _check_param(d, record.param_name, record.param_value_internal, where)
            _check_choices(d, record.param_name, record.distribution, where)
        elif isinstance(record, r.SetTrialIntermediateValue):
            _check_integer(d, record.step, "the step", where)
        elif isinstance(record, r.SetTrialUserAttr):
            _check_attrs(d, t.trial_user_attributes, record.user_attr, where)
        elif isinstance(record, r.SetStudyUserAttr):
            _check_attrs(d, t.study_user_attributes, record.user_attr, where)
        elif isinstance(record, r.SetTrialSystemAttr):
            _check_attrs(d, t.trial_system_attributes, record.system_attr, where)
        elif isinstance(record, r.SetStudySystemAttr):
            _check_attrs(d, t.study_system_attributes, record.system_attr, where)
        elif isinstance(record, r.SetTrialStateValues):
            _check_objectives(record.values or (), where)
        elif isinstance(record, r.CreateTrial):
            for name, value in record.params.items():
                _check_param(d, name, value, where)
            for step in record.intermediate_values:
                _check_integer(d, int(step), "the step", where)
            for name, distribution in record.distributions.items():
                _check_choices(d, name, distribution, where)
            _check_attrs(d, t.trial_user_attributes, record.user_attrs, where)
            _check_attrs(d, t.trial_system_attributes, record.system_attrs, where)
            _check_objectives(template_values(record), where)


_IDS: Final = ("studies", "trials_of", "finished_of", "waiting_of", "next_of", "trials")


def possible(d: Dialect, wanted: Wanted) -> Wanted:
    """The same without what no column can hold: nothing is called so, and drivers would fail."""
    changed: dict[str, Any] = {}
    for name in _IDS:
        ids = getattr(wanted, name)
        if ids and not all(type(one) is int and abs(one) <= d.integer_max for one in ids):
            found = [possible_id(d, one) for one in ids]
            changed[name] = frozenset([one for one in found if one is not None])
    if wanted.names:
        changed["names"] = frozenset([name for name in wanted.names if _is_possible(d, name)])
    if wanted.numbers:
        pairs = [(possible_id(d, one), possible_id(d, n)) for one, n in wanted.numbers]
        changed["numbers"] = frozenset([pair for pair in pairs if None not in pair])
    return msgspec.structs.replace(wanted, **changed) if changed else wanted


def possible_id(d: Dialect, one: Any) -> int | None:
    """As an integer of Python's; None for what no column can hold."""
    try:
        number = operator.index(one)
    except TypeError:
        return None
    return number if abs(number) <= d.integer_max else None


def _is_possible(d: Dialect, text: Any) -> bool:
    if not isinstance(text, str):
        return False
    try:
        letters = text.encode()
    except UnicodeEncodeError:
        return False
    return d.nul_in_text or b"\0" not in letters


def _where(record: Operation) -> str:
    if isinstance(record, r.CreateStudy):
        return f"Study {record.study_name[:40]!r}"
    trial_id = getattr(record, "trial_id", None)
    if trial_id is not None:
        return f"Trial {trial_id}"
    study_id = getattr(record, "study_id", None)
    return f"Study {study_id}" + (", new trial" if isinstance(record, r.CreateTrial) else "")


def _check_text(d: Dialect, text: str, what: str, where: str) -> None:
    if d.name_len_max is not None and len(text) > d.name_len_max:
        raise ValueError(
            f"{where}: {what} ({text[:40]!r}…) has {len(text)} letters, its column holds "
            f"{d.name_len_max}; use a shorter one."
        )
    if text.isascii():
        if not d.nul_in_text and "\0" in text:
            raise ValueError(
                f"{where}: {what} ({text[:40]!r}) holds a NUL, which {d.name} can't store in "
                f"text; use another one."
            )
        return
    if not d.nul_in_text and "\0" in text:
        raise ValueError(f"{where}: {what} ({text[:40]!r}) holds a NUL; use another one.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: {what} ({text[:40]!r}) is no Unicode text (a lone surrogate), which a "
            f"column can't hold; use another one."
        ) from None


def _check_attrs(d: Dialect, table: sa.Table, attrs: dict[str, Any], where: str) -> None:
    for key, value in attrs.items():
        _check_text(d, key, "the attribute's key", where)
        if d.text_bytes_sure is not None and _may_be_long(value, d.text_bytes_sure):
            _check_length(d, table, dumps(value), f"attribute {key[:40]!r}", where)


def _may_be_long(value: Any, n_bytes: int) -> bool:
    """Whether the JSON of a value may be so long, by a look that costs nothing."""
    if isinstance(value, str):
        return len(value) * _LETTER_BYTES_MAX + 2 > n_bytes
    return not isinstance(value, float | bool | None)


def _check_choices(d: Dialect, name: str, distribution: str, where: str) -> None:
    _check_length(d, t.trial_params, distribution, f"the distribution of {name[:40]!r}", where)


def _check_length(d: Dialect, table: sa.Table, text: str, what: str, where: str) -> None:
    if d.text_bytes_sure is None or len(text) <= d.text_bytes_sure:
        return
    holds = d.text_bytes_max(table)
    if len(text) > holds:
        raise ValueError(
            f"{where}: {what} is {len(text)} bytes long, its column in {table.name} holds "
            f"{holds}; keep a file elsewhere and its name here, or make the column a LONGTEXT."
        )
    takes = d.message_bytes_max()
    sent = len(text) + sum(map(text.count, _ESCAPED)) + _AROUND_BYTES
    if sent > takes:
        raise ValueError(
            f"{where}: {what} is {sent} bytes long as it is sent, the server takes {takes} in a "
            "message; keep a file elsewhere and its name here, or raise its max_allowed_packet."
        )


def _check_param(d: Dialect, name: str, value: float, where: str) -> None:
    _check_text(d, name, "the parameter's name", where)
    if not math.isfinite(value):
        raise ValueError(f"{where}: parameter {name!r} is {value}; it must be a finite number.")


def _check_integer(d: Dialect, value: int, what: str, where: str) -> None:
    if not -d.integer_max - 1 <= value <= d.integer_max:
        raise ValueError(
            f"{where}: {what} {value} does not fit its column, which ends at {d.integer_max}; "
            f"count in larger units."
        )


def _check_objectives(values: Sequence[float], where: str) -> None:
    if any(value != value for value in values):
        raise ValueError(f"{where}: an objective's value is NaN, which the tables can't hold.")


def refusal(record: Operation, cause: str) -> str:
    names = [getattr(record, name, None) for name in ("param_name", "study_name")]
    for field in ("user_attr", "system_attr", "params", "user_attrs", "system_attrs"):
        names += list(getattr(record, field, None) or ())
    keys = ", ".join(repr(name[:40]) for name in names if name)
    return (
        f"{_where(record)}: a column can't hold what {keys or 'this'} has or is called ({cause}); "
        "nothing was stored. Use a shorter value, or a name that differs by more than case, "
        "accents or spaces at the end."
    )
