"""Calls that a client can leave open: bounded, and on threads of their own.

A call holds a thread for as long as its client neither sends what is waited for nor takes what it
is sent. Of an exchange, all is there at once; a stream may stand still for ever. So streams run
apart from exchanges, only so many of each kind at once, and one that waits too long for its client
is cancelled. The health check runs here as well: whoever has no token may call it, and may leave
it open by sending no request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import threading
from typing import Any, Final

import grpc

from trialstore.logs.grpc import status

HEALTH_CHECK: Final = "/grpc.health.v1.Health/Check"

STREAMS_MAX: Final = 8
"""Of each kind; an unread one keeps in memory what it has to send."""
STANDSTILL_S: Final = 30.0
"""A part of 1 MiB takes as long on a line of 35 kB/s."""

# More than all kinds together may hold (two of ours, two of health, one of reflection), so that
# a refusal always finds one.
_THREADS_MAX: Final = 6 * STREAMS_MAX


class StreamBounds(grpc.ServerInterceptor):  # type: ignore[misc]
    """Keeps streams within their bounds.

    Args:
        standstill_s: For how long a stream may wait for its client, each time.
    """

    def __init__(self, standstill_s: float) -> None:
        self._standstill_s = standstill_s
        self._pool = ThreadPoolExecutor(_THREADS_MAX, "trialstore-stream")
        self._bounded: dict[str, grpc.RpcMethodHandler] = {}

    def intercept_service(self, continuation: Callable[..., Any], details: Any) -> Any:
        found = continuation(details)
        if found is None or not (found.response_streaming or details.method == HEALTH_CHECK):
            return found
        bounded = self._bounded.get(details.method)
        if bounded is None:
            bounded = self._bounded[details.method] = self._bound(found)
        return bounded

    def close(self) -> None:
        """Wait for the threads, after the last call has ended."""
        self._pool.shutdown()

    def _bound(self, found: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        free = threading.BoundedSemaphore(STREAMS_MAX)

        def serve(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            if not free.acquire(blocking=False):
                status.refuse_for_now(context, f"{STREAMS_MAX} of these are open already.")
            try:
                for reply in _replies(found, self._patiently(requests, context), context):
                    with self._waiting(context):
                        yield reply
            finally:
                free.release()

        serve.experimental_thread_pool = self._pool  # type: ignore[attr-defined]
        # Whatever the kind: of all others grpcio waits for the request before it calls anybody.
        return grpc.stream_stream_rpc_method_handler(
            serve, found.request_deserializer, found.response_serializer
        )

    def _patiently(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        while True:
            with self._waiting(context):
                request = next(requests, None)
            if request is None:
                return
            yield request

    @contextlib.contextmanager
    def _waiting(self, context: grpc.ServicerContext) -> Iterator[None]:
        """While it is the client's turn. What the server takes to answer is not its fault."""
        timer = threading.Timer(self._standstill_s, context.cancel)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _replies(
    found: grpc.RpcMethodHandler, requests: Iterator[Any], context: grpc.ServicerContext
) -> Iterator[Any]:
    """What a handler of any kind answers."""
    if found.request_streaming:
        yield from found.stream_stream(requests, context)
        return
    for request in requests:
        if found.response_streaming:
            yield from found.unary_stream(request, context)
        else:
            yield found.unary_unary(request, context)
        return
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "There was no request.")
