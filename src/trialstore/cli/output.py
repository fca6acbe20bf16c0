"""What all commands share: arguments, exit codes, one JSON document, progress that vanishes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import enum
import functools
import io
import json
import os
import sys
from typing import Annotated, Any, NoReturn, ParamSpec

from optuna.exceptions import DuplicatedStudyError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
import typer

from trialstore.errors import (
    IncompatibleSchemaError,
    LogCorruptError,
    LogUnavailableError,
    OutcomeUnknownError,
)

_P = ParamSpec("_P")


class Exit(enum.IntEnum):
    """Exit codes of every command."""

    DONE = 0
    FINDINGS = 1
    USAGE = 2
    UNAVAILABLE = 3
    DAMAGED = 4
    INTERRUPTED = 130


Url = Annotated[str, typer.Argument(metavar="URL", help="The store.", show_default=False)]
Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]
Study = Annotated[str | None, typer.Option("--study", metavar="NAME", help="This study only.")]


class _Stdout(Console):
    """Its reader may leave early (``| head -1``); the exit code is what it would be without."""

    def on_broken_pipe(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


# Who reads a pipe or a file wants nothing wrapped or cut off. None: it was closed (``>&-``).
_WIDTH = None if sys.stdout is not None and sys.stdout.isatty() else 10_000
stdout = _Stdout(soft_wrap=True, highlight=False, width=_WIDTH)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)

# What a user can do something about, in a sentence and without a traceback.
_EXITS: tuple[tuple[type[BaseException], Exit], ...] = (
    (LogUnavailableError, Exit.UNAVAILABLE),
    (OutcomeUnknownError, Exit.UNAVAILABLE),
    (LogCorruptError, Exit.DAMAGED),
    (IncompatibleSchemaError, Exit.DAMAGED),
    (DuplicatedStudyError, Exit.USAGE),
    (FileExistsError, Exit.USAGE),
    (ImportError, Exit.USAGE),
    (KeyError, Exit.USAGE),
    (ValueError, Exit.USAGE),
    (OSError, Exit.UNAVAILABLE),
    (KeyboardInterrupt, Exit.INTERRUPTED),
    (typer.Abort, Exit.INTERRUPTED),
)


def command(run: Callable[_P, Exit | None]) -> Callable[_P, None]:
    """A command that returns its exit code, and whose errors are sentences."""

    @functools.wraps(run)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> None:
        as_json = bool(kwargs.get("as_json"))
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names that the locale lacks
        try:
            code = run(*args, **kwargs)
        except BaseException as error:
            # Optuna's optimize may fail over an interrupt with an error of its own.
            if isinstance(error.__context__, KeyboardInterrupt):
                error = error.__context__
            code = next((code for kind, code in _EXITS if isinstance(error, kind)), None)
            if code is None:
                raise
            _explain(error, as_json)
        raise typer.Exit(int(code or Exit.DONE))

    return wrapped


def _explain(error: BaseException, as_json: bool) -> None:
    text = str(error)
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    elif isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}."
    elif isinstance(error, KeyboardInterrupt | typer.Abort):
        text = "Interrupted."
    if as_json:
        with contextlib.suppress(OSError):
            print_json({"error": text, "type": type(error).__name__})
            return
    stderr.print(text, markup=False, style="red")


def print_json(document: Any) -> None:
    """The one document of ``--json``; text that is no Unicode is escaped."""
    try:
        print(json.dumps(document, indent=2), flush=True)
    except BrokenPipeError:
        stdout.on_broken_pipe()


def fail(text: str) -> NoReturn:
    """Wrong usage."""
    raise ValueError(text)


@contextlib.contextmanager
def progress(what: str, total: int | None, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr while something long runs; yields what says how far it is."""
    if quiet or not stderr.is_terminal:
        yield lambda n: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.update(task, completed=n)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns; what is too wide for the terminal is folded, so nothing is cut off."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    stdout.print(table)
