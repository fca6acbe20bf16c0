"""What a URL of Redis says: which servers, with which options, and what of it may be shown.

Source: redis-py ``ConnectionPool.from_url``, ``Sentinel``.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from trialstore.credentials import Secret
from trialstore.logs.redis.driver import driver

# An answer that takes longer is given up; the connection may be dead without anybody knowing.
SOCKET_TIMEOUT_S: Final = 10.0
CONNECT_TIMEOUT_S: Final = 5.0

_SENTINEL_SCHEMES: Final = {
    "redis+sentinel": "redis",
    "rediss+sentinel": "rediss",
    "sentinel": "redis",
}


def check_url(url: str) -> None:
    """Raises ValueError for one that no connection can be made of."""
    try:
        # Made, not connected: this is where an option is refused that there is not.
        pool_of(url).make_connection()
        address_of(url)
    except (ValueError, TypeError):
        # Without the driver's words and without the cause: both may quote the password.
        raise ValueError(
            "This is no Redis URL that can be used; the forms are "
            "redis://[[user]:password@]host:port/db, rediss://..., unix://... and "
            "redis+sentinel://host:port,host:port/service/db. Reserved characters in a "
            "password must be percent-encoded."
        ) from None


def address_of(url: str) -> str:
    """The URL without user, password and options, for messages."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def with_password(url: str, password: Secret | None) -> str:
    """The URL with the server's password as it is now, if that is kept elsewhere.

    Raises:
        SecretNotFoundError: It is not where it should be.
    """
    if password is None:
        return url
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user = credentials.partition(":")[0]
    netloc = f"{user}:{quote(password.read(), safe='')}@{hosts}"
    return urlunsplit(parts._replace(netloc=netloc))


def pool_of(url: str) -> Any:
    """Connections as the URL says; none is made yet."""
    pool = _pool_of(url)
    # An option that some give, for clients of their own; what is read here are bytes.
    pool.connection_kwargs.pop("decode_responses", None)
    return pool


def _pool_of(url: str) -> Any:
    redis = driver()
    options = {
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_keepalive": True,
        # The older protocol says everything that is asked here, and saves a round trip.
        "protocol": 2,
    }
    if urlsplit(url).scheme not in _SENTINEL_SCHEMES:
        if url.startswith("unix:"):
            del options["socket_connect_timeout"], options["socket_keepalive"]
        return redis.ConnectionPool.from_url(url, **options)
    address = _parse_sentinel_url(url)
    server = redis.connection.parse_url(address.server_url)
    for name in ("host", "port"):
        server.pop(name, None)
    connection_class = server.pop("connection_class", None)
    if connection_class is not None:
        server["ssl"] = True
    sentinel = redis.sentinel.Sentinel(
        address.hosts,
        # One that is gone is passed over at once; trying again is done here.
        sentinel_kwargs={**options, "retry": _no_retry(), **address.sentinel_options},
    )
    return redis.sentinel.SentinelConnectionPool(address.service, sentinel, **options, **server)


def _no_retry() -> Any:
    redis = driver()
    return redis.retry.Retry(redis.backoff.NoBackoff(), 0)


class _SentinelAddress(NamedTuple):
    """What a Sentinel URL says.

    Args:
        hosts: Of the Sentinels.
        service: Name that they know the master by.
        server_url: URL of a server with everything but its host.
        sentinel_options: For the connections to the Sentinels.
    """

    hosts: list[tuple[str, int]]
    service: str
    server_url: str
    sentinel_options: dict[str, Any]


def _parse_sentinel_url(url: str) -> _SentinelAddress:
    parts = urlsplit(url)
    scheme = _SENTINEL_SCHEMES[parts.scheme]
    credentials, _, hosts_text = parts.netloc.rpartition("@")
    hosts = []
    for text in hosts_text.split(","):
        host, _, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
        hosts.append(((host or port).strip("[]"), int(port) if host and port else 26379))
    service, _, db = parts.path.strip("/").partition("/")
    options: dict[str, Any] = {}
    rest: list[tuple[str, str]] = []
    for name, value in parse_qsl(parts.query):
        if name.startswith("sentinel_"):
            options[name.removeprefix("sentinel_")] = value
        else:
            rest.append((name, value))
    server_url = f"{scheme}://{credentials}@localhost/{db or 0}?{urlencode(rest)}"
    return _SentinelAddress(hosts, unquote(service) or "mymaster", server_url, options)
