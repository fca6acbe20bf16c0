"""The connection of a log: one at a time, made anew until a question is answered or time is up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import logging
import threading
from typing import Final, NoReturn, TypeVar

from trialstore.clock import Clock
from trialstore.credentials import Secret
from trialstore.errors import LogCorruptError, LogUnavailableError, OutcomeUnknownError
from trialstore.logs.redis.address import (
    CONNECT_TIMEOUT_S,
    SOCKET_TIMEOUT_S,
    address_of,
    pool_of,
    with_password,
)
from trialstore.logs.redis.doors import (
    Cluster,
    Door,
    Server,
    bytes_free,
    risks_of,
    settings_of,
    value_bytes_max,
)
from trialstore.logs.redis.driver import driver, kind_of
from trialstore.logs.redis.keys import Keys, has_hash_tag
from trialstore.patience import Patience

_logger = logging.getLogger(__package__)
_T = TypeVar("_T")

# For how long a server that was reached before may be away: a restart that reads a large
# append-only file, or a failover. And one that was not: a wrong address should be told soon.
_HEAL_S: Final = 30.0
_OPEN_S: Final = 5.0
# No server can be told to refuse a value that is not longer.
_VALUE_BYTES_SAFE: Final = 1 << 20
_PAUSE_FIRST_S: Final = 0.02
_PAUSE_MAX_S: Final = 1.0

_warned: set[str] = set()


class Connection:
    """To a server or a cluster, opened when it is first used and whenever it was lost.

    Args:
        url: See ``RedisLog``, as the next four.
        use_cluster: The server is a node of a cluster.
        keys: Of the journal.
        durability: What the server's settings are measured by.
        clock: Time.
        password: Where the server's password is kept, if it is not in the URL.

    Attributes:
        mutex: Held by whoever asks something.
        in_slots: The server is a cluster, and the keys are in any of its slots; known once
            something was asked.
        is_uncertain: Records were sent to which no answer came; cleared by who sends them, once
            it is known what became of them.
    """

    def __init__(
        self,
        url: str,
        use_cluster: bool,
        keys: Keys,
        durability: str,
        clock: Clock,
        password: Secret | None,
    ) -> None:
        self.keys = keys
        self.clock = clock
        self.address = address_of(url)
        self.name = f"{self.address} {keys.number}"
        self.mutex = threading.RLock()
        self.door: Door | None = None
        self.in_slots = False
        self.is_uncertain = False
        self._url = url
        self._use_cluster = use_cluster
        self._durability = durability
        self._password = password
        self._was_reached = False

    def ask(self, do: Callable[[Door], _T], *, appends: bool = False) -> _T:
        """Have something done by the server, however often the connection is lost meanwhile.

        Args:
            do: May run several times, also after it has taken effect.
            appends: What is done appends records.

        Raises:
            LogUnavailableError: The server can't be reached, or refuses.
            OutcomeUnknownError: The same, and records were sent before.
            LogCorruptError: A key holds something else.
            SecretNotFoundError: The password is not where it should be.
        """
        give_up_s: float | None = None
        patience = Patience(
            self.address, self.clock, first_s=_PAUSE_FIRST_S, longest_s=_PAUSE_MAX_S
        )
        while True:
            sent = False
            try:
                if self.door is None:
                    self.door = self._connect()
                sent = appends
                return do(self.door)
            except Exception as error:
                kind = kind_of(error)
                if kind is None:
                    self.hang_up()
                    raise
                if kind.what == "damaged":
                    raise LogCorruptError(f"{error}.{kind.advice}", source=self.name) from error
                if kind.what == "refused":
                    self._raise_unavailable(error, kind.advice)
                self.hang_up()
                # A script was refused as a whole, of several commands perhaps only one was.
                if sent and (kind.what == "retry" or self.in_slots):
                    self.is_uncertain = True
                if give_up_s is None:
                    give_up_s = self.clock.now_s() + (_HEAL_S if self._was_reached else _OPEN_S)
                if not patience.pause(give_up_s, error):
                    self._raise_unavailable(error, "")
            except BaseException:
                # Interrupted between a question and its answer: the answer must not be taken for
                # that of the next question.
                self.hang_up()
                raise

    def check_lengths(self, values: Iterable[bytes]) -> None:
        """Look before sending whether the server takes such long values.

        It hangs up on a longer one, most often before the client has read why; and that looks like
        a server that went away.

        Raises:
            ValueError: It does not; nothing was sent.
            LogUnavailableError: As for ``ask``.
        """
        longest = max(map(len, values), default=0)
        if longest <= _VALUE_BYTES_SAFE:
            return
        limit = min(self.ask(lambda door: door.ask_each(value_bytes_max)))
        if longest > limit:
            raise ValueError(
                f"{self.address}: a value of {longest:,} bytes is longer than the server takes "
                f"({limit:,}). Raise its proto-max-bulk-len, or keep what is large elsewhere, for "
                "example in Optuna's artifact store."
            )

    def check_memory(self, n_bytes: int) -> None:
        """Look before sending whether the server has room for so many bytes.

        Of a value that is too much for it the part that has arrived counts already: meanwhile it
        refuses what others append, or evicts records, as its policy is.

        Raises:
            LogUnavailableError: It has not; nothing was sent.
        """
        free = min(self.ask(lambda door: door.ask_each(bytes_free)))
        if n_bytes > free:
            raise LogUnavailableError(
                f"{self.address}: of maxmemory {free:,} bytes are left, and {n_bytes:,} are "
                "needed, lest the journal lack them. Give Redis more memory."
            )

    def _connect(self) -> Door:
        door = self.open_door()
        try:
            self._warn_of_settings(door)
        except BaseException:
            door.close()
            raise
        self._was_reached = True
        return door

    def open_door(self) -> Door:
        """A way to the server that was not used yet.

        Raises:
            SecretNotFoundError: The password is not where it should be.
        """
        url = with_password(self._url, self._password)
        if self._use_cluster:
            try:
                cluster = Cluster(
                    url,
                    {
                        "socket_timeout": SOCKET_TIMEOUT_S,
                        "socket_connect_timeout": CONNECT_TIMEOUT_S,
                    },
                )
            except driver().exceptions.RedisClusterException as error:
                # Optuna takes the flag for any server; then the script does better.
                if "not enabled" not in f"{error} {error.__cause__}":
                    raise
            else:
                self.in_slots = not has_hash_tag(self.keys.prefix)
                return cluster
        self.in_slots = False
        return Server(pool_of(url))

    def hang_up(self) -> None:
        """Close the connection, if there is one; what is asked next makes another."""
        door, self.door = self.door, None
        if door is not None:
            try:
                door.close()
            except Exception as error:
                _logger.debug("Closing a connection failed: %s", error)

    def _warn_of_settings(self, door: Door) -> None:
        """Say, once in a process, which settings of the server can lose a journal."""
        about = f"{self.address} {self._durability}"
        if about in _warned:
            return
        risks: dict[str, None] = {}
        for settings in door.ask_each(settings_of):
            risks.update(dict.fromkeys(risks_of(settings, self._durability)))
        _warned.add(about)
        if risks:
            _logger.warning("%s: %s", self.address, " ".join(risks))

    def _raise_unavailable(self, error: Exception, advice: str) -> NoReturn:
        if self.is_uncertain:
            raise OutcomeUnknownError(
                f"{self.address}: records were sent, the answer was lost, and the server can't "
                f"be asked: {error}.{advice}"
            ) from error
        raise LogUnavailableError(f"{self.address} can't be used: {error}.{advice}") from error
