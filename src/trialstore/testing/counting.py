"""A log between a storage and its log that counts exchanges and makes some of them fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
import functools
from typing import Any

from trialstore.errors import LogUnavailableError, OutcomeUnknownError
from trialstore.log import Batch, Cursor, Log, Wanted
from trialstore.records import AnyOperation


class CountingLog:
    """Passes everything on to ``inner``, its capabilities included.

    Args:
        inner: Any log.

    Attributes:
        appended: The records of each exchange, in order.
        wanted: What each exchange wanted.
        n_news: How many records came back, over all exchanges.
        used: How often each method of a capability was called, by name.
    """

    def __init__(self, inner: Log) -> None:
        self.inner = inner
        self.appended: list[tuple[AnyOperation, ...]] = []
        self.wanted: list[Wanted] = []
        self.n_news = 0
        self.used: Counter[str] = Counter()
        self._failures: dict[int, bool] = {}
        self._bind_capabilities()

    def _bind_capabilities(self) -> None:
        """On the instance: protocols that are checked at run time don't see ``__getattr__``."""
        for name in dir(self.inner):
            if name.startswith("_") or hasattr(type(self), name) or name in self.__dict__:
                continue
            member = getattr(self.inner, name)
            counted = functools.partial(self._use, name, member) if callable(member) else member
            self.__dict__[name] = counted

    def _use(self, name: str, method: Callable[..., Any], *args: Any) -> Any:
        self.used[name] += 1
        return method(*args)

    def __getstate__(self) -> dict[str, Any]:
        own = ("inner", "appended", "wanted", "n_news", "used", "_failures")
        return {name: self.__dict__[name] for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind_capabilities()

    @property
    def n_exchanges(self) -> int:
        return len(self.wanted)

    @property
    def n_records(self) -> int:
        return sum(map(len, self.appended))

    def reset(self) -> None:
        """Count from 0 again; failures that were ordered are forgotten."""
        self.appended.clear()
        self.wanted.clear()
        self.n_news = 0
        self.used.clear()
        self._failures.clear()

    def fail_before(self, k: int = 1) -> None:
        """Let the ``k``-th exchange from now raise LogUnavailableError, nothing appended."""
        self._failures[self.n_exchanges + k] = False

    def fail_after(self, k: int = 1) -> None:
        """Let the ``k``-th exchange from now append, lose its answer, and raise
        OutcomeUnknownError."""
        self._failures[self.n_exchanges + k] = True

    def exchange(self, records: Sequence[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``Log.exchange``."""
        self.appended.append(tuple(records))
        self.wanted.append(wanted)
        after = self._failures.pop(self.n_exchanges, None)
        if after is False:
            raise LogUnavailableError("The test cut this exchange before it was sent.")
        batch = self.inner.exchange(records, cursor, wanted)
        self.n_news += len(batch.news)
        if after:
            raise OutcomeUnknownError("The test lost the answer of this exchange.")
        return batch

    def close(self) -> None:
        """See ``Log.close``."""
        self.inner.close()
