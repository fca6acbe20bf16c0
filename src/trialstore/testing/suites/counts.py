"""Exchanges per trial, counted: the round trips that the design promises."""

from __future__ import annotations

from collections import Counter

import optuna
import pytest

from trialstore.storage import Storage
from trialstore.testing.clock import ManualClock
from trialstore.testing.suites.base import Capabilities, OpenStorage, SuiteBase, count_exchanges


def _objective(trial: optuna.Trial) -> float:
    total = sum(trial.suggest_float(f"x{number}", -1.0, 1.0) for number in range(5))
    trial.set_user_attr("k", total)
    return total


class CountSuite(SuiteBase):
    """Part of ``StorageSuite``."""

    @pytest.fixture
    def still(self, opened: OpenStorage, capabilities: Capabilities) -> Storage:
        """A storage whose linger never ends by itself."""
        return opened(clock=ManualClock()) if capabilities.lingers else opened()

    def _exchanges_per_trial(
        self, storage: Storage, sampler: optuna.samplers.BaseSampler
    ) -> list[int]:
        study = optuna.create_study(storage=storage, sampler=sampler)
        study.optimize(_objective, n_trials=1)
        counter = count_exchanges(storage)
        counts = []
        for _ in range(15):
            counter.reset()
            study.optimize(_objective, n_trials=1)
            counts.append(counter.n_exchanges)
        return counts

    # ``optimize`` itself ends with remove_session(), which has nothing left to flush.

    def test_a_trial_of_random_sampler_takes_four_exchanges(self, still: Storage) -> None:
        counts = self._exchanges_per_trial(still, optuna.samplers.RandomSampler(seed=0))
        assert max(counts) <= 4, Counter(counts)

    def test_a_trial_of_tpe_takes_six_exchanges(self, still: Storage) -> None:
        # Optuna before 5 draws one parameter at a time unless told, and reads all trials for each.
        sampler = optuna.samplers.TPESampler(
            seed=0, n_startup_trials=3, constant_liar=True, multivariate=True
        )
        counts = self._exchanges_per_trial(still, sampler)
        assert max(counts) <= 6, Counter(counts)

    def test_a_trial_of_tpe_without_constant_liar_takes_five_exchanges(
        self, still: Storage
    ) -> None:
        sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=3, constant_liar=False)
        counts = self._exchanges_per_trial(still, sampler)
        assert max(counts) <= 5, Counter(counts)
