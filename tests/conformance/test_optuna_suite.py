"""Optuna's own suite for storages, unmodified, over every backend."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from pathlib import Path

import pytest

from backends import Backend, params
from trialstore.storage import Storage

pytest.importorskip(
    "optuna.testing.pytest_storages", reason="ships with Optuna from 4.7 on", exc_type=ImportError
)
from optuna.testing.pytest_storages import StorageTestCase

_COMPARE_TIMES = {
    "test_create_new_trial",
    "test_create_new_trial_with_template_trial",
    "test_get_trial",
    "test_get_all_trials",
}


def _compares_times(request: pytest.FixtureRequest) -> bool:
    name: str = request.function.__name__
    return name in _COMPARE_TIMES


class TestOptunaSuite(StorageTestCase):
    @pytest.fixture(params=params())
    def storage(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
        backend: Backend = request.param
        if not backend.capabilities.keeps_microseconds and _compares_times(request):
            # Optuna's own RDBStorage fails them there as well.
            request.node.add_marker(
                pytest.mark.xfail(
                    reason="MySQL's DATETIME columns keep whole seconds", strict=False
                )
            )
        name = request.function.__name__
        if not backend.capabilities.keeps_order and name == "test_get_all_trials_params_order":
            pytest.skip("The store keeps no order of parameters.")
        with contextlib.closing(backend.prepare(tmp_path)()) as storage:
            yield storage
