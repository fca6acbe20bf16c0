"""Lost replies, killed servers, cut networks: a write is applied once, and nobody is told."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import itertools
import math
import multiprocessing
import os
from pathlib import Path
import pickle
import random
import threading
from typing import Any

import grpc
import optuna
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

from ageing import age_leases
from grpc_servers import KillableServer, open_grpc, serve, served_url
from servers import free_port
import trialstore
from trialstore import records as r
from trialstore.errors import LogCorruptError, LogUnavailableError, OutcomeUnknownError
from trialstore.log import NOTHING, START, Batch, Cursor, Wanted
from trialstore.logs.file import FileLog, system
from trialstore.logs.grpc import (
    client,
    judged as judged_share,
    payload,
    sequential as sequential_share,
    settle,
)
from trialstore.logs.grpc.client import GrpcLog
from trialstore.logs.grpc.generated import log_pb2 as pb
from trialstore.logs.grpc.judged import JudgedShare
from trialstore.logs.grpc.sequential import SequentialShare
from trialstore.logs.grpc.share import Request
from trialstore.logs.grpc.sharing import ShareLog, share_of
from trialstore.logs.relational import reading
from trialstore.logs.relational.log import TablesLog
from trialstore.records import Verdict
from trialstore.storage import Storage
from trialstore.testing.clock import ManualClock
from trialstore.testing.contents import study_contents
from trialstore.testing.counting import CountingLog
from trialstore.testing.proxy import CountingProxy
from trialstore.testing.suites.base import run_threads
from trialstore.testing.syncs import SyncCounter

_KINDS = ["journal", "sqlite", pytest.param("psycopg", marks=pytest.mark.servers)]
_DEADLINE_S = 120.0
_UNIT = FloatDistribution(0.0, 1.0)


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0.0, 1.0)
    trial.set_user_attr("number", trial.number)
    return x


def work(port: int, n_trials: int, seed: int) -> None:
    """A worker process that knows nothing of what befalls the server."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # How long a server takes to start depends on the machine; nobody here gives up before.
    options = {"call_timeout_s": 3.0, "retry_deadline_s": 600.0}
    with contextlib.closing(open_grpc(port, **options)) as storage:
        study = optuna.load_study(
            study_name="s", storage=storage, sampler=optuna.samplers.RandomSampler(seed=seed)
        )
        study.optimize(objective, n_trials=n_trials)


def assert_whole(storage: Storage, n_trials: int) -> None:
    """Exactly so many results: no ghost, no double, nothing missing."""
    study_id = storage.get_study_id_from_name("s")
    trials = storage.get_all_trials(study_id)
    assert [trial.number for trial in trials] == list(range(n_trials))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    for trial in trials:
        assert trial.user_attrs == {"number": trial.number}
        assert trial.values == [trial.params["x"]]


# --- replies that are lost -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", _KINDS)
def test_replies_lost_one_by_one_leave_every_write_applied_once(kind: str, tmp_path: Path) -> None:
    port = serve(served_url(kind, tmp_path))
    with CountingProxy("localhost", port) as proxy:
        storage = open_grpc(proxy.port, linger_s=0.0)
        study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
        for number in range(12):
            for k in (1, 2):
                # The handshake of HTTP/2 is a reply as well: cut it now, and the answer then.
                proxy.cut_at_reply(k)
                trial_id = storage.create_new_trial(study_id)
                storage.set_trial_param(trial_id, "x", number / 12, _UNIT)
                proxy.cut_at_reply(k)
                storage.set_trial_user_attr(trial_id, "number", 2 * number + k - 1)
                proxy.cut_at_reply(k)
                storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [number / 12])
        storage.close()
    assert_whole(open_grpc(port), 24)


def test_a_claim_whose_answer_is_lost_is_this_client_s(tmp_path: Path) -> None:
    for kind in ("journal", "sqlite"):
        port = serve(served_url(kind, tmp_path))
        with CountingProxy("localhost", port) as proxy:
            storage = open_grpc(proxy.port)
            study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
            template = optuna.trial.create_trial(state=TrialState.WAITING)
            trial_id = storage.create_new_trial(study_id, template)
            proxy.cut_at_reply(1)
            assert storage.set_trial_state_values(trial_id, TrialState.RUNNING)
            assert proxy.was_cut
            assert not open_grpc(port).set_trial_state_values(trial_id, TrialState.RUNNING)
            storage.close()


def test_a_network_that_swallows_everything_for_a_while_is_survived(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cut_s = 5.0 if request.config.getoption("--soak") else 0.5
    port = serve(served_url("journal", tmp_path))
    with CountingProxy("localhost", port) as proxy:
        storage = open_grpc(proxy.port, call_timeout_s=0.2)
        study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
        for direction in ({"replies": False}, {"requests": False}, {}):
            proxy.swallow(**direction)
            thread = threading.Timer(cut_s, proxy.pass_on)
            thread.start()
            trial_id = storage.create_new_trial(study_id)
            thread.join()
            storage.set_trial_state_values(trial_id, TrialState.FAIL)
        assert len(storage.get_all_trials(study_id)) == 3
        storage.close()


def test_without_a_server_nothing_was_stored_and_the_error_says_so() -> None:
    storage = open_grpc(free_port(), retry_deadline_s=0.3)
    with pytest.raises(LogUnavailableError, match="nothing was stored"):
        storage.create_new_study([StudyDirection.MINIMIZE], "s")


class _Pauses(ManualClock):
    """Time that passes in pauses only, which are written down."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses_s: list[float] = []

    def sleep(self, duration_s: float) -> None:
        self.pauses_s.append(duration_s)
        self.advance(duration_s)


def test_clients_whose_server_is_gone_come_back_seldom_and_not_all_at_once() -> None:
    port = free_port()
    waits = []
    for _ in range(20):
        clock = _Pauses()
        log = GrpcLog("localhost", port, retry_deadline_s=30.0, clock=clock)
        with contextlib.closing(log), pytest.raises(LogUnavailableError):
            log.exchange([], START, NOTHING)
        waits.append(clock.pauses_s)
    # Each waits longer and longer, two seconds on average in the end.
    assert all(len(pauses) < 40 for pauses in waits)
    assert all(1.0 <= pauses[-1] <= 3.0 for pauses in waits)
    # Those who lost their server together are apart from the first attempt on, and more and more.
    for attempt in range(10):
        moments = sorted(sum(pauses[: attempt + 1]) for pauses in waits)
        assert len(set(moments)) == len(moments)
        assert moments[-1] - moments[0] > 0.02 * 1.5**attempt


class _Lost(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return ""

    def trailing_metadata(self) -> None:
        return None


class _Stream:
    """The client's side of a stream, over a line that takes 7 s for a part.

    Args:
        n_parts: What comes before it ends.
        end: How: it is over, it breaks off, or nothing comes any more until it is cancelled.
        timeout: As gRPC's, of the call as a whole.
    """

    def __init__(
        self, clock: ManualClock, n_parts: int, end: str = "", timeout: float | None = None
    ) -> None:
        self._clock, self._n_parts, self._end = clock, n_parts, end
        self._give_up_at = math.inf if timeout is None else clock.now_s() + timeout
        self._cancelled = threading.Event()

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> Any:
        if self._n_parts:
            self._n_parts -= 1
            self._clock.advance(7.0)
            if self._clock.now_s() > self._give_up_at:
                raise _Lost(grpc.StatusCode.DEADLINE_EXCEEDED)
            return pb.ExchangeReply(cursor=b"M\x07")
        if self._end == "breaks":
            raise _Lost(grpc.StatusCode.UNAVAILABLE)
        if self._end == "stands still":
            assert self._cancelled.wait(_DEADLINE_S)
            raise _Lost(grpc.StatusCode.CANCELLED)
        raise StopIteration

    def cancel(self) -> None:
        self._cancelled.set()


def _read(log: GrpcLog, monkeypatch: pytest.MonkeyPatch, streams: list[Any]) -> Cursor:
    """Read a study; ``streams``: arguments of ``_Stream``, for one attempt after the other."""

    def call(request: Any, *, metadata: Any, timeout: float | None = None) -> _Stream:
        return _Stream(log._clock, *streams.pop(0), timeout=timeout)  # type: ignore[arg-type]

    monkeypatch.setattr(log, "_call", lambda name: call)
    return log.exchange((), START, NOTHING).cursor


def test_a_read_takes_as_long_as_its_parts_keep_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    log = GrpcLog("localhost", 1, clock=ManualClock())
    assert _read(log, monkeypatch, [(50,)]) == b"M\x07"
    assert _read(log, monkeypatch, [(50, "breaks"), (51, "breaks"), (60,)]) == b"M\x07"


def test_a_read_that_comes_no_further_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    log = GrpcLog("localhost", 1, clock=ManualClock())
    streams = [(20, "breaks")] * 20
    with pytest.raises(LogUnavailableError):
        _read(log, monkeypatch, streams)
    assert len(streams) == 18


def test_a_read_that_stands_still_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    log = GrpcLog("localhost", 1, clock=ManualClock(), call_timeout_s=0.05)
    assert _read(log, monkeypatch, [(3, "stands still"), (5,)]) == b"M\x07"


def test_a_write_that_is_given_up_is_applied_once_when_it_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("journal", "sqlite"):
        port = serve(served_url(kind, tmp_path))
        with CountingProxy("localhost", port) as proxy:
            log: Any = GrpcLog("localhost", proxy.port)
            study = r.CreateStudy(worker_id="w", seq=0, study_name="s", directions=[1])
            first = log.exchange([study], START, NOTHING)
            outcome = first.outcomes[0].id if first.outcomes else 0
            create = r.CreateTrial(
                worker_id="w", seq=1, study_id=outcome, datetime_start=r.now_text()
            )
            proxy.swallow(requests=False)
            with monkeypatch.context() as patch, pytest.raises(OutcomeUnknownError):
                patch.setattr(log, "_retry_deadline_s", 0.5)  # which the others may need
                log.exchange([create], first.cursor, NOTHING)
            proxy.pass_on()
            log.exchange([create], first.cursor, NOTHING)
            log.close()
        assert len(open_grpc(port).get_all_trials(outcome)) == 1, kind


_LARGE = "x" * (9 << 20)
"""More than an answer holds; the rest is read."""


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_records_that_are_stored_are_not_called_not_stored_if_the_news_are_lost(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KillableServer(served_url(kind, tmp_path)) as server:
        other = open_grpc(server.port)
        study_id = other.create_new_study([StudyDirection.MINIMIZE], "s")
        log = GrpcLog("localhost", server.port, retry_deadline_s=5.0)
        first = log.exchange([], START, Wanted(studies=frozenset((study_id,))))
        other.set_study_user_attr(study_id, "k", _LARGE)
        wanted = Wanted(trials_of=frozenset((study_id,)))

        def killed_before(*args: Any) -> Any:
            server.kill()
            return GrpcLog._stream(log, *args)

        monkeypatch.setattr(log, "_stream", killed_before)
        create = _create(1, study_id)
        with pytest.raises(OutcomeUnknownError, match="are stored"):
            log.exchange([create], first.cursor, wanted)
        monkeypatch.undo()
        server.start()
        assert len(open_grpc(server.port).get_all_trials(study_id)) == 1
        # Who makes the same call with the same marks again gets what came of it.
        log.exchange([create], first.cursor, wanted)
        assert len(open_grpc(server.port).get_all_trials(study_id)) == 1
        log.close()
        other.close()


def test_what_was_refused_is_called_not_stored_if_the_news_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KillableServer(served_url("sqlite", tmp_path)) as server:
        other = open_grpc(server.port)
        study_id = other.create_new_study([StudyDirection.MINIMIZE], "s")
        log = GrpcLog("localhost", server.port, retry_deadline_s=5.0)
        wanted = Wanted(trials_of=frozenset((study_id,)))
        first = log.exchange([], START, wanted)

        def decide(news: Any, cursor: Cursor) -> Any:
            other.set_study_user_attr(study_id, "k", _LARGE)  # somebody comes between
            return [_create(1, study_id)]

        def killed_before(*args: Any) -> Any:
            server.kill()
            return GrpcLog._stream(log, *args)

        monkeypatch.setattr(log, "_stream", killed_before)
        with pytest.raises(LogUnavailableError, match="nothing was stored"):
            log.exchange_if(decide, first.cursor, wanted)
        server.start()
        assert open_grpc(server.port).get_all_trials(study_id) == []
        log.close()
        other.close()


def test_who_reports_keeps_nobody_from_appending_on_a_condition(tmp_path: Path) -> None:
    port = serve(served_url("sqlite", tmp_path))
    other, log = open_grpc(port, linger_s=0.0), GrpcLog("localhost", port)
    study_id = other.create_new_study([StudyDirection.MINIMIZE], "s")
    trial_id = other.create_new_trial(study_id)
    n_decided = 0

    def appended(change: Callable[[int], None], wanted: Wanted) -> int:
        """After how many decisions; during each of the first four somebody changes something."""
        nonlocal n_decided
        n_decided = 0

        def decide(news: Any, cursor: Cursor) -> Any:
            nonlocal n_decided
            n_decided += 1
            if n_decided < 5:
                change(n_decided)
            return [_create(next(numbers), study_id)]

        log.exchange_if(decide, START, wanted)
        return n_decided

    def report(step: int) -> None:
        other.set_trial_intermediate_value(trial_id, step, 0.5)
        other.set_trial_user_attr(trial_id, "k", step)
        other.set_trial_param(trial_id, f"x{step}", 0.5, _UNIT)

    def hold(number: int) -> None:
        other.set_trial_system_attr(trial_id, "slot", number)

    numbers = itertools.count(1)
    of_study = Wanted(trials_of=frozenset((study_id,)))
    assert appended(report, of_study) == 2  # the first time, all that is RUNNING is new
    assert appended(report, of_study | Wanted(trials=frozenset((trial_id,)))) == 5
    assert appended(report, of_study | Wanted(numbers=frozenset(((study_id, 0),)))) == 5
    assert appended(hold, of_study) == 5
    for one in (other, log):
        one.close()


def test_of_a_batch_that_goes_in_parts_the_first_is_not_called_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_REQUEST_BYTES_MAX", 1_000)
    with KillableServer(served_url("sqlite", tmp_path)) as server:
        study_id = open_grpc(server.port).create_new_study([StudyDirection.MINIMIZE], "s")
        log = GrpcLog("localhost", server.port, retry_deadline_s=5.0)
        send = log._send

        def then_killed(*args: Any) -> Any:
            reply = send(*args)
            server.kill()
            log.close()  # what is sent on a connection that looks open may have come
            return reply

        monkeypatch.setattr(log, "_send", then_killed)
        trials = [_create(seq, study_id, user_attrs={"k": "x" * 600}) for seq in (1, 2)]
        with pytest.raises(OutcomeUnknownError, match=r"are stored \(1\)"):
            log.exchange(trials, START, NOTHING)
        server.start()
        assert len(open_grpc(server.port).get_all_trials(study_id)) == 1
        log.close()


# --- what a server is asked before it is put off -------------------------------------------------


@pytest.mark.parametrize(
    ("text", "is_asked"),
    [
        ("x" * 20_000, False),
        ("x" * 65_000, True),
        ("字" * 15_000, True),  # 45,000 bytes in UTF-8, 90,000 in a column
        ("é" * 12_000, True),
        ("🎈" * 6_000, True),
        ("字" * 6_000, False),
    ],
)
def test_a_value_that_a_column_may_not_hold_is_asked_about(
    text: str, is_asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = GrpcLog("localhost", serve(served_url("sqlite", tmp_path)))
    asked: list[str] = []

    def noted(name: str, *args: Any) -> Any:
        asked.append(name)
        return GrpcLog._unary(log, name, *args)

    monkeypatch.setattr(log, "_unary", noted)
    log.check([r.SetTrialUserAttr(worker_id="w", seq=1, trial_id=1, user_attr={"k": text})])
    assert asked == ["Check"] * is_asked
    log.close()


def test_a_value_is_asked_about_while_another_thread_connects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = GrpcLog("localhost", serve(served_url("sqlite", tmp_path)))
    record = r.SetTrialUserAttr(worker_id="w", seq=1, trial_id=1, user_attr={"k": "v" * 30_000})
    answers: list[object] = []

    def check() -> None:
        try:
            answers.append(log.check([record]))
        except BaseException as error:
            answers.append(error)

    asking = threading.Thread(target=check)
    calls = client.calls

    def connect(*args: Any) -> Any:
        if asking.ident is None:
            asking.start()
            asking.join(0.1)  # or it waits for this one
        return calls(*args)

    monkeypatch.setattr(client, "calls", connect)
    log.exchange((), START, NOTHING)
    asking.join(_DEADLINE_S)
    assert answers == [None]
    log.close()


# --- servers that are killed ---------------------------------------------------------------------


@pytest.mark.timeout(3600)  # with --soak; how long a server takes to start depends on the machine
@pytest.mark.parametrize("kind", _KINDS)
def test_a_server_killed_again_and_again_loses_and_doubles_nothing(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    long = request.config.getoption("--soak")
    n_workers, n_trials = (8, 250) if long else (2, 60)
    with KillableServer(served_url(kind, tmp_path)) as server:
        storage = open_grpc(server.port)
        storage.create_new_study([StudyDirection.MINIMIZE], "s")
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=work, args=(server.port, n_trials, seed))
            for seed in range(n_workers)
        ]
        for worker in workers:
            worker.start()
        pause = random.Random(7)
        n_kills = 0
        while alive := [worker for worker in workers if worker.is_alive()]:
            alive[0].join(3.0 if long else pause.uniform(0.2, 1.0))
            if n_kills < 3 or long:
                server.kill()
                server.start()
                n_kills += 1
        assert [worker.exitcode for worker in workers] == [0] * n_workers
        assert n_kills
        assert_whole(storage, n_workers * n_trials)
        storage.close()


def test_sigterm_lets_running_calls_end_and_clients_go_on_with_the_next_server(
    tmp_path: Path,
) -> None:
    with KillableServer(served_url("journal", tmp_path)) as server:
        open_grpc(server.port).create_new_study([StudyDirection.MINIMIZE], "s")
        context = multiprocessing.get_context("spawn")
        worker = context.Process(target=work, args=(server.port, 60, 0))
        worker.start()
        journal = Path(server.url)
        for _ in range(3):
            size = journal.stat().st_size
            while worker.is_alive() and journal.stat().st_size == size:
                worker.join(0.05)
            assert server.stop() == 0
            server.start()
        worker.join()
        assert worker.exitcode == 0
        assert_whole(open_grpc(server.port), 60)


@pytest.mark.parametrize("kind", _KINDS)
def test_clients_may_switch_between_servers_on_one_log_at_any_call(
    kind: str, tmp_path: Path
) -> None:
    url = served_url(kind, tmp_path)
    first, second = serve(url), serve(url)
    storage = open_grpc(first)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
    log: Any = storage._exchanger.log
    for number in range(20):
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_user_attr(trial_id, "number", number)
        log._target = f"localhost:{second if number % 2 else first}"
        log.close()
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.0])
    numbers = [trial.user_attrs["number"] for trial in open_grpc(second).get_all_trials(study_id)]
    assert numbers == list(range(20))


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_lease_outlives_the_server_that_it_was_taken_at(kind: str, tmp_path: Path) -> None:
    with KillableServer(served_url(kind, tmp_path)) as server:
        options = {"heartbeat_interval": 60, "grace_period": 120, "retry_deadline_s": 600.0}
        worker = open_grpc(server.port, **options)
        study_id = worker.create_new_study([StudyDirection.MINIMIZE], "s")
        lost = [worker.create_new_trial(study_id)]
        server.kill()
        server.start()
        lost.append(worker.create_new_trial(study_id))
        reaper = open_grpc(server.port, **options)
        assert reaper.fail_stale_trials() == []
        with contextlib.closing(trialstore.get_storage(server.url)) as served:
            age_leases(served, 1000.0)
        assert reaper.fail_stale_trials() == lost
        worker.close()
        reaper.close()


def test_contents_that_died_with_their_server_are_told_of() -> None:
    with KillableServer("memory://") as server:
        storage = open_grpc(server.port)
        study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
        server.kill()
        server.start()
        with pytest.raises(LogCorruptError, match="restarted"):
            storage.get_all_trials(study_id)


# --- what the server does with a record that comes twice -----------------------------------------


def _create(seq: int, study_id: int = 0, **fields: Any) -> r.CreateTrial:
    start = r.now_text()
    return r.CreateTrial(worker_id="w", seq=seq, study_id=study_id, datetime_start=start, **fields)


class PositionLog:
    """A list with cursors that travel, as journals have them."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def exchange(self, records: Any, cursor: Cursor, wanted: Wanted) -> Batch:
        self.records.extend(records)
        return Batch(None, self.records[cursor or 0 :], len(self.records) or START)

    def close(self) -> None: ...


def test_a_record_marked_as_sent_again_is_appended_only_if_it_is_missing() -> None:
    log = PositionLog()
    share = share_of(log, START, lambda: log, n_copies_max=1)
    assert isinstance(share, SequentialShare)
    study = r.CreateStudy(worker_id="w", seq=0, study_name="s", directions=[1])
    start = share.exchange(Request([study], b"", NOTHING)).cursor
    one, two = _create(1), _create(2)
    share.exchange(Request([one], start, NOTHING))
    again = share.exchange(Request([one, two], start, NOTHING, again=True))
    assert log.records == [study, one, two]
    news = [
        record
        for part in payload.payloads(again.news, 1)
        for record in payload.unpack_records(part)
    ]
    assert news == [one, two]


def test_what_an_attempt_put_there_whose_sync_failed_is_synced_before_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = FileLog(str(tmp_path / "journal"))
    share = share_of(log, START, lambda: log, n_copies_max=1)
    study = r.CreateStudy(worker_id="w", seq=0, study_name="s", directions=[1])
    start = share.exchange(Request([study], b"", NOTHING)).cursor

    def fail(fd: int) -> None:
        raise OSError("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr(system, "sync_fd", fail)
        for again in (False, True):
            with pytest.raises(OutcomeUnknownError, match="not synced"):
                share.exchange(Request([_create(1)], start, NOTHING, again=again))
    with SyncCounter() as syncs:
        share.exchange(Request([_create(1)], start, NOTHING, again=True))
    assert syncs.total == 1


def test_a_log_that_answers_in_portions_is_read_to_its_end() -> None:
    class Portions(PositionLog):
        def exchange(self, records: Any, cursor: Cursor, wanted: Wanted) -> Batch:
            batch = super().exchange(records, cursor, wanted)
            if records or len(batch.news) <= 2:
                return batch
            return Batch(None, batch.news[:2], (cursor or 0) + 2, more=True)

    def read(cursor: bytes) -> tuple[int, bytes]:
        answer = share.exchange(Request([], cursor, NOTHING))
        parts = payload.payloads(answer.news, 1)
        return sum(len(payload.unpack_records(part)) for part in parts), answer.cursor

    log = Portions()
    log.records = [_create(seq) for seq in range(7)]
    share = share_of(log, START, lambda: log, n_copies_max=1)
    n_records, cursor = read(b"")
    assert n_records == 7
    log.records += [_create(seq) for seq in range(7, 12)]
    assert read(cursor)[0] == 5


def test_a_record_that_arrives_after_its_own_repetition_is_not_appended() -> None:
    log = PositionLog()
    share = share_of(log, START, lambda: log, n_copies_max=1)
    one = _create(1)
    share.exchange(Request([one], b"", NOTHING, again=True))
    share.exchange(Request([one], b"", NOTHING))  # the first attempt, late
    assert log.records == [one]


def test_what_its_client_has_given_up_is_not_appended() -> None:
    log = PositionLog()
    share = share_of(log, START, lambda: log, n_copies_max=1)
    with pytest.raises(LogUnavailableError):
        share.exchange(Request([_create(1)], b"", NOTHING, is_alive=lambda: False))
    assert log.records == []


@pytest.mark.parametrize("remembers", [True, False])
def test_where_the_log_judges_a_repetition_has_the_outcome_of_the_first(
    tmp_path: Path, remembers: bool
) -> None:
    log = TablesLog(f"sqlite:///{tmp_path}/a.db")

    def new_share() -> JudgedShare:
        share = share_of(
            pickle.loads(pickle.dumps(log)),
            START,
            lambda: pickle.loads(pickle.dumps(log)),
            n_copies_max=2,
        )
        assert isinstance(share, JudgedShare)
        return share

    share = new_share()

    def send(*records: Any, again: bool = False) -> list[Any]:
        nonlocal share
        if again and not remembers:
            share = new_share()  # the server was killed in between
        answer = share.exchange(Request(list(records), b"", NOTHING, again))
        return list(answer.outcomes or ())

    (study,) = send(r.CreateStudy(worker_id="w", seq=0, study_name="s", directions=[1]))
    create = _create(1, study.id)
    (created,) = send(create)
    assert send(create, again=True) == [created]
    attr = r.SetTrialUserAttr(worker_id="w", seq=2, trial_id=created.id, user_attr={"k": 1})
    tell = r.SetTrialStateValues(
        worker_id="w",
        seq=3,
        trial_id=created.id,
        state=r.COMPLETE,
        values=[1.0],
        datetime_complete=r.now_text(),
    )
    assert [one.verdict for one in send(attr, tell)] == [Verdict.ACCEPTED] * 2
    assert [one.verdict for one in send(attr, tell, again=True)] == [Verdict.ACCEPTED] * 2
    other = r.SetTrialStateValues(
        worker_id="v", seq=0, trial_id=created.id, state=r.FAIL, values=None
    )
    assert [one.verdict for one in send(other, again=True)] == [Verdict.FINISHED]
    batch = log.exchange((), START, Wanted(trials_of=frozenset((study.id,))))
    assert len([one for one in batch.news if isinstance(one, r.PutTrial)]) == 1


def test_where_no_more_connections_are_to_be_had_clients_take_turns(tmp_path: Path) -> None:
    n_asked, goes_on = itertools.count(), threading.Event()

    def refuse() -> TablesLog:
        next(n_asked)
        raise LogUnavailableError("by the test")

    share = JudgedShare(TablesLog(f"sqlite:///{tmp_path}/a.db"), refuse, n_copies_max=3)
    request = Request([], b"", Wanted(catalogue=True))
    first = threading.Thread(target=share.alone, args=(lambda: goes_on.wait(_DEADLINE_S),))
    first.start()
    while share._idle:
        first.join(0.01)
    answers: list[Any] = []
    others = [
        threading.Thread(target=lambda: answers.append(share.exchange(request))) for _ in range(3)
    ]
    for other in others:
        other.start()
        while not share._full_until_s:
            other.join(0.01)
    goes_on.set()
    for one in (first, *others):
        one.join(_DEADLINE_S)
    assert len(answers) == 3
    assert next(n_asked) == 1, "each asked anew"


# --- what many clients read ----------------------------------------------------------------------


class _CountingNews(CountingLog):
    n_news = 0

    def exchange(self, records: Any, cursor: Cursor, wanted: Wanted) -> Batch:
        batch = super().exchange(records, cursor, wanted)
        self.n_news += len(batch.news)
        return batch


@pytest.mark.parametrize("page", [15, 5_000])
def test_a_study_that_many_open_is_read_from_the_tables_once(
    page: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "TRIALS_MAX", page)
    log = TablesLog(f"sqlite:///{tmp_path}/a.db")
    counter = _CountingNews(log)
    share = JudgedShare(counter, lambda: counter, n_copies_max=1)
    with contextlib.closing(Storage(ShareLog(share))) as storage:
        study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
        for number in range(40):
            trial_id = storage.create_new_trial(study_id)
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [float(number)])
        running = storage.create_new_trial(study_id)
        n_read = []
        for _ in range(3):
            before = counter.n_news
            with contextlib.closing(Storage(ShareLog(share))) as reader:
                assert reader.get_n_trials(study_id, TrialState.RUNNING) == 1
                assert study_contents(reader, study_id) == study_contents(storage, study_id)
            n_read.append(counter.n_news - before)
        assert n_read[0] > 40 > 10 > max(n_read[1:])
        storage.set_trial_state_values(running, TrialState.COMPLETE, [0.0])
        with contextlib.closing(Storage(ShareLog(share))) as reader:
            assert reader.get_trial(running).state == TrialState.COMPLETE
            assert study_contents(reader, study_id) == study_contents(storage, study_id)
        late = Storage(ShareLog(share))
        assert late.get_study_id_from_name("s") == study_id
        storage.delete_study(study_id)
        with pytest.raises(KeyError):
            late.get_all_trials(study_id)
        assert late.get_all_studies() == []
        late.close()
        for _ in range(2):
            with contextlib.closing(Storage(ShareLog(share))) as reader:
                with pytest.raises(KeyError):
                    reader.get_all_trials(study_id)
                assert reader.get_all_studies() == []


def test_what_many_read_of_a_journal_is_packed_once_and_a_poll_packs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = []

    def pack(records: Any) -> Any:
        packed.extend(records)
        return payload.pack(records)

    monkeypatch.setattr(sequential_share, "pack", pack)
    log = FileLog(str(tmp_path / "journal.log"))
    share = share_of(log, START, lambda: log, n_copies_max=1)
    with contextlib.closing(Storage(ShareLog(share), linger_s=0.0)) as storage:
        study_id = storage.create_new_study([StudyDirection.MINIMIZE], "s")
        readers = [Storage(ShareLog(share)) for _ in range(4)]
        for number in range(5):
            trial_id = storage.create_new_trial(study_id)
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [float(number)])
            for reader in readers:
                assert reader.get_n_trials(study_id) == number + 1
        assert len(packed) == 1 + 5 * 2
        for reader in readers:
            assert study_contents(reader, study_id) == study_contents(storage, study_id)
            reader.get_all_trials(study_id, states=(TrialState.WAITING,))
            reader.close()
        assert len(packed) == 1 + 5 * 2


def test_what_clients_write_counts_for_the_next_snapshot() -> None:
    log, noted = PositionLog(), list[int]()
    share = share_of(log, START, lambda: log, n_copies_max=1, note=noted.append)
    share.exchange(Request([_create(1), _create(2)], b"", NOTHING))
    share.exchange(Request([_create(3)], b"", NOTHING))
    assert sum(noted) == 3


def test_what_a_server_remembers_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential_share, "_TAIL_BYTES_MAX", 2_000)
    monkeypatch.setattr(sequential_share, "_CLIENTS_MAX", 10)
    monkeypatch.setattr(settle, "_REMEMBERED_MAX", 10)
    monkeypatch.setattr(judged_share, "_OPENINGS_BYTES_MAX", 1_000)
    positions = PositionLog()
    sequential: Any = share_of(positions, START, lambda: positions, n_copies_max=1)
    tables = TablesLog(f"sqlite:///{tmp_path}/a.db")
    judged: Any = share_of(tables, START, lambda: tables, n_copies_max=1)
    for number in range(50):
        worker = f"w{number}"
        study = r.CreateStudy(worker_id=worker, seq=0, study_name=worker, directions=[1])
        sequential.exchange(Request([study], b"", NOTHING))
        (created,) = judged.exchange(Request([study], b"", NOTHING)).outcomes
        judged.exchange(Request([], b"", Wanted(trials_of=frozenset((created.id,)))))
        read = sequential.exchange(Request([], b"", NOTHING))
        assert sum(run.n_records for run in read.news) == number + 1
    tail = sequential._tail
    assert tail._n_bytes <= 2_000 and len(tail._runs) == len(tail._numbers) < 50
    assert len(sequential._last_seq) <= 10
    assert judged._remembered._n_outcomes <= 10
    assert sum(one.size for one in judged._openings.values()) <= 1_000
    assert not judged._remembered._locks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="There is no fork here.")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_while_a_fork_waits_for_a_client_keeps_no_thread_from_forking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clients = [trialstore.GrpcStorageProxy(port=1) for _ in range(2)]

    def interrupt() -> None:
        raise KeyboardInterrupt

    def fork() -> None:
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)

    with monkeypatch.context() as patch:
        for client in clients:
            patch.setattr(client._exchanger, "hold_for_fork", interrupt)
        fork()
    run_threads(fork)
