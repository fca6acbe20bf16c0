"""Round trips to a database server, counted between it and the storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import create_trial
import pytest

from servers import new_database, proxied
from trialstore import RDBStorage
from trialstore.testing.proxy import CountingProxy

pytestmark = pytest.mark.servers

_N_TRIALS = 20

ProxyAndStorage = tuple[CountingProxy, Callable[[], RDBStorage]]


@pytest.fixture(params=["psycopg", "psycopg2", "pymysql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_database(request.param, tmp_path)


@pytest.fixture
def proxy_and_storage(url: str) -> Iterator[ProxyAndStorage]:
    """What counts, and what opens a storage behind it."""
    with proxied(url) as (proxy, through):
        # On a busy machine the linger ends in the middle of a trial and costs an exchange.
        yield proxy, lambda: RDBStorage(through, linger_s=600.0)


def _objective(trial: optuna.Trial) -> float:
    trial.set_user_attr("note", trial.number)
    return sum(trial.suggest_float(f"x{i}", -1.0, 1.0) for i in range(5))


@pytest.mark.parametrize(
    ("sampler", "trips_max"),
    [
        pytest.param(lambda: RandomSampler(seed=1), 4, id="random"),
        pytest.param(lambda: TPESampler(seed=1, constant_liar=True), 6, id="tpe"),
    ],
)
def test_round_trips_of_a_trial(
    proxy_and_storage: ProxyAndStorage, sampler: Callable[[], BaseSampler], trips_max: int
) -> None:
    proxy, open_storage = proxy_and_storage
    storage = open_storage()
    study = optuna.create_study(storage=storage, sampler=sampler())
    study.optimize(_objective, n_trials=12)  # TPE samples at random before
    proxy.reset()
    study.optimize(_objective, n_trials=_N_TRIALS)
    assert proxy.n_round_trips <= trips_max * _N_TRIALS
    storage.close()


def test_round_trips_to_open_a_study(url: str, proxy_and_storage: ProxyAndStorage) -> None:
    proxy, open_storage = proxy_and_storage
    filler = RDBStorage(url)
    study_id = filler.create_new_study([StudyDirection.MINIMIZE], "s")
    params = {f"x{i}": 0.5 for i in range(5)}
    distributions = {name: optuna.distributions.FloatDistribution(0, 1) for name in params}
    template = create_trial(value=1.0, params=params, distributions=distributions)
    for _ in range(1_000):
        filler.create_new_trial(study_id, template)
    filler.close()
    storage = open_storage()
    assert len(optuna.load_study(study_name="s", storage=storage).trials) == 1_000
    assert proxy.n_round_trips <= 6
    storage.close()
