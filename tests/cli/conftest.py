"""The command line as a fixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import stores
from stores import Cli
import trialstore


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capsys)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same studies in ``a.journal`` and ``a.db``; only to be copied."""
    folder = tmp_path_factory.mktemp("filled")
    for url in (f"{folder}/a.journal", f"sqlite:///{folder}/a.db"):
        storage: Any = trialstore.get_storage(url)
        stores.fill(storage)
        storage.close()
    return folder
