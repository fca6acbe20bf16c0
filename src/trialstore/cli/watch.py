"""``trialstore watch``."""

from __future__ import annotations

from collections import deque
import contextlib
from datetime import datetime
import math
import time
from typing import Annotated, Any

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
import typer

from trialstore.cli.output import Exit, Json, Study, Url, command, print_json, stdout
from trialstore.cli.stores import existing_storage
from trialstore.storage import Storage

Every = Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two looks.")]
Once = Annotated[bool, typer.Option("--once", help="One look, then end; always with --json.")]

_BARS = "▁▂▃▄▅▆▇█"
_SPARKS = 40
_RUNNING_SHOWN = 15
_WINDOW_S = 30.0
"""Trials a second are those of the last so many."""


@command
def watch(
    url: Url, study: Study = None, every: Every = 1.0, once: Once = False, as_json: Json = False
) -> Exit | None:
    """See studies at work: trials a second, states, running trials, best value. Ctrl-C ends."""
    with existing_storage(url) as storage:
        boards: dict[int, Board] = {}
        _look(storage, study, boards)
        if as_json:
            print_json([board.document() for board in boards.values()])
        elif once or not stdout.is_terminal:
            for board in boards.values():
                stdout.print(board.picture())
        else:
            _live(storage, study, boards, every)
    return None


def _look(storage: Storage, name: str | None, boards: dict[int, Board]) -> None:
    """Read what is new; studies may be new, too, or gone."""
    if name is not None:
        storage.get_study_id_from_name(name)  # or KeyError
    studies = [one for one in storage.get_all_studies() if name in (None, one.study_name)]
    for study_id in boards.keys() - {one._study_id for one in studies}:
        del boards[study_id]
    for one in studies:
        if one._study_id not in boards:
            boards[one._study_id] = Board(storage, one._study_id, one.study_name, one.directions)
        try:
            boards[one._study_id].look()
        except KeyError:  # deleted meanwhile
            del boards[one._study_id]


def _live(storage: Storage, name: str | None, boards: dict[int, Board], every: float) -> None:
    with Live(console=stdout, auto_refresh=False) as live:
        try:
            while True:
                pictures = [board.picture() for board in boards.values()]
                live.update(Group(*pictures) if pictures else "No study yet.", refresh=True)
                time.sleep(every)
                _look(storage, name, boards)
        except KeyboardInterrupt:
            return


class Board:
    """What there is to see of one study."""

    def __init__(
        self, storage: Storage, study_id: int, name: str, directions: list[StudyDirection]
    ) -> None:
        self._storage = storage
        self._study_id = study_id
        self._name = name
        self._single = len(directions) == 1
        self._counts: dict[str, int] = {}
        self._running: list[FrozenTrial] = []
        self._heard_within_s: dict[int, float] = {}
        self._best: FrozenTrial | None = None
        self._bests: deque[float] = deque(maxlen=_SPARKS)
        self._finished: deque[tuple[float, int]] = deque()

    def look(self) -> None:
        """Read what is new."""
        storage, study_id = self._storage, self._study_id
        self._counts = {
            state.name: n for state in TrialState if (n := storage.get_n_trials(study_id, state))
        }
        self._running = storage.get_all_trials(study_id, False, (TrialState.RUNNING,))
        self._heard_within_s = storage.heard_within_s(study_id) if self._running else {}
        if self._single and self._counts.get("COMPLETE"):
            with contextlib.suppress(ValueError):  # of none of them the values can be read
                self._best = storage.get_best_trial(study_id)
                assert self._best.values is not None
                self._bests.append(self._best.values[0])
        now_s = time.monotonic()
        n = sum(self._counts.get(name, 0) for name in ("COMPLETE", "PRUNED", "FAIL"))
        self._finished.append((now_s, n))
        while len(self._finished) > 2 and self._finished[0][0] < now_s - _WINDOW_S:
            self._finished.popleft()

    def _rate(self) -> float:
        (first_s, first), (last_s, last) = self._finished[0], self._finished[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        best = None
        if self._best is not None and self._best.values is not None:
            value = self._best.values[0]
            best = {
                "trial": self._best.number,
                "value": value if value - value == 0 else str(value),
            }
        return {
            "study": self._name,
            "states": self._counts,
            "best": best,
            "running": [
                {
                    "trial": trial.number,
                    "seconds": _age_s(trial),
                    "last_beat": self._last_beat(trial),
                }
                for trial in self._running
            ],
        }

    def _last_beat(self, trial: FrozenTrial) -> str | None:
        """None of a trial whose worker has no heartbeats."""
        time_s = self._heard_within_s.get(trial._trial_id)
        if time_s is None:
            return None
        return f"within {time_s:.0f} s" if time_s < math.inf else "more than an hour ago"

    def picture(self) -> Group:
        """For the terminal."""
        states = "  ".join(f"{n} {name}" for name, n in self._counts.items()) or "no trials"
        lines = [Text(self._name, style="bold"), Text(f"{self._rate():.1f} trials/s   {states}")]
        if self._best is not None and self._best.values is not None:
            best = f"best {self._best.values[0]:.6g} in trial {self._best.number}  "
            lines.append(Text(best + sparkline(list(self._bests)), style="green"))
        table = Table(box=None, pad_edge=False, show_header=bool(self._running))
        for column in ("running", "for", "last beat", "reports", "last report"):
            table.add_column(column)
        for trial in self._running[:_RUNNING_SHOWN]:
            steps = trial.intermediate_values
            last = max(steps, default=None)
            table.add_row(
                str(trial.number),
                f"{_age_s(trial) or 0:.0f} s",
                self._last_beat(trial) or "",
                str(len(steps)),
                "" if last is None else f"{steps[last]:.6g} at {last}",
            )
        if len(self._running) > _RUNNING_SHOWN:
            table.add_row(f"and {len(self._running) - _RUNNING_SHOWN} more")
        return Group(*lines, table)


def _age_s(trial: FrozenTrial) -> float | None:
    if trial.datetime_start is None:
        return None
    return (datetime.now() - trial.datetime_start).total_seconds()


def sparkline(values: list[float]) -> str:
    """The finite ones of some values as bars."""
    finite = [value for value in values if value - value == 0]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(_BARS) - 1
    return "".join(_BARS[round((value - low) / span * top) if span else 0] for value in finite)
