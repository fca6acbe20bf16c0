"""The names of a journal's keys. Source: docs/formats/redis.md."""

from __future__ import annotations


class Keys:
    """The keys of the journal with a prefix; the first two are Optuna's as well.

    Args:
        prefix: What all of them begin with.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.number = f"{prefix}:log_number"
        self.records = f"{prefix}:log:"
        self.optuna_snapshot = f"{prefix}:snapshot"
        self.complete = f"{prefix}:trialstore:complete"
        self.turn = f"{prefix}:trialstore:turn"
        self.leases = f"{prefix}:trialstore:leases"
        self.snapshot = f"{prefix}:trialstore:snapshot"
        self.lock = f"{prefix}:trialstore:snapshot_lock"
        self.stale = f"{prefix}:trialstore:stale"
        self.compacting = f"{prefix}:trialstore:compacting"
        self.base = f"{prefix}:trialstore:base"

    def record(self, number: int) -> str:
        return f"{self.records}{number}"

    def new(self, number: int | str) -> str:
        """Of a record that a compaction writes beside the journal."""
        return f"{self.prefix}:trialstore:new:{number}"


def has_hash_tag(prefix: str) -> bool:
    """Whether every key that begins with ``prefix`` is in one slot of a cluster."""
    _, brace, rest = prefix.partition("{")
    tag, closed, _ = rest.partition("}")
    return bool(brace and closed and tag)
