"""Questions to a storage that has just been opened: how many trials, which is best, what studies.

On tables, where they are answered by SQL; Optuna reads the trials. The summaries are those of the
storage, which a plain Optuna has no more: there ``optuna.get_all_study_summaries`` is measured.
Without Rustuna: it reads everything when it is opened, and its own copy of SQLite ends the locks
of ours, in one process on one file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import sys
import time
from typing import Any

import optuna

from benchmarks import harness
from benchmarks.harness import OURS, Report, Row

_COMPARED = (OURS, "optuna")


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--store", action="append", help="sqlite or a URL; default: sqlite")
    parser.add_argument("--trials", type=int, default=10_000, help="in one study")
    parser.add_argument("--studies", type=int, default=200, help="of 50 trials each")
    arguments = parser.parse_args()
    with Report("catalogue", arguments) as report:
        for store in arguments.store or ("sqlite",):
            compare(report, store, arguments.trials, arguments.studies, arguments.rounds)
    return 0


def compare(report: Report, store: str, n_trials: int, n_studies: int, rounds: int) -> None:
    folder = report.new_folder()
    kind = store.partition("://")[0]
    ours: Any = harness.open_storage(OURS, store, folder)
    study_id = ours.get_study_id_from_name(harness.fill_in_bulk(ours, n_trials))

    def count(storage: Any) -> None:
        assert storage.get_n_trials(study_id) == n_trials

    def best(storage: Any) -> None:
        assert storage.get_best_trial(study_id).value is not None

    for what, ask in (("get_n_trials", count), ("get_best_trial", best)):
        samples = harness.in_turn(
            _COMPARED,
            rounds,
            lambda name, ask=ask: ask_ms(name, store, folder, ask),
        )
        report.add(Row(f"{kind}: cold {what}", "ms", harness.medians(samples, float)))
    for _ in range(n_studies):
        harness.fill_in_bulk(ours, 50)
    ours.close()

    def summarize(storage: Any) -> None:
        own = getattr(storage, "get_all_study_summaries", None)
        summaries = own() if own else optuna.get_all_study_summaries(storage)
        assert len(summaries) == n_studies + 1

    samples = harness.in_turn(
        _COMPARED, rounds, lambda name: ask_ms(name, store, folder, summarize)
    )
    report.add(Row(f"{kind}: summaries of studies", "ms", harness.medians(samples, float)))


def ask_ms(name: str, store: str, folder: Path, ask: Callable[[Any], None]) -> float:
    """Of the one call, after the storage was opened."""
    storage = harness.open_storage(name, store, folder)
    began_s = time.perf_counter()
    ask(storage)
    return (time.perf_counter() - began_s) * 1e3


if __name__ == "__main__":
    sys.exit(main())
