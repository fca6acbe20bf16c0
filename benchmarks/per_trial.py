"""What one trial of ``study.optimize`` costs: wall time, CPU of this process, exact counts.

``--store`` names ``memory``, ``journal``, ``sqlite`` or the URL of a server, where Optuna's own
storage for that URL is compared.
"""

from __future__ import annotations

import os
from pathlib import Path
import sys

from benchmarks import harness
from benchmarks.harness import Cost, Report, Row
from trialstore.testing.syncs import count_syncs, mark_syncs

KNOWN_IN_MEMORY = (10, 100_000)


def main() -> int:
    if sys.argv[1:2] == ["--count-syncs-of"]:
        run_marked(*sys.argv[2:4], Path(sys.argv[4]), int(sys.argv[5]))
        return 0
    parser = harness.parser(__doc__)
    parser.add_argument("--store", action="append", help="default: memory, journal and sqlite")
    parser.add_argument("--trials", type=int, default=60, help="in one sample")
    arguments = parser.parse_args()
    with Report("per trial", arguments) as report:
        for store in arguments.store or ("memory", "journal", "sqlite"):
            if store == "memory":
                for known in KNOWN_IN_MEMORY:
                    in_memory(report, known, arguments.rounds)
            else:
                on_disk(report, store, arguments.rounds, arguments.trials)
                if "://" not in store:
                    syncs(report, store, arguments.trials)
    return 0


def in_memory(report: Report, known: int, rounds: int) -> None:
    """Few trials in many studies where few are known; the fixed part of ``optimize`` counts too,
    as it does for a user."""
    n_trials, n_studies = (10, 20) if known < 100 else (50, 1)
    names = harness.contenders("memory")
    studies = {}
    if n_studies == 1:
        for name in names:
            study = harness.new_study(harness.open_storage(name, "memory", report.folder))
            harness.fill(study._storage, study._study_id, known)
            study.optimize(harness.objective, n_trials=2)
            studies[name] = study

    def sample(name: str) -> Cost:
        costs = []
        for _ in range(n_studies):
            study = studies.get(name)
            if study is None:
                study = harness.new_study(harness.open_storage(name, "memory", report.folder))
                study.optimize(harness.objective, n_trials=known)
            costs.append(harness.optimize(study, n_trials))
        return Cost(
            sum(cost.wall_ms for cost in costs) / n_studies,
            sum(cost.cpu_ms for cost in costs) / n_studies,
        )

    add_costs(report, f"memory, {known:,} known", harness.in_turn(names, rounds, sample))


def on_disk(report: Report, store: str, rounds: int, n_trials: int) -> None:
    names = harness.contenders(store)
    exchanges = []

    def sample(name: str) -> Cost:
        storage = harness.open_storage(name, store, report.new_folder())
        study = harness.new_study(storage)
        study.optimize(harness.objective, n_trials=5)
        exchanger = getattr(storage, "_exchanger", None)
        before = exchanger.n_exchanges if exchanger else 0
        cost = harness.optimize(study, n_trials)
        if exchanger:
            exchanges.append((exchanger.n_exchanges - before) / n_trials)
        if "://" in store:
            storage.delete_study(study._study_id)
        return cost

    label = store.partition("://")[0]
    add_costs(report, label, harness.in_turn(names, rounds, sample))
    report.add(Row(f"{label}, exchanges", "per trial", {harness.OURS: min(exchanges)}))


def add_costs(report: Report, label: str, samples: dict[str, list[Cost]]) -> None:
    report.add(Row(label, "wall ms", harness.medians(samples, lambda cost: cost.wall_ms)))
    report.add(Row(label, "CPU ms", harness.medians(samples, lambda cost: cost.cpu_ms)))


def syncs(report: Report, store: str, n_trials: int) -> None:
    """Exact: counted below Python, in a child, from the tenth trial on."""
    values = {}
    for name in harness.contenders(store):
        folder = report.new_folder()
        argv = [sys.executable, "-m", "benchmarks.per_trial", "--count-syncs-of", name, store]
        try:
            trace = count_syncs([*argv, str(folder), str(n_trials)], folder, env=_path_to_here())
        except RuntimeError as error:
            print(f"syncs are not counted: {error}", file=sys.stderr)
            return
        values[name] = trace.by_file("begin", "end").total() / n_trials
    report.add(Row(f"{store}, syncs", "per trial", values))


def _path_to_here() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}


def run_marked(name: str, store: str, folder: Path, n_trials: int) -> None:
    """The child of ``syncs``."""
    study = harness.new_study(harness.open_storage(name, store, folder))
    study.optimize(harness.objective, n_trials=10)
    mark_syncs("begin")
    study.optimize(harness.objective, n_trials=n_trials)
    mark_syncs("end")


if __name__ == "__main__":
    sys.exit(main())
