"""``trialstore serve``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from trialstore.cli.output import Exit, Port, Url, command
from trialstore.cli.stores import existing_storage

Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Certificate = Annotated[
    Path | None, typer.Option("--certificate", help="PEM certificate; with --key, TLS.")
]
Key = Annotated[Path | None, typer.Option("--key", help="Its private key.")]
ClientCa = Annotated[
    Path | None, typer.Option("--client-ca", help="Clients need a certificate signed by these.")
]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", help="Clients must show the token in it."),
]
Insecure = Annotated[
    bool,
    typer.Option("--allow-insecure", help="Let strangers in: neither TLS nor token."),
]

Create = Annotated[bool, typer.Option("--create", help="Make the store if it is not there.")]


@command
def serve(
    url: Url,
    host: Host = "localhost",
    port: Port = 13000,
    certificate: Certificate = None,
    key: Key = None,
    client_ca: ClientCa = None,
    token_file: TokenFile = None,
    allow_insecure: Insecure = False,
    create: Create = False,
) -> Exit | None:
    """Serve a store over gRPC, to GrpcStorageProxy of trialstore and of Optuna.

    The token may also be in the environment, as TRIALSTORE_GRPC_TOKEN. SIGTERM and Ctrl-C let
    running calls end.
    """
    from trialstore.grpc import run_grpc_proxy_server

    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("trialstore.grpc").setLevel(logging.INFO)
    # One in memory is never there before.
    with existing_storage(url, create=create or url.startswith("memory:")) as storage:
        try:
            run_grpc_proxy_server(
                storage,
                host=host,
                port=port,
                certificate_file=_path(certificate),
                key_file=_path(key),
                client_ca_file=_path(client_ca),
                token_file=_path(token_file),
                allow_insecure=allow_insecure,
            )
        except ValueError as error:
            raise ValueError(_in_options(str(error))) from error
        except RuntimeError as error:
            raise OSError(f"{host}:{port} can't be listened on: {error}") from error
    return None


def _in_options(text: str) -> str:
    """A refusal of ``run_grpc_proxy_server``, whose arguments are options here."""
    for argument, option in (
        ("client_ca_file", "--client-ca"),
        ("certificate_file", "--certificate"),
        ("key_file", "--key"),
        ("token_file", "--token-file"),
        ("allow_insecure=True", "--allow-insecure"),
    ):
        text = text.replace(argument, option)
    return text


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)
