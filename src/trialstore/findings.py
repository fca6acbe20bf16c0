"""What is wrong in a store: what, where, how bad. ``stores/check.py`` collects, logs contribute.

Severities:

* ``note``: what a crash leaves behind and the next writer mends; nothing acknowledged is missing;
* ``warning``: readers pass over it, and something that was written is not seen;
* ``error``: the store can't be read, or says something that can't be true.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["note", "warning", "error"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong.

    Args:
        kind: What, in a word that scripts may compare, such as ``torn-tail``.
        where: File and byte offset, key, or table and row; study and trial.
        message: A sentence for people.
        severity: How bad.
    """

    kind: str
    where: str
    message: str
    severity: Severity = "error"
