"""``OptunaDatabase``: the studies of one database whose password is a secret in a file.

Names, defaults and environment are those of docktuna's ``optuna_db``, so that its users change
the import line only.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import datetime
import os
from pathlib import Path
import threading
from typing import Any

import optuna
from optuna.study import StudySummary
import sqlalchemy as sa

from trialstore.credentials import Secret
from trialstore.errors import SecretNotFoundError
from trialstore.rdb import RDBStorage

SECRETS_FOLDER = Path("/run/secrets")
PASSWORD_SECRET = "optuna_db_user_password"
_DRIVER = "postgresql+psycopg2"


class OptunaDatabase:
    """A database of studies.

    Args:
        username: Name of the database's user.
        db_password_secret: Name of the file in ``secrets_folder`` that holds the password, which
            may have any characters.
        db_name: Name of the database.
        hostname: Host, or ``host:port``; an IPv6 address in brackets. "" is the local socket.
        driver: SQLAlchemy's name of database and driver: ``postgresql+psycopg2``,
            ``postgresql+psycopg``, ``mysql+pymysql`` …
        secrets_folder: Where secrets are mounted.
        options: For ``RDBStorage``, such as ``heartbeat_interval``.

    Raises:
        ValueError: A name is missing, such as a variable that is not set, or ``hostname`` is none.
    """

    def __init__(
        self,
        username: str,
        db_password_secret: str,
        db_name: str,
        hostname: str,
        *,
        driver: str = _DRIVER,
        secrets_folder: str | Path = SECRETS_FOLDER,
        **options: Any,
    ) -> None:
        names = {"username": username, "db_password_secret": db_password_secret}
        for what, name in {**names, "db_name": db_name, "hostname": hostname}.items():
            if not isinstance(name, str) or (not name and what != "hostname"):
                raise ValueError(f"{what} must be a name, not {name!r}.")
        self._username = username
        self._db_password_secret = db_password_secret
        self._db_name = db_name
        self._hostname = hostname
        self._driver = driver
        self._secrets_folder = Path(secrets_folder)
        self._options = options
        self._storage: RDBStorage | None = None
        self._lock = threading.Lock()
        self._url()

    def __repr__(self) -> str:
        return f"OptunaDatabase({self._url().render_as_string()!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def username(self) -> str:
        """Name of the database's user."""
        return self._username

    @property
    def db_name(self) -> str:
        """Name of the database."""
        return self._db_name

    @property
    def hostname(self) -> str:
        """Host, with its port if it was given one."""
        return self._hostname

    def _url(self) -> sa.URL:
        try:
            place = sa.make_url(f"{self._driver}://{self._hostname}")
        except ValueError:
            raise ValueError(
                "hostname must be a host or host:port, with an IPv6 address in brackets."
            ) from None
        return place.set(username=self._username, database=self._db_name)

    def _secret_file(self, secret_name: str) -> str:
        return str(self._secrets_folder / secret_name)

    def _read_secret(self, secret_name: str) -> str:
        """Raises SecretNotFoundError naming the secret."""
        return Secret(self._secret_file(secret_name)).read()

    @property
    def _db_url(self) -> str:
        """The address with the password in it; not for logs."""
        url = self._url().set(password=self._read_secret(self._db_password_secret))
        return url.render_as_string(hide_password=False)

    @property
    def storage(self) -> RDBStorage:
        """The storage, opened on first use and then kept.

        Raises:
            SecretNotFoundError: The secret is not there.
            LogUnavailableError: The database was not reached, or did not take the password.
        """
        with self._lock:
            if self._storage is None:
                self._storage = RDBStorage(
                    self._url().render_as_string(),
                    password_file=self._secret_file(self._db_password_secret),
                    **self._options,
                )
            return self._storage

    @property
    def study_summaries(self) -> list[StudySummary]:
        """A summary of every study, by id, by SQL."""
        return self.storage.get_all_study_summaries()

    @property
    def num_existing_studies(self) -> int:
        """Number of studies."""
        return len(self.storage.get_all_studies())

    def _study_id(self, study_name: str) -> int | None:
        try:
            return self.storage.get_study_id_from_name(study_name)
        except KeyError:
            return None

    def is_in_db(self, study_name: str) -> bool:
        """Whether there is a study of that name."""
        return self._study_id(study_name) is not None

    def get_study_summary(self, study_name: str) -> StudySummary:
        """The summary of one study. Raises StopIteration if there is none of that name."""
        try:
            return self.storage.get_study_summary(study_name)
        except KeyError:
            raise StopIteration(f"There is no study with the name {study_name!r}.") from None

    def get_best_params(self, study_name: str) -> dict[str, Any]:
        """Parameters of the best trial; empty without a COMPLETE trial or with several objectives.

        Raises StopIteration if there is no study of that name.
        """
        study_id = self._study_id(study_name)
        if study_id is None:
            raise StopIteration(f"There is no study with the name {study_name!r}.")
        try:
            return dict(self.storage.get_best_trial(study_id).params)
        except (ValueError, RuntimeError):
            return {}

    def get_study(self, study_name: str) -> optuna.Study:
        """The study of that name, created if it does not exist."""
        with _only_warnings():
            return optuna.create_study(
                study_name=study_name, storage=self.storage, load_if_exists=True
            )

    def get_all_studies(self) -> list[optuna.Study]:
        """Every study, by id."""
        with _only_warnings():
            return [
                optuna.load_study(study_name=study.study_name, storage=self.storage)
                for study in self.storage.get_all_studies()
            ]

    @staticmethod
    def get_last_update_time(study: optuna.Study) -> datetime.datetime:
        """When the last trial ended, as naive local time; the first of January of year 1 if
        none has."""
        ends = (trial.datetime_complete for trial in study.get_trials(deepcopy=False))
        return max(filter(None, ends), default=datetime.datetime(1, 1, 1))

    def get_latest_study(self) -> optuna.Study | None:
        """The study whose last trial ended last, by SQL; None if there is no study."""
        name = self.storage.get_latest_study_name()
        if name is None:
            return None
        with _only_warnings():
            return optuna.load_study(study_name=name, storage=self.storage)


@contextlib.contextmanager
def _only_warnings() -> Iterator[None]:
    """Optuna says at INFO of every study whether it was found or made."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


# --- the one instance of a process ---------------------------------------------------------------

_instance: OptunaDatabase | None = None
_opened_with: dict[str, Any] = {}
_instance_lock = threading.Lock()


def default_env_file() -> Path:
    """Where the environment of ``get_optuna_db`` is looked for."""
    return Path.home() / "project" / "docker" / "optuna_db" / "optuna_db.env"


def get_optuna_db(
    *,
    env_file: str | Path | None = None,
    secrets_folder: str | Path = SECRETS_FOLDER,
    driver: str = _DRIVER,
    **options: Any,
) -> OptunaDatabase:
    """The database of this process, opened by the first call; later ones return the same.

    ``OPTUNA_DB_USER``, ``OPTUNA_DB_NAME`` and ``OPTUNA_DB_HOST`` name it, in the environment or
    in a file; the password is the secret ``optuna_db_user_password``.

    Args:
        env_file: ``NAME=value`` lines for what the environment does not have; by default
            ``~/project/docker/optuna_db/optuna_db.env``, which need not exist.
        secrets_folder: Where secrets are mounted.
        driver: As for ``OptunaDatabase``.
        options: For ``RDBStorage``.

    Raises:
        RuntimeError: The database could not be opened; the next call tries again. The message
            names what is missing, and no password.
        ValueError: An argument is given that the first call had otherwise.
    """
    global _instance, _opened_with
    defaults = {"env_file": None, "secrets_folder": SECRETS_FOLDER, "driver": _DRIVER}
    asked = {
        "env_file": None if env_file is None else Path(env_file),
        "secrets_folder": Path(secrets_folder),
        "driver": driver,
        **options,
    }
    with _instance_lock:
        if _instance is not None:
            for name, value in asked.items():
                if value != defaults.get(name) and value != _opened_with.get(name):
                    raise ValueError(
                        f"The database of this process was opened with another {name}; open one "
                        "of your own with OptunaDatabase(...), or leave the argument out."
                    )
        if _instance is None:
            try:
                _load_environment(env_file)
                database = OptunaDatabase(
                    _variable("OPTUNA_DB_USER"),
                    PASSWORD_SECRET,
                    _variable("OPTUNA_DB_NAME"),
                    _variable("OPTUNA_DB_HOST"),
                    driver=driver,
                    secrets_folder=secrets_folder,
                    **options,
                )
                _ = database.storage
            except Exception as error:
                raise RuntimeError(f"Failed to open Optuna's database: {error}") from error
            _instance, _opened_with = database, asked
        return _instance


def _load_environment(env_file: str | Path | None) -> None:
    path = default_env_file() if env_file is None else Path(env_file)
    if not path.is_file():
        if env_file is not None:
            raise SecretNotFoundError(f"There is no environment file {str(path)!r}.")
        return
    try:
        from dotenv import load_dotenv
    except ImportError as error:
        raise ImportError(
            f"Reading {str(path)!r} needs python-dotenv: pip install 'trialstore[postgres]'."
        ) from error
    try:
        load_dotenv(path)
    except UnicodeDecodeError:
        raise SecretNotFoundError(f"The environment file {str(path)!r} is no UTF-8.") from None


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise SecretNotFoundError(f"The environment variable {name} is not set.")
    return value
