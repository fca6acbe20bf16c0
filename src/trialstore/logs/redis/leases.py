"""Who lives: a hash of owners, told and compared by the server's clock.

Source: docs/formats/redis.md, docs/heartbeats.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from trialstore.logs.redis.connection import Connection
from trialstore.records import AnyOperation, owners_of_started

# In milliseconds.
_NOW_MS: Final = (
    "local time = redis.call('TIME') local now_ms = time[1] * 1000 + math.floor(time[2] / 1000) "
)
_RENEW_SCRIPT: Final = (
    f"{_NOW_MS} for _, owner in ipairs(ARGV) do "
    "redis.call('HSET', KEYS[1], owner, string.format('%d', now_ms)) end"
)
_AGES_SCRIPT: Final = (
    f"{_NOW_MS} local ages = redis.call('HMGET', KEYS[1], unpack(ARGV)) "
    "for i = 1, #ages do if ages[i] then ages[i] = now_ms - ages[i] end end return ages"
)
_OWNERS_MAX: Final = 1000  # a script takes only so many arguments apart


class Leases:
    """The leases of a journal; whoever calls holds the connection's ``mutex``.

    Args:
        connection: To the server that keeps them.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._key = connection.keys.leases
        self._taken: set[str] = set()

    def take(self, owner: str) -> None:
        """From now on what this owner starts renews its lease."""
        self._taken.add(owner)

    def withdraw(self, owner: str) -> None:
        """End a lease."""
        self._taken.discard(owner)
        self._connection.ask(lambda door: door.command("HDEL", self._key, owner))

    def renew(self, owners: Sequence[str]) -> None:
        """Say that these live."""
        command = ("EVAL", _RENEW_SCRIPT, 1, self._key, *owners)
        self._connection.ask(lambda door: door.command(*command))

    def owners_of(self, records: Sequence[AnyOperation]) -> list[str]:
        """Those whose leases cover trials that these records create or claim."""
        return sorted(owners_of_started(records) & self._taken) if self._taken else []

    def expired(self, running: Mapping[int, str], grace_period_s: float) -> list[int]:
        """Those of the trials whose owner has a lease that is older than that."""
        owners = sorted({owner for owner in running.values() if owner})
        dead: set[str] = set()
        for first in range(0, len(owners), _OWNERS_MAX):
            some = owners[first : first + _OWNERS_MAX]
            dead |= {
                owner
                for owner, age_ms in zip(some, self._ages_ms(some), strict=True)
                if age_ms is not None and age_ms > grace_period_s * 1000
            }
        return [trial_id for trial_id, owner in running.items() if owner in dead]

    def _ages_ms(self, owners: Sequence[str]) -> list[Any]:
        command = ("EVAL", _AGES_SCRIPT, 1, self._key, *owners)
        ages: list[Any] = self._connection.ask(lambda door: door.command(*command))
        return ages
