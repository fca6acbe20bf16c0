"""Optuna's own ``StorageService``, field for field: served over any storage, and called.

The server side answers plain Optuna workers; the client side lets our client work on a plain
Optuna server, as ``foreign.Methods``.

Source: optuna.proto, docs/formats/grpc.md; Optuna ``run_grpc_proxy_server``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
import contextlib
from datetime import datetime
import json
import logging
from typing import Any, Final, Protocol

import grpc
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from trialstore.errors import OutcomeUnknownError, TrialstoreError
from trialstore.logs.grpc import status
from trialstore.logs.grpc.generated import optuna_pb2 as pb
from trialstore.records import AnyOperation

_logger = logging.getLogger(__name__)

_TIME: Final = "%Y-%m-%d %H:%M:%S.%f"
_CODE: Final = grpc.StatusCode
# Proto3 has no NOT_SET, and Optuna's own server sends MAXIMIZE for whatever is not MINIMIZE.
_TO_DIRECTION: Final = {StudyDirection.MINIMIZE: pb.MINIMIZE}
_STATES: Final = {
    TrialState.RUNNING: pb.RUNNING,
    TrialState.COMPLETE: pb.COMPLETE,
    TrialState.PRUNED: pb.PRUNED,
    TrialState.FAIL: pb.FAIL,
    TrialState.WAITING: pb.WAITING,
}
_FROM_STATE: Final = {code: state for state, code in _STATES.items()}


# --- messages ------------------------------------------------------------------------------------


def _directions_to_wire(directions: Iterable[StudyDirection]) -> list[int]:
    return [_TO_DIRECTION.get(direction, pb.MAXIMIZE) for direction in directions]


def _directions_from_wire(codes: Iterable[int]) -> list[StudyDirection]:
    return [
        StudyDirection.MINIMIZE if code == pb.MINIMIZE else StudyDirection.MAXIMIZE
        for code in codes
    ]


def _attrs_to_wire(attrs: dict[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in attrs.items()}


def _attrs_from_wire(attrs: Any) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in attrs.items()}


def _time_to_wire(time: datetime | None) -> str:
    return "" if time is None else time.strftime(_TIME)


def _time_from_wire(text: str) -> datetime | None:
    return datetime.strptime(text, _TIME) if text else None


def check_names(records: Sequence[AnyOperation]) -> None:
    """Raises ValueError for a name or key that is no UTF-8, which strings on the wire are."""
    for name in (name for record in records for name in _names(record)):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"A plain Optuna server takes no lone surrogates in names: {name!r}."
            ) from error


def _names(record: AnyOperation) -> Iterator[str]:
    for field in record.__struct_fields__:
        value = getattr(record, field)
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value


def trial_to_wire(trial: FrozenTrial) -> Any:
    """The message for a trial."""
    return pb.Trial(
        trial_id=trial._trial_id,
        number=trial.number,
        state=_STATES[trial.state],
        values=trial.values,
        datetime_start=_time_to_wire(trial.datetime_start),
        datetime_complete=_time_to_wire(trial.datetime_complete),
        params={
            name: trial.distributions[name].to_internal_repr(value)
            for name, value in trial.params.items()
        },
        distributions={
            name: distribution_to_json(known) for name, known in trial.distributions.items()
        },
        user_attributes=_attrs_to_wire(trial.user_attrs),
        system_attributes=_attrs_to_wire(trial.system_attrs),
        intermediate_values=trial.intermediate_values,
    )


def trial_from_wire(message: Any) -> FrozenTrial:
    """The trial in a message."""
    distributions = {
        name: json_to_distribution(text) for name, text in message.distributions.items()
    }
    return FrozenTrial(
        trial_id=message.trial_id,
        number=message.number,
        state=_FROM_STATE[message.state],
        value=None,
        values=list(message.values) or None,
        datetime_start=_time_from_wire(message.datetime_start),
        datetime_complete=_time_from_wire(message.datetime_complete),
        params={
            name: distributions[name].to_external_repr(internal)
            for name, internal in message.params.items()
        },
        distributions=distributions,
        user_attrs=_attrs_from_wire(message.user_attributes),
        system_attrs=_attrs_from_wire(message.system_attributes),
        intermediate_values=dict(message.intermediate_values),
    )


# --- the server's side ---------------------------------------------------------------------------


@contextlib.contextmanager
def _aborting(context: grpc.ServicerContext) -> Iterator[None]:
    """Errors as the statuses that Optuna's client knows."""
    try:
        yield
    except DuplicatedStudyError as error:
        context.abort(_CODE.ALREADY_EXISTS, str(error))
    except UpdateFinishedTrialError as error:
        context.abort(_CODE.FAILED_PRECONDITION, str(error))
    except KeyError as error:
        context.abort(_CODE.NOT_FOUND, str(error))
    except TrialstoreError as error:
        status.abort(context, error)
    except (ValueError, TypeError) as error:
        context.abort(_CODE.INVALID_ARGUMENT, str(error))
    except Exception as error:
        if type(error) is Exception and not error.args:
            raise  # what abort() itself raises
        _logger.exception("A call of StorageService failed.")
        status.abort(context, error)


class StorageServicer:
    """Answers plain Optuna workers.

    Args:
        storage: Any storage.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def CreateNewStudy(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            study_id = self._storage.create_new_study(
                _directions_from_wire(request.directions), request.study_name
            )
            return pb.CreateNewStudyReply(study_id=study_id)

    def DeleteStudy(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            self._storage.delete_study(request.study_id)
            return pb.DeleteStudyReply()

    def SetStudyUserAttribute(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            value = json.loads(request.value)
            self._storage.set_study_user_attr(request.study_id, request.key, value)
            return pb.SetStudyUserAttributeReply()

    def SetStudySystemAttribute(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            value = json.loads(request.value)
            self._storage.set_study_system_attr(request.study_id, request.key, value)
            return pb.SetStudySystemAttributeReply()

    def GetStudyIdFromName(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            study_id = self._storage.get_study_id_from_name(request.study_name)
            return pb.GetStudyIdFromNameReply(study_id=study_id)

    def GetStudyNameFromId(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            name = self._storage.get_study_name_from_id(request.study_id)
            return pb.GetStudyNameFromIdReply(study_name=name)

    def GetStudyDirections(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            directions = self._storage.get_study_directions(request.study_id)
            return pb.GetStudyDirectionsReply(directions=_directions_to_wire(directions))

    def GetStudyUserAttributes(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            attrs = self._storage.get_study_user_attrs(request.study_id)
            return pb.GetStudyUserAttributesReply(user_attributes=_attrs_to_wire(attrs))

    def GetStudySystemAttributes(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            attrs = self._storage.get_study_system_attrs(request.study_id)
            return pb.GetStudySystemAttributesReply(system_attributes=_attrs_to_wire(attrs))

    def GetAllStudies(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            studies = [
                pb.Study(
                    study_id=study._study_id,
                    study_name=study.study_name,
                    directions=_directions_to_wire(study.directions),
                    user_attributes=_attrs_to_wire(study.user_attrs),
                    system_attributes=_attrs_to_wire(study.system_attrs),
                )
                for study in self._storage.get_all_studies()
            ]
            return pb.GetAllStudiesReply(studies=studies)

    def CreateNewTrial(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            template = (
                None if request.template_trial_is_none else trial_from_wire(request.template_trial)
            )
            trial_id = self._storage.create_new_trial(request.study_id, template)
            return pb.CreateNewTrialReply(trial_id=trial_id)

    def SetTrialParameter(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            self._storage.set_trial_param(
                request.trial_id,
                request.param_name,
                request.param_value_internal,
                json_to_distribution(request.distribution),
            )
            return pb.SetTrialParameterReply()

    def GetTrialIdFromStudyIdTrialNumber(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            trial_id = self._storage.get_trial_id_from_study_id_trial_number(
                request.study_id, request.trial_number
            )
            return pb.GetTrialIdFromStudyIdTrialNumberReply(trial_id=trial_id)

    def SetTrialStateValues(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            updated = self._storage.set_trial_state_values(
                request.trial_id, _FROM_STATE[request.state], list(request.values) or None
            )
            return pb.SetTrialStateValuesReply(trial_updated=updated)

    def SetTrialIntermediateValue(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            self._storage.set_trial_intermediate_value(
                request.trial_id, request.step, request.intermediate_value
            )
            return pb.SetTrialIntermediateValueReply()

    def SetTrialUserAttribute(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            value = json.loads(request.value)
            self._storage.set_trial_user_attr(request.trial_id, request.key, value)
            return pb.SetTrialUserAttributeReply()

    def SetTrialSystemAttribute(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            value = json.loads(request.value)
            self._storage.set_trial_system_attr(request.trial_id, request.key, value)
            return pb.SetTrialSystemAttributeReply()

    def GetTrial(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            trial = self._storage.get_trial(request.trial_id)
            return pb.GetTrialReply(trial=trial_to_wire(trial))

    def GetTrials(self, request: Any, context: Any) -> Any:
        with _aborting(context):
            trials = self._storage.get_all_trials(request.study_id, deepcopy=False)
            after = request.trial_id_greater_than
            # Every storage gives them by id: what the client has is passed over unseen.
            newer = bisect_right(trials, after, key=_id_of)
            known = _of_ids(trials, newer, request.included_trial_ids)
            return pb.GetTrialsReply(trials=map(trial_to_wire, [*known, *trials[newer:]]))


def _id_of(trial: FrozenTrial) -> int:
    return trial._trial_id


def _of_ids(
    trials: Sequence[FrozenTrial], end: int, trial_ids: Iterable[int]
) -> Iterator[FrozenTrial]:
    """Those of the given ids, of the first ``end`` trials."""
    for trial_id in sorted(set(trial_ids)):
        index = bisect_right(trials, trial_id, hi=end, key=_id_of) - 1
        if index >= 0 and trials[index]._trial_id == trial_id:
            yield trials[index]


# --- the client's side ---------------------------------------------------------------------------


class StockRefusal(Exception):
    """The server's own refusal of a call.

    Args:
        error: The status.
        again: An earlier attempt may have been carried out.
    """

    def __init__(self, error: grpc.RpcError, again: bool) -> None:
        super().__init__(error)
        self.error = error
        self.again = again


class AnswerLostError(Exception):
    """A call that must not be repeated blindly was sent, and no answer came."""


class Invoke(Protocol):
    """Calls a method of ``StorageService`` by name, again while no answer comes."""

    def __call__(self, method: str, request: Any, *, once: bool = False) -> Any:
        """The reply.

        Raises:
            StockRefusal: The server understood and refused.
            AnswerLostError: With ``once``, as soon as the call may have been carried out.
            LogUnavailableError, OutcomeUnknownError: No answer came at all.
        """
        ...


class StockMethods:
    """A plain Optuna server, as ``foreign.Methods``."""

    def __init__(self, invoke: Invoke) -> None:
        self._invoke = invoke

    def _call(
        self, method: str, settle: Callable[[grpc.RpcError], Any] | None = None, **fields: Any
    ) -> Any:
        """Call; if an earlier attempt may have been carried out and this one was refused,
        ``settle`` has the word."""
        try:
            return self._invoke(method, getattr(pb, f"{method}Request")(**fields))
        except StockRefusal as refusal:
            if refusal.again and settle is not None:
                return settle(refusal.error)
            raise _from_status(refusal.error) from refusal.error

    # Studies.

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        def look(error: grpc.RpcError) -> Any:
            if error.code() == _CODE.ALREADY_EXISTS and str(study_name).startswith("no-name-"):
                # Nobody else makes the same name up.
                return self._call("GetStudyIdFromName", study_name=study_name)
            raise _from_status(error) from error

        codes = _directions_to_wire(directions)
        reply = self._call("CreateNewStudy", look, directions=codes, study_name=study_name)
        return int(reply.study_id)

    def delete_study(self, study_id: int) -> None:
        # If it is gone after a lost answer, then by us as likely as by anybody.
        self._call("DeleteStudy", lambda error: None, study_id=study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        text = json.dumps(value)
        self._call("SetStudyUserAttribute", study_id=study_id, key=key, value=text)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        text = json.dumps(value)
        self._call("SetStudySystemAttribute", study_id=study_id, key=key, value=text)

    def get_study_id_from_name(self, study_name: str) -> int:
        return int(self._call("GetStudyIdFromName", study_name=study_name).study_id)

    def get_study_name_from_id(self, study_id: int) -> str:
        return str(self._call("GetStudyNameFromId", study_id=study_id).study_name)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return _directions_from_wire(
            self._call("GetStudyDirections", study_id=study_id).directions
        )

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        reply = self._call("GetStudyUserAttributes", study_id=study_id)
        return _attrs_from_wire(reply.user_attributes)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        reply = self._call("GetStudySystemAttributes", study_id=study_id)
        return _attrs_from_wire(reply.system_attributes)

    def get_all_studies(self) -> list[FrozenStudy]:
        return [
            FrozenStudy(
                study_id=study.study_id,
                study_name=study.study_name,
                direction=None,
                directions=_directions_from_wire(study.directions),
                user_attrs=_attrs_from_wire(study.user_attributes),
                system_attrs=_attrs_from_wire(study.system_attributes),
            )
            for study in self._call("GetAllStudies").studies
        ]

    # Trials.

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """A lost answer is looked for by the start that the template carries."""
        fields: dict[str, Any] = {"template_trial_is_none": template_trial is None}
        if template_trial is not None:
            fields["template_trial"] = trial_to_wire(template_trial)
        request = pb.CreateNewTrialRequest(study_id=study_id, **fields)
        start = None if template_trial is None else template_trial.datetime_start
        is_again = False
        while True:
            try:
                trial_id = int(self._invoke("CreateNewTrial", request, once=True).trial_id)
                if is_again:
                    self._fail_other(study_id, start, trial_id)
                return trial_id
            except StockRefusal as refusal:
                raise _from_status(refusal.error) from refusal.error
            except AnswerLostError as lost:
                if start is None:
                    raise OutcomeUnknownError(
                        f"{lost} Whether the trial was created can't be told; look for one that "
                        "nobody runs."
                    ) from lost
                for trial in self.trials_after(study_id, -1, ()):
                    if trial.datetime_start == start:
                        return trial._trial_id
                is_again = True

    def _fail_other(self, study_id: int, start: datetime | None, trial_id: int) -> None:
        """Nobody runs what came of an attempt that was still under way when it was looked for."""
        for trial in self.trials_after(study_id, -1, ()):
            if trial.datetime_start == start and trial._trial_id != trial_id:
                with contextlib.suppress(UpdateFinishedTrialError):
                    self.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        self._call(
            "SetTrialParameter",
            trial_id=trial_id,
            param_name=param_name,
            param_value_internal=param_value_internal,
            distribution=distribution_to_json(distribution),
        )

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        def look(error: grpc.RpcError) -> Any:
            if error.code() == _CODE.FAILED_PRECONDITION:
                trial = self.get_trial(trial_id)
                if trial.state == state and (values is None or trial.values == list(values)):
                    return pb.SetTrialStateValuesReply(trial_updated=True)
            raise _from_status(error) from error

        reply = self._call(
            "SetTrialStateValues", look, trial_id=trial_id, state=_STATES[state], values=values
        )
        return bool(reply.trial_updated)

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        self._call(
            "SetTrialIntermediateValue",
            trial_id=trial_id,
            step=step,
            intermediate_value=intermediate_value,
        )

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        text = json.dumps(value)
        self._call("SetTrialUserAttribute", trial_id=trial_id, key=key, value=text)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        text = json.dumps(value)
        self._call("SetTrialSystemAttribute", trial_id=trial_id, key=key, value=text)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return trial_from_wire(self._call("GetTrial", trial_id=trial_id).trial)

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        reply = self._call(
            "GetTrialIdFromStudyIdTrialNumber", study_id=study_id, trial_number=trial_number
        )
        return int(reply.trial_id)

    def trials_after(
        self, study_id: int, after_id: int, and_ids: Collection[int]
    ) -> Iterable[FrozenTrial]:
        """See ``foreign.Methods``."""
        reply = self._call(
            "GetTrials",
            study_id=study_id,
            included_trial_ids=and_ids,
            trial_id_greater_than=after_id,
        )
        return map(trial_from_wire, reply.trials)


REFUSALS: Final = {
    _CODE.ALREADY_EXISTS: DuplicatedStudyError,
    _CODE.NOT_FOUND: KeyError,
    _CODE.FAILED_PRECONDITION: UpdateFinishedTrialError,
    _CODE.INVALID_ARGUMENT: ValueError,
}
"""What the server says of a call that it understood."""


def _from_status(error: grpc.RpcError) -> Exception:
    return REFUSALS[error.code()](error.details())
