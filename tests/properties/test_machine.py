"""Any interleaving of two storages on one log leaves both equal to an independent model."""

from __future__ import annotations

import functools
from pathlib import Path
import pickle
import shutil
import tempfile
from typing import ClassVar
from unittest import TestCase

from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import precondition, rule

from backends import BACKENDS, SERVER_BACKENDS, Backend
from trialstore import journal
from trialstore.log import TrimmableLog
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
        if self.backend.open_plain is not None:
            self.open_plain = functools.partial(self.backend.open_plain, *self.open_storage.args)

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


class _CompactingMachine(_BackendMachine):
    """Now and then somebody else compacts the journal, or trims it.

    A worker of Optuna's would not survive that; who opens a compacted one reads it, not a trimmed.
    """

    plain_writes = False

    @precondition(lambda self: self.model.studies)
    @rule(trims=st.booleans())
    def compact(self, trims: bool) -> None:
        log = pickle.loads(pickle.dumps(self.storages[0]._exchanger.log))
        change = journal.trim if trims and isinstance(log, TrimmableLog) else journal.compact
        change(log)
        log.close()
        self._leave_plain()
        self.plain_reads = change is journal.compact


def _test_case(
    backend: Backend, keeps_ids_apart: bool, *, is_compacted: bool = False
) -> type[TestCase]:
    body = {"backend": backend, "keeps_ids_apart": keeps_ids_apart}
    machine = _CompactingMachine if is_compacted else _BackendMachine
    case: type[TestCase] = type("Machine", (machine,), body).TestCase
    n_runs = 15 if is_compacted else backend.machine_runs
    case.settings = settings(_SETTINGS, max_examples=n_runs)  # type: ignore[attr-defined]
    return type(backend.name, (case,), {"pytestmark": list(backend.marks)})


def _name(backend: Backend) -> str:
    return "".join(part.capitalize() for part in backend.name.split("-"))


for _backend in (*BACKENDS, *SERVER_BACKENDS):
    if _backend.capabilities.shared:
        globals()[f"TestMachineOn{_name(_backend)}"] = _test_case(_backend, True)
    if _backend.capabilities.shared and _backend.capabilities.reuses_ids:
        globals()[f"TestMachineWithReusedIdsOn{_name(_backend)}"] = _test_case(_backend, False)
    if _backend.name in ("journal-file", "journal-redis"):
        globals()[f"TestMachineThatCompacts{_name(_backend)}"] = _test_case(
            _backend, True, is_compacted=True
        )
