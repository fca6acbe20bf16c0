"""Four processes tune a classifier over one journal file; one is killed, and nothing is lost.

Every worker notes each trial in a file of its own once ``optimize`` has told it. At the end the
journal is opened afresh, by trialstore and by plain Optuna, and must hold all that was noted.
Exit code 1 if it does not.
"""

from __future__ import annotations

import os

# Four workers share few cores: one thread each, before numpy starts its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
from collections.abc import Iterator
import contextlib
import json
import logging
import multiprocessing
from multiprocessing.process import BaseProcess
from pathlib import Path
import signal
import sys
import tempfile
import time

import optuna
from optuna.trial import FrozenTrial, TrialState

import trialstore

STUDY_NAME = "digits"
N_EPOCHS = 40
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def open_storage(journal: Path) -> trialstore.JournalStorage:
    return trialstore.JournalStorage(trialstore.journal.JournalFileBackend(str(journal)))


# --- a worker ------------------------------------------------------------------------------------


class Objective:
    """Accuracy of a small neural network on handwritten digits, reported after every epoch."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, digits = load_digits(return_X_y=True)
        self.split = train_test_split(
            images / 16, digits, test_size=0.3, random_state=0, stratify=digits
        )

    def __call__(self, trial: optuna.Trial) -> float:
        from sklearn.neural_network import MLPClassifier

        train_images, test_images, train_digits, test_digits = self.split
        model = MLPClassifier(
            hidden_layer_sizes=(trial.suggest_int("hidden_units", 8, 128, log=True),),
            activation=trial.suggest_categorical("activation", ["relu", "tanh", "logistic"]),
            learning_rate_init=trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
            alpha=trial.suggest_float("l2_penalty", 1e-6, 1e-1, log=True),
            batch_size=trial.suggest_int("batch_size", 16, 128, step=16),
            random_state=0,
        )
        accuracy = 0.0
        for epoch in range(N_EPOCHS):
            model.partial_fit(train_images, train_digits, classes=range(10))
            accuracy = model.score(test_images, test_digits)
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        trial.set_user_attr("n_weights", sum(layer.size for layer in model.coefs_))
        return accuracy


class Notes:
    """Where a worker writes down what the storage has acknowledged."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        os.write(self.fd, (json.dumps(told(trial)) + "\n").encode())
        os.fsync(self.fd)


def told(trial: FrozenTrial) -> dict[str, object]:
    """What a worker knows of a trial that it has told."""
    return {
        "number": trial.number,
        "state": trial.state.name,
        "values": trial.values,
        "params": trial.params,
        "reports": len(trial.intermediate_values),
    }


def work(journal: Path, notes: Path, n_trials: int, seed: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(
        study_name=STUDY_NAME,
        storage=open_storage(journal),
        sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=8, n_warmup_steps=5),
    )
    enough = optuna.study.MaxTrialsCallback(n_trials, states=FINISHED)
    enough_already = len(study.get_trials(deepcopy=False, states=FINISHED)) >= n_trials
    if not enough_already:
        study.optimize(Objective(), callbacks=[Notes(notes), enough])


# --- the parent ----------------------------------------------------------------------------------


class Crew:
    """The worker processes, by name."""

    def __init__(self, folder: Path, n_trials: int) -> None:
        self.journal = folder / "study.journal"
        self.folder = folder
        self.n_trials = n_trials
        self.workers: dict[str, BaseProcess] = {}
        self.killed: set[str] = set()

    def hire(self, name: str) -> None:
        # Spawned, as on every platform: nothing is shared but the file.
        worker = multiprocessing.get_context("spawn").Process(
            target=work,
            args=(self.journal, self.notes(name), self.n_trials, len(self.workers)),
            name=name,
        )
        worker.start()
        self.workers[name] = worker

    def notes(self, name: str) -> Path:
        return self.folder / f"told-by-{name}.jsonl"

    def kill(self, name: str) -> None:
        """As hard as it gets: SIGKILL can't be caught (TerminateProcess on Windows)."""
        self.workers[name].kill()
        self.workers[name].join()
        self.killed.add(name)

    def is_working(self) -> bool:
        return any(worker.is_alive() for worker in self.workers.values())

    def failed(self) -> list[str]:
        """Workers that ended by themselves and did not end well."""
        return [
            name
            for name, worker in self.workers.items()
            if name not in self.killed and worker.exitcode
        ]

    def told(self, name: str) -> list[dict[str, object]]:
        """The whole lines of a worker's notes; a kill may have cut the last one."""
        if not self.notes(name).exists():
            return []
        lines = self.notes(name).read_bytes().split(b"\n")[:-1]
        return [json.loads(line) for line in lines]

    def stop(self) -> None:
        for worker in self.workers.values():
            if worker.is_alive():
                worker.terminate()
            worker.join()


class PlainProgress:
    """A line now and then, for logs and pipes."""

    def __init__(self, n_trials: int) -> None:
        self.n_trials = n_trials
        self.due_s = 0.0

    def show(self, crew: Crew, trials: list[FrozenTrial]) -> None:
        if time.monotonic() >= self.due_s:
            self.due_s = time.monotonic() + 5.0
            print(progress_line(trials, self.n_trials), flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)


class RichProgress:
    """A bar and a table that follow the study."""

    def __init__(self, n_trials: int) -> None:
        from rich.live import Live

        self.n_trials = n_trials
        self.began_s = time.monotonic()
        self.live = Live(refresh_per_second=8)

    def show(self, crew: Crew, trials: list[FrozenTrial]) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        n_finished = sum(trial.state.is_finished() for trial in trials)
        workers = Table("worker", "process", "told", "")
        for name, worker in crew.workers.items():
            if name in crew.killed:
                status = Text("killed", style="red")
            elif worker.is_alive():
                status = Text("working", style="green")
            else:
                status = Text("done")
            workers.add_row(name, str(worker.pid), str(len(crew.told(name))), status)
        elapsed_s = time.monotonic() - self.began_s
        self.live.update(
            Group(
                ProgressBar(total=self.n_trials, completed=min(n_finished, self.n_trials)),
                Text(progress_line(trials, self.n_trials) + f"   {elapsed_s:.0f} s"),
                workers,
            )
        )

    def say(self, text: str) -> None:
        self.live.console.print(text)


@contextlib.contextmanager
def progress(n_trials: int) -> Iterator[PlainProgress | RichProgress]:
    try:
        import rich  # noqa: F401
    except ImportError:
        yield PlainProgress(n_trials)
        return
    if not sys.stdout.isatty():
        yield PlainProgress(n_trials)
        return
    display = RichProgress(n_trials)
    with display.live:
        yield display


def progress_line(trials: list[FrozenTrial], n_trials: int) -> str:
    n_finished = sum(trial.state.is_finished() for trial in trials)
    line = f"{n_finished} of {n_trials}   {states(trials)}"
    values = [trial.values[0] for trial in trials if trial.state == TrialState.COMPLETE]
    return line + (f"   best {max(values):.4f}" if values else "")


def states(trials: list[FrozenTrial]) -> str:
    counts = [(state, sum(trial.state == state for trial in trials)) for state in TrialState]
    return "  ".join(f"{state.name} {count}" for state, count in counts if count)


def run(folder: Path, n_trials: int, n_workers: int) -> int:
    crew = Crew(folder, n_trials)
    study = optuna.create_study(
        study_name=STUDY_NAME, storage=open_storage(crew.journal), direction="maximize"
    )
    print(f"{n_workers} processes share {crew.journal}", flush=True)
    try:
        with progress(n_trials) as display:
            for number in range(1, n_workers + 1):
                crew.hire(f"worker-{number}")
            while crew.is_working():
                trials = study.get_trials(deepcopy=False)
                n_finished = sum(trial.state.is_finished() for trial in trials)
                if not crew.killed and n_finished >= 0.4 * n_trials:
                    crew.kill("worker-1")
                    crew.hire("replacement")
                    display.say("SIGKILL for worker-1 in the middle of a trial; replaced")
                display.show(crew, trials)
                time.sleep(0.25)
            display.show(crew, study.get_trials(deepcopy=False))
    finally:
        crew.stop()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        # Nobody works any more, so this is what the killed worker left behind.
        study.tell(trial.number, state=TrialState.FAIL)
        print(f"trial {trial.number} was running in a killed worker and is told as FAIL")
    return report(crew)


def report(crew: Crew) -> int:
    """What was found, what is stored, and whether they agree; the exit code."""
    study = optuna.load_study(study_name=STUDY_NAME, storage=open_storage(crew.journal))
    trials = study.get_trials(deepcopy=False)
    print(f"\nbest accuracy {study.best_value:.4f}, trial {study.best_trial.number}:")
    for name, value in study.best_params.items():
        print(f"  {name:15} {value:.6g}" if isinstance(value, float) else f"  {name:15} {value}")
    print(f"{len(trials)} trials: {states(trials)}")

    problems = [f"{name} ended with an error" for name in crew.failed()]
    if [trial.number for trial in trials] != list(range(len(trials))):
        problems.append("the trial numbers have gaps or doubles")
    notes = [note for name in crew.workers for note in crew.told(name)]
    stored = {trial.number: json.loads(json.dumps(told(trial))) for trial in trials}
    lost = [note["number"] for note in notes if stored.get(note["number"]) != note]
    if lost:
        problems.append(f"told but lost or changed: trials {lost}")
    if len({note["number"] for note in notes}) != len(notes):
        problems.append("a trial was told twice")
    print(f"{len(notes)} trials were told by workers, {len(lost)} of them are lost")

    optuna_backend = optuna.storages.journal.JournalFileBackend(str(crew.journal))
    optuna_study = optuna.load_study(
        study_name=STUDY_NAME, storage=optuna.storages.JournalStorage(optuna_backend)
    )
    if optuna_study.get_trials(deepcopy=False) != trials:
        problems.append("plain Optuna reads other trials from the same file")
    else:
        print("plain Optuna reads the same trials from the same file")
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--keep", type=Path, help="a new folder for journal and notes, kept")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("trialstore").setLevel(logging.WARNING)
    if arguments.keep:
        arguments.keep.mkdir(parents=True)
        return run(arguments.keep, arguments.trials, arguments.workers)
    with tempfile.TemporaryDirectory(prefix="trialstore-demo-") as folder:
        return run(Path(folder), arguments.trials, arguments.workers)


if __name__ == "__main__":
    sys.exit(main())
