"""``run_grpc_proxy_server`` and ``GrpcStorageProxy``: a storage for machines that can't reach it.

The server serves the log of a storage of ours, so that a client is a storage like any other over
a log far away; beside it Optuna's own service, for plain Optuna workers. The client finds out by
itself which of the two it talks to.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
import contextlib
import logging
import os
from typing import Any
import uuid
import weakref

from optuna.storages import BaseStorage

try:
    import grpc as _grpc  # noqa: F401
except ImportError as error:
    raise ImportError("The gRPC proxy needs grpcio: pip install 'trialstore[grpc]'.") from error

from trialstore.callbacks import StaleTrialCallback
from trialstore.clock import CLOCK, Clock
from trialstore.exchange import Exchanger
from trialstore.log import START, Log, Wanted
from trialstore.logs.grpc.client import (
    CALL_TIMEOUT_S,
    RETRY_DEADLINE_S,
    TOKEN_VARIABLE,
    Credentials,
    GrpcLog,
)
from trialstore.logs.grpc.foreign import LocalMethods, StorageLog
from trialstore.logs.grpc.server import MESSAGE_BYTES_MAX, ProxyServer, Security
from trialstore.logs.grpc.share import Share
from trialstore.logs.grpc.sharing import ShareLog, share_of
from trialstore.logs.memory import MemoryLog
from trialstore.processes import Fork
from trialstore.storage import Storage

__all__ = ["GrpcStorageProxy", "run_grpc_proxy_server"]

_logger = logging.getLogger(__name__)

_CONNECTIONS_MAX = 8


def run_grpc_proxy_server(
    storage: BaseStorage,
    *,
    host: str = "localhost",
    port: int = 13000,
    thread_pool: ThreadPoolExecutor | None = None,
    certificate_file: str | None = None,
    key_file: str | None = None,
    client_ca_file: str | None = None,
    token: str | None = None,
    token_file: str | None = None,
    allow_insecure: bool = False,
    max_message_bytes: int = MESSAGE_BYTES_MAX,
    max_connections: int = _CONNECTIONS_MAX,
) -> None:
    """Serve a storage until SIGTERM or SIGINT, then let running calls end, and return.

    Args:
        storage: Any storage. Nobody else should use this object meanwhile but through the server.
        host: Address to listen on.
        port: Port to listen on.
        thread_pool: Where calls run, by default 64 threads; streams have their own.
        certificate_file: PEM certificate of the server; with ``key_file``, TLS.
        key_file: Its private key.
        client_ca_file: PEM certificates; clients need one that is signed by one of them.
        token: Bearer token that clients must show; by default that of the environment's
            ``TRIALSTORE_GRPC_TOKEN``, if there is one.
        token_file: File that holds the token.
        allow_insecure: Listen on an address that others reach, with neither TLS nor token.
        max_message_bytes: Larger requests are refused.
        max_connections: How many connections to a database at most.

    Raises:
        ValueError: Arguments do not go together, or strangers could call.
        RuntimeError: The port is taken.
    """
    if token is None and token_file is None:
        token = os.environ.get(TOKEN_VARIABLE, "").strip() or None
    security = Security(
        certificate_file=certificate_file,
        key_file=key_file,
        client_ca_file=client_ca_file,
        token=token,
        token_file=token_file,
    )
    with _shared(storage, max_connections) as share:
        server = ProxyServer(
            share,
            storage,
            host=host,
            port=port,
            security=security,
            allow_insecure=allow_insecure,
            thread_pool=thread_pool,
            message_bytes_max=max_message_bytes,
        )
        _logger.info("Serving %s at %s:%d.", type(storage).__name__, host, server.port)
        server.run()
        storage.remove_session()


# --- the server's storage ------------------------------------------------------------------------


@contextlib.contextmanager
def _shared(storage: BaseStorage, max_connections: int) -> Any:
    """A share of what the storage stands on; the storage itself goes through it meanwhile."""
    log = _log_of(storage)
    if log is None:
        yield _share_of_methods(storage)
        return
    assert isinstance(storage, Storage)
    exchanger = storage._exchanger
    with _alone(exchanger):
        saver = exchanger._saver
        share = share_of(
            log,
            exchanger._cursor,
            None,
            n_copies_max=max_connections,
            # What clients write goes past the exchanger, which would have saved snapshots.
            **({} if saver is None else {"note": saver.note}),
        )
        exchanger.log = ShareLog(share)
    try:
        yield share
    finally:
        with _alone(exchanger):
            exchanger.log = log
        share.close()


def _log_of(storage: BaseStorage) -> Log | None:
    """The log of a storage of ours; None if there is none, or it is in memory, without records."""
    if not isinstance(storage, Storage):
        return None
    log = storage._exchanger.log
    if isinstance(log, MemoryLog):
        return None
    storage._exchanger.run((), Wanted(catalogue=True))
    return log


def _share_of_methods(storage: BaseStorage) -> Share:
    # By name: of Optuna's storages nothing but the abstract class is imported here.
    dies_with_us = isinstance(storage, Storage) or type(storage).__name__ == "InMemoryStorage"
    epoch = uuid.uuid4().hex if dies_with_us else ""
    log = StorageLog(LocalMethods(storage), epoch=epoch)
    # It keeps nothing of its own, and the storage takes any number of threads.
    return share_of(log, START, lambda: log, n_copies_max=1 << 30)


@contextlib.contextmanager
def _alone(exchanger: Exchanger) -> Any:
    """While no exchange is on the wire, and none can begin."""
    exchanger.hold_for_fork()
    try:
        yield
    finally:
        exchanger.go_on_in_parent()


# --- the client ----------------------------------------------------------------------------------


class GrpcStorageProxy(Storage):
    """A storage behind ``run_grpc_proxy_server``, or behind Optuna's own.

    Nothing is contacted before the first call.

    Args:
        host: Where the server listens.
        port: Its port.
        tls: Talk TLS and trust the certificates of the system.
        ca_file: Talk TLS and trust these PEM certificates instead; like the next two read again
            where no connection is to be had.
        certificate_file: PEM certificate of this client, where the server asks for one.
        key_file: Its private key.
        token: Bearer token; by default that of ``TRIALSTORE_GRPC_TOKEN``, if there is one.
        token_file: File that holds the token; unlike ``token`` it is not in a pickle, and it is
            read again when the server refuses what it said.
        retry_deadline_s: For how long a call tries to get an answer before it gives up; a study
            that is opened comes in parts, and each begins the time anew.
        call_timeout_s: For how long its first attempt waits, for an answer or for each part.
        linger_s: For how long a write on a running trial may wait for an exchange to ride along
            with; 0 writes everything through.
        max_staleness_s: How old an answer may be; 0 means never older than the call.
        heartbeat_interval: Seconds between two beats for the trials that this storage runs; None
            is without heartbeat. Expiry is judged by the clock of what the server stands on;
            docs/heartbeats.md has this and the next three.
        grace_period: Seconds without a beat after which a trial is failed.
        heartbeat_stale_trial_callback: What is done about a failed trial.
        failed_trial_callback: The name of that until Optuna 4.9.
    """

    def __init__(
        self,
        *,
        host: str = "localhost",
        port: int = 13000,
        tls: bool = False,
        ca_file: str | None = None,
        certificate_file: str | None = None,
        key_file: str | None = None,
        token: str | None = None,
        token_file: str | None = None,
        retry_deadline_s: float = RETRY_DEADLINE_S,
        call_timeout_s: float = CALL_TIMEOUT_S,
        linger_s: float = 0.02,
        max_staleness_s: float = 0.0,
        heartbeat_interval: int | None = None,
        grace_period: int | None = None,
        heartbeat_stale_trial_callback: StaleTrialCallback | None = None,
        failed_trial_callback: StaleTrialCallback | None = None,
        clock: Clock = CLOCK,
    ) -> None:
        credentials = Credentials(
            tls=tls,
            ca_file=ca_file,
            certificate_file=certificate_file,
            key_file=key_file,
            token=token,
            token_file=token_file,
        )
        log = GrpcLog(
            host,
            port,
            credentials=credentials,
            retry_deadline_s=retry_deadline_s,
            call_timeout_s=call_timeout_s,
        )
        super().__init__(
            log,
            linger_s=linger_s,
            max_staleness_s=max_staleness_s,
            heartbeat_interval=heartbeat_interval,
            grace_period=grace_period,
            heartbeat_stale_trial_callback=heartbeat_stale_trial_callback,
            failed_trial_callback=failed_trial_callback,
            clock=clock,
        )

    def _open(self, log: Log) -> None:
        super()._open(log)
        _alive.add(self._exchanger)

    def wait_server_ready(self, timeout: float | None = None) -> None:
        """Wait until there is a server, in seconds. Raises ConnectionError if there is none."""
        log: Any = self._exchanger.log
        log.wait_until_ready(timeout)


# --- fork ----------------------------------------------------------------------------------------

# grpcio prepares for a fork only while no thread is inside a call, and its hook, registered when
# it was imported, runs before the one in exchange.py that waits for the calls to end. This one
# was registered later and therefore runs before both.

_alive: weakref.WeakSet[Exchanger] = weakref.WeakSet()
_fork = Fork(_alive)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_fork.hold, after_in_parent=_fork.release, after_in_child=_fork.forget
    )
