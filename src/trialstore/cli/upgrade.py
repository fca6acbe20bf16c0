"""``trialstore upgrade``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from trialstore.cli.output import Exit, Json, Url, command, print_json, stdout
from trialstore.cli.stores import existing_log
from trialstore.log import Versioned

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


@command
def upgrade(url: Url, dry_run: DryRun = False, as_json: Json = False) -> Exit | None:
    """Bring tables to the latest schema version. Make a backup and stop all workers first."""
    with existing_log(url, any_version=True) as log:
        if not isinstance(log, Versioned):
            document: dict[str, Any] = {"from": None, "to": None, "upgraded": False}
            text = "Nothing to do: this kind of store has one version only."
        else:
            before, head = log.get_current_version(), log.get_head_version()
            document = {"from": before, "to": head, "upgraded": before != head and not dry_run}
            if before == head:
                text = f"Nothing to do: the tables are of version {head}."
            elif dry_run:
                text = f"The tables would be brought from version {before} to {head}."
            else:
                log.upgrade()
                text = f"Upgraded from version {before} to {head}."
    if as_json:
        print_json(document)
    else:
        stdout.print(text, markup=False)
    return None
