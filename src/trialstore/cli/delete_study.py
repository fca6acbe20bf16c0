"""``trialstore delete-study``."""

from __future__ import annotations

from typing import Annotated

import typer

from trialstore.cli.output import Exit, Json, Url, command, fail, print_json, stderr, stdout
from trialstore.cli.stores import existing_storage

Name = Annotated[str, typer.Argument(metavar="NAME", help="The study.", show_default=False)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@command
def delete_study(url: Url, name: Name, yes: Yes = False, as_json: Json = False) -> Exit | None:
    """Delete a study and all of its trials, for good."""
    with existing_storage(url) as storage:
        study_id = storage.get_study_id_from_name(name)
        n_trials = storage.get_n_trials(study_id)
        if not yes:
            if as_json:
                fail("With --json nobody can be asked; pass --yes.")
            if not typer.confirm(f"Delete study {name!r} with {n_trials} trials?", err=True):
                stderr.print("Nothing was deleted.")
                return Exit.INTERRUPTED
        storage.delete_study(study_id)
    if as_json:
        print_json({"deleted": name, "n_trials": n_trials})
    else:
        stdout.print(f"Deleted study {name!r} with {n_trials} trials.", markup=False)
    return None
