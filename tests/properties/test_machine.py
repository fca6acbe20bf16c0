"""Any interleaving of two storages on one log leaves both equal to an independent model."""

from __future__ import annotations

from pathlib import Path
import shutil
import tempfile
from typing import ClassVar
from unittest import TestCase

from hypothesis import HealthCheck, settings

from backends import BACKENDS, SERVER_BACKENDS, Backend
from trialstore.testing.machine import StorageMachine

_SETTINGS = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class _BackendMachine(StorageMachine):
    backend: ClassVar[Backend]

    def prepare(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="trialstore-machine-"))
        self.capabilities = self.backend.capabilities
        self.open_storage = self.backend.prepare(self.folder)

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def _test_case(backend: Backend, keeps_ids_apart: bool) -> type[TestCase]:
    body = {"backend": backend, "keeps_ids_apart": keeps_ids_apart}
    case: type[TestCase] = type("Machine", (_BackendMachine,), body).TestCase
    case.settings = _SETTINGS  # type: ignore[attr-defined]
    return type(backend.name, (case,), {"pytestmark": list(backend.marks)})


def _name(backend: Backend) -> str:
    return "".join(part.capitalize() for part in backend.name.split("-"))


for _backend in (*BACKENDS, *SERVER_BACKENDS):
    if _backend.capabilities.shared:
        globals()[f"TestMachineOn{_name(_backend)}"] = _test_case(_backend, True)
    if _backend.capabilities.shared and _backend.capabilities.reuses_ids:
        globals()[f"TestMachineWithReusedIdsOn{_name(_backend)}"] = _test_case(_backend, False)
