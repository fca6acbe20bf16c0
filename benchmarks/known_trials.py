"""Whether a trial becomes dearer as the study grows: CPU per trial with few and many known.

Our budget is a factor between the two; Optuna reads 100,000 trials for a minute before it can be
measured at all, so ``--known`` sets other sizes.
"""

from __future__ import annotations

from pathlib import Path
import shutil
import sys

import optuna

from benchmarks import harness
from benchmarks.harness import OURS, Cost, Report, Row


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--store", action="append", help="journal or sqlite; default: both")
    parser.add_argument("--known", type=int, nargs=2, default=(1_000, 10_000))
    parser.add_argument("--trials", type=int, default=20, help="in one sample")
    parser.add_argument("--only-ours", action="store_true")
    arguments = parser.parse_args()
    few, many = arguments.known
    with Report("known trials", arguments) as report:
        for store in arguments.store or ("journal", "sqlite"):
            names = [OURS] if arguments.only_ours else harness.contenders(store)
            cpu_ms = {}
            for known in (few, many):
                studies = open_studies(report, store, names, known)
                samples = harness.in_turn(
                    names,
                    arguments.rounds,
                    lambda name, studies=studies: harness.optimize(
                        studies[name], arguments.trials
                    ),
                )
                cpu_ms[known] = harness.medians(samples, cpu_of)
                report.add(Row(f"{store}, {known:,} known", "CPU ms per trial", cpu_ms[known]))
            growth = {name: cpu_ms[many][name] / cpu_ms[few][name] for name in names}
            report.add(Row(f"{store}, {many:,} over {few:,}", "factor", growth))
    return 0


def cpu_of(cost: Cost) -> float:
    return cost.cpu_ms


def open_studies(
    report: Report, store: str, names: list[str], known: int
) -> dict[str, optuna.Study]:
    """A copy of the same files for each, opened, and warm by two trials."""
    origin = report.new_folder()
    storage = harness.open_storage(OURS, store, origin)
    study_name = harness.fill_in_bulk(storage, known)
    storage.close()
    studies = {}
    for name in names:
        folder = report.new_folder()
        copy_files(origin, folder)
        studies[name] = optuna.load_study(
            study_name=study_name,
            storage=harness.open_storage(name, store, folder),
            sampler=optuna.samplers.RandomSampler(seed=1),
        )
        studies[name].optimize(harness.objective, n_trials=2)
    return studies


def copy_files(origin: Path, folder: Path) -> None:
    for path in origin.iterdir():
        shutil.copy(path, folder / path.name)


if __name__ == "__main__":
    sys.exit(main())
