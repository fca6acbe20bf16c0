"""Errors as gRPC statuses and back, in one table for both sides.

A status of gRPC's own making (nobody there, a connection that broke, a deadline) carries no
``trialstore-error``; then nobody knows whether the server did what it was asked.
"""

from __future__ import annotations

from typing import Any, Final, NoReturn

import grpc

from trialstore.errors import (
    IncompatibleSchemaError,
    LogCompactedError,
    LogCorruptError,
    LogUnavailableError,
    OutcomeUnknownError,
)

KEY: Final = "trialstore-error"

_Code = grpc.StatusCode

# The first that an error is an instance of; looked up by name on the way back.
_TABLE: Final[tuple[tuple[str, type[Exception], Any], ...]] = (
    ("unavailable", LogUnavailableError, _Code.UNAVAILABLE),
    ("outcome-unknown", OutcomeUnknownError, _Code.ABORTED),
    ("compacted", LogCompactedError, _Code.OUT_OF_RANGE),
    ("corrupt", LogCorruptError, _Code.DATA_LOSS),
    ("incompatible-schema", IncompatibleSchemaError, _Code.FAILED_PRECONDITION),
    ("value", ValueError, _Code.INVALID_ARGUMENT),
)

# grpcio's words for a call beyond ``maximum_concurrent_rpcs``, and ours for one beyond our bounds.
_TOO_MANY: Final = "Concurrent RPC limit"

_REFUSED: Final = {
    _Code.UNAUTHENTICATED: "it wants a token, and this is not the one. Pass token= or token_file=",
    _Code.PERMISSION_DENIED: "it denies permission",
    _Code.RESOURCE_EXHAUSTED: "it has not the resources",
}

# What a plain Optuna server says of a call that it refuses, and gRPC of one that nobody serves.
_UNDERSTOOD: Final = (
    _Code.INVALID_ARGUMENT,
    _Code.NOT_FOUND,
    _Code.ALREADY_EXISTS,
    _Code.FAILED_PRECONDITION,
    _Code.UNIMPLEMENTED,
)


def abort(context: grpc.ServicerContext, error: Exception) -> NoReturn:
    """End a call with the status of an error; an unknown one tells its type and no more."""
    for name, kind, code in _TABLE:
        if isinstance(error, kind):
            context.set_trailing_metadata(((KEY, name),))
            context.abort(code, str(error))
    context.abort(_Code.INTERNAL, f"{type(error).__name__} in the server; its log says more.")
    raise AssertionError("abort raises")


def refuse_for_now(context: grpc.ServicerContext, why: str) -> NoReturn:
    """End a call before it has begun; the client comes back, with jitter."""
    context.abort(_Code.RESOURCE_EXHAUSTED, f"{_TOO_MANY} exceeded! {why}")
    raise AssertionError("abort raises")


def is_known(error: Exception) -> bool:
    """Whether the table has a status for an error."""
    return any(isinstance(error, kind) for _, kind, _ in _TABLE)


def error_name(error: grpc.RpcError) -> str:
    """The name in the table of what the server's log said; empty if that is not what failed."""
    for key, value in error.trailing_metadata() or ():
        if key == KEY:
            return str(value)
    return ""


def was_raised(error: grpc.RpcError) -> bool:
    """Whether this is a plain Optuna server's answer: its storage raised an exception."""
    # The words are grpcio's.
    return error.code() == _Code.UNKNOWN and "Exception calling application" in (
        error.details() or ""
    )


def is_transient(error: grpc.RpcError) -> bool:
    """Whether another attempt may succeed."""
    name = error_name(error)
    if name:
        return name in ("unavailable", "outcome-unknown")
    if error.code() == _Code.UNKNOWN:
        return not was_raised(error)
    if error.code() == _Code.RESOURCE_EXHAUSTED:
        return _TOO_MANY in (error.details() or "")
    return error.code() in (
        _Code.UNAVAILABLE,
        _Code.DEADLINE_EXCEEDED,
        _Code.CANCELLED,
        _Code.ABORTED,
    )


def may_have_arrived(error: grpc.RpcError) -> bool:
    """Whether the server may have done what it was asked."""
    name = error_name(error)
    if name:
        return name == "outcome-unknown"
    if error.code() in _REFUSED or error.code() in _UNDERSTOOD:
        return False
    # The core's words for a call that found no connection, and was not sent. If they change one
    # day, an error is called unknown that could be called safe to retry.
    details = error.details() or ""
    return "failed to connect" not in details and "resolution" not in details


def to_error(error: grpc.RpcError, server: str, *, unknown: bool) -> Exception:
    """What to raise for a call that failed for good.

    Args:
        error: The last attempt's.
        server: Its name, for the message.
        unknown: Records were sent, and may have been appended.
    """
    details = error.details() or error.code().name
    name = error_name(error)
    if name == "compacted":
        return LogCompactedError(details, source=server)
    if name == "corrupt":
        return LogCorruptError(details, source=server)
    for known, kind, _ in _TABLE:
        if name == known and not is_transient(error):
            return kind(details)
    if "larger than max" in details:  # the core's words
        return ValueError(
            f"{server} takes no message as large as this ({details}); keep large values in a "
            "file and store its path."
        )
    if unknown and was_raised(error):
        return OutcomeUnknownError(
            f"{server}: the storage behind the server failed ({details}). Read the study to see "
            "whether anything was stored."
        )
    if unknown:
        return OutcomeUnknownError(
            f"{server}: the records were sent and no answer came ({error.code().name}: "
            f"{details}). Read the study to see what was stored."
        )
    refused = _REFUSED.get(error.code())
    if refused is not None:
        return LogUnavailableError(f"{server} refuses the call: {refused} ({details}).")
    return LogUnavailableError(
        f"{server}: no answer, nothing was stored; the call may be made again "
        f"({error.code().name}: {details})."
    )
