"""``InMemoryStorage``: a storage for one process, over a list."""

from __future__ import annotations

import math
from typing import Any

from trialstore.clock import CLOCK, Clock
from trialstore.logs.memory import MemoryLog
from trialstore.records import Record
from trialstore.storage import Storage


class InMemoryStorage(Storage):
    """Studies that live as long as this object; pickling it carries them along.

    Attributes and categorical choices may be any objects. For one process; ``JournalStorage`` on
    a file serves several.
    """

    def __init__(self, *, clock: Clock = CLOCK) -> None:
        # Nobody else reads the list, so a deferred write may wait until somebody here reads.
        super().__init__(
            MemoryLog(keep_all=False, clock=clock),
            linger_s=math.inf,
            keep_objects=True,
            clock=clock,
        )

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        with self._exchanger.mutex:
            replica = self._replica
            images: list[Record] = [replica.study_image(id_) for id_ in replica.study_ids()]
            images.append(replica.positions())
            for study_id in replica.study_ids():
                images += replica.param_images(study_id)
                images += replica.trial_images(study_id)
        state["log"] = MemoryLog(images, keep_all=False, clock=self._clock)
        return state
