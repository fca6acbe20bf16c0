"""``trialstore export`` and ``trialstore import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from trialstore.cli.output import (
    Exit,
    Json,
    Url,
    command,
    fail,
    print_json,
    progress,
    stdout,
)
from trialstore.cli.stores import any_log, existing_log
from trialstore.scan import Scan
from trialstore.stores import files
from trialstore.stores.frames import Frame
from trialstore.stores.transfer import receive

Name = Annotated[str, typer.Option("--study", metavar="NAME", help="Which one.")]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", help=f"The ending decides: {', '.join(files.FORMATS)}."),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="A,B",
        help="These only, named as trials_dataframe names them: number,value,params_x.",
    ),
]
File = Annotated[
    Path, typer.Argument(metavar="FILE", help="jsonl, parquet or arrow, as export wrote it.")
]
NewName = Annotated[str | None, typer.Option("--study", metavar="NAME", help="Call the study so.")]


@command
def export(
    url: Url,
    study: Name,
    output: Output,
    columns: Columns = None,
    force: Force = False,
    as_json: Json = False,
) -> Exit | None:
    """Write the trials of a study to a file, with the columns of Optuna's trials_dataframe.

    jsonl, parquet and arrow hold everything, and can be imported again.
    """
    kind = files.kind_of(output)
    if kind not in files.FORMATS:
        fail(f"The ending of {output} is none of {', '.join(files.FORMATS)}.")
    if output.exists() and not force:
        raise FileExistsError(f"{output} exists already; --force overwrites it.")
    with existing_log(url) as log:
        scan = Scan(log)
        found = [one for one in scan.studies if one.study_name == study]
        if not found:
            raise KeyError(f"There is no study with the name {study!r}.")
        names = None if columns is None else columns.split(",")
        frame = Frame(scan, found[0], names, whole=kind not in ("csv", "json"))
        with progress("Exporting", frame.n_trials, quiet=as_json) as advance:
            files.write(frame, output, kind, advance)
    if as_json:
        print_json(
            {
                "file": str(output),
                "n_trials": frame.n_trials,
                "columns": [column.name for column in frame.columns],
            }
        )
    else:
        stdout.print(f"{output}: {frame.n_trials} trials.", markup=False)
    return None


@command
def import_(file: File, url: Url, study: NewName = None, as_json: Json = False) -> Exit | None:
    """Bring back into a store what export wrote; run it again to go on after an interruption."""
    image, trials = files.read(file, study)
    with any_log(url) as log, progress("Importing", None, quiet=as_json) as advance:
        received = receive(log, image, trials, progress=advance)
    if as_json:
        print_json(msgspec.to_builtins(received))
    else:
        text = f"{received.name}: {received.n_trials} trials, {received.n_new} of them new."
        stdout.print(text, markup=False)
    return None
