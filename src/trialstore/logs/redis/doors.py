"""How requests reach one server, or a cluster, and what those say about themselves.

Source: Redis serialization protocol specification; redis-py ``Connection``, ``RedisCluster``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import hashlib
import math
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from trialstore.logs.redis.driver import driver

_T = TypeVar("_T")

# The setting that says how long a value may be, and what it is where nobody has set it.
_LIMIT: Final = "proto-max-bulk-len"
_USUAL_VALUE_BYTES_MAX: Final = 512 << 20


class Door(Protocol):
    """The few things asked of a server or a cluster; raises redis-py's errors."""

    def command(self, *args: Any) -> Any: ...

    def pipeline(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]: ...

    def ask_each(self, ask: Callable[[Any], _T]) -> list[_T]:
        """What each server that keeps records answers, through redis-py's client of it."""
        ...

    def close(self) -> None: ...


class Settings(NamedTuple):
    """What a server says about itself; empty where it refuses to."""

    info: dict[str, Any]
    config: dict[str, Any]


class Server:
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
            except driver().ResponseError as refused:
                error = error or refused
        if error is not None:
            raise error
        return answers

    def can_read(self, timeout_s: float) -> bool:
        """Whether the server has said something by itself, or says it within so long."""
        return bool(self._connection.can_read(timeout_s))

    def read(self) -> Any:
        return self._connection.read_response()

    def ask_each(self, ask: Callable[[Any], _T]) -> list[_T]:
        client = driver().Redis(connection_pool=self._pool)
        try:
            return [ask(client)]
        finally:
            self._pool.disconnect()

    def close(self) -> None:
        self._connection.disconnect()
        self._pool.disconnect()


class Cluster:
    """redis-py's client of a cluster, which follows its slots."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self._client = driver().RedisCluster.from_url(url, **options)

    def command(self, *args: Any) -> Any:
        return self._client.execute_command(*args)

    def pipeline(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        with self._client.pipeline() as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = pipeline.execute()
            return answers

    def ask_each(self, ask: Callable[[Any], _T]) -> list[_T]:
        nodes = self._client.get_primaries()
        return [ask(self._client.get_redis_connection(node)) for node in nodes]

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


def settings_of(client: Any) -> Settings:
    answers: list[dict[str, Any]] = []
    for ask, args in ((client.info, ()), (client.config_get, ("*append*",))):
        try:
            answers.append(ask(*args))
        except driver().ResponseError:
            answers.append({})  # hosted servers refuse CONFIG; what is not known is not warned of
    return Settings(*answers)


def value_bytes_max(client: Any) -> int:
    """The longest value that a server takes."""
    try:
        return int(client.config_get(_LIMIT).get(_LIMIT, _USUAL_VALUE_BYTES_MAX))
    except driver().ResponseError:
        return _USUAL_VALUE_BYTES_MAX  # hosted servers refuse CONFIG


def bytes_free(client: Any) -> float:
    """What is left of a server's memory; infinite where that is not said."""
    try:
        memory = client.info("memory")
    except driver().ResponseError:
        return math.inf
    limit = memory.get("maxmemory")
    return limit - memory["used_memory"] if limit else math.inf


def risks_of(settings: Settings, durability: str) -> list[str]:
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


def send_one(door: Door, command: tuple[Any, ...]) -> Any:
    return door.command(*command)


def send(door: Door, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    return door.pipeline(commands)


def run(door: Door, name: str, args: Sequence[Any]) -> Any:
    """What a script of this folder returns; the server keeps it for the next time."""
    body, sha = _script(name)
    try:
        return door.command("EVALSHA", sha, *args)
    except driver().exceptions.NoScriptError:
        # A server forgets its scripts when it restarts.
        return door.command("EVAL", body, *args)


@functools.cache
def _script(name: str) -> tuple[bytes, bytes]:
    """A script, and the name that Redis gives it."""
    body = Path(__file__).with_name(name).read_bytes()
    return body, hashlib.sha1(body).hexdigest().encode()
