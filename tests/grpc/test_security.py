"""Who may call: nobody without the token or certificate, and garbage harms nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
from datetime import datetime, timedelta, timezone
import hmac
import ipaddress
import itertools
import os
from pathlib import Path
import pickle
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import grpc
import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

from grpc_servers import KillableServer, open_grpc, serve, served_url, serving
from servers import free_port
import trialstore
from trialstore import grpc as trialstore_grpc
from trialstore.errors import LogUnavailableError
from trialstore.log import NOTHING, START, Batch, Wanted
from trialstore.logs.grpc import payload, status
from trialstore.logs.grpc.client import TOKEN_VARIABLE, GrpcLog
from trialstore.logs.grpc.generated import log_pb2 as pb
from trialstore.logs.grpc.methods import LOG_SERVICE, STORAGE_SERVICE, calls
from trialstore.logs.grpc.server import THREADS_MAX, ProxyServer, Security, is_loopback
from trialstore.logs.grpc.streams import STREAMS_MAX
from trialstore.storage import Storage
from trialstore.testing.clock import ManualClock

_MINIMIZE = [StudyDirection.MINIMIZE]
_DEADLINE_S = 240.0


def _refused(storage: Storage) -> str:
    with pytest.raises(LogUnavailableError) as caught:
        storage.create_new_study(_MINIMIZE, "intruder")
    return str(caught.value)


# --- tokens --------------------------------------------------------------------------------------


def test_without_the_token_nothing_reaches_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("s3cret\n")
    with KillableServer(served_url("sqlite", tmp_path), token_file=str(token_file)) as server:
        assert "token" in _refused(open_grpc(server.port))
        assert "token" in _refused(open_grpc(server.port, token="S3cret"))
        with grpc.insecure_channel(f"localhost:{server.port}") as channel:
            for service in (LOG_SERVICE, STORAGE_SERVICE):
                for name, call in calls(channel, service).items():
                    with pytest.raises(grpc.RpcError) as caught:
                        reply = call(_empty_request(service, name), timeout=30)
                        list(reply)
                    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED, name
        friend = open_grpc(server.port, token_file=str(token_file))
        assert friend.get_all_studies() == []
        friend.create_new_study(_MINIMIZE, "s")
        assert [study.study_name for study in pickle.loads(pickle.dumps(friend)).get_all_studies()]
        assert b"s3cret" not in pickle.dumps(friend)
        monkeypatch.setenv(TOKEN_VARIABLE, "s3cret")
        assert [study.study_name for study in open_grpc(server.port).get_all_studies()] == ["s"]


def _empty_request(service: Any, name: str) -> Any:
    from google.protobuf.message_factory import GetMessageClass

    return GetMessageClass(service.methods_by_name[name].input_type)()


def test_a_token_is_in_no_text(tmp_path: Path) -> None:
    storage = open_grpc(free_port(), token="s3cret", retry_deadline_s=0.1)
    assert "s3cret" not in _refused(storage) + repr(storage._exchanger.log) + repr(storage)


def test_a_server_takes_its_token_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, " s3cret\n")
    with KillableServer(served_url("journal", tmp_path)) as server:
        assert open_grpc(server.port).get_all_studies() == []
        monkeypatch.delenv(TOKEN_VARIABLE)
        assert "token" in _refused(open_grpc(server.port))


def test_a_token_that_is_changed_is_read_again(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("one")
    url = served_url("journal", tmp_path)
    with KillableServer(url, token_file=str(token_file)) as server:
        friend = open_grpc(server.port, token_file=str(token_file))
        study_id = friend.create_new_study(_MINIMIZE, "s")
        friend.create_new_trial(study_id)
        server.kill()
        token_file.write_text("two")
        server.start()
        friend.create_new_trial(study_id)
        token_file.unlink()
        assert len(friend.get_all_trials(study_id)) == 2
        server.kill()
        other = tmp_path / "other"
        other.write_text("three")
        server.options["token_file"] = str(other)
        server.start()
        assert "token" in _refused(friend)


def test_a_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    (interceptor,) = Security(token="s3cret").interceptors()
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda *both: compared.append(both))
    shown = (("authorization", "Bearer s3cret"),)
    details = SimpleNamespace(
        method="/trialstore.v1.LogService/Exchange", invocation_metadata=shown
    )
    interceptor.intercept_service(lambda details: None, details)
    assert compared == [(b"Bearer s3cret", b"Bearer s3cret")]


@pytest.mark.parametrize("token", ["pässword", "two\nlines", "a\ttab"])
def test_a_token_that_no_header_can_hold_is_refused(token: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ASCII"):
        Security(token=token)
    with pytest.raises(ValueError, match="ASCII"):
        open_grpc(1, token=token)
    file = tmp_path / "token"
    file.write_text(token)
    assert "ASCII" in _refused(open_grpc(1, token_file=str(file)))


def test_arguments_that_do_not_go_together_are_refused() -> None:
    for options in (
        {"certificate_file": "c"},
        {"client_ca_file": "c"},
        {"token": "a", "token_file": "b"},
        {"token": ""},
    ):
        with pytest.raises(ValueError):
            Security(**options)
    with pytest.raises(ValueError):
        open_grpc(1, certificate_file="c")
    with pytest.raises(ValueError):
        open_grpc(1, token="a", token_file="b")


# --- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_only_loopback_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_server_that_strangers_reach_does_not_start_without_protection(host: str) -> None:
    storage = trialstore.InMemoryStorage()
    with pytest.raises(ValueError, match="allow_insecure"):
        trialstore_grpc.run_grpc_proxy_server(storage, host=host, port=free_port())


# --- TLS -----------------------------------------------------------------------------------------


class _Authority:
    """Makes certificates in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        x509 = pytest.importorskip("cryptography.x509")
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        self._x509, self._hashes, self._serialization, self._ec = x509, hashes, serialization, ec
        self._folder = folder
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._sign(self._key, name, self._key, authority=True)
        self.certificate_file = self._write("ca", self._certificate, None)[0]

    def _sign(self, key: Any, name: str, by: Any, *, authority: bool = False) -> Any:
        x509 = self._x509
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self._name)])
        now = datetime.now(timezone.utc)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(by, self._hashes.SHA256())
        )

    def _write(self, name: str, certificate: Any, key: Any) -> tuple[str, str]:
        s = self._serialization
        files = (
            self._folder / f"{self._name}-{name}.crt",
            self._folder / f"{self._name}-{name}.key",
        )
        files[0].write_bytes(certificate.public_bytes(s.Encoding.PEM))
        if key is not None:
            pem = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
            files[1].write_bytes(pem)
        return str(files[0]), str(files[1])

    def issue(self, name: str) -> dict[str, str]:
        key = self._ec.generate_private_key(self._ec.SECP256R1())
        certificate, key_file = self._write(name, self._sign(key, name, self._key), key)
        return {"certificate_file": certificate, "key_file": key_file}


def test_tls_serves_those_who_trust_it_and_refuses_plain_text(tmp_path: Path) -> None:
    ours, theirs = _Authority(tmp_path, "ours"), _Authority(tmp_path, "theirs")
    with KillableServer(served_url("journal", tmp_path), **ours.issue("server")) as server:
        friend = open_grpc(server.port, ca_file=ours.certificate_file)
        friend.create_new_study(_MINIMIZE, "s")
        for options in ({}, {"tls": True}, {"ca_file": theirs.certificate_file}):
            _refused(open_grpc(server.port, retry_deadline_s=1.0, **options))
        assert [study.study_name for study in friend.get_all_studies()] == ["s"]


def test_mutual_tls_lets_in_only_certificates_of_the_authority(tmp_path: Path) -> None:
    ours, theirs = _Authority(tmp_path, "ours"), _Authority(tmp_path, "theirs")
    options = {**ours.issue("server"), "client_ca_file": ours.certificate_file}
    with KillableServer(served_url("journal", tmp_path), **options) as server:
        trust = {"ca_file": ours.certificate_file}
        friend = open_grpc(server.port, **trust, **ours.issue("client"))
        friend.create_new_study(_MINIMIZE, "s")
        for shown in ({}, theirs.issue("client")):
            _refused(open_grpc(server.port, retry_deadline_s=1.0, **trust, **shown))
        assert [study.study_name for study in friend.get_all_studies()] == ["s"]


@pytest.mark.parametrize("what", ["whom to trust", "what to show"])
def test_certificates_that_are_changed_are_read_again(what: str, tmp_path: Path) -> None:
    old, new = _Authority(tmp_path, "old"), _Authority(tmp_path, "new")
    trusted = shutil.copy(old.certificate_file, tmp_path / "trusted")
    mine = {"ca_file": str(trusted), **old.issue("client")}
    options = {**old.issue("server"), "client_ca_file": old.certificate_file}
    with KillableServer(served_url("journal", tmp_path), **options) as server:
        friend = open_grpc(server.port, **mine)
        study_id = friend.create_new_study(_MINIMIZE, "s")
        server.kill()
        if what == "whom to trust":
            server.options.update(new.issue("server"))
            shutil.copy(new.certificate_file, trusted)
        else:
            server.options["client_ca_file"] = new.certificate_file
            for name, path in new.issue("client").items():
                shutil.copy(path, mine[name])
        server.start()
        friend.create_new_trial(study_id)
        Path(mine["key_file"]).unlink()
        assert len(friend.get_all_trials(study_id)) == 1


# --- garbage -------------------------------------------------------------------------------------


def test_garbage_on_the_port_leaves_the_server_serving(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    soak_s = 60.0 if request.config.getoption("--soak") else 0.0
    with KillableServer(served_url("journal", tmp_path)) as server:
        storage = open_grpc(server.port)
        study_id = storage.create_new_study(_MINIMIZE, "s")
        dice = random.Random(3)
        began_s = time.monotonic()
        for number in itertools.count():
            if number > 300 and time.monotonic() - began_s > soak_s:
                break
            with contextlib.suppress(OSError):
                connection = socket.create_connection(("localhost", server.port), timeout=5)
                with connection:
                    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if number % 2 else b""
                    connection.sendall(preface + dice.randbytes(dice.randrange(1, 2000)))
        assert storage.get_all_trials(study_id) == []
        resident = Path(f"/proc/{server.process.pid}/statm")
        if resident.exists():
            n_bytes = int(resident.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            assert n_bytes < 600 << 20


def test_garbage_in_messages_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    port = serve(served_url("journal", tmp_path))
    storage = open_grpc(port)
    study_id = storage.create_new_study(_MINIMIZE, "s")
    dice = random.Random(4)
    with grpc.insecure_channel(f"localhost:{port}") as channel:
        log_calls, storage_calls = calls(channel, LOG_SERVICE), calls(channel, STORAGE_SERVICE)
        refused = (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.DATA_LOSS,
        )
        for number in range(200):
            junk = [b"MJ\xdd\x00"[number % 4 :][:1] + dice.randbytes(40) for _ in range(3)]
            deep = b"M" + b"\x91" * 100_000
            call = pb.ExchangeRequest(
                records=junk[0] if number % 3 == 0 else b"",
                cursor=junk[1] if number % 3 == 1 else b"",
                wanted=(deep if number % 2 else junk[2]) if number % 3 == 2 else b"",
            )
            with pytest.raises(grpc.RpcError) as caught:
                log_calls["Exchange"](call, timeout=30)
            assert caught.value.code() in refused, number
        # What is no operation is no record: images are the server's to send.
        image = (
            b'J[{"op_code":100,"study_id":7,"study_name":"x","directions":[1],'
            b'"user_attrs":{},"system_attrs":{}}]'
        )
        with pytest.raises(grpc.RpcError) as caught:
            log_calls["Exchange"](pb.ExchangeRequest(records=image), timeout=30)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        for name in storage_calls:
            junk_call = channel.unary_unary(f"/{STORAGE_SERVICE.full_name}/{name}")
            with contextlib.suppress(grpc.RpcError):
                junk_call(dice.randbytes(30), timeout=30)
    assert [study.study_name for study in open_grpc(port).get_all_studies()] == ["s"]
    assert open_grpc(port).get_all_trials(study_id) == []


def test_a_message_beyond_the_bound_is_refused(tmp_path: Path) -> None:
    url = served_url("journal", tmp_path)
    with KillableServer(url, max_message_bytes=1 << 16) as server:
        storage = open_grpc(server.port, retry_deadline_s=5.0)
        study_id = storage.create_new_study(_MINIMIZE, "s")
        with pytest.raises(ValueError, match="larger"):
            storage.set_study_user_attr(study_id, "k", "x" * (1 << 17))
        trial_id = storage.create_new_trial(study_id)
        with pytest.raises(ValueError, match="larger"):
            storage.set_trial_user_attr(trial_id, "large", "x" * (1 << 17))
        for key in "abc":  # together they are beyond it
            storage.set_trial_user_attr(trial_id, key, "x" * (1 << 15))
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        assert set(open_grpc(server.port).get_trial(trial_id).user_attrs) == set("abc")


# --- health, reflection --------------------------------------------------------------------------


def test_health_and_reflection_answer(tmp_path: Path) -> None:
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    port = serve(served_url("journal", tmp_path))
    with grpc.insecure_channel(f"localhost:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", LOG_SERVICE.full_name, STORAGE_SERVICE.full_name):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {LOG_SERVICE.full_name, STORAGE_SERVICE.full_name} <= set(database.get_services())
        found = DescriptorPool(database).FindServiceByName(STORAGE_SERVICE.full_name)
        assert len(found.methods) == 19


def test_only_the_health_check_needs_no_token(tmp_path: Path) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2_grpc

    with (
        KillableServer(served_url("journal", tmp_path), token="t") as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        reply = health.Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        for stream in (
            health.Watch(health_pb2.HealthCheckRequest(), timeout=30),
            reflection.ServerReflectionInfo(iter(()), timeout=30),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                next(stream)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


# --- what clients leave open ---------------------------------------------------------------------

_EXCHANGE = f"/{LOG_SERVICE.full_name}/Exchange"
_CHECK = "/grpc.health.v1.Health/Check"


class _Open:
    """Calls that are left open: what they wait for is not sent, what they are sent not taken."""

    def __init__(self, port: int) -> None:
        # Without a window that grows, or on a fast line all is taken before anybody reads it.
        options = [("grpc.http2.bdp_probe", 0)]
        self._channel = grpc.insecure_channel(f"localhost:{port}", options)
        self._ended = threading.Event()

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._channel.close()

    def call(self, kind: str) -> Any:
        from grpc_health.v1 import health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection_pb2_grpc

        if kind == "reflection":
            stub = reflection_pb2_grpc.ServerReflectionStub(self._channel)
            return stub.ServerReflectionInfo(self._nothing())
        if kind == "watch":
            return health_pb2_grpc.HealthStub(self._channel).Watch(health_pb2.HealthCheckRequest())
        if kind == "read":
            wanted = payload.pack_wanted(Wanted(catalogue=True))
            read: Any = calls(self._channel, LOG_SERVICE)["Read"]
            return read(pb.ExchangeRequest(wanted=wanted))
        return self._channel.stream_stream(kind)(self._nothing())

    def _nothing(self) -> Iterator[bytes]:
        self._ended.wait()
        yield from ()


def _wait_for_ends(left_open: Sequence[Any], n_ends: int) -> None:
    """Until so many have ended, whichever."""
    ended = threading.Semaphore(0)
    for call in left_open:
        if not call.add_callback(ended.release):
            ended.release()
    for _ in range(n_ends):
        assert ended.acquire(timeout=_DEADLINE_S)


def _end(call: Any) -> grpc.StatusCode:
    """How a call ended, once it has; one that nobody reads does not, as far as its client sees."""
    ended = threading.Event()
    assert not call.add_callback(ended.set) or ended.wait(_DEADLINE_S)
    code: grpc.StatusCode = call.code()
    return code


def _storage_of_more_than_a_window(folder: Path) -> Storage:
    """What does not get through to a client that takes nothing."""
    storage = trialstore.get_storage(f"sqlite:///{folder}/a.db")
    for name in "abc":
        study_id = storage.create_new_study(_MINIMIZE, name)
        storage.set_study_user_attr(study_id, "k", "x" * (1 << 20))
    return storage


@pytest.mark.parametrize("kind", ["reflection", "watch", "read", _CHECK])
def test_what_is_left_open_keeps_nobody_from_an_exchange(kind: str, tmp_path: Path) -> None:
    with (
        serving(_storage_of_more_than_a_window(tmp_path)) as server,
        _Open(server.port) as clients,
    ):
        left_open = [clients.call(kind) for _ in range(THREADS_MAX + STREAMS_MAX)]
        _wait_for_ends(left_open, THREADS_MAX)
        refused = [call for call in left_open if not call.is_active()]
        assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert all(status.is_transient(call) for call in refused)
        with contextlib.closing(open_grpc(server.port, retry_deadline_s=30.0)) as storage:
            study_id = storage.create_new_study(_MINIMIZE, "s")
            storage.create_new_trial(study_id)


@pytest.mark.parametrize("kind", ["reflection", _CHECK])
def test_what_sends_nothing_is_ended(kind: str) -> None:
    with (
        serving(trialstore.InMemoryStorage(), standstill_s=0.1) as server,
        _Open(server.port) as clients,
    ):
        for _ in range(STREAMS_MAX + 1):
            assert _end(clients.call(kind)) == grpc.StatusCode.CANCELLED


def test_what_takes_nothing_makes_way_for_others(tmp_path: Path) -> None:
    storage = _storage_of_more_than_a_window(tmp_path)
    with serving(storage, standstill_s=1.0) as server, _Open(server.port) as clients:
        left_open = [clients.call("read") for _ in range(2 * STREAMS_MAX)]
        _wait_for_ends(left_open, STREAMS_MAX)
        with contextlib.closing(GrpcLog("localhost", server.port)) as log:
            log.exchange((), START, NOTHING)


def test_a_server_ends_although_calls_are_left_open(tmp_path: Path) -> None:
    with (
        serving(_storage_of_more_than_a_window(tmp_path)) as server,
        _Open(server.port) as clients,
    ):
        sending = [clients.call("reflection"), clients.call(_CHECK)]
        for kind in ("watch", "read"):
            assert next(clients.call(kind))  # it has come that far
        server.drain(0)
        assert all(map(_end, sending))


def test_what_shows_no_token_is_not_waited_for(tmp_path: Path) -> None:
    storage = trialstore.InMemoryStorage()
    with serving(storage, security=Security(token="t")) as server, _Open(server.port) as clients:
        for kind in (_EXCHANGE, "read", "reflection"):
            assert _end(clients.call(kind)) == grpc.StatusCode.UNAUTHENTICATED


class _Announced(ManualClock):
    """Time that passes in pauses only; somebody is told when one begins."""

    def __init__(self, has_paused: threading.Event) -> None:
        super().__init__()
        self._has_paused = has_paused

    def sleep(self, duration_s: float) -> None:
        self._has_paused.set()
        time.sleep(0.01)


def test_who_opens_while_too_many_do_comes_back(tmp_path: Path) -> None:
    with serving(_storage_of_more_than_a_window(tmp_path)) as server:
        has_paused = threading.Event()
        log = GrpcLog("localhost", server.port, clock=_Announced(has_paused))
        with _Open(server.port) as clients:
            left_open = [clients.call("read") for _ in range(2 * STREAMS_MAX)]
            _wait_for_ends(left_open, STREAMS_MAX)
            opened: list[Batch] = []
            opening = threading.Thread(
                target=lambda: opened.append(log.exchange((), START, Wanted(catalogue=True)))
            )
            opening.start()
            assert has_paused.wait(_DEADLINE_S)
        opening.join(_DEADLINE_S)
        assert len(opened[0].news) >= 3
        log.close()


# --- waiting -------------------------------------------------------------------------------------


def test_waiting_for_a_server_that_is_not_there_ends() -> None:
    storage = trialstore_grpc.GrpcStorageProxy(port=free_port())
    with pytest.raises(ConnectionError):
        storage.wait_server_ready(0.1)


def test_the_command_says_where_it_serves(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "trialstore", "serve", str(tmp_path / "j"), "--create"]
    command += ["--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            open_grpc(port).wait_server_ready(_DEADLINE_S)
            process.terminate()
            _, told = process.communicate(timeout=_DEADLINE_S)
        finally:
            process.kill()
    assert f"Serving JournalStorage at localhost:{port}." in told


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RuntimeError):
            trialstore_grpc.run_grpc_proxy_server(
                optuna.storages.InMemoryStorage(), host="127.0.0.1", port=taken.getsockname()[1]
            )


class _Slow:
    """A share whose exchanges wait until the test lets them go on."""

    def __init__(self, share: Any) -> None:
        self.log = share.log
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        self._share = share

    def exchange(self, request: Any) -> Any:
        self.has_begun.set()
        assert self.may_go_on.wait(_DEADLINE_S)
        return self._share.exchange(request)


def test_a_drained_server_has_answered_what_it_had_taken() -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    storage = trialstore.InMemoryStorage()
    with trialstore_grpc._shared(storage, 1) as share:
        slow: Any = _Slow(share)
        server = ProxyServer(slow, storage, host="localhost", port=0, security=Security())
        server.start()
        with grpc.insecure_channel(f"localhost:{server.port}") as channel:
            exchange: Any = calls(channel, LOG_SERVICE)["Exchange"]
            running = exchange.future(pb.ExchangeRequest(), timeout=_DEADLINE_S)
            assert slow.has_begun.wait(_DEADLINE_S)
            draining = threading.Thread(target=server.drain)
            draining.start()
            check = health_pb2_grpc.HealthStub(channel).Check
            with pytest.raises(grpc.RpcError) as refused:
                while True:  # until it has begun to drain
                    check(health_pb2.HealthCheckRequest(), timeout=_DEADLINE_S)
            assert status.is_transient(refused.value)
            assert not running.done()
            assert draining.is_alive()
            slow.may_go_on.set()
            assert running.result(_DEADLINE_S).cursor
            draining.join(_DEADLINE_S)
            assert not draining.is_alive()
        server.drain()
