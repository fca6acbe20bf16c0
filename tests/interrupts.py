"""Ctrl-C at a chosen moment of a call."""

from __future__ import annotations

from collections.abc import Callable
import sys
from types import FrameType


def is_interrupted_at(moment: int, use: Callable[[], object], *folders: str) -> bool:
    """Call ``use`` and raise KeyboardInterrupt in it at a moment of code in the folders.

    The interpreter looks for signals as a function begins and after a call of one in C; these
    are the moments, counted from 1.

    Returns:
        Whether there are so many.
    """
    left = moment

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        code = frame.f_code
        if code.co_name == "<genexpr>":
            return  # as it is closed, nobody hears of it
        if event in ("call", "c_return") and code.co_filename.startswith(folders):
            left -= 1
            if left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        use()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    # Not whether it was seen: what interrupts a finalizer is not raised by anything.
    return left <= 0
