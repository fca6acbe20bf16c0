"""Interpreters with an Optuna of their own, in which trialstore is installed as well."""

from __future__ import annotations

from collections.abc import Sequence
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import optuna
import pytest

_ROOT = Path(__file__).parent.parent.parent
_WORKERS = Path(__file__).parent / "workers.py"
DEADLINE_S = 280


def python_with(version: str) -> str:
    """The interpreter of the environment with that Optuna; else skip, or fail where required."""
    if optuna.__version__.startswith(version):
        return sys.executable
    variable = f"TRIALSTORE_OPTUNA_{version.replace('.', '')}"
    folder = f".venv-optuna{version.replace('.', '')}"
    path = os.environ.get(variable) or str(_ROOT / folder / "bin" / "python")
    if Path(path).exists():
        return path
    reason = f"no environment with Optuna {version}: make venvs, or set {variable}"
    if os.environ.get("TRIALSTORE_REQUIRE_SERVERS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def has_module(python: str, name: str) -> bool:
    return subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode == 0


def start(python: str, *arguments: object, zone: str = "UTC", **how: Any) -> subprocess.Popen[str]:
    """A process of ``workers.py``."""
    environment = {**os.environ, "TZ": zone, "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [python, str(_WORKERS), *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **how,
    )


def finish(workers: Sequence[subprocess.Popen[str]]) -> list[str]:
    """What each wrote; fails with the errors of those that failed."""
    outputs = []
    try:
        for worker in workers:
            out, errors = worker.communicate(timeout=DEADLINE_S)
            assert worker.returncode == 0, errors
            outputs.append(out)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
    return outputs


def run(python: str, *arguments: object, zone: str = "UTC") -> Any:
    """One process to its end; its JSON, if it wrote any."""
    (out,) = finish([start(python, *arguments, zone=zone)])
    return json.loads(out) if out else None
