"""A server over a log and a storage: ``LogService`` for our clients, Optuna's service for its own.

Threads, not asyncio: every log blocks, and handing a call over to a thread costs more than
grpcio's own threads do (docs/decisions/0010).

Who may call is decided before anything is read: TLS with or without client certificates, and a
bearer token, compared in constant time. Messages, calls at once and metadata are bounded, and
streams run apart from exchanges (``streams.py``); whatever a client sends, or doesn't, it gets a
status and the server goes on.

Source: docs/formats/grpc.md; gRPC health checking protocol; gRPC server reflection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import hmac
import ipaddress
import logging
import os
from pathlib import Path
import signal
import threading
from typing import Any, Final

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from optuna.storages import BaseStorage

from trialstore.log import Compacted, Limited, SnapshotStore
from trialstore.logs.grpc import payload, status
from trialstore.logs.grpc.generated import POOL, log_pb2 as pb
from trialstore.logs.grpc.methods import LOG_SERVICE, STORAGE_SERVICE, bearer, handler
from trialstore.logs.grpc.share import Request, Share
from trialstore.logs.grpc.stock import StorageServicer
from trialstore.logs.grpc.streams import HEALTH_CHECK, STANDSTILL_S, StreamBounds

_logger = logging.getLogger(__name__)

MESSAGE_BYTES_MAX: Final = 64 << 20
THREADS_MAX: Final = 64
# Beyond this many waiting calls a client is told to come back, which it does with jitter.
_CALLS_MAX: Final = 1024
# Parts of this size keep what gRPC buffers for a slow client small.
_PART_BYTES: Final = 1 << 20
# More than this goes out by Read, in parts.
_REPLY_BYTES_MAX: Final = 8 << 20
# What an opening client reads is in memory once for each.
_READS_AT_ONCE: Final = 4
_DRAIN_S: Final = 30.0


class LogServicer:
    """Serves a share.

    Args:
        share: The log, for any number of threads.
    """

    def __init__(self, share: Share) -> None:
        self._share = share
        self._reads = threading.BoundedSemaphore(_READS_AT_ONCE)

    def Exchange(self, request: Any, context: grpc.ServicerContext) -> Any:
        with _aborting(context):
            answer = self._share.exchange(_request(request, context))
            outcomes = payload.pack_outcomes(answer.outcomes)
            size = sum(run.size for run in answer.news)
            if size > _REPLY_BYTES_MAX:
                return pb.ExchangeReply(
                    cursor=request.cursor, outcomes=outcomes, more=True, refused=answer.refused
                )
            return pb.ExchangeReply(
                news=payload.payloads(answer.news, size),
                cursor=answer.cursor,
                outcomes=outcomes,
                refused=answer.refused,
            )

    def Read(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with _aborting(context), self._reads:
            asked = _request(request, context)
            answer = self._share.exchange(asked._replace(records=[], again=False))
        for part in payload.payloads(answer.news, _PART_BYTES):
            yield pb.ExchangeReply(news=[part])
        yield pb.ExchangeReply(
            cursor=answer.cursor, outcomes=payload.pack_outcomes(answer.outcomes)
        )

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:
        log = self._share.log
        if not isinstance(log, Limited):
            return pb.CheckReply(unlimited=True)
        with _aborting(context):
            log.check(payload.unpack_operations(request.records))
        return pb.CheckReply()

    def Lease(self, request: Any, context: grpc.ServicerContext) -> Any:
        trial_ids = list(request.trial_ids)
        with _aborting(context):
            owners = [owner.decode("utf-8", "surrogatepass") for owner in request.owners]
            if request.verb == pb.LeaseRequest.EXPIRED:
                running = dict(zip(trial_ids, owners, strict=True))
                asked = request.study_id, running, request.grace_period_s
                expired = self._share.lease(lambda log: log.expired(*asked))
                return pb.LeaseReply(trial_ids=expired)
            (owner,) = owners
            if request.verb == pb.LeaseRequest.RENEW:
                self._share.lease(lambda log: log.renew_lease(owner, trial_ids))
            else:
                self._share.withdraw_lease(owner, trial_ids)
            return pb.LeaseReply()

    def Snapshot(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        log = self._share.log
        if request.base:
            if not isinstance(log, Compacted):
                return
            with _aborting(context), self._reads:
                base = self._share.alone(log.load_base)
            snapshot, cursor = base.snapshot or b"", base.cursor
            marks = payload.pack_marks(base.marks)
        else:
            if not isinstance(log, SnapshotStore):
                return
            with _aborting(context), self._reads:
                stored = self._share.alone(log.load_snapshot)
            if stored is None:
                return
            snapshot, cursor = stored
            marks = b""
        yield pb.SnapshotReply(
            cursor=payload.pack_cursor(cursor), part=bytes(snapshot[:_PART_BYTES]), marks=marks
        )
        for offset in range(_PART_BYTES, len(snapshot), _PART_BYTES):
            yield pb.SnapshotReply(part=bytes(snapshot[offset : offset + _PART_BYTES]))


def _request(request: Any, context: grpc.ServicerContext) -> Request:
    return Request(
        records=payload.unpack_operations(request.records),
        cursor=request.cursor,
        wanted=payload.unpack_wanted(request.wanted),
        again=request.again,
        is_alive=context.is_active,
        leased=request.leased,
        expected=request.expected if request.HasField("expected") else None,
        sender=request.sender,
        number=request.number,
    )


@contextlib.contextmanager
def _aborting(context: grpc.ServicerContext) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not status.is_known(error):
            _logger.exception("A call of LogService failed.")
        status.abort(context, error)


# --- who may call --------------------------------------------------------------------------------


class Security:
    """Who may call. Everything is read once, when the server starts.

    Args:
        certificate_file: PEM certificate of the server, with its chain; with ``key_file``, TLS.
        key_file: Its private key.
        client_ca_file: PEM certificates; only clients with a certificate signed by one of them
            are let in.
        token: What clients must show.
        token_file: File that holds it.

    Raises:
        ValueError: The arguments do not go together, or nobody could show the token.
        OSError: A file can't be read.
    """

    def __init__(
        self,
        *,
        certificate_file: str | None = None,
        key_file: str | None = None,
        client_ca_file: str | None = None,
        token: str | None = None,
        token_file: str | None = None,
    ) -> None:
        if (certificate_file is None) != (key_file is None):
            raise ValueError("certificate_file and key_file go together.")
        if client_ca_file is not None and certificate_file is None:
            raise ValueError("client_ca_file needs certificate_file and key_file: TLS.")
        if token is not None and token_file is not None:
            raise ValueError("Pass token or token_file, not both.")
        if token_file is not None:
            token = Path(token_file).read_text().strip()
        if token is not None and not token:
            raise ValueError("The token is empty; everybody would have it.")
        self._token = None if token is None else bearer(token).encode()
        self._tls: grpc.ServerCredentials | None = None
        if certificate_file is not None and key_file is not None:
            self._tls = grpc.ssl_server_credentials(
                [(Path(key_file).read_bytes(), Path(certificate_file).read_bytes())],
                root_certificates=(
                    None if client_ca_file is None else Path(client_ca_file).read_bytes()
                ),
                require_client_auth=client_ca_file is not None,
            )

    def interceptors(self) -> list[grpc.ServerInterceptor]:
        return [] if self._token is None else [_TokenInterceptor(self._token)]

    def listen(self, server: grpc.Server, host: str, port: int, *, allow_insecure: bool) -> int:
        """Open the port.

        Raises:
            ValueError: Anybody who reaches ``host`` could call.
            RuntimeError: The port is taken.
        """
        if not (allow_insecure or self._tls or self._token or is_loopback(host)):
            raise ValueError(
                f"{host} can be reached from other machines, and whoever reaches it could read "
                "and delete every study. Pass certificate_file and key_file, token_file, or "
                "allow_insecure=True if something else keeps strangers out."
            )
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if self._tls is not None:
            return int(server.add_secure_port(address, self._tls))
        return int(server.add_insecure_port(address))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _TokenInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Lets nobody in without the token, but the health check, which tells nothing."""

    def __init__(self, expected: bytes) -> None:
        self._expected = expected
        # Whatever was called: of a call that is no stream grpcio would wait for the request.
        self._refusal = grpc.stream_stream_rpc_method_handler(_refuse)

    def intercept_service(self, continuation: Callable[..., Any], details: Any) -> Any:
        if details.method == HEALTH_CHECK:
            return continuation(details)
        for key, value in details.invocation_metadata:
            if key == "authorization":
                shown = value if isinstance(value, bytes) else value.encode()
                if hmac.compare_digest(shown, self._expected):
                    return continuation(details)
        return None if continuation(details) is None else self._refusal


def _refuse(requests: Any, context: grpc.ServicerContext) -> Any:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "A bearer token is needed.")


# --- the server ----------------------------------------------------------------------------------


class ProxyServer:
    """A server, from its first call to the end of its last.

    Args:
        share: What ``LogService`` serves; None to serve plain Optuna workers only.
        storage: What Optuna's service serves.
        host: Address to listen on.
        port: Port, or 0 for a free one.
        security: Who may call.
        allow_insecure: Listen on any address without TLS or token.
        thread_pool: Where calls run that are no streams.
        message_bytes_max: Larger requests are refused.
        standstill_s: For how long a stream may wait for its client.

    Raises:
        ValueError, RuntimeError: As ``Security.listen``.
    """

    def __init__(
        self,
        share: Share,
        storage: BaseStorage,
        *,
        host: str,
        port: int,
        security: Security,
        allow_insecure: bool = False,
        thread_pool: ThreadPoolExecutor | None = None,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
        standstill_s: float = STANDSTILL_S,
    ) -> None:
        self._pool = thread_pool or ThreadPoolExecutor(THREADS_MAX, "trialstore-grpc")
        self._owns_pool = thread_pool is None
        self._streams = StreamBounds(standstill_s)
        self._server = grpc.server(
            self._pool,
            interceptors=[*security.interceptors(), self._streams],
            maximum_concurrent_rpcs=_CALLS_MAX,
            options=[
                ("grpc.max_receive_message_length", message_bytes_max),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a second server on the port is a mistake
            ],
        )
        self._server.add_generic_rpc_handlers(
            (
                handler(LogServicer(share), LOG_SERVICE),
                handler(StorageServicer(storage), STORAGE_SERVICE),
            )
        )
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        _enable_reflection(self._server)
        self._services = ("", LOG_SERVICE.full_name, STORAGE_SERVICE.full_name)
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        self.port = security.listen(self._server, host, port, allow_insecure=allow_insecure)

    def start(self) -> None:
        self._server.start()
        for service in self._services:
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def drain(self, grace_s: float = _DRAIN_S) -> None:
        """Take no new calls, and let the running ones come to their end."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._health.enter_graceful_shutdown()
            self._server.stop(grace_s).wait()
            self._streams.close()
            if self._owns_pool:
                self._pool.shutdown()
            self._stopped.set()
        self._stopped.wait()

    def wait(self) -> None:
        """Wait until the last call has ended after ``drain``."""
        self._stopped.wait()

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, or until ``drain`` in another thread; then drain."""
        wake = threading.Event()
        with _signals(wake.set):
            self.start()
            while not (wake.is_set() or self._stopping.is_set()):
                # A wait without a timeout would keep the signal handler from running on Windows.
                wake.wait(1.0)
            self.drain()


def _enable_reflection(server: grpc.Server) -> None:
    for module in (health_pb2, reflection._reflection_pb2):
        with contextlib.suppress(TypeError):  # it is there already
            POOL.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    names = (
        LOG_SERVICE.full_name,
        STORAGE_SERVICE.full_name,
        health.SERVICE_NAME,
        reflection.SERVICE_NAME,
    )
    reflection.enable_server_reflection(names, server, pool=POOL)


@contextlib.contextmanager
def _signals(wake: Callable[[], None]) -> Iterator[None]:
    """Have SIGTERM and SIGINT call ``wake``, where this is the main thread, which alone can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda *_: wake())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
