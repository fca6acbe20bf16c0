"""optuna-dashboard on the database of the workers. ``PORT`` is 8080 unless set."""

from __future__ import annotations

import os

import optuna_dashboard

from trialstore.optuna_db import get_optuna_db


def main() -> None:
    database = get_optuna_db(secrets_folder=os.environ.get("SECRETS_FOLDER", "/run/secrets"))
    host, port = os.environ.get("HOST", "0.0.0.0"), int(os.environ.get("PORT", "8080"))
    optuna_dashboard.run_server(database.storage, host=host, port=port)


if __name__ == "__main__":
    main()
