"""What lines say: many whole ones at once, an odd one by itself.

Source: docs/formats/journal.md.
"""

from __future__ import annotations

from collections.abc import Callable
import json
from typing import Any, TypeVar

from trialstore.records import (
    RECORD_START,
    checksum_matches,
    checksums_match,
    counts_for_nothing,
    decode_line,
    decode_lines,
)

_T = TypeVar("_T")

# The slow path, told how to decode one line: it finds the record behind a torn prefix, and damage.
OneByOne = Callable[[Callable[[bytes], _T]], list[_T]]
# (whole lines, their slow path; None for our own, of which none is odd) -> one each
Decode = Callable[[bytes, OneByOne[_T] | None], list[_T]]


def decode_chunk(lines: bytes, one_by_one: OneByOne[Any] | None) -> list[Any]:
    """The operations in whole lines."""
    count = lines.count(b"\n")
    try:
        records = decode_lines(lines)
        if len(records) == count and (one_by_one is None or checksums_match(lines, count)):
            return records
    except ValueError:
        pass
    if one_by_one is None:
        return [decode_line(line) for line in lines.split(b"\n")[:-1]]
    return one_by_one(decode_line)


def decode_dicts(
    lines: bytes, one_by_one: OneByOne[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """The dictionaries in whole lines, with every field that they have."""
    if one_by_one is None:
        return [json.loads(line) for line in lines.split(b"\n")[:-1]]
    return one_by_one(json.loads)


def decode_checked(line: bytes, decode: Callable[[bytes], _T]) -> _T:
    """What a line without its newline says. Raises ValueError, also for a wrong checksum."""
    line = line.lstrip(b" ")
    if checksum_matches(line) is False:
        raise ValueError("the checksum does not match")
    return decode(line)


def glued_at(line: bytes) -> int:
    """Where the one whole record of a line with a torn prefix begins; 0 if it is no such line."""
    for start in RECORD_START.finditer(line, 1):
        try:
            decode_checked(line[start.start() :], decode_line)
        except (ValueError, RecursionError):
            continue
        return start.start() if counts_for_nothing(line[: start.start()]) else 0
    return 0
