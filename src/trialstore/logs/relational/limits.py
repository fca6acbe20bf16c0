"""What a column can't hold is refused by name, before anything is written, and not asked for."""

from __future__ import annotations

from collections.abc import Sequence
import math
import operator
from typing import Any, Final

import msgspec

from trialstore import records as r
from trialstore.log import Wanted
from trialstore.logs.relational import tables as t
from trialstore.logs.relational.dialects import Dialect
from trialstore.logs.relational.writing import template_values
from trialstore.records import Operation


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
        elif isinstance(record, r.SetTrialIntermediateValue):
            _check_integer(d, record.step, "the step", where)
        elif isinstance(record, r.SetTrialUserAttr | r.SetStudyUserAttr):
            _check_keys(d, record.user_attr, where)
        elif isinstance(record, r.SetTrialSystemAttr | r.SetStudySystemAttr):
            _check_keys(d, record.system_attr, where)
        elif isinstance(record, r.SetTrialStateValues):
            _check_objectives(record.values or (), where)
        elif isinstance(record, r.CreateTrial):
            for name, value in record.params.items():
                _check_param(d, name, value, where)
            for step in record.intermediate_values:
                _check_integer(d, int(step), "the step", where)
            _check_keys(d, record.user_attrs, where)
            _check_keys(d, record.system_attrs, where)
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
    if len(text) > t.NAME_LEN_MAX:
        raise ValueError(
            f"{where}: {what} ({text[:40]!r}…) has {len(text)} letters, its column holds "
            f"{t.NAME_LEN_MAX}; use a shorter one."
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


def _check_keys(d: Dialect, attrs: dict[str, Any], where: str) -> None:
    for key in attrs:
        _check_text(d, key, "the attribute's key", where)


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
