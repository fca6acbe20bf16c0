"""gRPC servers for tests, in processes of their own: a server and a fork do not mix.

``serve`` asks one helper process, started once, for one more server, which takes milliseconds.
``KillableServer`` is a process for itself, to be killed and started again on the same port.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
import contextlib
import functools
import logging
import multiprocessing
from multiprocessing.connection import Connection
import os
from pathlib import Path
import queue
import signal
import socket
import sys
import threading
import time
from typing import Any

import optuna

from servers import free_port, new_database
import trialstore
from trialstore import grpc as trialstore_grpc
from trialstore.logs.grpc.server import LogServicer, ProxyServer, Security
from trialstore.storage import Storage

_DEADLINE_S = 120.0


def open_served(url: str) -> Any:
    """The storage that a server is to stand on; ``optuna+`` before a URL means Optuna's own."""
    if url.startswith("optuna+"):
        url = url.removeprefix("optuna+")
        if url == "memory://":
            return optuna.storages.InMemoryStorage()
        return optuna.storages.get_storage(url)
    return trialstore.get_storage(url)


def open_grpc(port: int, **options: Any) -> Storage:
    """A client of a server on loopback; picklable, as an opener of a store has to be."""
    return trialstore_grpc.GrpcStorageProxy(port=port, **options)


# --- many servers in one helper process ----------------------------------------------------------


def _run_helper(orders: Connection, path: list[str]) -> None:
    sys.path[:] = path
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("trialstore").setLevel(logging.ERROR)
    while True:
        try:
            url, stock = orders.recv()
        except EOFError:
            os._exit(0)
        try:
            orders.send(_start(url, stock))
        except Exception as error:
            orders.send(error)


# A test needs two at most; older ones are stopped, or a database runs out of connections.
_RUNNING_MAX = 6
_running: list[Callable[[], object]] = []


def _start(url: str, stock: bool) -> int:
    while len(_running) >= _RUNNING_MAX:
        _running.pop(0)()
    storage = open_served(url)
    return _start_stock(storage) if stock else _start_ours(storage)


def _start_stock(storage: Any) -> int:
    from optuna.storages._grpc.server import make_server

    port = free_port()
    server: Any = make_server(storage, "localhost", port)
    server.start()
    _running.append(lambda: server.stop(0).wait())
    return port


def _start_ours(storage: Any) -> int:
    started: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            with trialstore_grpc._shared(storage, 3) as share:
                server = ProxyServer(share, storage, host="localhost", port=0, security=Security())
                server.start()
                started.put(server)
                server.wait()
        except Exception as error:
            started.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    server = started.get(timeout=_DEADLINE_S)
    if isinstance(server, Exception):
        raise server

    def stop() -> None:
        server.drain(0)
        thread.join(_DEADLINE_S)

    _running.append(stop)
    port: int = server.port
    return port


@contextlib.contextmanager
def serving(storage: Any, **options: Any) -> Iterator[ProxyServer]:
    """A server in this very process, for a test that has to hold the storage or the server."""
    options = {"security": Security(), **options}
    with trialstore_grpc._shared(storage, 3) as share:
        server = ProxyServer(share, storage, host="localhost", port=0, **options)
        server.start()
        try:
            yield server
        finally:
            server.drain(0)


_helpers: dict[int, Connection] = {}


def serve(url: str, *, stock: bool = False) -> int:
    """Start a server on a storage; returns its port. ``stock``: Optuna's own server."""
    orders = _helpers.get(os.getpid())
    if orders is None:
        context = multiprocessing.get_context("spawn")
        orders, theirs = context.Pipe()
        process = context.Process(target=_run_helper, args=(theirs, sys.path), daemon=True)
        process.start()
        theirs.close()
        _helpers[os.getpid()] = orders
    orders.send((url, stock))
    if not orders.poll(_DEADLINE_S):
        raise TimeoutError("The helper process does not answer.")
    answer = orders.recv()
    if isinstance(answer, Exception):
        raise answer
    port: int = answer
    _urls[port] = url
    return port


_urls: dict[int, str] = {}


def url_behind(port: int) -> str:
    """What a server that ``serve`` started stands on."""
    return _urls[port]


def served_url(kind: str, folder: Path) -> str:
    """URL of a new empty store for a server: journal, memory, or a kind of ``new_database``."""
    if kind == "journal":
        return str(folder / "served.log")
    if kind == "in-process":
        return "memory://"
    return new_database(kind, folder)


def prepare_grpc(kind: str, folder: Path, *, stock: bool = False) -> Any:
    """Start a server on a new store; returns what opens clients of it."""
    url = served_url(kind, folder)
    return functools.partial(open_grpc, serve(f"optuna+{url}" if stock else url, stock=stock))


# --- one server, to be killed --------------------------------------------------------------------


def _die_before_replying(order: Path) -> None:
    """Have this process end, as by SIGKILL, with the next records that are in the log when their
    answer is not yet on its way; as soon as there is a file that orders it."""
    exchange = LogServicer.Exchange

    def dying(self: LogServicer, request: Any, context: Any) -> Any:
        reply = exchange(self, request, context)
        if request.records and order.exists():
            order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return reply

    LogServicer.Exchange = dying  # type: ignore[method-assign]


def _run_server(url: str, path: list[str], options: dict[str, Any], dies_by: Path | None) -> None:
    sys.path[:] = path
    if dies_by is not None:
        _die_before_replying(dies_by)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("trialstore").setLevel(logging.ERROR)
    trialstore_grpc.run_grpc_proxy_server(open_served(url), **options)


class KillableServer:
    """A server process on one port.

    Args:
        url: What it stands on; something that survives it.
        dies_by: A file; once it is there, the server dies of the next write, whose answer is lost.
        options: Passed to ``run_grpc_proxy_server``.
    """

    def __init__(self, url: str, *, dies_by: Path | None = None, **options: Any) -> None:
        self.url = url
        self._dies_by = dies_by
        self.port = options.setdefault("port", free_port())
        self.options = options
        self.process: Any = None
        self.start()
        atexit.register(self.kill)

    def start(self, *, wait: bool = True) -> None:
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(
            target=_run_server,
            args=(self.url, sys.path, self.options, self._dies_by),
            daemon=True,
        )
        self.process.start()
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        end_s = time.monotonic() + _DEADLINE_S
        while True:
            try:
                socket.create_connection(("localhost", self.port), timeout=5).close()
                return
            except OSError:
                assert self.process.is_alive(), "the server ended"
                assert time.monotonic() < end_s, "the server does not listen"
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.join(_DEADLINE_S)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.terminate()
        self.process.join(_DEADLINE_S)
        code: int = self.process.exitcode
        return code

    def __enter__(self) -> KillableServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
