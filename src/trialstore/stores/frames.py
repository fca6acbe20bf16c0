"""A study as a table, with the columns of Optuna's ``trials_dataframe``.

Two more, ``intermediate_values`` and ``distributions``, make it possible to read it back. Trials
pass through one portion at a time; they are read twice, because which columns there are, and what
they hold, is known only after the last trial.

Source: Optuna ``Study.trials_dataframe``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
import functools
import itertools
import json
from typing import Any, Final, Literal, NamedTuple

from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from trialstore import records as r
from trialstore.contents import parse_distribution
from trialstore.scan import Scan

Kind = Literal["int", "float", "bool", "str", "json", "time", "duration"]

_PORTION_ROWS: Final = 2000
_INT64: Final = 1 << 63
_METRIC_NAMES: Final = "study:metric_names"
_KINDS: Final[dict[type, Kind]] = {int: "int", float: "float", bool: "bool", str: "str"}
WHOLE: Final = ("intermediate_values", "distributions")


class Column(NamedTuple):
    """One column.

    Args:
        name: As ``trials_dataframe`` has it.
        field: Of the trial: ``number``, ``params`` …
        key: In that field, where it is a dictionary; the objective's index in ``values``.
        kind: Of all values; ``json`` where they are of several kinds, or nested, or None.
    """

    name: str
    field: str
    key: Any
    kind: Kind


class Frame:
    """The table of one study.

    Args:
        scan: Of its store.
        study: Which one.
        columns: Names of those that are wanted, in this order; None for ``trials_dataframe``'s.
        whole: Also the two columns without which nothing can be imported.

    Raises:
        ValueError: There is no such column.
    """

    def __init__(
        self,
        scan: Scan,
        study: r.PutStudy,
        columns: Sequence[str] | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self._scan = scan
        self.study = study
        self.n_trials = 0
        found = self._survey()
        if columns is None:
            self.columns = [column for column in found if whole or column.name not in WHOLE]
        else:
            by_name = {column.name: column for column in found}
            unknown = [name for name in columns if name not in by_name]
            if unknown:
                raise ValueError(
                    f"Study {study.study_name!r} has no column {unknown[0]!r}; it has "
                    f"{', '.join(by_name)}."
                )
            self.columns = [by_name[name] for name in columns]

    def _survey(self) -> list[Column]:
        kinds: dict[tuple[str, Any], Kind] = {}
        for image in self._scan.trials(self.study.study_id):
            self.n_trials += 1
            for field, contents in _open_fields(image):
                for key, value in contents.items():
                    kind = _kind_of(value)
                    if kinds.setdefault((field, key), kind) != kind:
                        kinds[field, key] = "json"
        metrics = self.study.system_attrs.get(_METRIC_NAMES)
        n = len(self.study.directions)
        names = metrics if isinstance(metrics, list) and len(metrics) == n else None
        if n == 1:
            values = [Column(f"value_{names[0]}" if names else "value", "values", 0, "float")]
        else:
            values = [
                Column(f"values_{names[i] if names else i}", "values", i, "float")
                for i in range(n)
            ]
        columns = [
            Column("number", "number", None, "int"),
            *values,
            Column("datetime_start", "datetime_start", None, "time"),
            Column("datetime_complete", "datetime_complete", None, "time"),
            Column("duration", "duration", None, "duration"),
        ]
        for field in ("params", "user_attrs", "system_attrs"):
            keys = sorted(key for one, key in kinds if one == field)
            columns += [Column(f"{field}_{key}", field, key, kinds[field, key]) for key in keys]
        columns.append(Column("state", "state", None, "str"))
        columns += [Column(name, name, None, "json") for name in WHOLE]
        return columns

    def portions(self) -> Iterator[list[list[Any]]]:
        """Rows, some thousand at a time; None where a trial has no value."""
        images = self._scan.trials(self.study.study_id)
        while portion := list(itertools.islice(images, _PORTION_ROWS)):
            yield [self._row(image) for image in portion]

    def _row(self, image: r.PutTrial) -> list[Any]:
        fields: dict[str, Any] = dict(_open_fields(image))
        fields["number"] = image.number
        fields["values"] = dict(enumerate(image.values or ()))
        start, complete = _moment(image.datetime_start), _moment(image.datetime_complete)
        fields["datetime_start"], fields["datetime_complete"] = start, complete
        fields["duration"] = complete - start if start and complete else None
        fields["state"] = TrialState(image.state).name
        fields["intermediate_values"] = image.intermediate_values
        fields["distributions"] = dict(zip(image.params, image.distributions, strict=True))
        return [
            fields[column.field]
            if column.key is None
            else fields[column.field].get(column.key, MISSING)
            for column in self.columns
        ]


class _Missing:
    """No value, where None is one."""

    def __repr__(self) -> str:
        return "missing"


MISSING: Final = _Missing()


def _open_fields(image: r.PutTrial) -> Iterator[tuple[str, dict[str, Any]]]:
    yield (
        "params",
        {
            name: parsed(text).to_external_repr(internal)
            for (name, internal), text in zip(
                image.params.items(), image.distributions, strict=True
            )
        },
    )
    yield "user_attrs", image.user_attrs
    yield "system_attrs", image.system_attrs


@functools.lru_cache(maxsize=4096)
def parsed(text: str) -> BaseDistribution:
    return parse_distribution(text)


def _kind_of(value: Any) -> Kind:
    kind = _KINDS.get(type(value), "json")
    if kind == "int" and not -_INT64 <= value < _INT64:
        return "json"
    if kind == "str":
        try:
            value.encode()
        except UnicodeEncodeError:
            return "json"
    return kind


def _moment(text: str | None) -> datetime | None:
    return None if text is None else r.parse_time(text).astimezone(timezone.utc)


def as_json(value: Any) -> str | None:
    """The text of a ``json`` cell; None where the trial has no value."""
    return None if value is MISSING else json.dumps(value)


def describe_study(study: r.PutStudy) -> dict[str, Any]:
    """What a file says of the study beside its trials."""
    return {
        "name": study.study_name,
        "directions": study.directions,
        "user_attrs": study.user_attrs,
        "system_attrs": study.system_attrs,
    }
