"""Times mean the same on both sides of every clock change."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from datetime import datetime, timedelta, timezone
import os
import time

import pytest

from trialstore.records import STORES_UTC, format_time, parse_time


@pytest.fixture(params=["UTC", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe"])
def zone(request: pytest.FixtureRequest) -> Iterator[str]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = request.param
    time.tzset()
    yield request.param
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


def test_every_quarter_of_an_hour_of_a_year_is_read_as_optuna_reads_it(zone: str) -> None:
    moment = datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=timezone.utc)
    for _ in range(365 * 96):
        expected = moment.astimezone().replace(tzinfo=None)
        found = parse_time(moment.isoformat(timespec="microseconds"))
        assert found == expected
        moment += timedelta(minutes=15)


@pytest.mark.skipif(not STORES_UTC, reason="Optuna 4 writes local time, which may happen twice")
def test_a_time_that_was_read_is_written_as_it_was(zone: str) -> None:
    moment = datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=timezone.utc)
    for _ in range(365 * 96):
        text = moment.isoformat(timespec="microseconds")
        assert format_time(parse_time(text)) == text
        moment += timedelta(minutes=15)


@pytest.mark.parametrize(
    "text", ["2026-03-01T12:00:00.000001", "2026-03-01T12:00:00", "2026-03-01 12:00"]
)
def test_a_time_without_an_offset_is_local(zone: str, text: str) -> None:
    assert parse_time(text) == datetime.fromisoformat(text)


@pytest.mark.parametrize(
    "text", ["", "soon", "2026-13-01T12:00:00.000000+00:00", "x" * 26 + "+00:00"]
)
def test_a_text_that_is_no_time_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_time(text)


@pytest.mark.parametrize(
    "text", ["0001-01-01T00:00:00.000000+00:00", "9999-12-31T23:00:00.000000+00:00"]
)
def test_at_the_ends_of_the_calendar_a_time_is_read_or_a_value_error(zone: str, text: str) -> None:
    expected = None
    with contextlib.suppress(ValueError, OverflowError):
        expected = datetime.fromisoformat(text).astimezone().replace(tzinfo=None)
    if expected is None:
        with pytest.raises(ValueError, match="no time here"):
            parse_time(text)
    else:
        assert parse_time(text) == expected
