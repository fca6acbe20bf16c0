"""Values that storages tend to lose: each of them must come back as it was."""

from __future__ import annotations

import math
import sys
from typing import Any, Final

ODD_FLOATS: Final = (
    math.nan,
    math.inf,
    -math.inf,
    -0.0,
    0.0,
    5e-324,
    -5e-324,
    sys.float_info.min,
    sys.float_info.max,
    -sys.float_info.max,
    0.1 + 0.2,
    1 / 3,
    float(2**53 + 2),
)
"""Every one a legal intermediate value; all but NaN legal objective values."""

ODD_ATTRIBUTES: Final[dict[str, Any]] = {
    "none": None,
    "true": True,
    "false": False,
    "zero": 0,
    "minus zero": -0.0,
    "largest": 2**63 - 1,
    "smallest": -(2**63),
    "unsigned": 2**64 - 1,
    "subnormal": 5e-324,
    "exact": 0.1 + 0.2,
    "empty list": [],
    "empty dict": {},
    "empty text": "",
    "nested": {"a": [1, 2.5, None, {"b": [True, "c"]}], "": "empty key"},
    "float that looks like an int": 1.0,
    "digits": "0123",
    "quotes": "\"'`\\\\%s%%{}$",
    "lines": "a\nb\r\nc\u2028d\u0085e\tf",
    "wide": "żółć 日本語 🏳️‍🌈 \U0010ffff",
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "nans": [math.nan, {"x": -math.inf}],
    "": "an empty key",
    "k" * 512: "a long key",
}
"""JSON as Python has it, NaN and infinities included."""

ODD_TEXTS: Final = ("a\x00b", "\x00", "\ud800", "\udfff\ud800 pair the wrong way", "\x7f\x1b[0m")
"""Texts that not every column can hold."""
