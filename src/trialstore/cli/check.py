"""``trialstore check``."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from trialstore.cli.output import (
    Exit,
    Json,
    Url,
    command,
    print_json,
    progress,
    stdout,
)
from trialstore.cli.stores import existing_log
from trialstore.stores.check import check as check_log

Deep = Annotated[
    bool, typer.Option("--deep", help="Also read every page of a SQLite file, every trial.")
]

_STYLES = {"note": "cyan", "warning": "yellow", "error": "red"}


@command
def check(url: Url, deep: Deep = False, as_json: Json = False) -> Exit | None:
    """Look for damage: what, where and how bad; reads only. Exit code 1 if there is any."""
    with (
        existing_log(url, any_version=True) as log,
        progress("Checking", None, quiet=as_json) as advance,
    ):
        report = check_log(log, deep=deep, progress=advance)
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        for finding in report.findings:
            stdout.print(f"[{_STYLES[finding.severity]}]{finding.severity}[/] ", end="")
            stdout.print(f"{finding.kind} at {finding.where}: {finding.message}", markup=False)
        found = ", ".join(f"{n} {name}" for name, n in report.by_severity.items())
        counted = f"{report.n_studies} studies, {report.n_trials} trials"
        if report.n_records:
            counted += f", {report.n_records} records"
        text = f"{found or 'Nothing is wrong'}: {counted}."
        if report.not_counted is not None:
            text = f"{found}. {report.not_counted}"
        stdout.print(text, markup=False)
    return Exit.FINDINGS if report.findings else None
