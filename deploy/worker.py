"""One worker of many: runs trials of a study until there are enough, and retries lost ones.

``STUDY`` names the study, ``N_TRIALS`` says how many trials are enough, ``SECRETS_FOLDER`` where
the password is. Replace ``objective``.
"""

from __future__ import annotations

import os
import signal
import time

import optuna

import trialstore
from trialstore.optuna_db import get_optuna_db


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", -2.0, 2.0)
    y = trial.suggest_float("y", -1.0, 3.0)
    time.sleep(0.1)  # in place of work
    return (1 - x) ** 2 + 100 * (y - x * x) ** 2


def main() -> None:
    database = get_optuna_db(
        secrets_folder=os.environ.get("SECRETS_FOLDER", "/run/secrets"),
        # A worker is dead when it was not heard of for twice as long.
        heartbeat_interval=30,
        heartbeat_stale_trial_callback=trialstore.RetryHeartbeatStaleTrialCallback(max_retry=2),
    )
    study = database.get_study(os.environ.get("STUDY", "example"))
    # Finish the trial at hand, then go; the loop is the main thread's, as signals are.
    signal.signal(signal.SIGTERM, lambda number, frame: study.stop())
    enough = trialstore.MaxTrials(int(os.environ.get("N_TRIALS", "200")))
    study.optimize(enough(objective))
    database.storage.close()


if __name__ == "__main__":
    main()
