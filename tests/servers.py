"""Private servers for tests: PostgreSQL, MariaDB and Redis, each in a folder and on a port of its
own, started from the binaries on the machine, ended by their own process id.

Where a binary is missing the test is skipped, or fails if ``TRIALSTORE_REQUIRE_SERVERS=1``.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
import contextlib
import ctypes
import functools
import os
from pathlib import Path
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from typing import Any

import pytest
import sqlalchemy as sa

from trialstore.testing.proxy import CountingProxy

_READY_S = 180.0
_dice = random.SystemRandom()  # a test that seeds the other would have two processes agree

SECRETIVE = "secretive"
"""Name of a database user that gets in by password only; see ``let_in``."""


@contextlib.contextmanager
def proxied(url: str) -> Iterator[tuple[CountingProxy, str]]:
    """What counts and cuts the messages to a server, and the URL that leads through it."""
    server = sa.make_url(url)
    assert server.host is not None and server.port is not None
    with CountingProxy(server.host, server.port) as proxy:
        through = server.set(host=proxy.host, port=proxy.port)
        yield proxy, through.render_as_string(hide_password=False)


def find_binary(*names: str) -> str:
    """The path of the first of ``names`` that exists; else skip or fail the test."""
    for name in names:
        found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
        if found:
            return found
        for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True):
            return str(path)
    reason = f"none of {', '.join(names)} is installed"
    if os.environ.get("TRIALSTORE_REQUIRE_SERVERS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def free_port() -> int:
    """A port that nobody is given before a server listens on it, nor while that one is down: not
    one of the ephemeral ones, which outgoing connections and other tests' servers get."""
    while True:
        port = _dice.randrange(16_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def die_with_parent() -> None:
    """A test process that is killed runs no ``atexit``; the kernel ends its servers (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


class Server:
    """One server process. ``kill`` is SIGKILL; ``start`` after it runs on the same data."""

    user = "root"

    def __init__(self) -> None:
        _ = self._owner
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix=f"trialstore-{type(self).__name__.lower()}-"))
        self.process: subprocess.Popen[bytes] | None = None
        self._account = None
        if os.getuid() == 0:
            # PostgreSQL refuses to run as root; MariaDB wants to be asked for it.
            for name in ("postgres", "mysql", "nobody"):
                with contextlib.suppress(KeyError):
                    self._account = pwd.getpwnam(name)
                    break
        if self._account is not None:
            os.chown(self.folder, self._account.pw_uid, self._account.pw_gid)
        atexit.register(self.remove)
        self.initialize()
        self.start()

    def run(self, *command: str) -> None:
        """A short command as the server's user."""
        subprocess.run(
            command, check=True, capture_output=True, cwd=self.folder, **self._as_user()
        )

    def _as_user(self) -> dict[str, Any]:
        if self._account is None:
            return {}
        environment = {**os.environ, "HOME": str(self.folder), "LC_ALL": "C.UTF-8"}
        return {
            "user": self._account.pw_uid,
            "group": self._account.pw_gid,
            "extra_groups": [],
            "env": environment,
        }

    def initialize(self) -> None:
        """Create the data folder."""

    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        """Whether a client gets an answer."""
        raise NotImplementedError

    def start(self) -> None:
        n_before = self._launch()
        give_up_at = time.monotonic() + _READY_S
        while not self.answers():
            assert self.process is not None
            is_over = self.process.poll() is not None
            if is_over or time.monotonic() > give_up_at:
                said = (self.folder / "log").read_bytes()[n_before:].decode(errors="replace")
                # PostgreSQL's backends outlive their killed parent for a moment.
                if not (is_over and "shared memory block" in said):
                    raise RuntimeError(f"{type(self).__name__} did not start:\n{said[-2000:]}")
                n_before = self._launch()
            time.sleep(0.05)

    def _launch(self) -> int:
        """Returns how many bytes were in its log before."""
        with (self.folder / "log").open("ab") as log:
            n_before = log.tell()
            self.process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=die_with_parent,
                **self._as_user(),
            )
        return n_before

    def stop(self) -> None:
        """End in an orderly way."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL the server's process and its children, as an out-of-memory killer does."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return
        if how is signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
        else:
            process.send_signal(how)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def remove(self) -> None:
        if self._owner == os.getpid():
            self._end(signal.SIGKILL)
            shutil.rmtree(self.folder, ignore_errors=True)

    @functools.cached_property
    def _owner(self) -> int:
        return os.getpid()


class PostgreSQLServer(Server):
    def initialize(self) -> None:
        self.run(
            find_binary("initdb"), "-D", "data", "-U", "optuna", "--auth=trust", "-E", "UTF8",
            "--locale=C", "--no-sync",
        )  # fmt: skip
        # Whoever asks for it has to know a password; the tests' own user is trusted.
        rules = self.folder / "data" / "pg_hba.conf"
        rules.write_text(f"host all {SECRETIVE} 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")

    def command(self) -> list[str]:
        options = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.folder),
            "max_connections": 200,
            "shared_buffers": "64MB",
            # Processes are killed here, the machine is not. Recovery after a kill reads what was
            # written since the last checkpoint, and every CREATE DATABASE writes a lot.
            "fsync": "off",
            "max_wal_size": "64MB",
            "checkpoint_timeout": "30s",
        }
        flags = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        return [find_binary("postgres"), "-D", str(self.folder / "data"), *flags]

    def answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self._dsn("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _dsn(self, database: str) -> str:
        return f"host=127.0.0.1 port={self.port} user=optuna password=s3cret dbname={database}"

    def let_in(self, password: str) -> None:
        """Make the user whose password is looked at."""
        import psycopg
        from psycopg import sql

        with psycopg.connect(self._dsn("postgres"), autocommit=True) as connection:
            with contextlib.suppress(psycopg.errors.DuplicateObject):
                connection.execute(f"CREATE ROLE {SECRETIVE} LOGIN SUPERUSER")
            connection.execute(
                sql.SQL("ALTER ROLE {} PASSWORD {}").format(
                    sql.Identifier(SECRETIVE), sql.Literal(password)
                )
            )

    def new_database(self, driver: str = "psycopg") -> str:
        """URL of a new empty database."""
        import psycopg

        name = f"d{os.getpid()}_{_serial()}"
        with psycopg.connect(self._dsn("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+{driver}://optuna:s3cret@127.0.0.1:{self.port}/{name}"


class MariaDBServer(Server):
    def initialize(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self._install()
            return
        # On a busy machine it may give up on itself; it begins anew.
        shutil.rmtree(self.folder / "data", ignore_errors=True)
        self._install()

    def _install(self) -> None:
        self.run(
            find_binary("mariadb-install-db", "mysql_install_db"),
            "--no-defaults", f"--datadir={self.folder}/data",
            "--auth-root-authentication-method=normal", "--skip-test-db",
        )  # fmt: skip

    def command(self) -> list[str]:
        return [
            find_binary("mariadbd", "mysqld"),
            "--no-defaults",
            f"--datadir={self.folder}/data",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            f"--socket={self.folder}/s",
            f"--pid-file={self.folder}/pid",
            "--skip-name-resolve",
            "--innodb-buffer-pool-size=64M",
            "--character-set-server=utf8mb4",
            "--max-connections=200",
        ]

    def _connect(self) -> Any:
        import pymysql

        return pymysql.connect(host="127.0.0.1", port=self.port, user="root", connect_timeout=5)

    def answers(self) -> bool:
        import pymysql

        try:
            connection = self._connect()
        except (pymysql.err.OperationalError, OSError):
            return False
        with connection.cursor() as cursor:
            cursor.execute("CREATE USER IF NOT EXISTS optuna@'127.0.0.1' IDENTIFIED BY 's3cret'")
            cursor.execute("GRANT ALL ON *.* TO optuna@'127.0.0.1'")
        connection.close()
        return True

    def let_in(self, password: str) -> None:
        """Make the user whose password is looked at."""
        with self._connect() as connection, connection.cursor() as cursor:
            cursor.execute(
                f"CREATE OR REPLACE USER {SECRETIVE}@'127.0.0.1' IDENTIFIED BY %s", (password,)
            )
            cursor.execute(f"GRANT ALL ON *.* TO {SECRETIVE}@'127.0.0.1'")

    def new_database(self, driver: str = "pymysql") -> str:
        """URL of a new empty database."""
        name = f"d{os.getpid()}_{_serial()}"
        connection = self._connect()
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name}")
        connection.close()
        return f"mysql+{driver}://optuna:s3cret@127.0.0.1:{self.port}/{name}"


class RedisServer(Server):
    """Standalone, every write on disk before its answer."""

    def command(self) -> list[str]:
        return [
            find_binary("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1",
            "--dir", str(self.folder), "--appendonly", "yes", "--appendfsync", "always",
            "--save", "",
        ]  # fmt: skip

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"


_serials = iter(range(1, 1_000_000))
_shared: dict[tuple[int, type[Server]], Server] = {}


def _serial() -> int:
    return next(_serials)


def _of_this_process(kind: type[Server]) -> Server:
    key = (os.getpid(), kind)
    if key not in _shared:
        _shared[key] = kind()
    server = _shared[key]
    if server.process is None:
        server.start()
    return server


def shared_postgresql() -> PostgreSQLServer:
    """The session's server, started on first use, up again if a test has killed it."""
    find_binary("postgres")
    server = _of_this_process(PostgreSQLServer)
    assert isinstance(server, PostgreSQLServer)
    return server


def shared_mariadb() -> MariaDBServer:
    find_binary("mariadbd", "mysqld")
    server = _of_this_process(MariaDBServer)
    assert isinstance(server, MariaDBServer)
    return server


def shared_redis() -> RedisServer:
    find_binary("redis-server")
    server = _of_this_process(RedisServer)
    assert isinstance(server, RedisServer)
    return server


def new_database(kind: str, folder: Path) -> str:
    """URL of a new empty database: ``sqlite``, ``memory``, or the name of a server's driver."""
    makers: dict[str, Callable[[], str]] = {
        "sqlite": lambda: f"sqlite:///{folder}/{_serial()}.db",
        "memory": lambda: "sqlite:///:memory:",
        "psycopg": lambda: shared_postgresql().new_database("psycopg"),
        "psycopg2": lambda: shared_postgresql().new_database("psycopg2"),
        "pymysql": lambda: shared_mariadb().new_database("pymysql"),
    }
    return makers[kind]()
