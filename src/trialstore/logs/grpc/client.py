"""A log on the other side of a gRPC server: ours, or failing that a plain Optuna server.

A call that gets no answer is made again, with jitter, until a deadline. Records carry marks
(``worker_id``, ``seq``) by which a server of ours tells whether an earlier attempt appended them,
so a write is applied once, whatever was lost in between, also if the server was killed or another
one answers now.

gRPC's threads do not survive a fork. Its own support for that has to be switched on before it is
imported, and a child must make its own channel.

Source: docs/formats/grpc.md; gRPC core's ``GRPC_ENABLE_FORK_SUPPORT``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import logging
import os
from pathlib import Path
import threading
from typing import Any, Final, TypeVar
import uuid

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")

import grpc
import msgspec

from trialstore.clock import CLOCK, Clock
from trialstore.errors import LogUnavailableError, OutcomeUnknownError
from trialstore.log import NOTHING, START, Base, Batch, Cursor, Decide, Wanted
from trialstore.logs.grpc import payload, status
from trialstore.logs.grpc.foreign import StorageLog
from trialstore.logs.grpc.generated import log_pb2 as pb
from trialstore.logs.grpc.methods import LOG_SERVICE, STORAGE_SERVICE, Call, bearer, calls
from trialstore.logs.grpc.stock import (
    REFUSALS,
    AnswerLostError,
    StockMethods,
    StockRefusal,
    check_names,
)
from trialstore.patience import Patience
from trialstore.records import (
    RUNNING,
    AnyOperation,
    CreateStudy,
    CreateTrial,
    Outcome,
    Record,
    SetTrialStateValues,
)

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

RETRY_DEADLINE_S: Final = 60.0
CALL_TIMEOUT_S: Final = 10.0
TOKEN_VARIABLE: Final = "TRIALSTORE_GRPC_TOKEN"
_PAUSE_FIRST_S: Final = 0.05
_PAUSE_MAX_S: Final = 2.0
# What a server of ours takes at most by default, less what is around the records.
_REQUEST_BYTES_MAX: Final = (64 << 20) - (1 << 16)

# Every column of Optuna's tables, on every database, holds 65,535 bytes of JSON, which escapes
# letters and puts spaces between what stands here without: three times as much at most.
_USUAL_BYTES_MAX: Final = 65_535 // 3
_USUAL_NAME_LEN_MAX: Final = 250
_USUAL_INTEGER_MAX: Final = 2**31 - 1
_json_encoder: Final = msgspec.json.Encoder()

_OPTIONS: Final = (
    # A plain Optuna server sends a study in one message.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # gRPC adds jitter of its own; its default maximum of 120 s is no way to heal.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Two clients of one process must not share a connection that one of them gives up.
    ("grpc.use_local_subchannel_pool", 1),
)

_NO_LEASES: Final = (
    "{!r} is a server that keeps no leases: leave heartbeat_interval out, or serve a journal or a "
    "database with run_grpc_proxy_server of trialstore."
)

_inherited: list[Any] = []
"""Channels opened by a parent process, which must not be closed or collected here."""


class Credentials:
    """What a client shows and whom it trusts. Pickled, it carries paths, not secrets.

    Args:
        tls: Talk TLS; implied by any of the three paths.
        ca_file: PEM certificates to trust, by default those of the system.
        certificate_file: PEM certificate of this client, for a server that asks for one.
        key_file: Its private key.
        token: Bearer token; better in a file, because a pickle carries it along.
        token_file: File that holds the token; read at each connection, and again when a server
            refuses what it said.
    """

    def __init__(
        self,
        *,
        tls: bool = False,
        ca_file: str | None = None,
        certificate_file: str | None = None,
        key_file: str | None = None,
        token: str | None = None,
        token_file: str | None = None,
    ) -> None:
        if (certificate_file is None) != (key_file is None):
            raise ValueError("certificate_file and key_file go together.")
        if token is not None and token_file is not None:
            raise ValueError("Pass token or token_file, not both.")
        if token is not None:
            bearer(token)
        self.tls = tls or ca_file is not None or certificate_file is not None
        self._ca_file = ca_file
        self._certificate_file = certificate_file
        self._key_file = key_file
        self._token = token
        self._token_file = token_file

    def __repr__(self) -> str:
        return f"Credentials(tls={self.tls})"

    def certificates(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Whom to trust, the private key, and what to show, as the files say now."""
        return _read(self._ca_file), _read(self._key_file), _read(self._certificate_file)

    def channel(self, target: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        if not self.tls:
            return grpc.insecure_channel(target, options=options)
        credentials = grpc.ssl_channel_credentials(*self.certificates())
        return grpc.secure_channel(target, credentials, options=options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The token: given, from its file, or from the environment."""
        token = self._token
        if self._token_file is not None:
            token = Path(self._token_file).read_text().strip()
        if token is None:
            token = os.environ.get(TOKEN_VARIABLE, "").strip() or None
        return () if token is None else (("authorization", bearer(token)),)


def _read(path: str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()


class GrpcLog:
    """A log behind a gRPC server.

    Args:
        host: Where the server listens.
        port: Its port.
        credentials: What to show and whom to trust.
        retry_deadline_s: For how long an exchange tries again before it gives up, counted from the
            last part of an answer that has come.
        call_timeout_s: For how long one attempt waits for an answer, or for each part of a long
            one; doubled for each further attempt.
        clock: Replaced in tests.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        credentials: Credentials | None = None,
        retry_deadline_s: float = RETRY_DEADLINE_S,
        call_timeout_s: float = CALL_TIMEOUT_S,
        clock: Clock = CLOCK,
    ) -> None:
        if retry_deadline_s <= 0 or call_timeout_s <= 0:
            raise ValueError("retry_deadline_s and call_timeout_s must be positive.")
        self._target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._credentials = credentials or Credentials()
        self._retry_deadline_s = retry_deadline_s
        self._call_timeout_s = call_timeout_s
        self._clock = clock
        # Which of the two services; found out by the first call.
        self._foreign: StorageLog | None = None
        self._speaks_log = self._speaks_optuna = False
        self._is_unlimited = False
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        # Held by whoever calls the server: ``check`` comes from any thread.
        self._mutex = threading.RLock()
        self._channel: grpc.Channel | None = None
        self._calls: dict[str, Call] = {}
        self._metadata: tuple[tuple[str, str], ...] = ()
        self._certificates: tuple[bytes | None, ...] = ()
        # By these two a server tells a repetition from another exchange.
        self._sender = uuid.uuid4().hex
        self._n_sent = 0
        # How far the answer of the present call has come, and when.
        self._n_parts_max = 0
        self._heard_at_s = 0.0
        # Marks of records that may have been appended by a call that was given up.
        self._unsettled: set[tuple[str, int]] = set()
        self._leased: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "target": self._target,
            "credentials": self._credentials,
            "retry_deadline_s": self._retry_deadline_s,
            "call_timeout_s": self._call_timeout_s,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._target = state["target"]
        self._credentials = state["credentials"]
        self._retry_deadline_s = state["retry_deadline_s"]
        self._call_timeout_s = state["call_timeout_s"]
        self._clock = CLOCK
        self._foreign = None
        self._speaks_log = self._speaks_optuna = False
        self._is_unlimited = False
        self._begin()

    def __repr__(self) -> str:
        return f"GrpcLog({self._target!r})"

    # --- Log -------------------------------------------------------------------------------------

    def exchange(self, records: Sequence[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``Log.exchange``.

        Raises:
            ValueError: The server's log can't hold a value, or a record is too large to send.
            LogUnavailableError: No answer within the deadline; nothing was stored.
            OutcomeUnknownError: No answer within the deadline; records may have been stored, or
                have been and what else is new was not sent.
        """
        if self._foreign is None:
            try:
                return self._exchange(list(records), cursor, wanted)
            except _NoLogServiceError:
                self._fall_back()
        assert self._foreign is not None
        if self._leased:
            self._keeps_leases()
        return self._foreign.exchange(records, cursor, wanted)

    def _exchange(self, records: list[AnyOperation], cursor: Cursor, wanted: Wanted) -> Batch:
        packed = payload.pack_records(records)
        if len(packed) > _REQUEST_BYTES_MAX:
            return self._exchange_in_parts(records, cursor, wanted)
        request = self._request(packed, records, cursor, wanted)
        if not records and cursor is START:
            return self._read(request)
        reply = self._send(request, records) if records else self._ask(request)
        self._speaks_log = True
        return self._batch(reply, request, records, wanted)

    def _batch(
        self, reply: Any, request: Any, records: list[AnyOperation], wanted: Wanted
    ) -> Batch:
        """What a reply holds, and what it leaves to ``Read``."""
        outcomes = payload.unpack_outcomes(reply.outcomes)
        if reply.more:
            request.records = b""
            request.wanted = payload.pack_wanted(wanted | _owed(records, outcomes or ()))
            stored = () if reply.refused else records
            with self._having_stored(stored):
                rest = self._read(request)
            return Batch(outcomes, rest.news, rest.cursor)
        news = [record for part in reply.news for record in payload.unpack_records(part)]
        return Batch(outcomes, news, reply.cursor or START)

    @contextlib.contextmanager
    def _having_stored(self, records: Sequence[AnyOperation]) -> Iterator[None]:
        """What fails in here does not say that nothing was stored."""
        try:
            yield
        except BaseException as error:
            self._unsettled |= {(record.worker_id, record.seq) for record in records}
            if not records or not isinstance(error, LogUnavailableError):
                raise
            raise OutcomeUnknownError(
                f"{self!r}: records of the call are stored ({len(records)}), but then no answer "
                "came. Read the study to see them; made again, the call would store them a second "
                "time."
            ) from error

    def _request(
        self, packed: bytes, records: list[AnyOperation], cursor: Cursor, wanted: Wanted
    ) -> Any:
        return pb.ExchangeRequest(
            records=packed,
            cursor=b"" if cursor is START else cursor,
            wanted=payload.pack_wanted(wanted),
            leased=bool(self._leased) and any(one.worker_id in self._leased for one in records),
        )

    def _ask(self, request: Any) -> Any:
        try:
            return self._persistently(
                lambda timeout_s, _: self._unary("Exchange", request, timeout_s)
            )
        except _FailedError as failed:
            raise self._final_error(failed, unknown=False) from failed.error

    def _send(self, request: Any, records: list[AnyOperation]) -> Any:
        """Ask with records to append."""
        self._here()  # or a child would go on counting as its parent
        self._n_sent += 1
        request.sender, request.number = self._sender, self._n_sent
        marks = {(record.worker_id, record.seq) for record in records}
        was_given_up = not self._unsettled.isdisjoint(marks)

        def attempt(timeout_s: float, again: bool) -> Any:
            request.again = again or was_given_up
            return self._unary("Exchange", request, timeout_s)

        try:
            reply = self._persistently(attempt)
        except _FailedError as failed:
            if failed.again:
                self._unsettled |= marks
            raise self._final_error(failed, unknown=failed.again or was_given_up) from failed.error
        except BaseException:
            self._unsettled |= marks  # interrupted on the way
            raise
        if self._unsettled:
            self._unsettled -= marks
        return reply

    def _exchange_in_parts(
        self, records: list[AnyOperation], cursor: Cursor, wanted: Wanted
    ) -> Batch:
        """A batch that is too large for a message, as two."""
        if len(records) == 1:
            raise ValueError(
                f"A {type(records[0]).__name__} is larger than {_REQUEST_BYTES_MAX} bytes; keep "
                "large values in a file and store its path."
            )
        half = len(records) // 2
        first = self._exchange(records[:half], cursor, wanted)
        with self._having_stored(records[:half]):
            second = self._exchange(records[half:], first.cursor, wanted)
        outcomes = None
        if first.outcomes is not None and second.outcomes is not None:
            outcomes = [*first.outcomes, *second.outcomes]
        return Batch(outcomes, [*first.news, *second.news], second.cursor)

    def _read(self, request: Any) -> Batch:
        """In parts; a reply that breaks off is asked for again from the start."""

        def read(timeout_s: float, again: bool) -> Batch:
            news: list[Record] = []
            cursor, outcomes = b"", None
            with self._stream("Read", request, timeout_s) as replies:
                for reply in replies:
                    for part in reply.news:
                        news += payload.unpack_records(part)
                    cursor = reply.cursor or cursor
                    outcomes = payload.unpack_outcomes(reply.outcomes) or outcomes
            return Batch(outcomes, news, cursor or START)

        try:
            return self._persistently(read)
        except _FailedError as failed:
            raise self._final_error(failed, unknown=False) from failed.error

    def close(self) -> None:
        """Close the connection; a later exchange opens one again."""
        self._here()
        with self._mutex:
            channel, self._channel, self._calls = self._channel, None, {}
            if channel is not None:
                channel.close()

    # --- ConditionalLog --------------------------------------------------------------------------

    def exchange_if(self, decide: Decide, cursor: Cursor, wanted: Wanted) -> Batch:
        """See ``ConditionalLog``; ``decide`` runs here, and again if somebody came between.

        The server compares what is new with what was decided on.

        Raises:
            RuntimeError: It is a plain Optuna server, which compares nothing.
        """
        batch = self.exchange((), cursor, wanted)
        if self._foreign is not None:
            raise RuntimeError(
                f"{self!r} is a plain Optuna server, which can't append on a condition: exact "
                "budgets and queues need run_grpc_proxy_server of trialstore."
            )
        expected = payload.digest((), wanted)
        give_up_at = self._clock.now_s() + self._retry_deadline_s
        while True:
            records = list(decide(batch.news, batch.cursor))
            if not records:
                return Batch((), (), batch.cursor)
            packed = payload.pack_records(records)
            request = self._request(packed, records, batch.cursor, wanted)
            request.expected = expected
            reply = self._send(request, records)
            batch = self._batch(reply, request, records, wanted)
            if not reply.refused:
                return batch
            expected = payload.digest(batch.news, wanted)
            if self._clock.now_s() > give_up_at:
                raise LogUnavailableError(
                    f"{self!r}: for {self._retry_deadline_s} s somebody else always came between; "
                    "nothing was stored, the call may be made again."
                )

    # --- LeaseStore ------------------------------------------------------------------------------

    def take_lease(self, owner: str) -> None:
        """See ``LeaseStore``; the server is told with the next records."""
        self._keeps_leases()
        self._leased.add(owner)

    def renew_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``LeaseStore``."""
        self._lease(pb.LeaseRequest.RENEW, trial_ids, [owner])

    def withdraw_lease(self, owner: str, trial_ids: Sequence[int]) -> None:
        """See ``LeaseStore``."""
        self._leased.discard(owner)
        with contextlib.suppress(ValueError):  # Who keeps no leases has none to withdraw.
            self._lease(pb.LeaseRequest.WITHDRAW, trial_ids, [owner])

    def expired(
        self, study_id: int, running: Mapping[int, str], grace_period_s: float
    ) -> Sequence[int]:
        """See ``LeaseStore``; by the clock of the server's log."""
        return self._lease(
            pb.LeaseRequest.EXPIRED,
            running,
            running.values(),
            study_id=study_id,
            grace_period_s=grace_period_s,
        )

    def _lease(
        self, verb: int, trial_ids: Iterable[int], owners: Iterable[str], **more: Any
    ) -> Sequence[int]:
        self._keeps_leases()
        request = pb.LeaseRequest(
            verb=verb,
            trial_ids=trial_ids,
            owners=[owner.encode("utf-8", "surrogatepass") for owner in owners],
            **more,
        )
        try:
            reply = self._persistently(
                lambda timeout_s, _: self._unary("Lease", request, timeout_s)
            )
        except _FailedError as failed:
            error = self._final_error(failed, unknown=False)
            if isinstance(error, _NoLogServiceError):
                error = ValueError(_NO_LEASES.format(self))
            raise error from failed.error
        return list(reply.trial_ids)

    def _keeps_leases(self) -> None:
        if self._foreign is not None:
            raise ValueError(_NO_LEASES.format(self))

    # --- Limited ---------------------------------------------------------------------------------

    def check(self, records: Sequence[AnyOperation]) -> None:
        """See ``Limited``; a round trip for values out of the ordinary only."""
        if self._is_unlimited:
            return
        if self._foreign is not None:
            check_names(records)
            return
        unusual = [record for record in records if _is_unusual(record)]
        if not unusual:
            return
        request = pb.CheckRequest(records=payload.pack_records(unusual))
        try:
            reply = self._persistently(
                lambda timeout_s, _: self._unary("Check", request, timeout_s)
            )
        except _FailedError as failed:
            error = self._final_error(failed, unknown=False)
            if not isinstance(error, _NoLogServiceError):
                raise error from failed.error
            check_names(records)
        else:
            self._is_unlimited = reply.unlimited

    # --- SnapshotStore ---------------------------------------------------------------------------

    def save_snapshot(self, make: Callable[[], tuple[bytes, Cursor] | None]) -> bool:
        """See ``SnapshotStore``. The server saves its own."""
        return False

    def load_snapshot(self) -> tuple[bytes, Cursor] | None:
        """See ``SnapshotStore``."""
        replies = self._snapshot(pb.SnapshotRequest())
        if not replies:
            return None
        return b"".join(reply.part for reply in replies), replies[0].cursor or START

    def load_base(self) -> Base:
        """See ``Compacted``; of the journal that the server serves."""
        replies = self._snapshot(pb.SnapshotRequest(base=True))
        if not replies:
            return Base({})
        return Base(
            payload.unpack_marks(replies[0].marks),
            b"".join(reply.part for reply in replies) or None,
            replies[0].cursor or START,
        )

    def _snapshot(self, request: Any) -> list[Any]:
        """The parts of what the server keeps beside its records; none from a plain Optuna one."""
        if self._foreign is not None:
            return []

        def read(timeout_s: float, again: bool) -> list[Any]:
            with self._stream("Snapshot", request, timeout_s) as replies:
                return list(replies)

        try:
            return self._persistently(read)
        except _FailedError as failed:
            error = self._final_error(failed, unknown=False)
            if not isinstance(error, _NoLogServiceError):
                raise error from failed.error
        self._fall_back()
        return []

    # --- calls -----------------------------------------------------------------------------------

    def wait_until_ready(self, timeout_s: float | None) -> None:
        """Wait for a connection. Raises ConnectionError if there is none in time."""
        with self._credentials.channel(self._target, _OPTIONS) as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=timeout_s)
            except grpc.FutureTimeoutError as error:
                raise ConnectionError(
                    f"{self!r}: no server within {timeout_s} s. Start one with "
                    "run_grpc_proxy_server, or check host, port and certificates."
                ) from error

    def _here(self) -> None:
        """Notice a fork."""
        if self._pid != os.getpid():
            _inherited.append((self._channel, self._calls))
            self._begin()

    def _call(self, name: str) -> Call:
        self._here()
        if self._channel is None:
            try:
                self._metadata = self._credentials.metadata()
                self._certificates = self._credentials.certificates()
                self._channel = self._credentials.channel(self._target, _OPTIONS)
            except (OSError, ValueError) as error:
                raise LogUnavailableError(
                    f"{self!r}: a certificate or token can't be used: {error}"
                ) from error
            self._calls = {
                **calls(self._channel, LOG_SERVICE),
                **calls(self._channel, STORAGE_SERVICE),
            }
        return self._calls[name]

    def _has_new_token(self) -> bool:
        """Read the token again: gRPC reconnects by itself to a server that wants another one."""
        try:
            metadata = self._credentials.metadata()
        except (OSError, ValueError):
            return False
        before, self._metadata = self._metadata, metadata
        return metadata != before

    def _has_new_certificates(self) -> bool:
        """Read the files again: a channel connects with what it was made with for ever."""
        try:
            return self._credentials.certificates() != self._certificates
        except OSError:
            return False

    def _unary(self, name: str, request: Any, timeout_s: float) -> Any:
        return self._call(name)(request, timeout=timeout_s, metadata=self._metadata)

    @contextlib.contextmanager
    def _stream(self, name: str, request: Any, timeout_s: float) -> Iterator[Iterator[Any]]:
        """The parts of an answer, which may take as long as it likes while they keep coming.

        Args:
            timeout_s: For how long to wait for each.
        """
        call = self._call(name)(request, metadata=self._metadata)
        try:
            yield self._parts(call, timeout_s)
        finally:
            call.cancel()  # nothing, to one that has ended

    def _parts(self, call: Any, timeout_s: float) -> Iterator[Any]:
        n_parts, stands_still = 0, threading.Event()

        def end() -> None:
            stands_still.set()
            call.cancel()

        while True:
            timer = threading.Timer(timeout_s, end)
            timer.daemon = True
            timer.start()
            try:
                part = next(call, None)
            except grpc.RpcError as error:
                if stands_still.is_set():
                    raise _StandstillError() from error
                raise
            finally:
                timer.cancel()
            if part is None:
                return
            n_parts += 1
            if n_parts > self._n_parts_max:
                self._n_parts_max, self._heard_at_s = n_parts, self._clock.now_s()
            yield part

    def _persistently(self, attempt: Callable[[float, bool], _T], *, once: bool = False) -> _T:
        """The answer of the first attempt that gets one.

        The deadline counts from the last part that came, unless an earlier attempt got further.

        Args:
            attempt: Called with its timeout, and whether an earlier one may have been carried out.
            once: Give up as soon as an attempt may have been carried out.

        Raises:
            _FailedError: With the status of the last attempt.
        """
        self._here()  # or a child would begin anew in the middle of its first attempt
        with self._mutex:
            return self._until_it_answers(attempt, once)

    def _until_it_answers(self, attempt: Callable[[float, bool], _T], once: bool) -> _T:
        self._n_parts_max, self._heard_at_s = 0, self._clock.now_s()
        patience = Patience(self, self._clock, first_s=_PAUSE_FIRST_S, longest_s=_PAUSE_MAX_S)
        timeout_s, again = self._call_timeout_s, False
        while True:
            remaining_s = self._heard_at_s + self._retry_deadline_s - self._clock.now_s()
            try:
                return attempt(max(min(timeout_s, remaining_s), 0.001), again)
            except grpc.RpcError as error:
                failure = error
            if failure.code() == grpc.StatusCode.UNAUTHENTICATED and self._has_new_token():
                continue
            again = again or status.may_have_arrived(failure)
            if not status.is_transient(failure) or (once and again):
                raise _FailedError(failure, again)
            is_half_open = failure.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # perhaps
            if is_half_open or self._has_new_certificates():
                self.close()  # a new connection may get through
            give_up_at = self._heard_at_s + self._retry_deadline_s
            if not patience.pause(give_up_at, failure.details() or failure.code().name):
                raise _FailedError(failure, again)
            timeout_s *= 2

    def _final_error(self, failed: _FailedError, *, unknown: bool) -> Exception:
        if failed.error.code() == grpc.StatusCode.UNIMPLEMENTED:
            return _NoLogServiceError()
        return status.to_error(failed.error, repr(self), unknown=unknown)

    # --- a plain Optuna server -------------------------------------------------------------------

    def _fall_back(self) -> None:
        if self._speaks_log:
            raise LogUnavailableError(
                f"{self!r}: the server was replaced by a plain Optuna server, which knows nothing "
                "of this storage's position. Open a new storage."
            )
        _logger.info("%r is a plain Optuna server.", self)
        self._foreign = StorageLog(StockMethods(self._invoke))

    def _invoke(self, method: str, request: Any, *, once: bool = False) -> Any:
        """See ``stock.Invoke``."""
        try:
            reply = self._persistently(
                lambda timeout_s, _: self._unary(method, request, timeout_s), once=once
            )
        except _FailedError as failed:
            if failed.error.code() == grpc.StatusCode.UNIMPLEMENTED and not self._speaks_optuna:
                self._foreign = None  # no plain Optuna server either, but what is in front of one
            if failed.error.code() in REFUSALS and not status.error_name(failed.error):
                self._speaks_optuna = True
                raise StockRefusal(failed.error, failed.again) from failed.error
            if once and failed.again and not status.was_raised(failed.error):
                raise AnswerLostError(f"{self!r}: {failed.error.details()}") from failed.error
            unknown = failed.again and not method.startswith("Get")
            raise status.to_error(failed.error, repr(self), unknown=unknown) from failed.error
        self._speaks_optuna = True
        return reply


def _is_unusual(record: AnyOperation) -> bool:
    """Whether there is a log that can't hold a record, as far as can be told here."""
    try:
        text = _json_encoder.encode(record)
    except (UnicodeEncodeError, OverflowError):
        return True
    if len(text) > _USUAL_BYTES_MAX or b"\\u0000" in text:
        return True
    for field in record.__struct_fields__:
        value = getattr(record, field)
        kind = type(value)
        if kind is dict:
            if value and max(map(len, value)) > _USUAL_NAME_LEN_MAX:
                return True
        elif kind is str:
            if len(value) > _USUAL_NAME_LEN_MAX and field != "distribution":
                return True
        elif kind is int and abs(value) > _USUAL_INTEGER_MAX:
            return True
    return False


class _FailedError(Exception):
    def __init__(self, error: grpc.RpcError, again: bool) -> None:
        super().__init__(error)
        self.error = error
        self.again = again


class _NoLogServiceError(Exception):
    pass


class _StandstillError(grpc.RpcError):  # type: ignore[misc]
    """No part of a stream came in time; to be treated as a call without an answer."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.DEADLINE_EXCEEDED

    def details(self) -> str:
        return "No further part of the answer came in time"

    def trailing_metadata(self) -> None:
        return None


def _owed(records: Sequence[AnyOperation], outcomes: Sequence[Outcome]) -> Wanted:
    """What the news would have held beside what was wanted: all that was created or claimed."""
    wanted = NOTHING
    for record, outcome in zip(records, outcomes, strict=False):
        if isinstance(record, CreateStudy) and outcome.id >= 0:
            wanted |= Wanted(studies=frozenset((outcome.id,)))
        elif isinstance(record, CreateTrial) and outcome.id >= 0:
            wanted |= Wanted(trials=frozenset((outcome.id,)))
        elif isinstance(record, SetTrialStateValues) and record.state == RUNNING:
            wanted |= Wanted(trials=frozenset((record.trial_id,)))
    return wanted
