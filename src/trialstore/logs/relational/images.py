"""Rows of the tables to images of studies and trials.

A bad row, whoever wrote it, never makes a study unreadable: the field is left out, with one
warning that names study, trial and field.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import gc
import hashlib
import json
import logging
import math
from operator import itemgetter
from typing import Any, Final

import msgspec
from optuna.distributions import CategoricalDistribution, json_to_distribution

from trialstore.logs.relational.dialects import record_time
from trialstore.records import FAIL, PutStudy, PutTrial

_logger = logging.getLogger(__name__)

_STATES: Final = {"RUNNING": 0, "COMPLETE": 1, "PRUNED": 2, "FAIL": 3, "WAITING": 4}
_DIRECTIONS: Final = {"NOT_SET": 0, "MINIMIZE": 1, "MAXIMIZE": 2}
_INFINITE: Final = {"INF_POS": math.inf, "INF_NEG": -math.inf}
_SPECIAL: Final = {**_INFINITE, "NAN": math.nan}

_MANY_ROWS: Final = 2_000
_UNREADABLE: Final = object()
_decode_json = msgspec.json.Decoder().decode


def _json(text: str | None) -> Any:
    try:
        return _decode_json(text)  # type: ignore[arg-type]
    except (msgspec.DecodeError, UnicodeError, TypeError):
        # NaN, Infinity and lone surrogates, which Optuna writes and msgspec refuses.
        try:
            return json.loads(text)  # type: ignore[arg-type]
        except (ValueError, TypeError, RecursionError):
            return _UNREADABLE


def _number(value: Any) -> float | None:
    """SQLite's columns take anything, and the drivers bring it as it is."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


NO_NUMBER: Final = -1
"""Of a trial whose number can't be read; without one it has no place in its study."""


class TrialRow(msgspec.Struct):
    """A trial's own row, with what the cursor needs of it."""

    image: PutTrial
    start: str


class StudyRow(msgspec.Struct):
    """A study's rows, with what the cursor needs of them."""

    image: PutStudy
    digest: bytes
    directions: tuple[str, ...]


class Decoder:
    """Keeps what repeats in rows: distributions, names, warnings given."""

    def __init__(self) -> None:
        # Distribution text to (the one text object, number of choices or 0); None if unreadable.
        self._distributions: dict[str, tuple[str, int] | None] = {}
        self._names: dict[str, str] = {}
        self._warned: set[tuple[Any, ...]] = set()

    def _warn(self, study_id: int, trial_id: int | None, field: str) -> None:
        key = (study_id, trial_id, field)
        if key in self._warned:
            return
        self._warned.add(key)
        where = f"Study {study_id}" + ("" if trial_id is None else f", trial {trial_id}")
        _logger.warning("%s: %s can't be read and is left out.", where, field)

    def _distribution(self, text: str) -> tuple[str, int] | None:
        if text not in self._distributions:
            if len(self._distributions) > 10_000:
                self._distributions.clear()
            try:
                parsed = json_to_distribution(text)
            except Exception:
                self._distributions[text] = None
            else:
                choices = parsed.choices if isinstance(parsed, CategoricalDistribution) else ()
                self._distributions[text] = (text, len(choices))
        return self._distributions[text]

    # --- trials ---

    def trials(self, rows: Sequence[Any]) -> list[TrialRow]:
        """Images of the trials in rows of ``trials_selected``, in order of trial id."""
        # Many new containers and no garbage: the collector would walk them again and again,
        # which takes as long as making them.
        pauses = len(rows) > _MANY_ROWS and gc.isenabled()
        if pauses:
            gc.disable()
        try:
            return self._trials(rows)
        finally:
            if pauses:
                gc.enable()

    def _trials(self, rows: Sequence[Any]) -> list[TrialRow]:
        try:
            heads = self._gather(rows)
        except KeyError:
            # A database may run the branches of a UNION in parallel; heads come first here.
            heads = self._gather(sorted(rows, key=itemgetter(0)))
        build = self._build
        return [build(trial_id, heads[trial_id]) for trial_id in sorted(heads)]

    def _gather(self, rows: Iterable[Any]) -> dict[int, list[Any]]:
        heads: dict[int, list[Any]] = {}
        names = self._names
        for kind, trial_id, row_id, a, b, c, d in rows:
            if kind == 5:
                heads[trial_id][9].append((row_id, b, c))
            elif kind == 1:
                heads[trial_id][5].append((row_id, names.setdefault(a, a), b, c))
            elif kind == 0:
                heads[trial_id] = [row_id, a, b, c, d, [], [], [], [], []]
            else:
                heads[trial_id][kind + 4].append((row_id, a, b, c))
        return heads

    def _build(self, trial_id: int, head: list[Any]) -> TrialRow:
        number, start, study, state_name, complete, params, users, systems, values, steps = head
        study_id = int(study or 0)
        state = _STATES.get(state_name, -1)
        if state < 0:
            self._warn(study_id, trial_id, "its state")
            state = FAIL
        if type(number) is not int or number < 0:
            self._warn(study_id, trial_id, "its number, and with it the trial,")
            number = NO_NUMBER
        if len(params) > 1:
            params.sort()
        image_params = {}
        distributions = []
        known = self._distributions
        for _, name, value, text in params:
            entry = known.get(text) or self._readable(text)
            read = value if type(value) is float else _number(value)
            if entry is None or read is None or not isinstance(name, str):
                self._warn(study_id, trial_id, f"parameter {name!r}")
                continue
            if entry[1] and not 0 <= read < entry[1]:
                self._warn(study_id, trial_id, f"parameter {name!r}")
                continue
            image_params[name] = read
            distributions.append(entry[0])
        image_values: list[float] | None = None
        if values:
            values.sort()
            read_values: list[float] = []
            image_values = read_values
            for _, _, value, kind in values:
                read = _number(value) if kind == "FINITE" else _INFINITE.get(kind)
                if read is None or read != read:
                    self._warn(study_id, trial_id, "its values")
                    image_values = None
                    if state == 1:
                        state = FAIL
                    break
                read_values.append(read)
        image_steps = {}
        for step, value, kind in steps:
            read = _number(value) if kind == "FINITE" else _SPECIAL.get(kind)
            if read is not None and isinstance(step, int):
                image_steps[step] = read
            else:
                self._warn(study_id, trial_id, f"intermediate value {step}")
        image = PutTrial(
            trial_id=trial_id,
            study_id=study_id,
            number=number,
            state=state,
            values=image_values,
            datetime_start=self.time(start, study_id, trial_id),
            datetime_complete=self.time(complete, study_id, trial_id),
            params=image_params,
            distributions=distributions,
            user_attrs=self._attributes(users, study_id, trial_id, "user") if users else {},
            system_attrs=self._attributes(systems, study_id, trial_id, "system")
            if systems
            else {},
            intermediate_values=image_steps,
        )
        return TrialRow(image, start or "")

    def _readable(self, text: Any) -> tuple[str, int] | None:
        return self._distribution(text) if isinstance(text, str) else None

    def time(self, raw: str | None, study_id: int, trial_id: int | None = None) -> str | None:
        """The time of a trial, or one among those of a study."""
        try:
            return record_time(raw)
        except (ValueError, TypeError):
            self._warn(study_id, trial_id, "a time")
            return None

    def _attributes(
        self, rows: list[Any], study_id: int, trial_id: int | None, kind: str
    ) -> dict[str, Any]:
        if len(rows) > 1:
            rows.sort(key=itemgetter(0))
        names = self._names
        found = {}
        for row_id_key_value in rows:
            key, text = row_id_key_value[1], row_id_key_value[3]
            value = _json(text)
            if value is _UNREADABLE or not isinstance(key, str):
                self._warn(study_id, trial_id, f"{kind} attribute {key!r}")
            else:
                found[names.setdefault(key, key)] = value
        return found

    # --- studies ---

    def studies(self, rows: Iterable[Any]) -> dict[int, StudyRow]:
        """Studies in rows of ``studies_selected``."""
        grouped: dict[int, list[list[Any]]] = {}
        for study_id, kind, row_id, key, value in rows:
            if study_id not in grouped:
                grouped[study_id] = [[], [], [], []]
            grouped[study_id][kind].append((row_id, key, None, value))
        found = {}
        for study_id, (names, directions, users, systems) in grouped.items():
            if not names:
                continue  # Rows of a study deleted between two snapshots.
            directions.sort(key=itemgetter(0))
            image = PutStudy(
                study_id=study_id,
                study_name=names[0][1],
                directions=[self._direction(d[1], study_id) for d in directions],
                user_attrs=self._attributes(users, study_id, None, "user"),
                system_attrs=self._attributes(systems, study_id, None, "system"),
            )
            text = repr((names, directions, users, systems)).encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(text, digest_size=8).digest()
            found[study_id] = StudyRow(image, digest, tuple([d[1] for d in directions]))
        return found

    def _direction(self, name: str, study_id: int) -> int:
        if name not in _DIRECTIONS:
            self._warn(study_id, None, "a direction")
        return _DIRECTIONS.get(name, 0)
