"""Private Redis servers beyond ``servers.RedisServer``: with options, as a cluster, with TLS, and
behind Sentinel. Each test takes a prefix of its own rather than a server of its own."""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path
import socket
import ssl
import time

from servers import RedisServer, Server, find_binary, free_port

_READY_S = 60.0
_SLOTS = 16384
_prefixes = itertools.count()


def new_prefix(pattern: str = "p%d") -> str:
    """A prefix that no other test uses."""
    return pattern % (os.getpid() * 10_000 + next(_prefixes))


class OptionsServer(RedisServer):
    """A server with more options; later ones win.

    Args:
        options: As on the command line, ``"--maxmemory", "1mb"``.
    """

    def __init__(self, *options: str) -> None:
        self._options = options
        super().__init__()

    def command(self) -> list[str]:
        return [*super().command(), *self._options]

    def answers(self) -> bool:
        if "--requirepass" not in self._options:
            return super().answers()
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5):
                return True
        except OSError:
            return False


class ClusterNode(OptionsServer):
    def __init__(self, *options: str) -> None:
        # By default the nodes talk on the port plus 10,000, which may not exist.
        self.bus_port = free_port()
        # A busy machine or disk holds a node up for seconds; it is not to be taken for dead then.
        super().__init__(
            "--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf",
            "--cluster-node-timeout", "60000", "--cluster-port", str(self.bus_port),
            *options,
        )  # fmt: skip


class RedisCluster:
    """Three masters without replicas, which share the slots."""

    def __init__(self) -> None:
        import redis

        self.nodes = [ClusterNode() for _ in range(3)]
        clients = [redis.Redis(port=node.port) for node in self.nodes]
        share = _SLOTS // len(clients) + 1
        for index, client in enumerate(clients):
            first = index * share
            end = min(first + share, _SLOTS)
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
        first_node = self.nodes[0]
        for client in clients[1:]:
            client.execute_command(
                "CLUSTER", "MEET", "127.0.0.1", first_node.port, first_node.bus_port
            )
        self.wait()

    def wait(self) -> None:
        """Until every node says that the cluster works, and knows the others."""
        import redis

        give_up_at = time.monotonic() + _READY_S
        for node in self.nodes:
            client = redis.Redis(port=node.port)
            while True:
                info = client.execute_command("CLUSTER", "INFO")
                if b"cluster_state:ok" in info and b"cluster_known_nodes:3" in info:
                    break
                if time.monotonic() > give_up_at:
                    raise RuntimeError(f"The cluster is not ready: {info}")
                time.sleep(0.05)
            client.close()

    @property
    def url(self) -> str:
        return self.nodes[0].url


class TLSServer(Server):
    """Speaks TLS only, and wants a password."""

    password = "s3cret/#"

    def initialize(self) -> None:
        find_binary("redis-server")
        self.run(
            find_binary("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            "-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
        )  # fmt: skip

    @property
    def certificate(self) -> Path:
        return self.folder / "cert.pem"

    def command(self) -> list[str]:
        _ = self._owner
        return [
            find_binary("redis-server"), "--port", "0", "--tls-port", str(self.port),
            "--bind", "127.0.0.1", "--dir", str(self.folder),
            "--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem",
            "--tls-ca-cert-file", "cert.pem", "--tls-auth-clients", "no",
            "--requirepass", self.password,
            "--appendonly", "yes", "--appendfsync", "always", "--save", "",
        ]  # fmt: skip

    def answers(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.certificate))
        try:
            with (
                socket.create_connection(("127.0.0.1", self.port), timeout=5) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as connection,
            ):
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"-NOAUTH")
        except OSError:
            return False


class Sentinel(RedisServer):
    """Watches one master under the name ``journals``.

    Args:
        master: To watch.
        password: The master's.
    """

    def __init__(self, master: RedisServer, password: str | None = None) -> None:
        self._master = master
        self._password = password
        super().__init__()

    def initialize(self) -> None:
        config = self.folder / "sentinel.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
            f"sentinel monitor journals 127.0.0.1 {self._master.port} 1\n"
            + (f'sentinel auth-pass journals "{self._password}"\n' if self._password else "")
        )
        if self._account is not None:
            os.chown(config, self._account.pw_uid, self._account.pw_gid)

    def command(self) -> list[str]:
        _ = self._owner
        return [find_binary("redis-server"), str(self.folder / "sentinel.conf"), "--sentinel"]


@functools.cache
def _cluster_of(pid: int) -> RedisCluster:
    return RedisCluster()


def shared_cluster() -> RedisCluster:
    """The session's cluster, started on first use, up again if a test has killed nodes."""
    find_binary("redis-server")
    cluster = _cluster_of(os.getpid())
    dead = [node for node in cluster.nodes if node.process is None]
    for node in dead:
        node.start()
    if dead:
        cluster.wait()
    return cluster
