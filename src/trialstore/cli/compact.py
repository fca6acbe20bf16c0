"""``trialstore compact``."""

from __future__ import annotations

from typing import Annotated

import typer

from trialstore.cli.output import Exit, Json, Url, command, fail, print_json, stdout
from trialstore.cli.stores import existing_log
from trialstore.compaction import compact as compact_log, trim as trim_log
from trialstore.log import CompactableLog, TrimmableLog

Force = Annotated[
    bool,
    typer.Option("--force", help="Although plain Optuna wrote to it. Stop those workers first."),
]
Trim = Annotated[
    bool,
    typer.Option("--trim", help="In Redis: leave a snapshot only; plain Optuna can't open it."),
]


@command
def compact(
    url: Url, force: Force = False, trim: Trim = False, as_json: Json = False
) -> Exit | None:
    """Let a journal say the same in fewer records; workers of trialstore go on meanwhile."""
    with existing_log(url) as log:
        if not isinstance(log, CompactableLog):
            fail("Only journals can be compacted.")
        if trim:
            if not isinstance(log, TrimmableLog):
                fail("Only a journal in Redis can be trimmed.")
            done = trim_log(log, force=force)
        else:
            done = compact_log(log, force=force)
    if as_json:
        print_json({"n_records": done.n_records, "n_kept": done.n_kept})
    else:
        stdout.print(f"{done.n_records} records became {done.n_kept}.")
    return None
