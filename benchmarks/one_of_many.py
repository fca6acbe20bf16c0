"""One study of many in a journal: CPU and memory of opening it, against opening all of them.

Ours reads the other studies' names from the snapshot and builds nothing of them. ``--studies 500
--trials 200`` is the size of the budget, at which Optuna reads for minutes; hence ``--only-ours``.
"""

from __future__ import annotations

from pathlib import Path
import sys
import time

from benchmarks import harness
from benchmarks.harness import OURS, Report, Row
from benchmarks.memory import resident_bytes


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--studies", type=int, default=100)
    parser.add_argument("--trials", type=int, default=50, help="in each study")
    parser.add_argument("--only-ours", action="store_true")
    parser.set_defaults(rounds=3)
    arguments = parser.parse_args()
    n_studies, n_trials = arguments.studies, arguments.trials
    with Report("one of many", arguments) as report:
        folder = report.new_folder()
        names = harness.in_child(fill, folder, n_studies, n_trials)
        contenders = [OURS] if arguments.only_ours else harness.contenders("journal")
        middle = [names[n_studies // 2]]
        label = f"{n_studies} x {n_trials}"
        costs = {}
        for what, wanted in (("all", names), ("one", middle)):
            samples = harness.in_turn(
                contenders,
                arguments.rounds,
                lambda name, wanted=wanted: harness.in_child(cost, name, folder, wanted, n_trials),
            )
            cpu = harness.medians(samples, lambda sample: sample[0])
            held = harness.medians(samples, lambda sample: sample[1])
            report.add(Row(f"{label}, {what}", "CPU ms", cpu))
            report.add(Row(f"{label}, {what}", "MB", held))
            costs[what] = cpu, held
        for unit, one, every in zip(("CPU", "MB"), costs["one"], costs["all"], strict=True):
            shares = {name: one[name] / every[name] for name in contenders}
            report.add(Row(f"{label}, one over all", unit, shares))
    return 0


def fill(folder: Path, n_studies: int, n_trials: int) -> list[str]:
    """The names of studies whose trials are in the journal, and in a snapshot beside it."""
    storage = harness.open_storage(OURS, "journal", folder)
    names = [harness.fill_in_bulk(storage, n_trials) for _ in range(n_studies)]
    harness.save_snapshot(storage)
    return names


def cost(name: str, folder: Path, study_names: list[str], n_trials: int) -> tuple[float, float]:
    """CPU in ms and resident memory in MB of opening the journal and reading some studies."""
    other = folder / f"warm-{name}"  # what opening imports and caches is not counted
    other.mkdir(exist_ok=True)
    warm = harness.new_study(harness.open_storage(name, "journal", other))
    warm.optimize(harness.objective, n_trials=2)
    before, began_s = resident_bytes(), time.process_time()
    storage = harness.open_storage(name, "journal", folder)
    for study_name in study_names:
        trials = storage.get_all_trials(storage.get_study_id_from_name(study_name), deepcopy=False)
        assert len(trials) == n_trials
    cpu_ms = (time.process_time() - began_s) * 1e3
    return cpu_ms, (resident_bytes() - before) / 1e6


if __name__ == "__main__":
    sys.exit(main())
