"""What a storage promises beyond Optuna's own suite, as tests that any storage of ours can run.

Subclass :class:`StorageSuite` and supply the ``open_storage`` fixture, and ``capabilities`` where
the store can do less::

    class TestMyStorage(StorageSuite):
        @pytest.fixture
        def open_storage(self, tmp_path):
            return functools.partial(open_my_storage, tmp_path / "store")

``open_storage`` takes the options ``linger_s``, ``max_staleness_s`` and ``clock``, and can be
pickled, so that other processes open the store as well. Optuna's suite is
``optuna.testing.pytest_storages.StorageTestCase`` (from 4.7 on); run both.
"""

from __future__ import annotations

from trialstore.testing.suites.base import Capabilities, OpenStorage
from trialstore.testing.suites.counts import CountSuite
from trialstore.testing.suites.heartbeats import AgeLeases
from trialstore.testing.suites.outbox import OutboxSuite
from trialstore.testing.suites.processes import ProcessSuite
from trialstore.testing.suites.queueing import QueueSuite
from trialstore.testing.suites.reads import ReadSuite
from trialstore.testing.suites.refusals import RefusalSuite
from trialstore.testing.suites.values import ValueSuite

__all__ = ["AgeLeases", "Capabilities", "OpenStorage", "StorageSuite"]


class StorageSuite(
    RefusalSuite, ReadSuite, OutboxSuite, ValueSuite, ProcessSuite, CountSuite, QueueSuite
):
    """Every promise of DESIGN.md sections 2, 5 and 6 that one store alone can keep."""
