"""Two kinds of numeric distributions in place of five."""

from __future__ import annotations

from functools import lru_cache
import json
from typing import Any
import warnings

from optuna.distributions import FloatDistribution, IntDistribution, distribution_to_json
import sqlalchemy as sa

from trialstore.logs.relational.migrations import rows_by_id, update_rows

revision = "v3.0.0.a"
down_revision = "v2.6.0.a"

_params = sa.table(
    "trial_params",
    sa.column("param_id", sa.Integer),
    sa.column("distribution_json", sa.Text),
)


def upgrade() -> None:
    for rows in rows_by_id(sa.select(*_params.c), _params.c.param_id):
        changes = []
        for param_id, old in rows:
            new = _converted(old)
            if new != old:
                changes.append({"param_id": param_id, "distribution_json": new})
        update_rows(_params, "param_id", changes)


@lru_cache(maxsize=10_000)
def _converted(text: str | None) -> str | None:
    """The JSON of the distribution that says the same now; what can't be read stays as it is."""
    try:
        known = json.loads(text or "")
        name, attributes = known["name"], known["attributes"]
        new = _new_distribution(name, attributes)
    except (ValueError, TypeError, KeyError):
        return text
    return text if new is None else distribution_to_json(new)


def _new_distribution(
    name: str, old: dict[str, Any]
) -> FloatDistribution | IntDistribution | None:
    with warnings.catch_warnings():
        # A range that is no multiple of its step is cut, as it always was when it was used.
        warnings.simplefilter("ignore")
        if name in ("UniformDistribution", "LogUniformDistribution"):
            log = name == "LogUniformDistribution"
            return FloatDistribution(old["low"], old["high"], log=log)
        if name == "DiscreteUniformDistribution":
            return FloatDistribution(old["low"], old["high"], step=old["q"])
        if name in ("IntUniformDistribution", "IntLogUniformDistribution"):
            log = name == "IntLogUniformDistribution"
            return IntDistribution(old["low"], old["high"], log=log, step=old.get("step", 1))
    return None
