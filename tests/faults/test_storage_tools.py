"""The tools that inject faults do what later tests rely on."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import pickle
import socket
import socketserver
import threading
import time

from optuna.study import StudyDirection
import pytest

from trialstore.errors import LogUnavailableError, OutcomeUnknownError
from trialstore.log import SnapshotStore
from trialstore.logs.memory import MemoryLog
from trialstore.storage import Storage
from trialstore.testing.faults import CountingLog, CountingProxy, ManualClock
from trialstore.testing.suites.base import wait_until

_DEADLINE_S = 60.0


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            while data := self.request.recv(65536):
                self.request.sendall(data)


@pytest.fixture
def proxy() -> Iterator[CountingProxy]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with CountingProxy("127.0.0.1", server.server_address[1]) as proxy:
            yield proxy
        server.shutdown()
        thread.join(_DEADLINE_S)


def _connect(proxy: CountingProxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=_DEADLINE_S)


def _ask(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    answer = b""
    while len(answer) < len(data):
        chunk = connection.recv(65536)
        if not chunk:
            raise ConnectionError("closed")
        answer += chunk
    return answer


def test_the_proxy_counts_answered_bursts(proxy: CountingProxy) -> None:
    with _connect(proxy) as connection:
        for _ in range(7):
            assert _ask(connection, b"ping") == b"ping"
    with _connect(proxy) as connection:
        assert _ask(connection, b"ping") == b"ping"
    assert (proxy.n_round_trips, proxy.n_connections) == (8, 2)
    proxy.reset()
    assert proxy.n_round_trips == 0


def test_the_proxy_passes_large_messages_whole(proxy: CountingProxy) -> None:
    data = bytes(range(256)) * 4096
    with _connect(proxy) as connection:
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        answer = b""
        while len(answer) < len(data):
            answer += connection.recv(65536)
        sender.join(_DEADLINE_S)
    assert answer == data


@pytest.mark.parametrize("k", [1, 3])
def test_the_proxy_cuts_the_kth_reply(proxy: CountingProxy, k: int) -> None:
    with _connect(proxy) as connection:
        proxy.cut_at_reply(k)
        for _ in range(k - 1):
            _ask(connection, b"ping")
        assert not proxy.was_cut
        with pytest.raises(ConnectionError):
            _ask(connection, b"ping")
        assert proxy.was_cut
    with _connect(proxy) as connection:
        assert _ask(connection, b"ping") == b"ping"


def test_the_proxy_delays_each_way(proxy: CountingProxy) -> None:
    proxy.delay_s = 0.02
    with _connect(proxy) as connection:
        began_s = time.monotonic()
        _ask(connection, b"ping")
        assert time.monotonic() - began_s >= 0.04


def test_the_proxy_swallows_and_passes_on(proxy: CountingProxy) -> None:
    with _connect(proxy) as connection:
        _ask(connection, b"ping")
        proxy.swallow()
        connection.settimeout(0.05)
        with pytest.raises(TimeoutError):
            _ask(connection, b"lost")
        wait_until(lambda: any(link.is_asking for link in proxy._links), "it is lost")
        proxy.pass_on()
        connection.settimeout(_DEADLINE_S)
        assert _ask(connection, b"ping") == b"ping"


def test_the_proxy_severs_and_refuses(proxy: CountingProxy) -> None:
    with _connect(proxy) as connection:
        _ask(connection, b"ping")
        proxy.sever()
        with pytest.raises(ConnectionError):
            _ask(connection, b"ping")
    proxy.refuse()
    with pytest.raises(ConnectionError), _connect(proxy) as connection:
        _ask(connection, b"ping")
    proxy.refuse(False)
    with _connect(proxy) as connection:
        assert _ask(connection, b"ping") == b"ping"


def test_the_proxy_starts_again_on_its_port(proxy: CountingProxy) -> None:
    port = proxy.port
    proxy.stop()
    with pytest.raises(ConnectionError):
        _connect(proxy)
    proxy.start()
    assert proxy.port == port
    with _connect(proxy) as connection:
        assert _ask(connection, b"ping") == b"ping"


def test_the_counting_log_counts_and_fails() -> None:
    log = CountingLog(MemoryLog())
    storage = Storage(log)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE])
    assert (log.n_exchanges, log.n_records) == (1, 1)
    log.fail_before()
    with pytest.raises(LogUnavailableError):
        storage.create_new_trial(study_id)
    assert storage.get_n_trials(study_id) == 0
    log.fail_after()
    with pytest.raises(OutcomeUnknownError):
        storage.create_new_trial(study_id)
    assert storage.get_n_trials(study_id) == 1


class _SnapshotLog(MemoryLog):
    def save_snapshot(self, make: object) -> bool:
        return False

    def load_snapshot(self) -> None:
        return None


@pytest.mark.parametrize("log", [MemoryLog(), _SnapshotLog()])
def test_the_counting_log_has_the_capabilities_of_its_log(log: MemoryLog) -> None:
    counting = CountingLog(log)
    assert isinstance(counting, SnapshotStore) == isinstance(log, SnapshotStore)
    copied = pickle.loads(pickle.dumps(counting))
    assert isinstance(copied, SnapshotStore) == isinstance(log, SnapshotStore)


def test_time_moves_only_by_advance() -> None:
    clock = ManualClock(sleep_advances=False)
    condition = threading.Condition()
    woken: list[str] = []

    def wait() -> None:
        with condition:
            clock.wait(condition, 2.0)
        woken.append("wait")

    def sleep() -> None:
        clock.sleep(5.0)
        woken.append("sleep")

    threads = [threading.Thread(target=wait), threading.Thread(target=sleep)]
    for thread in threads:
        thread.start()
    clock.until_waiting()
    clock.advance(1.9)
    assert woken == []
    clock.advance(0.1)
    threads[0].join(_DEADLINE_S)
    assert woken == ["wait"]
    while threads[1].is_alive():
        clock.advance(5.0)
        threads[1].join(0.01)
    assert woken == ["wait", "sleep"]
