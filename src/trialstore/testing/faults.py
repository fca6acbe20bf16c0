"""The faults and counters that tests inject, under one name each."""

from __future__ import annotations

from trialstore.testing.clock import ManualClock
from trialstore.testing.counting import CountingLog
from trialstore.testing.proxy import CountingProxy
from trialstore.testing.syncs import SyncCounter, SyncTrace, count_syncs, mark_syncs

__all__ = [
    "CountingLog",
    "CountingProxy",
    "ManualClock",
    "SyncCounter",
    "SyncTrace",
    "count_syncs",
    "mark_syncs",
]
