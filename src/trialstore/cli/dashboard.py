"""``trialstore dashboard``."""

from __future__ import annotations

from typing import Annotated

import typer

from trialstore.cli.output import Exit, Port, Url, command, stderr
from trialstore.cli.stores import existing_storage

Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]


@command
def dashboard(url: Url, host: Host = "localhost", port: Port = 8080) -> Exit | None:
    """Look at a store in a browser, with optuna-dashboard on a storage of trialstore."""
    try:
        from optuna_dashboard import run_server
    except ImportError as error:
        raise ImportError("This needs optuna-dashboard: pip install optuna-dashboard.") from error
    with existing_storage(url) as storage:
        stderr.print(f"http://{host}:{port}", markup=False)
        run_server(storage, host=host, port=port)
    return None
