"""redis-py: imported when it is first needed; what its errors mean."""

from __future__ import annotations

import ssl
from typing import Any, Literal, NamedTuple


def driver() -> Any:
    """The ``redis`` package, imported when it is first needed."""
    try:
        import redis
    except ImportError as error:
        raise ImportError(
            "A journal in Redis needs the redis package: pip install 'trialstore[redis]'."
        ) from error
    return redis


class Kind(NamedTuple):
    """What an error of the driver means.

    Args:
        what: Both "retry" and "passing" are worth another attempt; in the second case the server
            has said that it did nothing.
        advice: What to do, to end a message with.
    """

    what: Literal["retry", "passing", "refused", "damaged"]
    advice: str = ""


def kind_of(error: Exception) -> Kind | None:
    """The one table from redis-py's errors to ours; None for what is no error of the server."""
    redis = driver()
    errors = redis.exceptions
    if isinstance(
        error, (errors.AuthenticationError, errors.AuthorizationError, errors.NoPermissionError)
    ):
        return Kind("refused", " Check the user and the password.")
    if isinstance(error, (errors.BusyLoadingError, errors.ReadOnlyError)):
        return Kind("passing")  # a restart, or a failover
    if isinstance(error, (errors.ConnectionError, errors.TimeoutError, OSError)):
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return Kind("refused", " Check ssl_ca_certs in the URL.")
            cause = cause.__cause__ or cause.__context__
        return Kind("retry")
    # Older versions of the driver have no class for some of them outside its cluster's client.
    text = str(error)
    if isinstance(error, errors.AskError) or text.startswith(("MOVED ", "ASK ")):
        return Kind("refused", " The server is part of a cluster: pass use_cluster=True.")
    if isinstance(error, errors.OutOfMemoryError):
        return Kind("refused", " Give Redis more memory, or delete what it need not keep.")
    if isinstance(
        error,
        (errors.ClusterError, errors.TryAgainError, errors.RedisClusterException),
    ):
        return Kind("retry")  # a failover too, or slots on their way
    if isinstance(error, errors.ResponseError):
        if "WRONGTYPE" in text:
            return Kind("damaged", " A key of the journal holds something else.")
        passing = ("BUSY ", "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN", "NOREPLICAS")
        return Kind("passing" if text.startswith(passing) else "refused")
    return Kind("retry") if isinstance(error, errors.RedisError) else None


def as_bytes(value: Any) -> bytes:
    """An answer as bytes, whatever a client's callbacks made of it."""
    return value.encode("latin-1") if isinstance(value, str) else bytes(value or b"")
