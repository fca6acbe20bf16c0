"""What others have built on Optuna's tables shows a study of ours."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
from pathlib import Path
import subprocess
import sys
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import pytest

from compat.workers import write
from servers import new_database
import trialstore

_KINDS = ["sqlite", *(pytest.param(x, marks=pytest.mark.servers) for x in ("psycopg", "pymysql"))]


@pytest.fixture(params=_KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database in which we wrote a study, "s"."""
    url = new_database(request.param, tmp_path)
    with contextlib.closing(trialstore.RDBStorage(url)) as storage:
        write(storage, "s")
    yield url


def test_optuna_studies_lists_it(url: str) -> None:
    command = ("studies", "--storage", url, "--format", "json")
    shown = subprocess.run(
        [sys.executable, "-c", "from optuna.cli import main; main()", *command],
        stdout=subprocess.PIPE,
        timeout=120,
        check=True,
    ).stdout
    (study,) = json.loads(shown)
    assert study["name"] == "s" and study["n_trials"] == 6
    assert study["direction"] == ["MINIMIZE", "MAXIMIZE"]


def test_the_dashboard_shows_it(url: str) -> None:
    theirs = optuna.storages.RDBStorage(url)
    with contextlib.closing(trialstore.RDBStorage(url)) as ours:
        shown = []
        for storage in (theirs, ours):
            application = optuna_dashboard.wsgi(storage)
            (study,) = _get(application, "/api/studies")["study_summaries"]
            assert study["study_name"] == "s"
            shown.append(_get(application, f"/api/studies/{study['study_id']}"))
    theirs.engine.dispose()
    assert [trial["number"] for trial in shown[0]["trials"]] == list(range(6))
    assert shown[0]["trials"] == shown[1]["trials"]


def _get(application: Any, path: str) -> Any:
    environment: dict[str, Any] = {"PATH_INFO": path, "QUERY_STRING": "after=0"}
    setup_testing_defaults(environment)
    answered: list[str] = []
    body = b"".join(application(environment, lambda status, *_: answered.append(status)))
    assert answered == ["200 OK"], body
    return json.loads(body)
