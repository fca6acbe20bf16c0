"""``trialstore stale``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from trialstore.cli.output import Exit, Json, Study, Url, command, print_json, print_table, stdout
from trialstore.cli.stores import existing_storage

Fail = Annotated[bool, typer.Option("--fail", help="Tell them as FAIL; no retry is queued.")]
Grace = Annotated[
    int,
    typer.Option(
        "--grace-period",
        min=1,
        help="Seconds without a beat that make a trial stale; longer than the workers' interval.",
    ),
]


@command
def stale(
    url: Url,
    study: Study = None,
    fail: Fail = False,
    grace_period: Grace = 120,
    as_json: Json = False,
) -> Exit | None:
    """Show RUNNING trials whose worker is dead: it had heartbeats on, and they stopped.

    Exit code 1 if there are any and they were not failed.
    """
    found: list[dict[str, Any]] = []
    with existing_storage(url) as storage:
        storage.heartbeat_interval = max(1, grace_period // 2)
        storage.grace_period = grace_period
        if study is not None:
            storage.get_study_id_from_name(study)  # or KeyError
        for one in storage.get_all_studies():
            if study is not None and one.study_name != study:
                continue
            if fail:
                ids = storage.fail_stale_trials(one._study_id)
            else:
                ids = storage._get_stale_trial_ids(one._study_id)
            found += [
                {"study": one.study_name, "trial": storage.get_trial_number_from_id(trial_id)}
                for trial_id in ids
            ]
    if as_json:
        print_json({"stale": found, "failed": fail})
    elif not found:
        stdout.print(f"No trial is stale (no beat for {grace_period} s).")
    else:
        print_table(
            ("study", "trial", ""),
            ((one["study"], str(one["trial"]), "failed" if fail else "stale") for one in found),
        )
    return Exit.FINDINGS if found and not fail else None
