"""Files of other users and groups, which only the superuser can make."""

from __future__ import annotations

import os

import pytest

OWNER, GROUP = 12345, 23456  # of nobody

as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="gives files to other users"
)


def may_not_chown(monkeypatch: pytest.MonkeyPatch, *, is_of_group: bool) -> None:
    """As for a user who is not root, and may be in the journal's group."""
    fchown = os.fchown

    def refuse(fd: int, owner: int, group: int) -> None:
        if owner != -1 or not is_of_group:
            raise PermissionError(1, "Operation not permitted")
        fchown(fd, owner, group)

    monkeypatch.setattr(os, "fchown", refuse)
