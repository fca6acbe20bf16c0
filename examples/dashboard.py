"""optuna-dashboard on a proxy: a server, a study, and the dashboard, until it is interrupted.

Needs ``pip install optuna-dashboard``.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path
import tempfile

import optuna
import optuna_dashboard

import trialstore
from trialstore.grpc import run_grpc_proxy_server


def serve(path: str, port: int) -> None:
    run_grpc_proxy_server(trialstore.get_storage(path), port=port)


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", -2.0, 2.0)
    y = trial.suggest_float("y", -1.0, 3.0)
    return (1 - x) ** 2 + 100 * (y - x * x) ** 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8080, help="of the dashboard")
    parser.add_argument("--proxy-port", type=int, default=13000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # A process of its own: a server and a fork do not mix.
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(str(Path(folder) / "studies.journal"), arguments.proxy_port)
        )
        server.start()
        try:
            storage = trialstore.GrpcStorageProxy(port=arguments.proxy_port)
            storage.wait_server_ready(60)
            study = optuna.create_study(storage=storage, study_name="rosenbrock")
            study.optimize(objective, n_trials=60)
            optuna_dashboard.run_server(storage, port=arguments.port)
        finally:
            server.terminate()
            server.join()


if __name__ == "__main__":
    main()
