"""Strategies for hypothesis: operations of a journal, as dictionaries without their worker."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from trialstore.records import STORES_UTC

_TIME = "2026-03-01T12:00:00.000001" + ("+00:00" if STORES_UTC else "")
_DISTRIBUTIONS = [
    FloatDistribution(0, 1),
    FloatDistribution(0.1, 9, log=True),
    IntDistribution(0, 9),
    CategoricalDistribution(["a", "b"]),
    CategoricalDistribution(["a", "c"]),
]
_study_ids = st.integers(0, 2)
_trial_ids = st.integers(0, 5)
_json_values = st.one_of(st.none(), st.integers(-5, 5), st.text(max_size=3))
_params = st.dictionaries(
    st.sampled_from(["x", "y"]),
    st.tuples(
        st.sampled_from([0.0, 1.0]), st.sampled_from(_DISTRIBUTIONS[:1] + _DISTRIBUTIONS[2:])
    ),
    max_size=2,
)


def _create_trial(study_id: int, state: int, params: dict[str, Any], attr: Any) -> dict[str, Any]:
    finished = state in (1, 2, 3)
    record: dict[str, Any] = {
        "op_code": 4,
        "study_id": study_id,
        "datetime_start": None if state == 4 else _TIME,
        "state": state,
        "value": 0.5 if state == 1 else None,
        "values": None,
        "params": {name: value for name, (value, _) in params.items()},
        "distributions": {name: distribution_to_json(d) for name, (_, d) in params.items()},
        "user_attrs": {"k": attr},
        "system_attrs": {},
        "intermediate_values": {"3": 0.25},
    }
    if finished:
        record["datetime_complete"] = _TIME
    return record


def _set_param(trial_id: int, name: str, value: float, index: int) -> dict[str, Any]:
    return {
        "op_code": 5,
        "trial_id": trial_id,
        "param_name": name,
        "param_value_internal": value,
        "distribution": distribution_to_json(_DISTRIBUTIONS[index]),
    }


def _set_state(trial_id: int, state: int) -> dict[str, Any]:
    return {
        "op_code": 6,
        "trial_id": trial_id,
        "state": state,
        "values": [1.5] if state == 1 else None,
        **({"datetime_start": _TIME} if state == 0 else {}),
        **({"datetime_complete": _TIME} if state in (1, 2, 3) else {}),
    }


operations = st.one_of(
    st.builds(
        lambda name: {"op_code": 0, "study_name": name, "directions": [1]},
        st.sampled_from(["a", "b", ""]),
    ),
    st.builds(lambda study_id: {"op_code": 1, "study_id": study_id}, _study_ids),
    st.builds(
        lambda op, study_id, value: {
            "op_code": op,
            "study_id": study_id,
            "user_attr" if op == 2 else "system_attr": {"k": value},
        },
        st.sampled_from([2, 3]),
        _study_ids,
        _json_values,
    ),
    st.builds(
        _create_trial, _study_ids, st.sampled_from([0, 0, 1, 2, 3, 4]), _params, _json_values
    ),
    st.builds(
        lambda study_id: {"op_code": 4, "study_id": study_id, "datetime_start": _TIME}, _study_ids
    ),
    st.builds(
        _set_param, _trial_ids, st.sampled_from(["x", "y"]), st.sampled_from([0.0, 1.0]),
        st.integers(0, 4),
    ),
    st.builds(_set_state, _trial_ids, st.sampled_from([0, 0, 1, 2, 3, 4])),
    st.builds(
        lambda trial_id, step, value: {
            "op_code": 7, "trial_id": trial_id, "step": step, "intermediate_value": value,
        },
        _trial_ids, st.integers(0, 3), st.sampled_from([0.0, 1.0, float("inf")]),
    ),
    st.builds(
        lambda op, trial_id, value: {
            "op_code": op,
            "trial_id": trial_id,
            "user_attr" if op == 8 else "system_attr": {"k": value},
        },
        st.sampled_from([8, 9]), _trial_ids, _json_values,
    ),
)  # fmt: skip
