"""What a storage says, as plain data that ``==`` and a diff understand.

Floats become text that tells NaN, signed zeros and every last bit apart, so two contents are
equal exactly if a user could not tell the storages apart.
"""

from __future__ import annotations

import struct
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

Contents = dict[str, Any]


def plain(value: Any, *, exact: bool = True) -> Any:
    """A value without floats; ``exact=False`` lets -0.0 pass for 0.0, as some columns do."""
    if isinstance(value, float):
        return exact_float(value if exact else value + 0.0)
    if isinstance(value, dict):
        return {key: plain(value[key], exact=exact) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item, exact=exact) for item in value]
    return value


def exact_float(value: float) -> str:
    """NaN as ``nan`` whichever its bits, anything else by its bits."""
    if value != value:
        return "float nan"
    return f"float {value!r} {struct.pack('>d', value).hex()}"


def trial_contents(
    trial: FrozenTrial,
    *,
    ids: bool = True,
    times: bool = True,
    exact: bool = True,
    in_order: bool = True,
) -> Contents:
    """Everything that a trial says; parameters in their order, or else by name."""
    names = trial.params if in_order else sorted(trial.params)
    contents: Contents = {
        "number": trial.number,
        "state": trial.state.name,
        "values": plain(trial.values, exact=exact),
        "params": [
            (
                name,
                plain(trial.params[name], exact=exact),
                distribution_to_json(trial.distributions[name]),
            )
            for name in names
        ],
        "user_attrs": plain(trial.user_attrs, exact=exact),
        "system_attrs": plain(trial.system_attrs, exact=exact),
        "intermediate_values": plain(trial.intermediate_values, exact=exact),
    }
    if ids:
        contents["id"] = trial._trial_id
    if times:
        contents["datetime_start"] = trial.datetime_start
        contents["datetime_complete"] = trial.datetime_complete
    return contents


def study_contents(storage: BaseStorage, study_id: int, **how: bool) -> list[Contents]:
    """The trials of a study, in the order of ``get_all_trials``; ``how`` as ``trial_contents``."""
    trials = storage.get_all_trials(study_id, deepcopy=False)
    return [trial_contents(trial, **how) for trial in trials]


def storage_contents(
    storage: BaseStorage, *, ids: bool = True, exact: bool = True, **how: bool
) -> dict[str, Contents]:
    """Every study by name; ``how`` as ``trial_contents``."""
    contents: dict[str, Contents] = {}
    for study in storage.get_all_studies():
        contents[study.study_name] = {
            "id": study._study_id if ids else None,
            "directions": [direction.name for direction in study.directions],
            "user_attrs": plain(study.user_attrs, exact=exact),
            "system_attrs": plain(study.system_attrs, exact=exact),
            "trials": study_contents(storage, study._study_id, ids=ids, exact=exact, **how),
        }
    return contents
