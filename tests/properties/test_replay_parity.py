"""Replay judges exactly as Optuna's: any journal shows the same studies and trials in both."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings, strategies as st
import optuna.storages
from optuna.storages.journal import BaseJournalBackend

from journals import operations as journal_operations
from trialstore.records import from_journal_dict
from trialstore.replica import Replica


class _ListBackend(BaseJournalBackend):
    def __init__(self, records: list[dict[str, Any]]) -> None:
        self._records = records

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        return self._records[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        raise AssertionError("the journal is only read")


@settings(max_examples=300, deadline=None)
@given(st.lists(journal_operations, max_size=40))
def test_replay_shows_what_optunas_replay_shows(operations: list[dict[str, Any]]) -> None:
    journal = [{"worker_id": "somebody", **operation} for operation in operations]
    optunas = optuna.storages.JournalStorage(_ListBackend(journal))
    replica = Replica()
    for record in journal:
        replica.apply(from_journal_dict(record))

    theirs = optunas.get_all_studies()
    assert [vars(study) for study in replica.studies()] == [vars(study) for study in theirs]
    for study in theirs:
        study_id = study._study_id
        expected = optunas.get_all_trials(study_id)
        assert replica.trials(study_id, None) == expected
        # The order of suggestion counts too, and dictionaries compare without it.
        assert [list(t.params) for t in replica.trials(study_id, None)] == [
            list(t.params) for t in expected
        ]
        for states in ((0,), (1,), (4,), (0, 4), (1, 2), ()):
            chosen = [t for t in expected if t.state in states]
            assert replica.trials(study_id, states) == chosen  # type: ignore[arg-type]
            assert replica.count(study_id, states) == len(chosen)  # type: ignore[arg-type]
        complete = [t for t in expected if t.state == 1]
        if complete:
            assert replica.best_trial(study_id) == min(complete, key=lambda t: t.value)
