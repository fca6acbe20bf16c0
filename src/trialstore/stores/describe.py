"""What a store holds, on one page: its kind, its size, and each study in a line."""

from __future__ import annotations

from typing import Any

from optuna.study import StudyDirection
from optuna.trial import TrialState

from trialstore import records as r
from trialstore.log import Described, LeaseStore, Log, Overview
from trialstore.scan import Scan

Description = dict[str, Any]
"""JSON values; times as ISO 8601 text in local time, sizes in bytes."""


def describe(log: Log) -> Description:
    """Everything that ``trialstore info`` shows.

    Raises:
        As ``Log.exchange``.
    """
    facts = log.facts() if isinstance(log, Described) else {"kind": type(log).__name__}
    version, expected = facts.get("schema_version"), facts.get("schema_version_expected")
    if version != expected:
        why = (
            "Studies are not shown: there are no tables of Optuna."
            if version is None
            else f"Studies are not shown: the tables are of version {version}, not {expected}. "
            "`trialstore upgrade` brings older ones up."
        )
        return {**facts, "studies": [], "not_shown": why}
    scan = Scan(log)
    studies = []
    for study in scan.studies:
        overview = scan.overview(study)
        best = overview.best
        studies.append(
            {
                "id": study.study_id,
                "name": study.study_name,
                "directions": [StudyDirection(code).name for code in study.directions],
                "n_trials": sum(overview.counts.values()),
                "states": {TrialState(code).name: n for code, n in overview.counts.items()},
                "best_value": _best_value(best) if len(study.directions) == 1 else None,
                "best_trial": best.number if best and len(study.directions) == 1 else None,
                "first_start_at": _local(overview.first_at),
                "last_complete_at": _local(overview.last_at),
                "n_with_heartbeats": _n_with_heartbeats(log, study.study_id, overview),
            }
        )
    return {**facts, "studies": studies}


def _best_value(best: r.PutTrial | None) -> float | str | None:
    if best is None or best.values is None:
        return None
    value = best.values[0]
    # JSON has no infinities.
    return value if value - value == 0 else str(value)


def _n_with_heartbeats(log: Log, study_id: int, overview: Overview) -> int:
    """How many RUNNING trials are covered by heartbeats, old ones included."""
    if not isinstance(log, LeaseStore) or not overview.counts.get(r.RUNNING):
        return 0
    try:
        return len(log.expired(study_id, overview.running, -1.0))
    except ValueError:  # behind this server nobody keeps leases
        return 0


def _local(text: str | None) -> str | None:
    return None if text is None else r.parse_time(text).isoformat()
