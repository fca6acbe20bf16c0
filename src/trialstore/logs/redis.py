"""A journal in Redis: one key a record, and one script that appends and reads in one round trip.

What a crash may leave behind, and why nothing that was acknowledged is lost or stored twice:

* *One server, or a cluster whose prefix has a hash tag.* The script is atomic, in memory and in
  the append-only file: a batch is there or it is not. Its records carry the writer and a sequence
  number, and the script leaves out those that it finds among the news, so a batch may be sent
  again whenever its answer did not come.
* *A cluster with a plain prefix.* Numbers are reserved with INCRBY, then every record is set if
  its key does not exist. A crash in between leaves a *hole*, which every reader must wait for,
  since the record may be on its way. After a bounded wait one of them fills it, if it still does
  not exist, with a record that means nothing to anybody. A slow writer whose number was filled
  sees that when it reads its own records back, and reserves anew.
* A key that is missing although it once existed was evicted or deleted. That is told apart from a
  hole by ``{prefix}:trialstore:complete`` and by what stands behind the gap, and never filled.
* A compaction writes beside the journal and switches in one script. Killed before, it leaves the
  old journal, killed after, the new one with records behind its end that readers pass over.

Nothing that is found in Redis is unpickled.

Source: docs/formats/redis.md; Optuna ``JournalRedisBackend``; Redis "Scripting with Lua",
"Cluster specification".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import functools
import hashlib
import json
import logging
import os
from pathlib import Path
import random
import ssl
import threading
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, NoReturn, Protocol, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit
import uuid
import weakref
import zlib

import msgspec
from optuna.storages.journal import BaseJournalBackend

from trialstore.clock import CLOCK, Clock
from trialstore.errors import (
    CompactionRefusedError,
    LogCompactedError,
    LogCorruptError,
    LogReplacedError,
    LogUnavailableError,
    OutcomeUnknownError,
)
from trialstore.findings import Finding
from trialstore.log import START, Base, Batch, Compaction, Cursor, Decide, Entry, Marks, Wanted
from trialstore.logs.head import Head, decode_head, encode_head
from trialstore.records import (
    AnyOperation,
    DeleteStudy,
    checksum_matches,
    decode_line,
    decode_lines,
    encode_dict,
    encode_line,
    owners_of_started,
)

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# The script returns so many records at most: it runs alone, and this takes it about a millisecond.
_NEWS_MAX: Final = 1000
# A worker that is further behind reads in chunks of so many keys, which others may interrupt.
_CHUNK_RECORDS: Final = 2000
# A cursor knows the last bytes before it again. A record of ours ends with its checksum.
_TAIL_BYTES: Final = 32

# For how long a server that was reached before may be away: a restart that reads a large
# append-only file, or a failover. And one that was not: a wrong address should be told soon.
_HEAL_S: Final = 30.0
_OPEN_S: Final = 5.0
_PAUSE_S: Final = 0.02
_PAUSE_MAX_S: Final = 1.0
# An answer that takes longer is given up; the connection may be dead without anybody knowing.
_SOCKET_TIMEOUT_S: Final = 10.0
_CONNECT_TIMEOUT_S: Final = 5.0
# A writer between its INCR and its SET takes milliseconds. One that was stopped for longer and
# then goes on finds its number taken (ours) or overwrites the filler (Optuna's).
_HOLE_WAIT_S: Final = 10.0
_HOLE_PAUSE_S: Final = 0.001
_HOLE_PAUSE_MAX_S: Final = 0.25
# Saving takes seconds. A killed saver keeps the others from saving for so long.
_SAVE_LOCK_S: Final = 300

_EXCHANGE: Final = "redis.lua"
_COMPACT: Final = "redis_compact.lua"
# Deletes the lock only if it is still the one that was taken.
_RELEASE_SCRIPT: Final = (
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
)
# Taken only if nobody has taken it since; what a cluster with a plain prefix does on a condition.
_RESERVE_SCRIPT: Final = (
    "if (redis.call('GET', KEYS[1]) or '-1') ~= ARGV[1] then return 0 end "
    "redis.call('SET', KEYS[1], ARGV[2]) return 1"
)
# Leases are told and compared by the server's clock, in milliseconds.
_NOW_MS: Final = (
    "local time = redis.call('TIME') local now_ms = time[1] * 1000 + math.floor(time[2] / 1000) "
)
_RENEW_SCRIPT: Final = (
    f"{_NOW_MS} for _, owner in ipairs(ARGV) do "
    "redis.call('HSET', KEYS[1], owner, string.format('%d', now_ms)) end"
)
_AGES_SCRIPT: Final = (
    f"{_NOW_MS} local ages = redis.call('HMGET', KEYS[1], unpack(ARGV)) "
    "for i = 1, #ages do if ages[i] then ages[i] = now_ms - ages[i] end end return ages"
)
_OWNERS_MAX: Final = 1000  # a script takes only so many arguments apart
# Whoever decides anew what to append on a condition has its turn, which takes a round trip.
_TURN_PAUSE_S: Final = 0.002
# Fills a hole, unless the journal has become shorter meanwhile and ends before it.
_FILL_SCRIPT: Final = (
    "if tonumber(redis.call('GET', KEYS[2]) or '-1') < tonumber(ARGV[2]) then return false end "
    "return redis.call('SET', KEYS[1], ARGV[1], 'NX')"
)
# A record about a study that can't exist: replayed by any Optuna, it changes nothing.
_FILLER_RECORD: Final = DeleteStudy(worker_id="trialstore-hole", study_id=-1)
_FILLER: Final = encode_line(_FILLER_RECORD)[:-1]
_SNAPSHOT_MAGIC: Final = b"\xfftrialstore-redis-1\n"

# An answer holds so many records at most, so that opening needs not all of them in memory twice.
_ANSWER_RECORDS: Final = 20_000
# How many places are remembered for those who read through Optuna's two methods.
_READ_POSITIONS_MAX: Final = 16
# A compaction writes beside the journal in pieces of so many records and bytes, and removes as
# many keys at a time. It switches when no more than that came meanwhile.
_PIECE_RECORDS: Final = 2000
_PIECE_BYTES: Final = 1 << 20
# A killed compactor keeps others from compacting for so long.
_COMPACT_LOCK_S: Final = 300
# Record 1 of a trimmed journal. Without an op_code, so that an Optuna that opens it stops with an
# error; at a missing record it would wait for ever.
_TRIMMED_MIN: Final = 4  # of less than so many records, none can go
_TRIMMED: Final = b'{"trialstore":"trimmed, only trialstore can open this journal","before":'


class _Position(NamedTuple):
    """A cursor.

    Args:
        number: Of the next record, counted from 0.
        tail: The last bytes of the record before it, each as one character.
        identity: Those of record 0, which name the journal; empty if not known.
    """

    number: int
    tail: str
    identity: str = ""


_BEGIN: Final = _Position(0, "")


# --- the driver ----------------------------------------------------------------------------------


def _driver() -> Any:
    """The ``redis`` package, imported when it is first needed."""
    try:
        import redis
    except ImportError as error:
        raise ImportError(
            "A journal in Redis needs the redis package: pip install 'trialstore[redis]'."
        ) from error
    return redis


class _Door(Protocol):
    """The few things asked of a server or a cluster; raises redis-py's errors."""

    def command(self, *args: Any) -> Any: ...

    def pipeline(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]: ...

    def settings(self) -> list[_Settings]: ...

    def close(self) -> None: ...


class _Settings(NamedTuple):
    """What a server says about itself; empty where it refuses to."""

    info: dict[str, Any]
    config: dict[str, Any]


class _Server:
    """One connection to one server, or to whichever server Sentinel calls the master.

    Below redis-py's client, whose retries, callbacks and pool cost more than the exchange.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._connection = pool.make_connection()
        self._connection.connect()

    def command(self, *args: Any) -> Any:
        self._connection.send_packed_command([_pack(args)], check_health=False)
        return self._connection.read_response()

    def pipeline(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        packed = b"".join(map(_pack, commands))
        self._connection.send_packed_command([packed], check_health=False)
        answers: list[Any] = []
        error: Exception | None = None
        for _ in commands:
            # Every answer is read, also after an error, or the next command would get them.
            try:
                answers.append(self._connection.read_response())
            except _driver().ResponseError as refused:
                error = error or refused
        if error is not None:
            raise error
        return answers

    def settings(self) -> list[_Settings]:
        client = _driver().Redis(connection_pool=self._pool)
        try:
            return [_ask_settings(client)]
        finally:
            self._pool.disconnect()

    def close(self) -> None:
        self._connection.disconnect()
        self._pool.disconnect()


class _Cluster:
    """redis-py's client of a cluster, which follows its slots."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self._client = _driver().RedisCluster.from_url(url, **options)

    def command(self, *args: Any) -> Any:
        return self._client.execute_command(*args)

    def pipeline(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        with self._client.pipeline() as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = pipeline.execute()
            return answers

    def settings(self) -> list[_Settings]:
        return [
            _ask_settings(self._client.get_redis_connection(node))
            for node in self._client.get_primaries()
        ]

    def close(self) -> None:
        self._client.close()


def _pack(args: Sequence[Any]) -> bytes:
    """A command on the wire; redis-py's own packing takes a tenth of what a trial costs.

    Source: Redis serialization protocol specification, "Sending commands to a Redis server".
    """
    parts = [b"*%d\r\n" % len(args)]
    for arg in args:
        value = arg if type(arg) is bytes else str(arg).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(value), value))
    return b"".join(parts)


def _send_one(door: _Door, command: tuple[Any, ...]) -> Any:
    return door.command(*command)


def _send(door: _Door, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    return door.pipeline(commands)


def _command(door: _Door, command: tuple[Any, ...]) -> Any:
    return door.command(*command)


def _ask_settings(client: Any) -> _Settings:
    answers: list[dict[str, Any]] = []
    for ask, args in ((client.info, ()), (client.config_get, ("*append*",))):
        try:
            answers.append(ask(*args))
        except _driver().ResponseError:
            answers.append({})  # hosted servers refuse CONFIG; what is not known is not warned of
    return _Settings(*answers)


class _Kind(NamedTuple):
    """What an error of the driver means."""

    what: Literal["retry", "refused", "damaged"]
    advice: str = ""


def _kind_of(error: Exception) -> _Kind | None:
    """The one table from redis-py's errors to ours; None for what is no error of the server."""
    redis = _driver()
    errors = redis.exceptions
    if isinstance(
        error, (errors.AuthenticationError, errors.AuthorizationError, errors.NoPermissionError)
    ):
        return _Kind("refused", " Check the user and the password in the URL.")
    if isinstance(error, (errors.ConnectionError, errors.TimeoutError, OSError)):
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return _Kind("refused", " Check ssl_ca_certs in the URL.")
            cause = cause.__cause__ or cause.__context__
        return _Kind("retry")
    # Older versions of the driver have no class for some of them outside its cluster's client.
    text = str(error)
    if isinstance(error, errors.AskError) or text.startswith(("MOVED ", "ASK ")):
        return _Kind("refused", " The server is part of a cluster: pass use_cluster=True.")
    if isinstance(error, errors.OutOfMemoryError):
        return _Kind("refused", " Give Redis more memory, or delete what it need not keep.")
    if isinstance(
        error,
        (
            errors.ReadOnlyError,
            errors.ClusterError,
            errors.TryAgainError,
            errors.RedisClusterException,
        ),
    ):
        return _Kind("retry")  # a failover, or slots on their way
    if isinstance(error, errors.ResponseError):
        if "WRONGTYPE" in text:
            return _Kind("damaged", " A key of the journal holds something else.")
        passing = ("BUSY ", "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN")
        return _Kind("retry" if text.startswith(passing) else "refused")
    return _Kind("retry") if isinstance(error, errors.RedisError) else None


@functools.cache
def _script(name: str) -> tuple[bytes, bytes]:
    """A script, and the name that Redis gives it."""
    body = Path(__file__).with_name(name).read_bytes()
    return body, hashlib.sha1(body).hexdigest().encode()


def _run(door: _Door, name: str, args: Sequence[Any]) -> Any:
    body, sha = _script(name)
    try:
        return door.command("EVALSHA", sha, *args)
    except _driver().exceptions.NoScriptError:
        # A server forgets its scripts when it restarts.
        return door.command("EVAL", body, *args)


# --- URLs ----------------------------------------------------------------------------------------

_SENTINEL_SCHEMES: Final = {
    "redis+sentinel": "redis",
    "rediss+sentinel": "rediss",
    "sentinel": "redis",
}


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


def _address_of(url: str) -> str:
    """The URL without user, password and options, for messages."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _pool_of(url: str) -> Any:
    """Connections as the URL says; none is made yet."""
    redis = _driver()
    options = {
        "socket_timeout": _SOCKET_TIMEOUT_S,
        "socket_connect_timeout": _CONNECT_TIMEOUT_S,
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
    redis = _driver()
    return redis.retry.Retry(redis.backoff.NoBackoff(), 0)


def _has_hash_tag(prefix: str) -> bool:
    """Whether every key that begins with ``prefix`` is in one slot of a cluster."""
    _, brace, rest = prefix.partition("{")
    tag, closed, _ = rest.partition("}")
    return bool(brace and closed and tag)


# --- the log -------------------------------------------------------------------------------------

_logs: weakref.WeakSet[RedisLog] = weakref.WeakSet()
_warned: set[str] = set()


class RedisLog(BaseJournalBackend):
    """A journal in Redis as a ``Log``, and as a backend for Optuna's own ``JournalStorage``.

    Connects when it is first used. A server that goes away and comes back within 30 seconds is
    not noticed but for the time that it takes.

    Args:
        url: ``redis://[[user]:password@]host:port/db``, ``rediss://…`` for TLS, ``unix://…``, or
            ``redis+sentinel://[…@]host:port,host:port/service/db``. Options of redis-py's
            connections may follow as a query, those of Sentinel's begin with ``sentinel_``.
        use_cluster: The server is a node of a cluster. Give it a prefix with a hash tag
            (``{name}``), which keeps the journal in one slot and each batch atomic.
        prefix: What all keys of the journal begin with.
        durability: "full" expects a server that syncs before it answers, "process" one that
            keeps an append-only file; a server that does not is warned of.
        clock: Time, for tests to replace.

    Raises:
        ValueError: The URL is none of these.
        ImportError: The ``redis`` package is not installed.
    """

    def __init__(
        self,
        url: str,
        use_cluster: bool = False,
        prefix: str = "",
        *,
        durability: Literal["full", "process"] = "full",
        clock: Clock = CLOCK,
    ) -> None:
        if durability not in ("full", "process"):
            raise ValueError(f"durability must be 'full' or 'process', not {durability!r}.")
        self._url = url
        self._use_cluster = use_cluster
        self._prefix = prefix
        self._durability = durability
        self._clock = clock
        self._begin()
        try:
            _pool_of(url)
            self._address = _address_of(url)
        except (ValueError, TypeError):
            # Without the driver's words and without the cause: both may quote the password.
            raise ValueError(
                "This is no Redis URL that can be used; the forms are "
                "redis://[[user]:password@]host:port/db, rediss://..., unix://... and "
                "redis+sentinel://host:port,host:port/service/db. Reserved characters in a "
                "password must be percent-encoded."
            ) from None

    def _begin(self) -> None:
        """The state of a log that has nothing open in this process."""
        self._mutex = threading.RLock()
        self._door: _Door | None = None
        self._was_reached = False
        self._in_slots = False  # a cluster, and the keys in any of its slots
        # Whether records were sent to which no answer came; cleared once it is known.
        self._is_uncertain = False
        self._read_positions: dict[int, _Position] = {}  # for read_logs, by record number
        self._mark = f"{uuid.uuid4().hex[:16]}-"
        self._n_marked = 0
        self._leased: set[str] = set()
        _logs.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "url": self._url,
            "use_cluster": self._use_cluster,
            "prefix": self._prefix,
            "durability": self._durability,
            "clock": self._clock,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._url = state["url"]
        self._use_cluster = state["use_cluster"]
        self._prefix = state["prefix"]
        self._durability = state["durability"]
        self._clock = state["clock"]
        self._address = _address_of(self._url)
        self._begin()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._address!r}, prefix={self._prefix!r})"

    # --- keys --------------------------------------------------------------------------------

    @property
    def _number_key(self) -> str:
        return f"{self._prefix}:log_number"

    @property
    def _complete_key(self) -> str:
        return f"{self._prefix}:trialstore:complete"

    @property
    def _turn_key(self) -> str:
        return f"{self._prefix}:trialstore:turn"

    @property
    def _leases_key(self) -> str:
        return f"{self._prefix}:trialstore:leases"

    @property
    def _snapshot_key(self) -> str:
        return f"{self._prefix}:trialstore:snapshot"

    @property
    def _lock_key(self) -> str:
        return f"{self._prefix}:trialstore:snapshot_lock"

    @property
    def _stale_key(self) -> str:
        return f"{self._prefix}:trialstore:stale"

    @property
    def _compacting_key(self) -> str:
        return f"{self._prefix}:trialstore:compacting"

    @property
    def _base_key(self) -> str:
        return f"{self._prefix}:trialstore:base"

    def _new_key(self, number: int | str) -> str:
        return f"{self._prefix}:trialstore:new:{number}"

    def _key(self, number: int) -> str:
        return f"{self._prefix}:log:{number}"

    # --- Log ---------------------------------------------------------------------------------

    def exchange(self, records: Sequence[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``Log.exchange``. One round trip but for the first, and for those who lag.

        Raises:
            LogUnavailableError: The server was not reached in time, or refused; nothing counts.
            OutcomeUnknownError: The records were sent, and the server did not come back to say.
            LogCorruptError: A record is missing, or is none. Nothing was appended.
            LogReplacedError: The journal is shorter than ``cursor``, or another one. Likewise.
        """
        position = _BEGIN if cursor is START else _Position(*cursor)
        lines = [encode_line(record)[:-1] for record in records]
        with self._mutex:
            news, after, more = self._exchange_lines(lines, position, self._owners(records))
        if not news:
            return Batch(None, (), cursor if after is position else tuple(after))
        return Batch(None, self._decode(news, after.number - len(news)), tuple(after), more)

    def exchange_if(self, decide: Decide, cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``ConditionalLog``, and ``exchange`` for what it raises.

        ``decide`` runs again if somebody else has appended meanwhile, whatever it was. Others
        then wait for their turn; on a cluster with a plain prefix they do not.
        """
        position = _BEGIN if cursor is START else _Position(*cursor)
        with self._mutex:
            lines: list[bytes] = []
            news, after = self._read_on(*self._exchange_lines(lines, position))
            while set(lines).isdisjoint(news):
                records: Sequence[AnyOperation] = ()
                try:
                    records = decide(self._decode(news, after.number - len(news)), tuple(after))
                finally:
                    if lines and not records and not self._in_slots:
                        release = ("EVAL", _RELEASE_SCRIPT, 1, self._turn_key, self._mark)
                        self._ask(functools.partial(_send_one, command=release))
                position = after
                if not records:
                    return Batch(None, (), tuple(after))
                lines = [encode_line(record)[:-1] for record in records]
                owners = self._owners(records)
                news, after = self._read_on(
                    *self._exchange_lines(lines, position, owners, alone=True)
                )
            return Batch(None, self._decode(news, after.number - len(news)), tuple(after))

    def _read_on(
        self, news: list[bytes], position: _Position, more: bool
    ) -> tuple[list[bytes], _Position]:
        """All of an answer that came in pieces."""
        while more:
            further, position, more = self._exchange_lines([], position)
            news = news + further
        return news, position

    def close(self) -> None:
        """Close the connection; a later call opens another."""
        with self._mutex:
            self._hang_up()

    # --- Optuna's backend --------------------------------------------------------------------

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """The records from a number on, as Optuna's ``JournalStorage`` replays them.

        Raises:
            LogUnavailableError, LogCorruptError: As for ``exchange``.
        """
        with self._mutex:
            begin = self._read_positions.get(log_number_from, _Position(log_number_from, ""))
            lines, position = self._read_on([], begin, more=True)
            # Optuna counts from where it began to read, and a compaction changes the numbers.
            moved = begin.identity and position.identity != begin.identity
            if moved or (log_number_from and not begin.identity and self._head() is not None):
                self._read_positions.clear()
                self._raise_compacted(log_number_from)
            self._note_read(position)
        logs: list[dict[str, Any]] = []
        for line in lines:
            logs.append(self._decode_one(line, log_number_from + len(logs), _decode_dict))
        return logs

    def _note_read(self, position: _Position) -> None:
        """Several storages may read through one backend."""
        self._read_positions.pop(position.number, None)
        self._read_positions[position.number] = position
        if len(self._read_positions) > _READ_POSITIONS_MAX:
            del self._read_positions[next(iter(self._read_positions))]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records, all or none; durable on return.

        Raises:
            LogUnavailableError, OutcomeUnknownError, LogCorruptError: As for ``exchange``.
        """
        if not logs:
            return
        with self._mutex:
            lines = [self._encode_dict(fields) for fields in logs]
            position = next(reversed(self._read_positions.values()), _BEGIN)
            if position.number == 0:
                position = _Position(self._ask(lambda door: self._last_number(door)) + 1, "")
            self._exchange_lines(lines, position)

    def _encode_dict(self, fields: dict[str, Any]) -> bytes:
        """A line that no other is equal to, so that it is known again after a lost answer."""
        if "seq" not in fields:
            self._n_marked += 1
            fields = {**fields, "mark": f"{self._mark}{self._n_marked}"}
        return encode_dict(fields)[:-1]

    # --- exchanging lines --------------------------------------------------------------------

    def _exchange_lines(
        self,
        lines: list[bytes],
        position: _Position,
        owners: Sequence[str] = (),
        *,
        alone: bool = False,
    ) -> tuple[list[bytes], _Position, bool]:
        """Append lines, each unique; return what is new after ``position``, they included.

        Args:
            owners: Whose leases are renewed with it.
            alone: Append only if nothing is new; else none of the lines is in the answer.

        Returns:
            The news, the position after them, and whether there is more, which is read next.
        """
        self._is_uncertain = False
        self._ask(lambda door: None)  # whether the keys are in one slot is known from here on
        if self._in_slots:
            if owners:
                self._beat(owners)
            news, more = self._exchange_in_slots(lines, position, alone)
            position = _position_after(position, news)
        else:
            news, position, more = self._exchange_by_script(lines, position, owners, alone)
        self._is_uncertain = False
        return news, position, more

    def _exchange_by_script(
        self, lines: list[bytes], position: _Position, owners: Sequence[str], alone: bool
    ) -> tuple[list[bytes], _Position, bool]:
        news: list[bytes] = []
        # Read without the script: perhaps of two journals, if it was compacted meanwhile.
        unsure: list[bytes] = []
        while True:
            # An attempt whose answer was lost may have appended them. What is not among the
            # records read was not appended: an attempt that comes late sees these as news.
            pending = _without(lines, news + unsure)
            if alone and (news or unsure):
                pending = []
            after = _position_after(position, unsure)
            status, number, found = self._run_script(after, pending, owners, alone)
            if status == b"other":
                position, unsure = self._moved(position), []
                continue
            news += unsure
            position, unsure = after, []
            if status == b"moved":
                return news + found, _position_after(position, found), False
            if status == b"ok":
                found += _without(pending, found)
                return news + found, _position_after(position, found), False
            if status == b"behind":
                if not pending:
                    if len(news) >= _ANSWER_RECORDS:
                        return news, position, True
                    number = min(number, position.number + _ANSWER_RECORDS - 1)
                unsure = self._read(position.number, number)
            elif status == b"hole":
                self._close_hole(number)
            elif status == b"turn":
                self._clock.sleep(_TURN_PAUSE_S * random.uniform(0.5, 1.5))
            else:
                self._raise_damaged(status, number, found, position)

    def _run_script(
        self, position: _Position, lines: list[bytes], owners: Sequence[str], alone: bool
    ) -> tuple[bytes, int, Any]:
        args = (
            5,
            self._number_key,
            self._complete_key,
            self._leases_key,
            self._stale_key,
            self._turn_key,
            f"{self._prefix}:log:",
            position.number,
            position.tail.encode("latin-1"),
            position.identity.encode("latin-1"),
            _NEWS_MAX,
            self._mark if alone else "",
            len(owners),
            *owners,
            *lines,
        )
        status, number, found = self._ask(
            lambda door: _run(door, _EXCHANGE, args), appends=bool(lines)
        )
        return status, number, found

    def _moved(self, position: _Position) -> _Position:
        """A position in the journal that this one was compacted from, as one of this one.

        Raises:
            LogCompactedError: It is in the middle of what was compacted.
            LogReplacedError: It is of another journal.
        """
        if not position.number:
            return _BEGIN
        first = self._ask(lambda door: door.command("GET", self._key(0)))
        if first is None:
            self._raise_damaged(b"missing", 0, [], position)
        head = decode_head(first)
        if head is None or position.identity not in head.of:
            self._raise_damaged(b"changed", 0, [], position)
        (end,), (begin,) = head.end, head.begin
        if position.identity != head.of[0] or position.number < end:
            self._raise_compacted(position.number)
        tail = position.tail if position.number > end else ""
        return _Position(begin + position.number - end, tail, _tail(first))

    def _exchange_in_slots(
        self, lines: list[bytes], position: _Position, alone: bool
    ) -> tuple[list[bytes], bool]:
        """Without the script, which can't reach keys in several slots.

        A crash after the reservation leaves holes, one in the middle of the writing leaves some
        of the records and holes; the caller was told neither.

        Returns:
            The news, and whether there is more.
        """
        last = self._check_by_hand(position)
        if not lines and last - position.number >= _ANSWER_RECORDS:
            return self._read(position.number, position.number + _ANSWER_RECORDS - 1), True
        news = self._read(position.number, last)
        while lines:
            number = position.number + len(news)
            # Nobody is told of a reservation whose answer is lost; it becomes a hole.
            if not alone:
                last = self._ask(functools.partial(self._reserve, count=len(lines)))
            elif not news and self._reserve_after(number - 1, len(lines)):
                last = number - 1 + len(lines)
            else:
                return news + self._read(number, self._ask(self._last_number)), False
            end, first = last + 1, last + 1 - len(lines)
            if first < number:
                # The number was lost since it was looked at, and the reservation began it anew.
                self._raise_damaged(b"beyond", number - 1, [], position)
            commands: list[tuple[Any, ...]] = [
                ("SET", self._key(first + index), line, "NX") for index, line in enumerate(lines)
            ]
            # What was read before was there; a hint, so it need not be exact.
            commands.append(("SET", self._complete_key, number - 1))
            self._ask(functools.partial(_send, commands=commands), appends=True)
            found = self._read(number, end - 1)
            news += found
            mine = found[len(found) - len(lines) :]
            kept = sum(line == own for line, own in zip(mine, lines, strict=True))
            if mine[:kept] != lines[:kept] or (alone and 0 < kept < len(lines)):
                raise OutcomeUnknownError(
                    f"{self._address}: this writer was stopped for so long in the middle of a "
                    f"batch that others filled some of its records, {self._key(first)} and "
                    "later ones. The rest of them count."
                )
            # Filled, all or the last ones: they were given up in this place, and get another.
            lines = lines[kept:]
        return news, False

    def _reserve(self, door: _Door, count: int) -> int:
        """Take the next numbers; returns the last of them."""
        door.command("SET", self._number_key, -1, "NX")
        return int(door.command("INCRBY", self._number_key, count))

    def _reserve_after(self, last: int, count: int) -> bool:
        """Take the next numbers, unless somebody has taken any after ``last``."""
        command = ("EVAL", _RESERVE_SCRIPT, 1, self._number_key, last, last + count)
        return bool(self._ask(lambda door: door.command(*command)))

    def _last_number(self, door: _Door) -> int:
        stored = door.command("GET", self._number_key)
        try:
            return -1 if stored is None else int(stored)
        except ValueError:
            self._raise_damaged(b"number", 0, [stored], _BEGIN)

    def _check_by_hand(self, position: _Position) -> int:
        """What the script checks before anything else; returns the number of the last record."""
        tail = position.tail.encode("latin-1")
        last = self._ask(self._last_number)
        if position.number > last + 1:
            self._raise_damaged(b"short", last, [], position)
        before = position.number - 1
        if tail:
            ask = ("GETRANGE", self._key(before), -len(tail), -1)
            found = self._ask(lambda door: door.command(*ask))
            if _bytes(found) != tail:
                self._raise_damaged(b"changed", before, [], position)
        if last < 0 and self._ask(lambda door: door.command("EXISTS", self._key(0))):
            # Everybody reserves before writing, so the number says something about a record only
            # if it is read after the record was seen: the first writer may have come in between.
            last = self._ask(self._last_number)
            if last < 0:
                self._raise_damaged(b"beyond", 0, [], position)
        return last

    def _read(self, number: int, last: int) -> list[bytes]:
        """The records from one number to another, once all are there.

        Fewer, if the journal was compacted meanwhile; those read are then of no use either.
        """
        lines: list[bytes] = []
        while number <= last:
            end = min(number + _CHUNK_RECORDS, last + 1)
            for line in self._get(range(number, end)):
                if line is None:
                    break
                lines.append(line)
                number += 1
            if number < end and not self._close_hole(number):
                break
        return lines

    def _get(self, numbers: Iterable[int]) -> list[bytes | None]:
        keys = [self._key(number) for number in numbers]
        if not keys:
            return []
        if self._in_slots:
            gets = [("GET", key) for key in keys]
            return self._ask(lambda door: door.pipeline(gets))
        values: list[bytes | None] = self._ask(lambda door: door.command("MGET", *keys))
        return values

    # --- holes -------------------------------------------------------------------------------

    def _close_hole(self, number: int) -> bool:
        """Wait until there is a record of this number: the writer's, or one that says nothing.

        Returns:
            False if there need not be one any more, because a compaction has made the journal
            shorter.

        Raises:
            LogCorruptError: There was one; it was evicted or deleted.
        """
        key = self._key(number)

        def exists() -> bool:
            return bool(self._ask(lambda door: door.command("EXISTS", key)))

        def is_reserved() -> bool:
            return self._in_slots or self._ask(self._last_number) >= number

        # First what tells of the past, then whether the record is there: in the other order it
        # may be written, or filled by another reader, and built upon, between the two.
        if self._was_written(number) and not exists():
            self._raise_damaged(b"missing", number, [], _BEGIN)
        give_up_s = self._clock.now_s() + _HOLE_WAIT_S
        pause_s = _HOLE_PAUSE_S
        while self._clock.now_s() < give_up_s:
            if exists():
                return True
            if not is_reserved():
                return False
            self._clock.sleep(pause_s)
            pause_s = min(2 * pause_s, _HOLE_PAUSE_MAX_S)
        if self._was_written(number) and not exists():
            self._raise_damaged(b"missing", number, [], _BEGIN)
        fill: tuple[Any, ...] = ("SET", key, _FILLER, "NX")
        if not self._in_slots:
            fill = ("EVAL", _FILL_SCRIPT, 2, key, self._number_key, _FILLER, number)
        if self._ask(lambda door: door.command(*fill)):
            _logger.warning(
                "%s: %s was reserved and never written; its writer was killed. The record is "
                "skipped.", self._address, key,
            )  # fmt: skip
        return True

    def _was_written(self, number: int) -> bool:
        """Whether there was a record of this number at some time, as far as can be told."""
        complete = self._ask(lambda door: door.command("GET", self._complete_key))
        if complete is not None and number <= int(complete):
            return True
        # Optuna's workers read up to their own record after each append, and wait at a hole. So
        # none of them has two records behind one; and our script appends nothing behind one.
        last = self._ask(self._last_number)
        seen: set[str] = set()
        for line in self._get(range(number + 1, min(number + _CHUNK_RECORDS, last + 1))):
            try:
                record = decode_line(line or b"")
            except (ValueError, RecursionError):
                continue  # told of when it is read
            if record == _FILLER_RECORD:
                continue
            if record.worker_id in seen or (record.seq >= 0 and not self._in_slots):
                return True
            if record.seq < 0:
                seen.add(record.worker_id)
        return False

    # --- leases ------------------------------------------------------------------------------

    def take_lease(self, owner: str) -> None:
        """See ``LeaseStore``."""
        with self._mutex:
            self._leased.add(owner)

    def renew_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``LeaseStore``; the lease is the owner's, whichever trials it runs.

        Raises:
            LogUnavailableError, LogCorruptError: As for ``exchange``.
        """
        with self._mutex:
            self._beat([owner])

    def withdraw_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``LeaseStore``, and ``renew_lease``."""
        with self._mutex:
            self._leased.discard(owner)
            self._ask(lambda door: door.command("HDEL", self._leases_key, owner))

    def expired(
        self, study_id: int, running: Mapping[int, str], grace_period_s: float
    ) -> Sequence[int]:
        """See ``LeaseStore``, and ``renew_lease``."""
        owners = sorted({owner for owner in running.values() if owner})
        dead: set[str] = set()
        for first in range(0, len(owners), _OWNERS_MAX):
            some = owners[first : first + _OWNERS_MAX]
            command = ("EVAL", _AGES_SCRIPT, 1, self._leases_key, *some)
            with self._mutex:
                ages_ms = self._ask(functools.partial(_send_one, command=command))
            dead |= {
                owner
                for owner, age_ms in zip(some, ages_ms, strict=True)
                if age_ms is not None and age_ms > grace_period_s * 1000
            }
        return [trial_id for trial_id, owner in running.items() if owner in dead]

    def _owners(self, records: Sequence[AnyOperation]) -> list[str]:
        """Those whose leases cover trials that these records create or claim."""
        return sorted(owners_of_started(records) & self._leased) if self._leased else []

    def _beat(self, owners: Sequence[str]) -> None:
        command = ("EVAL", _RENEW_SCRIPT, 1, self._leases_key, *owners)
        self._ask(lambda door: door.command(*command))

    # --- snapshots ---------------------------------------------------------------------------

    def save_snapshot(self, make: Callable[[], tuple[bytes, Cursor] | None]) -> bool:
        """See ``SnapshotStore``. Optuna's ``{prefix}:snapshot`` is neither read nor written.

        A crash leaves the old snapshot or the new one, and a lock that ends by itself.

        Raises:
            LogUnavailableError, LogCorruptError: As for ``exchange``, or there is no memory.
        """
        token = uuid.uuid4().hex.encode()

        def take(door: _Door) -> bool:
            if door.command("SET", self._lock_key, token, "NX", "EX", _SAVE_LOCK_S):
                return True
            # Ours all the same, if the answer to the first attempt was lost.
            return _bytes(door.command("GET", self._lock_key)) == token

        with self._mutex:
            if not self._ask(take):
                return False
        try:
            made = make()
            if made is None or made[1] is START:
                return True
            value = _pack_snapshot(*made)
            with self._mutex:
                # Another saver that comes between these two lines has a snapshot as good.
                if _bytes(self._ask(lambda door: door.command("GET", self._lock_key))) != token:
                    return False
                self._ask(lambda door: door.command("SET", self._snapshot_key, value))
            return True
        finally:
            with self._mutex:
                try:
                    release = ("EVAL", _RELEASE_SCRIPT, 1, self._lock_key, token)
                    self._ask(lambda door: door.command(*release))
                except (LogUnavailableError, LogCorruptError) as error:
                    _logger.debug("The lock is left to its expiry: %s", error)

    def load_snapshot(self) -> tuple[memoryview, Cursor] | None:
        """See ``SnapshotStore``; None also for bytes that are not ours, or of another journal.

        Of a trimmed journal the snapshot that stands for the trimmed records, if no other.
        """
        with self._mutex:
            for key in (self._snapshot_key, self._base_key):
                stored = self._stored_snapshot(key)
                if stored is not None:
                    return stored.snapshot, tuple(stored.position)
        return None

    def _stored_snapshot(self, key: str) -> _Stored | None:
        value = self._ask(lambda door: door.command("GET", key))
        stored = _unpack_snapshot(value or b"")
        if stored is None:
            return None
        position = stored.position
        expected = [position.identity.encode("latin-1"), position.tail.encode("latin-1")]
        asks = [
            ("GETRANGE", self._key(number), -len(tail), -1)
            for number, tail in zip((0, position.number - 1), expected, strict=True)
        ]
        found = self._ask(lambda door: door.pipeline(asks))
        return stored if [_bytes(value) for value in found] == expected else None

    # --- CompactableLog and TrimmableLog -----------------------------------------------------

    def load_base(self) -> Base:
        """See ``CompactableLog``."""
        with self._mutex:
            stored = self._stored_snapshot(self._base_key)
            if stored is not None:
                return Base(stored.marks, stored.snapshot, tuple(stored.position))
            head = self._head()
            return Base(head.marks if head is not None else {})

    def _head(self) -> Head | None:
        return decode_head(self._ask(lambda door: door.command("GET", self._key(0))) or b"")

    def compact(self, make: Callable[[], Compaction]) -> None:
        """See ``CompactableLog``. A kill at any moment leaves the old journal, or the new one.

        The new records are written beside the old ones, and one script puts all of them in place.

        Raises:
            LogUnavailableError, LogCorruptError: Nothing was changed.
            CompactionRefusedError: The keys are in several slots of a cluster.
        """
        with self._compacting() as token:
            made = make()
            if made.cursor is START:
                return
            position = _Position(*made.cursor)
            count = 1 + self._put(token, 1, made.lines)
            with self._mutex:
                old = self._head()
            of = [position.identity, *(old.of if old is not None else [])]
            head = encode_head(Head(of, [position.number], [count], dict(made.marks)))
            self._switch(token, head, count, position)
            self._sweep(token)

    def _switch(self, token: bytes, head: bytes, count: int, position: _Position) -> None:
        """Put the new journal in place, with what came after ``position``.

        Args:
            token: Of the lock.
            head: The new record 0.
            count: How many records the new journal has, that one included.
            position: In the old journal, after the last record that they stand for.
        """
        while True:
            status, number = self._step("switch", token, *_check_args(position), head, count)
            if status == b"ok":
                return
            with self._mutex:
                if status == b"behind":
                    # What came meanwhile stays as it is; most of it can be moved before.
                    lines = self._read(position.number, number)
                    count += self._put(token, count, lines)
                    position = _position_after(position, lines)
                elif status == b"hole":
                    self._close_hole(number)
                elif self._ask(lambda door: door.command("GET", self._key(0))) == head:
                    return  # and the answer to that was lost
                else:
                    self._raise_not_done(status, number, position)

    def trim(self, make: Callable[[], Compaction]) -> None:
        """See ``TrimmableLog``. A kill at any moment leaves the whole journal, or a trimmed one.

        Raises:
            As ``compact``.
        """
        with self._compacting() as token:
            made = make()
            # Record 0 names the journal, the last one is what a cursor knows its place by.
            if made.cursor is START or made.cursor[0] < _TRIMMED_MIN:
                return
            position = _Position(*made.cursor)
            (snapshot,) = made.lines
            trimmed = b"%s%d}" % (_TRIMMED, position.number)
            base = _pack_snapshot(snapshot, made.cursor, made.marks)
            status, number = self._step("trim", token, *_check_args(position), trimmed, base)
            if status != b"ok":
                with self._mutex:
                    self._raise_not_done(status, number, position)
            end = position.number - 1
            for first in range(2, end, _PIECE_RECORDS):
                self._step("drop", token, trimmed, first, min(first + _PIECE_RECORDS, end) - 1)

    @contextlib.contextmanager
    def _compacting(self) -> Iterator[bytes]:
        """Keep other compactors out; gives the token that says who is in."""
        token = uuid.uuid4().hex.encode()

        def take(door: _Door) -> bool:
            if door.command("SET", self._compacting_key, token, "NX", "EX", _COMPACT_LOCK_S):
                return True
            # Ours all the same, if the answer to the first attempt was lost.
            return _bytes(door.command("GET", self._compacting_key)) == token

        with self._mutex:
            self._is_uncertain = False
            self._ask(lambda door: None)
            if self._in_slots:
                raise CompactionRefusedError(
                    f"{self._name}: the records are in several slots of the cluster, so they "
                    "can't be replaced in one step. Copy the journal to a prefix with a hash tag, "
                    "say {name}, while nobody works on it."
                )
            if not self._ask(take):
                raise LogUnavailableError(
                    f"{self._name}: somebody else is compacting it, or was killed while doing so "
                    f"less than {_COMPACT_LOCK_S} s ago."
                )
        try:
            self._sweep(token)
            yield token
        finally:
            with self._mutex:
                try:
                    release = ("EVAL", _RELEASE_SCRIPT, 1, self._compacting_key, token)
                    self._ask(lambda door: door.command(*release))
                except (LogUnavailableError, LogCorruptError) as error:
                    _logger.debug("The lock is left to its expiry: %s", error)

    def _put(self, token: bytes, number: int, lines: Iterable[bytes]) -> int:
        """Write records beside the journal, the first with this number; returns how many."""
        count = 0
        for piece in _pieces(lines):
            status, _ = self._step("put", token, _COMPACT_LOCK_S, number + count, *piece)
            if status != b"ok":
                self._raise_not_done(status, number, _BEGIN)
            count += len(piece)
        return count

    def _sweep(self, token: bytes) -> None:
        """Remove what this compaction, or a killed one, has left, a little at a time."""
        status, number = self._step("sweep", token, _PIECE_RECORDS)
        while status == b"behind":
            status, number = self._step("sweep", token, _PIECE_RECORDS)
        number, removed = 1, 1
        while removed:
            keys = [self._new_key(number + index) for index in range(_PIECE_RECORDS)]
            unlink = functools.partial(_command, command=("UNLINK", *keys))
            with self._mutex:
                removed = self._ask(unlink)
            number += _PIECE_RECORDS

    def _step(self, name: str, token: bytes, *args: Any) -> tuple[bytes, int]:
        """A step of redis_compact.lua."""
        keys = (
            self._number_key,
            self._compacting_key,
            self._stale_key,
            self._complete_key,
            self._base_key,
            f"{self._prefix}:snapshot",
        )
        full = (len(keys), *keys, name, f"{self._prefix}:log:", self._new_key(""), token, *args)
        with self._mutex:
            status, number = self._ask(lambda door: _run(door, _COMPACT, full))
            return status, number

    def _raise_not_done(self, status: bytes, number: int, position: _Position) -> NoReturn:
        if status == b"lost":
            raise LogUnavailableError(
                f"{self._name}: this took so long that somebody else may compact it by now; "
                "nothing was changed."
            )
        self._raise_damaged(b"changed" if status == b"other" else status, number, [], position)

    # --- Entries and Inspectable -------------------------------------------------------------

    def entries(self) -> Iterator[Entry]:
        """See ``Entries``; of a trimmed journal those that are left."""
        cursor = self.load_base().cursor
        first = 0 if cursor is START else _Position(*cursor).number
        last = self._ask(self._last_number)
        for begin in range(first, last + 1, _CHUNK_RECORDS):
            numbers = range(begin, min(begin + _CHUNK_RECORDS, last + 1))
            with self._mutex:
                lines = self._get(numbers)
            for number, line in zip(numbers, lines, strict=True):
                yield Entry(self._key_name(number), None if line is None else _bytes(line))

    def facts(self) -> dict[str, Any]:
        """See ``Described``."""
        stored = self._ask(lambda door: door.command("STRLEN", self._snapshot_key))
        return {
            "kind": "journal in Redis",
            "address": self._address,
            "prefix": self._prefix,
            "n_records": self._ask(self._last_number) + 1,
            "snapshot_bytes": int(stored) or None,
        }

    def findings(self, *, deep: bool) -> Iterator[Finding]:
        """See ``Inspectable``: what is beside the records."""
        last = self._ask(self._last_number)
        with self._mutex:
            beyond = self._get(range(last + 1, last + 1 + _NEWS_MAX))
        # What a killed compaction has left is passed over, and removed by the next one.
        stale = int(self._ask(lambda door: door.command("GET", self._stale_key)) or -1)
        ahead = [last + 1 + n for n, line in enumerate(beyond) if line is not None]
        ahead = [number for number in ahead if number > stale]
        if ahead:
            yield Finding(
                "counter-behind",
                self._name,
                f"The counter says {last}, but there are records up to {ahead[-1]}; new records "
                "would overwrite them.",
            )
        stored = self._ask(lambda door: door.command("GET", self._snapshot_key))
        if stored is not None and self.load_snapshot() is None:
            yield Finding(
                "snapshot-unusable",
                f"{self._address} {self._snapshot_key}",
                "The snapshot is damaged or of another journal. It is ignored and replaced in "
                "time; nothing is lost.",
                "note",
            )

    # --- the connection ----------------------------------------------------------------------

    def _ask(self, do: Callable[[_Door], _T], *, appends: bool = False) -> _T:
        """Have something done by the server, however often the connection is lost meanwhile.

        Args:
            do: May run several times, also after it has taken effect.
            appends: What is done appends records.

        Raises:
            LogUnavailableError: The server can't be reached, or refuses.
            OutcomeUnknownError: The same, and records were sent before.
            LogCorruptError: A key holds something else.
        """
        give_up_s: float | None = None
        pause_s = _PAUSE_S
        while True:
            sent = False
            try:
                if self._door is None:
                    self._door = self._connect()
                sent = appends
                return do(self._door)
            except Exception as error:
                kind = _kind_of(error)
                if kind is None:
                    self._hang_up()
                    raise
                if kind.what == "damaged":
                    raise LogCorruptError(f"{error}.{kind.advice}", source=self._name) from error
                if kind.what == "refused":
                    self._raise_unavailable(error, kind.advice)
                self._hang_up()
                if sent:
                    self._is_uncertain = True
                now_s = self._clock.now_s()
                if give_up_s is None:
                    give_up_s = now_s + (_HEAL_S if self._was_reached else _OPEN_S)
                if now_s >= give_up_s:
                    self._raise_unavailable(error, "")
                _logger.debug("%s: %s; trying again", self._address, error)
                # Not all at the same moment, when a server comes back to many workers.
                self._clock.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, _PAUSE_MAX_S)
            except BaseException:
                # Interrupted between a question and its answer: the answer must not be taken for
                # that of the next question.
                self._hang_up()
                raise

    def _connect(self) -> _Door:
        door = self._open_door()
        try:
            self._warn_of_settings(door)
        except BaseException:
            door.close()
            raise
        self._was_reached = True
        return door

    def _open_door(self) -> _Door:
        if self._use_cluster:
            try:
                cluster = _Cluster(
                    self._url,
                    {
                        "socket_timeout": _SOCKET_TIMEOUT_S,
                        "socket_connect_timeout": _CONNECT_TIMEOUT_S,
                    },
                )
            except _driver().exceptions.RedisClusterException as error:
                # Optuna takes the flag for any server; then the script does better.
                if "not enabled" not in f"{error} {error.__cause__}":
                    raise
            else:
                self._in_slots = not _has_hash_tag(self._prefix)
                return cluster
        self._in_slots = False
        return _Server(_pool_of(self._url))

    def _hang_up(self) -> None:
        door, self._door = self._door, None
        if door is not None:
            try:
                door.close()
            except Exception as error:
                _logger.debug("Closing a connection failed: %s", error)

    def _warn_of_settings(self, door: _Door) -> None:
        """Say, once in a process, which settings of the server can lose a journal."""
        about = f"{self._address} {self._durability}"
        if about in _warned:
            return
        risks: dict[str, None] = {}
        for settings in door.settings():
            risks.update(dict.fromkeys(_risks(settings, self._durability)))
        _warned.add(about)
        if risks:
            _logger.warning("%s: %s", self._address, " ".join(risks))

    # --- decoding and errors -----------------------------------------------------------------

    def _decode(self, lines: list[bytes], number: int) -> list[AnyOperation]:
        """The operations in lines of which the first has this number."""
        try:
            records = decode_lines(b"\n".join(lines))
            if len(records) == len(lines) and False not in map(checksum_matches, lines):
                return records
        except ValueError:
            pass
        return [
            self._decode_one(line, number + index, decode_line) for index, line in enumerate(lines)
        ]

    def _decode_one(self, line: bytes, number: int, decode: Callable[[bytes], _T]) -> _T:
        try:
            if checksum_matches(line) is False:
                raise ValueError("the checksum does not match")
            return decode(line)
        except (ValueError, RecursionError) as error:
            if _trimmed_before(line):
                self._raise_compacted(number)
            raise LogCorruptError(
                f"no record, or a damaged one: {error}. Nothing is written to a damaged journal.",
                source=self._key_name(number),
                record_number=number,
            ) from error

    @property
    def _name(self) -> str:
        return f"{self._address} {self._number_key}"

    def _key_name(self, number: int) -> str:
        return f"{self._address} {self._key(number)}"

    def _raise_compacted(self, number: int) -> NoReturn:
        raise LogCompactedError(
            "the journal was compacted or trimmed behind what was read; read it anew, with a "
            f"trialstore storage, which begins a trimmed one at {self._base_key}",
            source=self._name,
            record_number=number,
        )

    def _raise_damaged(
        self, status: bytes, number: int, found: list[Any], position: _Position
    ) -> NoReturn:
        if status in (b"changed", b"missing") and not self._in_slots:
            second = self._ask(lambda door: door.command("GET", self._key(1)))
            if number < _trimmed_before(second or b""):
                self._raise_compacted(number)
        if status == b"number":
            reason = f"holds {found[0]!r} instead of the number of the last record."
            raise LogCorruptError(reason, source=self._name)
        reasons = {
            b"missing": (
                "the record is not there any more: evicted by a maxmemory policy, or deleted. "
                "Restore the key from a backup; nothing is written to a damaged journal."
            ),
            b"changed": (
                "the record is not the one that was read before: changed, deleted, or of another "
                "journal. Open a new storage to read what is there now."
            ),
            b"beyond": (
                f"the record is there, but {self._number_key} ends before it: that key was "
                "evicted, deleted or set back. Restore it; nothing is written to a damaged "
                "journal."
            ),
        }
        if status == b"short":
            raise LogReplacedError(
                f"the journal ends with record {number} and had {position.number} records: it "
                "was deleted, or a restart or failover lost the last ones. Open a new storage to "
                "read what is left.",
                source=self._name,
                record_number=max(number + 1, 0),
            )
        error = LogReplacedError if status == b"changed" else LogCorruptError
        raise error(reasons[status], source=self._key_name(number), record_number=number)

    def _raise_unavailable(self, error: Exception, advice: str) -> NoReturn:
        if self._is_uncertain:
            raise OutcomeUnknownError(
                f"{self._address}: records were sent, the answer was lost, and the server can't "
                f"be asked: {error}.{advice}"
            ) from error
        raise LogUnavailableError(f"{self._address} can't be used: {error}.{advice}") from error


def _position_after(position: _Position, lines: list[bytes]) -> _Position:
    if not lines:
        return position
    identity = position.identity if position.number else _tail(lines[0])
    return _Position(position.number + len(lines), _tail(lines[-1]), identity)


def _tail(line: bytes) -> str:
    return line[-_TAIL_BYTES:].decode("latin-1")


def _check_args(position: _Position) -> tuple[Any, ...]:
    """What tells the steps of a compaction that a journal is the one that was read."""
    tail, identity = position.tail.encode("latin-1"), position.identity.encode("latin-1")
    return position.number, tail, identity, _PIECE_RECORDS


def _pieces(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """The same, in lists that a server takes without being noticed."""
    piece: list[bytes] = []
    n_bytes = 0
    for line in lines:
        piece.append(line)
        n_bytes += len(line)
        if len(piece) == _PIECE_RECORDS or n_bytes >= _PIECE_BYTES:
            yield piece
            piece, n_bytes = [], 0
    if piece:
        yield piece


def _trimmed_before(line: bytes) -> int:
    """Number of the first record that a trim left, if this is record 1 of a trimmed journal."""
    return int(line[len(_TRIMMED) : -1]) if line.startswith(_TRIMMED) else 0


class _Stored(NamedTuple):
    """A snapshot as it is stored, with marks if it stands for trimmed records."""

    snapshot: memoryview
    position: _Position
    marks: dict[str, Marks]


def _pack_snapshot(
    snapshot: bytes, cursor: Cursor, marks: Mapping[str, Marks] = MappingProxyType({})
) -> bytes:
    header = msgspec.msgpack.encode((tuple(cursor), zlib.crc32(snapshot), dict(marks)))
    return b"".join((_SNAPSHOT_MAGIC, len(header).to_bytes(4, "big"), header, snapshot))


def _unpack_snapshot(stored: bytes) -> _Stored | None:
    """None for anything that is not whole and ours."""
    if not stored.startswith(_SNAPSHOT_MAGIC):
        return None
    begin = len(_SNAPSHOT_MAGIC) + 4
    end = begin + int.from_bytes(stored[begin - 4 : begin], "big")
    try:
        fields, checksum, marks = msgspec.msgpack.decode(
            stored[begin:end], type=tuple[tuple[int, str, str], int, dict[str, Marks]]
        )
        position = _Position(*fields)
        (position.tail + position.identity).encode("latin-1")
    except (msgspec.DecodeError, UnicodeEncodeError):
        return None
    snapshot = memoryview(stored)[end:]
    if zlib.crc32(snapshot) != checksum or position.number < 1 or not position.tail:
        return None
    return _Stored(snapshot, position, marks)


def _without(lines: list[bytes], found: list[bytes]) -> list[bytes]:
    if not lines or not found:
        return lines
    known = set(found)
    return [line for line in lines if line not in known]


def _decode_dict(line: bytes) -> dict[str, Any]:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("a record must be one JSON object")
    return fields


def _bytes(value: Any) -> bytes:
    """An answer as bytes, whatever a client's callbacks made of it."""
    return value.encode("latin-1") if isinstance(value, str) else bytes(value or b"")


def _risks(settings: _Settings, durability: str) -> list[str]:
    """What the settings of a server may do to a journal, a sentence each."""
    info, config = settings
    risks: list[str] = []
    policy = str(info.get("maxmemory_policy", ""))
    if policy.startswith("allkeys-") and info.get("maxmemory"):
        risks.append(
            f"maxmemory-policy {policy} lets Redis evict records of the journal when memory is "
            "short, which destroys it; set it to noeviction."
        )
    if info.get("aof_enabled") == 0:
        risks.append(
            "Redis keeps no append-only file, so a restart loses what was written since its last "
            "RDB save; set appendonly yes and appendfsync always."
        )
    elif durability == "full":
        sync = str(config.get("appendfsync", "always"))
        if sync != "always":
            risks.append(
                f"appendfsync {sync} may lose the last writes with the machine although they were "
                "acknowledged; set it to always, or pass durability='process'."
            )
        elif config.get("no-appendfsync-on-rewrite") == "yes":
            risks.append(
                "no-appendfsync-on-rewrite yes leaves out syncs while the append-only file is "
                "rewritten; set it to no, or pass durability='process'."
            )
    return risks


def _forget_in_child() -> None:
    # Dropped, not closed: redis-py closes what belongs to its own process only, and the parent
    # goes on with the same connection.
    for log in list(_logs):
        log._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
