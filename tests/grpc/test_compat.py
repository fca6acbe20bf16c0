"""Plain Optuna workers, of this environment and of Optuna 4.4, beside ours on one server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import os
from pathlib import Path
import subprocess
import sys
import threading
from typing import Any

import grpc
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState
import pytest

from grpc_servers import KillableServer, open_grpc, serve, served_url
from servers import free_port
from trialstore.errors import LogUnavailableError, OutcomeUnknownError
from trialstore.testing.contents import study_contents
from trialstore.testing.proxy import CountingProxy

_ROOT = Path(__file__).parents[2]
_DEADLINE_S = 120.0

_WORKER = """
import sys, warnings
import optuna
warnings.simplefilter("ignore")
optuna.logging.set_verbosity(optuna.logging.ERROR)
storage = optuna.storages.GrpcStorageProxy(port=int(sys.argv[1]))
study = optuna.load_study(study_name="s", storage=storage)
def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    y = trial.suggest_int("y", 1, 64, log=True)
    z = trial.suggest_categorical("z", ["a", None, 3])
    trial.set_user_attr("version", optuna.__version__)
    trial.set_user_attr("odd", [1, {"k": None}, float("inf")])
    trial.report(x, 0)
    trial.report(float("nan"), 1)
    if trial.number % 3 == 0:
        raise optuna.TrialPruned
    return x * y
study.optimize(objective, n_trials=int(sys.argv[2]))
study.set_user_attr(optuna.__version__, len(study.trials))
"""


def _python_44() -> str:
    path = os.environ.get("TRIALSTORE_OPTUNA44_PYTHON", f"{_ROOT}/.venv-optuna44/bin/python")
    probe = "import grpc, google.protobuf, optuna; assert optuna.__version__.startswith('4.4')"
    if not Path(path).exists() or subprocess.run([path, "-c", probe], check=False).returncode:
        pytest.skip("no environment with Optuna 4.4 and grpcio; see make test")
    return path


def _run_worker(python: str, port: int, n_trials: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [python, "-c", _WORKER, str(port), str(n_trials)],
        check=True,
        timeout=240,
        env=environment,
    )


@pytest.mark.parametrize("version", ["installed", "4.4"])
@pytest.mark.parametrize("kind", ["journal", "sqlite", "in-process"])
def test_a_stock_worker_and_ours_work_on_one_study(
    version: str, kind: str, tmp_path: Path
) -> None:
    python = sys.executable if version == "installed" else _python_44()
    port = serve(served_url(kind, tmp_path))
    with contextlib.closing(open_grpc(port)) as storage:
        study = optuna.create_study(study_name="s", storage=storage)
        study.enqueue_trial({"x": 0.25, "y": 4, "z": None})
        _run_worker(python, port, 8)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=8)
        _run_worker(python, port, 4)
        trials = study.trials
        assert [trial.number for trial in trials] == list(range(20))
        assert all(trial.state.is_finished() for trial in trials)
        assert trials[0].params == {"x": 0.25, "y": 4, "z": None}
        assert [len(trial.params) for trial in trials] == [3] * 8 + [1] * 8 + [3] * 4
        assert trials[1].user_attrs["odd"] == [1, {"k": None}, float("inf")]
        assert set(trials[1].intermediate_values) == {0, 1}
        with contextlib.closing(open_grpc(port)) as other:
            assert study_contents(other, study._study_id) == study_contents(
                storage, study._study_id
            )


@contextlib.contextmanager
def _stock_server(python: str) -> Iterator[int]:
    """A plain Optuna server in an environment of its own."""
    port = free_port()
    code = (
        "import optuna\n"
        "storage = optuna.storages.InMemoryStorage()\n"
        f"optuna.storages.run_grpc_proxy_server(storage, port={port})"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen([python, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    try:
        with contextlib.closing(open_grpc(port)) as storage:
            storage.wait_server_ready(240)
        yield port
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("version", ["installed", "4.4"])
def test_our_client_and_a_stock_one_work_on_a_stock_server(version: str) -> None:
    python = sys.executable if version == "installed" else _python_44()
    with _stock_server(python) as port, contextlib.closing(open_grpc(port)) as storage:
        study = optuna.create_study(study_name="s", storage=storage)
        study.enqueue_trial({"x": 0.25, "y": 4, "z": None})
        _run_worker(python, port, 5)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=5, n_jobs=2)
        _run_worker(python, port, 5)
        assert [trial.number for trial in study.trials] == list(range(15))
        assert all(trial.state.is_finished() for trial in study.trials)
        assert [len(trial.params) for trial in study.trials] == [3] * 5 + [1] * 5 + [3] * 5


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", ["second", "first"])
@pytest.mark.parametrize("by", ["us", "another", "another, seen in the catalogue"])
def test_a_study_that_bears_the_id_of_a_deleted_one_is_another(
    tmp_path: Path, name: str, by: str
) -> None:
    port = serve(f"optuna+sqlite:///{tmp_path}/reused.db", stock=True)
    directions = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    other = optuna.storages.GrpcStorageProxy(port=port)
    with contextlib.closing(open_grpc(port)) as storage:
        first = storage.create_new_study([StudyDirection.MINIMIZE], "first")
        storage.set_trial_state_values(storage.create_new_trial(first), TrialState.COMPLETE, [1])
        assert len(storage.get_all_trials(first)) == 1
        other.delete_study(first)
        creator = storage if by == "us" else other
        assert creator.create_new_study(directions, name) == first
        if by == "another, seen in the catalogue":
            (seen,) = storage.get_all_studies()
            assert (seen.study_name, seen.directions) == (name, directions)
        study = optuna.load_study(study_name=name, storage=storage)
        assert (study.directions, study.trials) == (directions, [])
        assert storage.get_study_name_from_id(first) == name
        study.tell(study.ask(), [0.5, 1.5])
        assert [trial.values for trial in study.trials] == [[0.5, 1.5]]
    other.remove_session()


def test_what_a_stock_server_refuses_is_not_taken_for_a_repetition() -> None:
    """Where no answer was lost, a refusal says that somebody else has done it."""
    port = serve("optuna+memory://", stock=True)
    with (
        contextlib.closing(open_grpc(port, linger_s=0.0)) as one,
        contextlib.closing(open_grpc(port, linger_s=0.0)) as other,
    ):
        study_id = one.create_new_study([StudyDirection.MINIMIZE], "no-name-of-mine")
        with pytest.raises(optuna.exceptions.DuplicatedStudyError):
            other.create_new_study([StudyDirection.MINIMIZE], "no-name-of-mine")
        trial_id = one.create_new_trial(study_id)
        other.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
            one.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        other.delete_study(study_id)
        with pytest.raises(KeyError):
            one.delete_study(study_id)


def test_what_fails_in_a_stock_server_is_not_tried_for_ever(tmp_path: Path) -> None:
    port = serve(f"optuna+sqlite:///{tmp_path}/a.db", stock=True)
    with contextlib.closing(open_grpc(port)) as storage:
        study = optuna.create_study(storage=storage)
        kinds = FloatDistribution(0, 1), CategoricalDistribution([0.5])
        one, other = (
            optuna.create_trial(value=1.0, params={"x": 0.5}, distributions={"x": kind})
            for kind in kinds
        )
        study.add_trial(one)
        with pytest.raises(OutcomeUnknownError, match="the storage behind the server failed"):
            study.add_trial(other)
        assert study.trials[0].distributions == {"x": kinds[0]}


class _SlowAtFirst(optuna.storages.InMemoryStorage):
    """The first trial is on its way until the second one is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.is_at_it, self.goes_on, self.is_done = [threading.Event() for _ in range(3)]

    def create_new_trial(self, *args: Any, **options: Any) -> int:
        if self.is_at_it.is_set():
            self.goes_on.set()
            self.is_done.wait(_DEADLINE_S)
            return super().create_new_trial(*args, **options)
        self.is_at_it.set()
        self.goes_on.wait(_DEADLINE_S)
        try:
            return super().create_new_trial(*args, **options)
        finally:
            self.is_done.set()


def test_a_stock_server_cut_off_in_the_middle_of_a_creation_leaves_nothing_running() -> None:
    from optuna.storages._grpc.server import make_server

    behind, port = _SlowAtFirst(), free_port()
    study_id = behind.create_new_study([StudyDirection.MINIMIZE])
    server: Any = make_server(behind, "localhost", port)
    server.start()
    with (
        CountingProxy("localhost", port) as proxy,
        ThreadPoolExecutor(1) as pool,
        contextlib.closing(open_grpc(proxy.port)) as storage,
    ):
        created = pool.submit(storage.create_new_trial, study_id)
        assert behind.is_at_it.wait(_DEADLINE_S)
        proxy.sever()
        mine = created.result(_DEADLINE_S)
        states = {trial._trial_id: trial.state for trial in behind.get_all_trials(study_id)}
        assert states == {0: TrialState.FAIL, 1: TrialState.RUNNING}
        assert mine == 1
    server.stop(0).wait()


def test_what_serves_nothing_is_not_taken_for_a_stock_server(tmp_path: Path) -> None:
    """A proxy that has no server behind it yet says the same of either service."""
    port = free_port()
    nothing = grpc.server(ThreadPoolExecutor(1))
    nothing.add_insecure_port(f"localhost:{port}")
    nothing.start()
    storage = open_grpc(port, heartbeat_interval=60)
    with pytest.raises(LogUnavailableError, match="UNIMPLEMENTED"):
        storage.get_all_studies()
    nothing.stop(0).wait()
    server = KillableServer(served_url("journal", tmp_path), port=port)
    with server, contextlib.closing(storage):
        study_id = storage.create_new_study([StudyDirection.MINIMIZE])
        storage.create_new_trial(study_id)  # with a lease, which a stock server keeps not
        assert storage.get_n_trials(study_id) == 1


_FORKING = """
import sys
import grpc
if sys.argv[2] == "with a channel":
    channel = grpc.insecure_channel(f"localhost:{sys.argv[1]}")
    grpc.channel_ready_future(channel).result(60)
import multiprocessing
import optuna
import trialstore
storage = trialstore.GrpcStorageProxy(port=int(sys.argv[1]))
study_id = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "s")
context = multiprocessing.get_context("fork")
for _ in range(3):
    child = context.Process(target=storage.create_new_trial, args=(study_id,))
    child.start()
    storage.create_new_trial(study_id)
    child.join()
    assert child.exitcode == 0
assert len(storage.get_all_trials(study_id)) == 6
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["imported", "with a channel"])
def test_parent_and_child_go_on_though_grpc_was_there_before_us(how: str, tmp_path: Path) -> None:
    """gRPC has to be told of forks before it begins, which importing us would have done."""
    port = serve(served_url("journal", tmp_path))
    environment = {name: value for name, value in os.environ.items() if "FORK" not in name}
    subprocess.run(
        [sys.executable, "-c", _FORKING, str(port), how], check=True, timeout=240, env=environment
    )


@pytest.mark.parametrize("url", ["memory://", "optuna+memory://", "optuna's server"])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_server_that_keeps_no_leases_is_told_of_before_there_is_a_trial(
    url: str, is_first: bool
) -> None:
    is_stock = url == "optuna's server"
    port = serve("optuna+memory://" if is_stock else url, stock=is_stock)
    with contextlib.closing(open_grpc(port)) as storage:
        study_id = storage.create_new_study([StudyDirection.MINIMIZE])
        with contextlib.closing(open_grpc(port, heartbeat_interval=60)) as beating:
            if not is_first:
                beating.get_all_studies()
            with pytest.raises(ValueError, match="keeps no leases: leave heartbeat_interval out"):
                beating.create_new_trial(study_id)
        assert storage.get_all_trials(study_id) == []
        beating.heartbeat_interval = None
        with contextlib.closing(beating):
            assert beating.create_new_trial(study_id) == 0


def test_both_packages_messages_live_in_one_process() -> None:
    """They have the same names, and protobuf's default pool has each name once."""
    from optuna.storages._grpc.auto_generated import api_pb2

    from trialstore.logs.grpc.generated import optuna_pb2

    message = api_pb2.Trial(trial_id=3, params={"x": 1.5}, values=[0.5])
    same = optuna_pb2.Trial.FromString(message.SerializeToString())
    assert (same.trial_id, dict(same.params), list(same.values)) == (3, {"x": 1.5}, [0.5])


def test_the_service_is_optuna_s_field_for_field() -> None:
    from google.protobuf.descriptor_pb2 import FileDescriptorProto
    from optuna.storages._grpc.auto_generated import api_pb2

    from trialstore.logs.grpc.generated import optuna_pb2

    theirs, ours = FileDescriptorProto(), FileDescriptorProto()
    api_pb2.DESCRIPTOR.CopyToProto(theirs)
    optuna_pb2.DESCRIPTOR.CopyToProto(ours)
    ours.name = theirs.name
    assert ours == theirs
