"""PgBouncer in transaction mode: after each transaction a client is lent another session.

Source: https://www.postgresql.org/docs/current/protocol-flow.html.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
import contextlib
import select
import socket
import struct
import threading

import sqlalchemy as sa

_SSL_OR_GSS_REQUEST = (80877103, 80877104)


@contextlib.contextmanager
def pooled(url: str, n_sessions: int) -> Iterator[str]:
    """The URL that leads to a PostgreSQL server through a pooler with so many sessions."""
    server = sa.make_url(url)
    assert server.host is not None and server.port is not None
    pooler = Pooler(server.host, server.port, n_sessions)
    try:
        yield server.set(port=pooler.port).render_as_string(hide_password=False)
    finally:
        pooler.close()


class Pooler:
    """Lends the session that has been idle for longest, so that nobody keeps one."""

    def __init__(self, host: str, port: int, n_sessions: int) -> None:
        self._address = (host, port)
        self._n_left = n_sessions
        self._idle: deque[socket.socket] = deque()
        self._changed = threading.Condition()
        self._greeting = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(EOFError, OSError), client:
            startup = _startup(client)
            self._give_back(self._take(startup))
            client.sendall(self._greeting)
            while (message := _message(client))[:1] != b"X":
                session = self._take(startup)
                session.sendall(message)
                # A client that goes in the middle of a transaction takes the session with it.
                _pass_on_until_idle(client, session)
                self._give_back(session)

    def _take(self, startup: bytes) -> socket.socket:
        with self._changed:
            self._changed.wait_for(lambda: self._n_left or self._idle)
            if not self._n_left:
                return self._idle.popleft()
            self._n_left -= 1
        session = socket.create_connection(self._address)
        self._open.append(session)
        session.sendall(startup)
        greeting = b""
        while (message := _message(session))[:1] != b"Z":
            greeting += message
        self._greeting = greeting + message
        return session

    def _give_back(self, session: socket.socket) -> None:
        with self._changed:
            self._idle.append(session)
            self._changed.notify()


def _exactly(n: int, peer: socket.socket) -> bytes:
    found = b""
    while len(found) < n:
        part = peer.recv(n - len(found))
        if not part:
            raise EOFError
        found += part
    return found


def _startup(client: socket.socket) -> bytes:
    """A client's first message, after it was told that there is no encryption."""
    while True:
        length = _exactly(4, client)
        body = _exactly(struct.unpack("!I", length)[0] - 4, client)
        if struct.unpack("!I", body[:4])[0] not in _SSL_OR_GSS_REQUEST:
            return length + body
        client.sendall(b"N")


def _message(peer: socket.socket) -> bytes:
    head = _exactly(5, peer)
    return head + _exactly(struct.unpack("!I", head[1:])[0] - 4, peer)


def _pass_on_until_idle(client: socket.socket, session: socket.socket) -> None:
    while True:
        for peer in select.select([client, session], [], [])[0]:
            message = _message(peer)
            (session if peer is client else client).sendall(message)
            if peer is session and message[:1] == b"Z" and message[5:6] == b"I":
                return
