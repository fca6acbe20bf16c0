"""What all tests share: quiet Optuna, and the options of the command line."""

from __future__ import annotations

from collections.abc import Iterator
import logging

import optuna
import pytest

pytest.register_assert_rewrite("trialstore.testing")
optuna.logging.set_verbosity(optuna.logging.WARNING)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="also run the long tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--soak"):
        return
    for item in items:
        if "soak" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="long; run with --soak"))


@pytest.fixture(autouse=True)
def _quiet_optuna() -> Iterator[None]:
    """A test may turn Optuna's logging up; the next one begins quiet."""
    yield
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(autouse=True)
def _warnings_are_left_on() -> Iterator[None]:
    """Else the tests of warnings that happen to come later in the process would fail."""
    yield
    silenced = []
    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and name.split(".")[0] == "trialstore":
            if logger.disabled or logger.level > logging.WARNING:
                silenced.append(name)
            logger.disabled = False
            logger.setLevel(logging.NOTSET)
    assert not silenced, f"This test silenced {', '.join(silenced)}."
