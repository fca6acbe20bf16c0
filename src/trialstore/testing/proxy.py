"""A TCP proxy on loopback that counts round trips, delays, cuts and swallows.

One thread runs an event loop with every connection on it, so counts need no care about order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
import contextlib
import threading
from types import TracebackType
from typing import Any, TypeVar

_CHUNK_BYTES = 1 << 18
_DEADLINE_S = 60.0

_T = TypeVar("_T")


class CountingProxy:
    """Stands between clients and a server.

    A *round trip* is a burst of bytes from a client that the server answers: however many
    messages the client sends before the first byte of the answer, they make one. Protocols whose
    server talks unasked (HTTP/2 pings) are better counted in their own client.

    Args:
        host: Where the server listens.
        port: Its port.
        delay_s: How late each chunk of bytes arrives, in each direction.

    Attributes:
        n_round_trips: Bursts that were answered, over all connections.
        n_connections: Connections accepted so far.
    """

    def __init__(self, host: str, port: int, *, delay_s: float = 0.0) -> None:
        self._target = (host, port)
        self.delay_s = delay_s
        self.host = "127.0.0.1"
        self.port = 0
        self.n_round_trips = 0
        self.n_connections = 0
        self._cut_in_replies: int | None = None
        self._was_cut = threading.Event()
        self._swallows: frozenset[str] = frozenset()
        self._refuses = False
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._server: asyncio.Server | None = None

    # --- life ------------------------------------------------------------------------------------

    def start(self) -> CountingProxy:
        """Listen on a free port of loopback, or again on the one of before."""
        loop = asyncio.new_event_loop()
        self._loop = loop
        self._thread = threading.Thread(target=loop.run_forever, name="counting-proxy")
        self._thread.daemon = True
        self._thread.start()
        try:
            self._call(self._listen())
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Cut every connection and listen no more."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        self._call(self._shut())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_DEADLINE_S)
        loop.close()
        self._loop = self._thread = None

    def __enter__(self) -> CountingProxy:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        assert self._loop is not None, "start() the proxy first"
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_DEADLINE_S)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
        self._abort_all()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- what a test orders ----------------------------------------------------------------------

    def reset(self) -> None:
        """Count round trips from 0 again."""
        self.n_round_trips = 0

    def cut_at_reply(self, k: int) -> None:
        """Throw the ``k``-th reply from now away and reset its connection, both sides.

        The server has done by then what it was asked; its client can't know.
        """
        self._was_cut.clear()
        self._cut_in_replies = k

    @property
    def was_cut(self) -> bool:
        """Whether the cut that was ordered last has happened."""
        return self._was_cut.is_set()

    def sever(self) -> None:
        """Reset every connection of now; new ones are welcome."""

        async def sever() -> None:
            self._abort_all()

        self._call(sever())

    def refuse(self, refuses: bool = True) -> None:
        """Reset new connections as soon as they are made, or no longer."""
        self._refuses = refuses

    def swallow(self, *, requests: bool = True, replies: bool = True) -> None:
        """Let bytes vanish without closing anything, as a network that drops packets does."""
        ordered = (("requests", requests), ("replies", replies))
        self._swallows = frozenset(name for name, wanted in ordered if wanted)

    def pass_on(self) -> None:
        """End :meth:`swallow` for what comes from now on."""
        self._swallows = frozenset()

    # --- connections -----------------------------------------------------------------------------

    def _abort_all(self) -> None:
        for link in list(self._links):
            link.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_connections += 1
        if self._refuses:
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, server_writer)
        self._links.add(link)
        pumps = [
            asyncio.ensure_future(self._pump(link, reader, server_writer, "requests")),
            asyncio.ensure_future(self._pump(link, server_reader, writer, "replies")),
        ]
        self._tasks.update(pumps)
        try:
            await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            link.abort()
            self._links.discard(link)
            self._tasks.difference_update(pumps)

    async def _pump(
        self,
        link: _Link,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        direction: str,
    ) -> None:
        """One direction of one connection; a second task writes, so that delays overlap."""
        loop = asyncio.get_running_loop()
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivery = asyncio.ensure_future(_deliver(late, writer))
        try:
            while chunk := await reader.read(_CHUNK_BYTES):
                if self._count(link, direction):
                    link.abort()
                    return
                if direction not in self._swallows:
                    late.put_nowait((loop.time() + self.delay_s, chunk))
            late.put_nowait((loop.time() + self.delay_s, b""))
            await delivery
        except (OSError, asyncio.CancelledError):
            link.abort()
        finally:
            delivery.cancel()

    def _count(self, link: _Link, direction: str) -> bool:
        """Note a chunk; returns whether it is the reply to be cut."""
        if direction == "requests":
            link.is_asking = True
            return False
        if not link.is_asking:
            return False
        link.is_asking = False
        self.n_round_trips += 1
        if self._cut_in_replies is None:
            return False
        self._cut_in_replies -= 1
        if self._cut_in_replies > 0:
            return False
        self._cut_in_replies = None
        self._was_cut.set()
        return True


class _Link:
    """The two ends of one client's connection."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._ends = (client, server)
        self.is_asking = False

    def abort(self) -> None:
        for end in self._ends:
            end.transport.abort()


async def _deliver(late: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
    """Write each chunk when it is due; an empty one ends this direction."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while True:
            due_s, chunk = await late.get()
            if due_s > loop.time():
                await asyncio.sleep(due_s - loop.time())
            if not chunk:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            writer.write(chunk)
            await writer.drain()
