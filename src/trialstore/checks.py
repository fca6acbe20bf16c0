"""What is refused at the call, before a byte of it is stored; each refusal says what to do.

A value that gets past these checks can be read back by every storage, ours and Optuna's. The
checks are about values alone; whether a study or trial takes them is for ``replica.py`` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import copy
from datetime import datetime
import json
import math
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from trialstore.records import ObjectText

# Most trials of a study suggest from the same few ranges, and json takes longer than all the
# rest of a deferred write.
_numeric_texts: dict[tuple[Any, ...], str] = {}
_NUMERIC_TEXTS_MAX = 1024

# How deep json can read depends on how much of the stack its caller has used.
_NESTED_MAX = 200

_JSON_TYPES = frozenset({str, int, float, bool, type(None)})


def text(value: Any, what: str) -> str:
    """A name or key. Raises TypeError for anything but a str."""
    if type(value) is str:
        return value
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a str, not {type(value).__name__}: {value!r}.")
    return str.__str__(value)  # an enum's own says the name of its member


def number(value: Any, what: str) -> None:
    """Raises TypeError for a study or trial id that is no int.

    numpy's integers and bools are equal to one, and would be found; a log can't keep them.
    """
    if type(value) is not int:
        raise TypeError(f"{what} must be an int, not {type(value).__name__}: {value!r}.")


def json_value(value: Any, what: str) -> Any:
    """The value as every reader will see it, sharing nothing with the caller's.

    Raises:
        TypeError: Something in it has no JSON; pass a str, number, bool, None, list or dict.
        ValueError: It holds itself, or is nested too deep.
    """
    if value is None or type(value) is str or type(value) is bool:
        return value
    try:
        written = json.dumps(value)
        read = json.loads(written)
        if written.count("[") + written.count("{") > _NESTED_MAX and _is_too_nested(read):
            raise ValueError(f"it is nested deeper than {_NESTED_MAX} levels")
        return read
    except TypeError as error:
        raise TypeError(
            f"{what} must be JSON: {error}. Store a str, number, bool, None, list or dict of "
            "them, or keep the object in a file and store its path."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be JSON: {error}.") from error


def _is_too_nested(value: Any) -> bool:
    level = [value]
    for _ in range(_NESTED_MAX):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(value, dict | list) for value in level)


def any_value(value: Any, what: str) -> Any:
    """The value itself, for a store that never leaves this process."""
    return value


def any_copied_value(value: Any, what: str) -> Any:
    """A copy, likewise: one template is often edited and queued again."""
    return copy.deepcopy(value)


def direction_codes(directions: Sequence[StudyDirection]) -> list[int]:
    """Raises ValueError without any direction and TypeError for anything else."""
    directions = list(directions)
    if not directions:
        raise ValueError("A study needs at least one direction.")
    for direction in directions:
        if not isinstance(direction, StudyDirection):
            raise TypeError(f"directions must be StudyDirection values, not {direction!r}.")
    return [int(direction) for direction in directions]


def distribution_text(
    distribution: BaseDistribution, name: str, *, any_choices: bool = False
) -> str:
    """Optuna's JSON of a distribution. Raises TypeError or ValueError if it has none.

    Args:
        distribution: Of a parameter.
        name: The parameter's, for the error.
        any_choices: Whether choices may be any objects, and stay the same ones.
    """
    if type(distribution) is FloatDistribution or type(distribution) is IntDistribution:
        key = (
            type(distribution),
            distribution.low,
            distribution.high,
            distribution.log,
            distribution.step,
        )
        known = _numeric_texts.get(key)
        if known is None:
            if len(_numeric_texts) >= _NUMERIC_TEXTS_MAX:
                _numeric_texts.clear()
            known = _numeric_texts[key] = distribution_to_json(distribution)
        return known
    if not isinstance(distribution, BaseDistribution):
        raise TypeError(
            f"The distribution of parameter {name!r} must be one of optuna.distributions, "
            f"not {distribution!r}."
        )
    if any_choices and isinstance(distribution, CategoricalDistribution):
        choices = distribution.choices
        if not all(type(choice) in _JSON_TYPES for choice in choices):
            stand_in = ObjectText(f"{distribution!r} {[id(choice) for choice in choices]}")
            stand_in.distribution = distribution
            return stand_in
    try:
        return distribution_to_json(distribution)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"The distribution of parameter {name!r} can't be stored: {error}. Use choices that "
            "are str, number, bool or None and map them to objects in the objective."
        ) from error


def internal_value(value: Any, distribution: BaseDistribution, name: str) -> float:
    """A parameter's internal representation that ``to_external_repr`` can read.

    Raises ValueError for NaN and for an index that is not one of the choices, TypeError for what
    is no number.
    """
    try:
        internal = float(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Parameter {name!r}: {value!r} is no number.") from error
    if type(distribution) is FloatDistribution and internal == internal:
        return internal
    if isinstance(distribution, CategoricalDistribution):
        n_choices = len(distribution.choices)
        if not (internal.is_integer() and 0 <= internal < n_choices):
            raise ValueError(
                f"Parameter {name!r}: {value!r} is no index of its {n_choices} choices; pass "
                "distribution.to_internal_repr(choice)."
            )
    elif math.isnan(internal):
        raise ValueError(f"Parameter {name!r} must not be NaN.")
    try:
        distribution.to_external_repr(internal)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"Parameter {name!r}: {value!r} does not fit: {error}.") from error
    return internal


def objective_values(values: Sequence[float] | None, n_objectives: int) -> list[float] | None:
    """One float per objective; infinities allowed, NaN not. Raises ValueError or TypeError."""
    if values is None:
        return None
    if isinstance(values, (str, bytes)):
        raise TypeError(f"values must be a sequence of floats, not {values!r}.")
    try:
        floats = list(map(float, values))
    except (TypeError, ValueError) as error:
        raise type(error)(f"Objective values must be floats, not {values!r}.") from error
    if any(map(math.isnan, floats)):
        raise ValueError(f"Objective values must not be NaN: {floats}. Tell the trial as FAIL.")
    if len(floats) != n_objectives:
        raise ValueError(f"{len(floats)} values for {n_objectives} objectives.")
    return floats


def duration(value: Any, what: str) -> None:
    """Seconds, or None. Raises ValueError for anything but a positive number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 < value < math.inf):
        raise ValueError(f"{what} must be None or a positive number of seconds, not {value!r}.")


def step(value: Any) -> int:
    """Raises TypeError for what is no integer."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"step must be an int, not {value!r}.") from error
    if number != value:
        raise TypeError(f"step must be an int, not {value!r}.")
    return number


def intermediate_value(value: Any) -> float:
    """NaN and infinities allowed. Raises TypeError or ValueError for what is no number."""
    return _number(value, "An intermediate value")


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what} must be a float, not {value!r}.") from error


def trial_state(value: Any) -> int:
    """Raises TypeError for anything but a TrialState."""
    if not isinstance(value, TrialState):
        raise TypeError(f"state must be an optuna.trial.TrialState, not {value!r}.")
    return int(value)


def template_fields(
    template: FrozenTrial,
    n_objectives: int,
    attribute: Callable[[Any, str], Any],
    any_choices: bool,
    format_time: Callable[[datetime], Any],
) -> dict[str, Any]:
    """The fields of ``CreateTrial`` that a template gives.

    Raises TypeError or ValueError naming the field that can't be stored.
    """
    params: dict[str, float] = {}
    distributions: dict[str, str] = {}
    if template.params.keys() != template.distributions.keys():
        raise ValueError(
            f"The template has parameters {list(template.params)} and distributions "
            f"{list(template.distributions)}; they must have the same names."
        )
    for key, external in template.params.items():
        name = text(key, "A parameter name")
        distribution = template.distributions[name]
        distributions[name] = distribution_text(distribution, name, any_choices=any_choices)
        internal = distribution.to_internal_repr(external)
        params[name] = internal_value(internal, distribution, name)
    values = objective_values(template.values, n_objectives)
    single = values is not None and len(values) == 1
    return {
        "datetime_start": _time(template.datetime_start, format_time),
        "datetime_complete": _time(template.datetime_complete, format_time),
        "state": trial_state(template.state),
        "value": values[0] if values is not None and single else None,
        "values": None if single else values,
        "params": params,
        "distributions": distributions,
        "user_attrs": _attributes(template.user_attrs, "User", attribute),
        "system_attrs": _attributes(template.system_attrs, "System", attribute),
        "intermediate_values": {
            str(step(number)): intermediate_value(value)
            for number, value in template.intermediate_values.items()
        },
    }


def _time(time: datetime | None, format_time: Callable[[datetime], Any]) -> Any:
    try:
        return None if time is None else format_time(time)
    except OverflowError as error:
        raise ValueError(f"The template's time {time} can't be stored: {error}.") from error


def _attributes(
    attrs: dict[str, Any], whose: str, attribute: Callable[[Any, str], Any]
) -> dict[str, Any]:
    return {
        text(key, f"{whose} attribute key"): attribute(value, f"{whose} attribute {key!r}")
        for key, value in attrs.items()
    }
