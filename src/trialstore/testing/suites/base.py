"""What every part of the storage suite stands on: capabilities and the fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
from dataclasses import dataclass
import multiprocessing
import threading
import time
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.study import StudyDirection
import pytest

from trialstore.exchange import Exchanger
from trialstore.storage import Storage
from trialstore.testing.clock import ManualClock
from trialstore.testing.contents import Contents, storage_contents
from trialstore.testing.counting import CountingLog

OpenStorage = Callable[..., Storage]
"""Opens the store under test once more; takes ``linger_s``, ``max_staleness_s``, ``clock``."""

DEADLINE_S = 120.0
UNIT = FloatDistribution(0.0, 1.0)
CHOICES = CategoricalDistribution(["a", "b", None, 3, 4.5, True])
MINIMIZE = StudyDirection.MINIMIZE


@dataclass(frozen=True)
class Capabilities:
    """What a store can do; a test that needs more is skipped.

    Args:
        shared: Two storages can be open on it at the same time, and see each other.
        crosses_processes: So can storages of two processes; the opener can be pickled.
        lingers: Deferred writes reach the log by themselves after ``linger_s``.
        keeps_every_text: NUL and lone surrogates are stored.
        keeps_every_key: They are, as keys of attributes and names of parameters.
        keeps_negative_zero: -0.0 does not come back as 0.0.
        keeps_order: The parameters of a trial come back in the order of suggestion.
        keeps_objects: Attributes may be objects that are no JSON.
        keeps_microseconds: Times come back as they were given.
        keeps_leases: It knows which workers live, so that ``heartbeat_interval`` may be set.
        appends_conditionally: What is decided on the contents is appended only while they last.
        tells_only_news: What it answers is what changed, however many trials are unfinished.
        reuses_ids: An id of something deleted may be given out again.
        tells_equal_choices_apart: 1, True and 1.0 are three choices of a parameter.
        templates_bind: A parameter of a template must be compatible with later uses of its name.
        attribute_bytes_max: The largest JSON of an attribute.
    """

    shared: bool = True
    crosses_processes: bool = True
    lingers: bool = True
    keeps_every_text: bool = True
    keeps_every_key: bool = True
    keeps_negative_zero: bool = True
    keeps_order: bool = True
    keeps_objects: bool = False
    keeps_microseconds: bool = True
    keeps_leases: bool = True
    appends_conditionally: bool = True
    tells_only_news: bool = True
    reuses_ids: bool = False
    tells_equal_choices_apart: bool = True
    templates_bind: bool = True
    attribute_bytes_max: int = 16 << 20

    def as_kept(self) -> dict[str, bool]:
        """For ``contents.py``: what the store keeps, compared no more exactly than it does."""
        return {"exact": self.keeps_negative_zero, "in_order": self.keeps_order}


class SuiteBase:
    """Fixtures; a subclass supplies ``open_storage`` and, where it differs, ``capabilities``."""

    @pytest.fixture
    def open_storage(self) -> OpenStorage:
        """Opens one more storage on the same store at each call."""
        raise NotImplementedError("Supply an open_storage fixture.")

    @pytest.fixture
    def capabilities(self) -> Capabilities:
        return Capabilities()

    @pytest.fixture
    def opened(self, open_storage: OpenStorage) -> Iterator[OpenStorage]:
        """``open_storage``, closing at the end of the test what it opened."""
        storages: list[Storage] = []

        def open_one(**options: Any) -> Storage:
            storages.append(open_storage(**options))
            return storages[-1]

        yield open_one
        for storage in storages:
            with contextlib.suppress(Exception):  # a rejected record that the test was about
                storage.close()

    @pytest.fixture
    def storage(self, opened: OpenStorage) -> Storage:
        return opened()

    @pytest.fixture
    def study_id(self, storage: Storage) -> int:
        return storage.create_new_study([MINIMIZE], "study")

    @pytest.fixture
    def other(self, opened: OpenStorage, storage: Storage, capabilities: Capabilities) -> Storage:
        """A second storage on the store that ``storage`` has opened."""
        if not capabilities.shared:
            pytest.skip("The store has one storage.")
        return opened()

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    def lingering(
        self, opened: OpenStorage, capabilities: Capabilities, clock: ManualClock
    ) -> Storage:
        """A storage whose linger ends when the test advances ``clock`` by 1 s."""
        if not (capabilities.shared and capabilities.lingers):
            pytest.skip("The store has one storage, or does not linger.")
        return opened(linger_s=1.0, clock=clock)


def exchanger_of(storage: Storage) -> Exchanger:
    return storage._exchanger


def count_exchanges(storage: Storage) -> CountingLog:
    """Put a counter between a storage and its log."""
    exchanger = exchanger_of(storage)
    counter = CountingLog(exchanger.log)
    exchanger.log = counter
    return counter


def contents_in_a_fresh_process(open_storage: OpenStorage, **how: bool) -> dict[str, Contents]:
    """What a process that knows nothing reads from the store."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply_async(_read_contents, (open_storage, how)).get(DEADLINE_S)


def _read_contents(open_storage: OpenStorage, how: dict[str, bool]) -> dict[str, Contents]:
    storage = open_storage()
    try:
        return storage_contents(storage, **how)
    finally:
        storage.close()


def run_threads(*calls: Callable[[], object]) -> None:
    """Run the calls at once; what one of them raised is raised here."""
    errors: list[BaseException] = []

    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll; the deadline is generous and only a broken promise reaches it."""
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, f"never happened: {what}"
        time.sleep(0.002)
