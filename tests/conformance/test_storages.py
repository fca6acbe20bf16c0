"""Every backend keeps what ``StorageSuite`` promises beyond Optuna's own suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from ageing import age_leases
from backends import Backend, params
from trialstore.testing.storage_suite import (
    AgeLeases,
    Capabilities,
    OpenStorage,
    StorageSuite,
)


class TestStorages(StorageSuite):
    @pytest.fixture(params=params())
    def backend(self, request: pytest.FixtureRequest) -> Backend:
        backend: Backend = request.param
        return backend

    @pytest.fixture
    def capabilities(self, backend: Backend) -> Capabilities:
        return backend.capabilities

    @pytest.fixture
    def open_storage(self, backend: Backend, tmp_path: Path) -> OpenStorage:
        return backend.prepare(tmp_path)

    @pytest.fixture
    def age_leases(self, backend: Backend) -> AgeLeases:
        if not backend.capabilities.keeps_leases:
            pytest.skip("The log keeps no leases.")
        return age_leases
