"""Who waits for a server that is away is told what for, and when it will be given up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from trialstore.errors import LogUnavailableError
from trialstore.log import NOTHING, START, Log
from trialstore.logs.grpc.client import GrpcLog
from trialstore.logs.redis import RedisLog
from trialstore.logs.relational import TablesLog
from trialstore.patience import Patience
from trialstore.testing.clock import ManualClock

_NOBODY = "127.0.0.1:9"


def test_pauses_grow_up_to_the_longest_and_end_at_the_deadline(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = ManualClock()
    patience = Patience("the server", clock, first_s=0.1, longest_s=1.0)
    paused_s = []
    while patience.pause(60.0, "it is away"):
        paused_s.append(clock.now_s() - sum(paused_s))
    expected_s = [0.1, 0.2, 0.4, 0.8, *[1.0] * (len(paused_s) - 4)]
    for pause_s, about_s in zip(paused_s, expected_s, strict=True):
        assert 0.5 * about_s <= pause_s <= 1.5 * about_s
    assert len(set(paused_s)) == len(paused_s), "with jitter"
    assert 58.5 <= clock.now_s() <= 60.0
    (told,) = caplog.messages
    assert told.startswith("the server can't be used now (it is away); trying again for 5")


def test_a_short_absence_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    patience = Patience("the server", clock, first_s=0.1, longest_s=1.0)
    while clock.now_s() < 3.5:
        assert patience.pause(60.0, "it is away")
    assert not caplog.messages


def _tables(url: str) -> Callable[[ManualClock], Log]:
    return lambda clock: TablesLog(url, clock=clock)


@pytest.mark.parametrize(
    "open_log",
    [
        lambda clock: GrpcLog("127.0.0.1", 9, clock=clock),
        lambda clock: RedisLog(f"redis://{_NOBODY}", clock=clock),
        _tables(f"postgresql+psycopg://user:s3cret@{_NOBODY}/name"),
        _tables(f"postgresql+psycopg2://user:s3cret@{_NOBODY}/name"),
        _tables(f"mysql+pymysql://user:s3cret@{_NOBODY}/name"),
    ],
    ids=["grpc", "redis", "psycopg", "psycopg2", "pymysql"],
)
def test_on_every_log_of_a_server(
    open_log: Callable[[ManualClock], Log],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("trialstore.patience._LONG_S", 2.0)
    with pytest.raises(LogUnavailableError):
        open_log(ManualClock()).exchange((), START, NOTHING)
    (told,) = caplog.messages
    assert "can't be used now" in told and ":9" in told and "s3cret" not in told
