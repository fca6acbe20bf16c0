"""The queue's index against a plain list, and what was read earlier against what it was then."""

from __future__ import annotations

import copy
import pickle
import random
import threading

import optuna
from optuna.trial import FrozenTrial, TrialState
import pytest

import trialstore
from trialstore.waiting import Waiting


class _Trial:
    def __init__(self, trial_id: int) -> None:
        self.id = trial_id
        self.version = 0
        self.n_looks = 0

    def shared_view(self) -> FrozenTrial:
        self.n_looks += 1
        return optuna.create_trial(
            state=TrialState.WAITING, system_attrs={"id": self.id, "version": self.version}
        )


def _shown(trials: object) -> list[tuple[int, int]]:
    return [(x.system_attrs["id"], x.system_attrs["version"]) for x in trials]  # type: ignore[attr-defined]


@pytest.mark.parametrize("left_max", [5, 1024])
@pytest.mark.parametrize("first", [0.9, 0.3])
@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_changes_leaves_earlier_reads_alone(
    seed: int, first: float, left_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trialstore.waiting._LEFT_MAX", left_max)
    rng = random.Random(seed)
    waiting, model, ids = Waiting(), dict[int, _Trial](), iter(rng.sample(range(10_000), 3000))
    read, left = [], list[_Trial]()
    for step in range(400):
        action = rng.random()
        if action < 0.5 or not model:
            # Mostly the latest, as on a journal; on tables an earlier one may come late, and
            # everywhere one that has left may be queued again.
            trial = _Trial(10_000 + step if rng.random() < 0.9 else next(ids))
            if left and rng.random() < 0.3:
                trial = left.pop(rng.choice([-1, rng.randrange(len(left))]))
            model[trial.id] = trial
            waiting.add(trial)
        elif action < 0.8:
            others = (rng.choice(list(model)), max(model))
            trial = model[min(model) if rng.random() < first else rng.choice(others)]
            waiting.remove(trial)
            left.append(model.pop(trial.id))
        elif action < 0.9:
            trial = rng.choice(list(model.values()))
            waiting.renew()
            trial.version += 1
        expected = [(id_, model[id_].version) for id_ in sorted(model)]
        if action >= 0.9:
            read.append((waiting.trials(threading.RLock), expected))
            above = rng.choice(expected)[0] if expected else 0
            later = [one for one in expected if one[0] > above]
            read.append((waiting.trials(threading.RLock, above), later))
        assert len(waiting) == len(expected)
        assert [trial.id for trial in waiting] == [id_ for id_, _ in expected]
    for trials, expected in read:
        assert _shown(trials) == expected
        assert len(trials) == len(expected)
        assert _shown(trials[1:3]) == expected[1:3]


def test_who_leaves_behind_the_first_costs_the_others_nothing() -> None:
    waiting, trials = Waiting(), [_Trial(trial_id) for trial_id in range(500)]
    for trial in trials:
        waiting.add(trial)
    for trial in trials[1:100]:
        read = waiting.trials(threading.RLock)
        waiting.remove(trial)
        assert len(waiting) == len(read) - 1
    assert sum(trial.n_looks for trial in trials) == 99, "those that left, for who had read them"


def test_the_queue_looks_like_a_list() -> None:
    storage = trialstore.InMemoryStorage()
    study = optuna.create_study(storage=storage)
    for number in range(3):
        study.enqueue_trial({"x": number})
    states = (TrialState.WAITING,)
    queue = study.get_trials(deepcopy=False, states=states)
    assert queue == storage.get_all_trials(study._study_id, deepcopy=True, states=states)
    assert (len(queue), queue[-1].number, [t.number for t in queue[:2]]) == (3, 2, [0, 1])
    with pytest.raises(IndexError):
        queue[3]
    study.ask()
    assert [trial.number for trial in queue] == [0, 1, 2] and queue[0].state == states[0]
    assert "fixed_params" in repr(queue)


def test_what_was_read_stays_as_it_was_though_it_is_looked_at_later(
    storage: trialstore.InMemoryStorage,
) -> None:
    study = optuna.create_study(storage=storage)
    study.enqueue_trial({"x": 1})
    read = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    storage.set_trial_user_attr(0, "k", 1)
    assert read[0].user_attrs == {}


def test_the_queue_goes_where_a_list_is_expected(storage: trialstore.InMemoryStorage) -> None:
    study = optuna.create_study(storage=storage)
    study.enqueue_trial({"x": 1})
    read = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    whole = list(read)
    nothing: list[FrozenTrial] = []
    assert read + nothing == nothing + read == read.copy() == whole
    assert pickle.loads(pickle.dumps(read)) == copy.deepcopy(read) == whole
    assert type(copy.deepcopy(read)) is list


@pytest.fixture
def storage() -> trialstore.InMemoryStorage:
    return trialstore.InMemoryStorage()
