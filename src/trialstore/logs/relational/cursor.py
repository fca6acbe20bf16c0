"""How far a replica has followed each study, so that a poll costs what changed.

Ids appear in commit order within a study (whoever creates a trial holds the study's row until the
commit), so two marks say everything: up to ``all_id`` every trial has been sent; up to
``seen_id`` it is known which trials were unfinished. Unfinished trials may change, so they are
kept by id: RUNNING ones in ``held`` whatever became of them, until their finished image has been
sent; WAITING ones as ranges, because there may be thousands.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
import itertools
from typing import Any, Final

import msgspec

Ranges = tuple[tuple[int, int], ...]

RANGES_MAX: Final = 64
"""More ranges than this are merged, which costs rows that turn out not to be WAITING."""


class Probe(msgspec.Struct, frozen=True, array_like=True):
    """A trial by which a study is recognised where ids are used again after a delete.

    Args:
        trial_id: A finished one if there is one, else a RUNNING one; of those the newest.
        number: Its number.
        start: As the column has it; empty for a trial that was WAITING, whose start may change.
        rank: 2 finished, 1 RUNNING, 0 WAITING.
    """

    trial_id: int
    number: int
    start: str
    rank: int


class StudyCursor(msgspec.Struct, frozen=True, array_like=True):
    """How far one study has been followed.

    Args:
        name: Its name, which never changes.
        digest: Hash of its last image.
        directions: As the column has them, which never change either.
        all_id: Every trial up to this id has been sent; 0 for none.
        seen_id: Up to this id unfinished trials are known; never less than ``all_id``.
        last_id: The greatest id of a trial of this study met so far.
        held: Ids of trials that were RUNNING when last seen.
        waiting: Ids of trials sent as WAITING, from and to, both included.
        probe: Where ids are used again.
        has_gaps: Whether ``waiting`` holds ids of which nothing is known, too.
    """

    name: str
    digest: bytes
    directions: tuple[str, ...]
    all_id: int = 0
    seen_id: int = 0
    last_id: int = 0
    held: tuple[int, ...] = ()
    waiting: Ranges = ()
    probe: Probe | None = None
    has_gaps: bool = False

    def holds(self, trial_id: int) -> bool:
        """Whether it is among the trials that were unfinished when last seen."""
        return trial_id in self.held or holds_id(self.waiting, trial_id)

    def is_still(
        self, name: str, directions: str | None, trial_id: int | None, number: int, start: str
    ) -> bool:
        """Whether this study is meant by a row of ``statements.incarnations``."""
        objectives = [one.partition(":") for one in directions.split(",")] if directions else []
        objectives.sort(key=lambda one: int(one[0]))
        if (name, tuple([one[2] for one in objectives])) != (self.name, self.directions):
            return False
        probe = self.probe
        if probe is None:
            return True
        known = (probe.trial_id, probe.number, probe.start or start)
        return (trial_id, number, start) == known


Studies = dict[int, StudyCursor]
"""The whole cursor: studies by id. Never edited; ``None`` is START."""


def read_cursor(cursor: Any) -> Studies:
    """The cursor as given back by a caller, who may have sent it through msgpack."""
    if cursor is None:
        return {}
    # There may be thousands, which are converted all or none.
    if type(cursor) is dict and all(
        type(s) is StudyCursor for s in itertools.islice(cursor.values(), 1)
    ):
        return cursor
    return msgspec.convert(cursor, Studies, strict=False)


def without_ids(ranges: Ranges, ids: Iterable[int]) -> Ranges:
    """The ranges with some ids taken out."""
    result = list(ranges)
    for one in ids:
        at = bisect_right(result, (one, 1 << 62)) - 1
        if at < 0 or not result[at][0] <= one <= result[at][1]:
            continue
        low, high = result[at]
        result[at : at + 1] = [
            part for part in ((low, one - 1), (one + 1, high)) if part[0] <= part[1]
        ]
    return tuple(result)


def with_ids(ranges: Ranges, ids: Iterable[int]) -> tuple[Ranges, bool]:
    """The ranges with some ids put in, and whether others came in with them."""
    parts = sorted([*ranges, *((one, one) for one in ids)])
    result: list[tuple[int, int]] = []
    for low, high in parts:
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(result[-1][1], high))
        else:
            result.append((low, high))
    are_merged = len(result) > RANGES_MAX
    while len(result) > RANGES_MAX:
        gaps = [(result[i + 1][0] - result[i][1], i) for i in range(len(result) - 1)]
        for i in sorted((i for _, i in sorted(gaps)[: len(result) - RANGES_MAX]), reverse=True):
            result[i : i + 2] = [(result[i][0], result[i + 1][1])]
    return tuple(result), are_merged


def n_ids(ranges: Ranges) -> int:
    """How many ids are in ranges."""
    return sum(high - low + 1 for low, high in ranges)


def split(ranges: Ranges, count: int) -> tuple[Ranges, Ranges]:
    """The first ``count`` ids, and the others."""
    first: list[tuple[int, int]] = []
    for at, (low, high) in enumerate(ranges):
        if high - low + 1 > count:
            if count:
                first.append((low, low + count - 1))
            return tuple(first), ((low + count, high), *ranges[at + 1 :])
        first.append((low, high))
        count -= high - low + 1
    return ranges, ()


def holds_id(ranges: Ranges, one: int) -> bool:
    at = bisect_right(ranges, (one, 1 << 62)) - 1
    return at >= 0 and ranges[at][0] <= one <= ranges[at][1]
