"""``trialstore info``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trialstore.cli.output import Exit, Json, Url, command, print_json, print_table, stdout
from trialstore.cli.stores import existing_log
from trialstore.stores.describe import describe


@command
def info(url: Url, as_json: Json = False) -> Exit | None:
    """Show what a store is and holds; reads only."""
    with existing_log(url, any_version=True) as log:
        description = describe(log)
    if as_json:
        print_json(description)
        return None
    for name, value in description.items():
        if name in ("studies", "not_shown") or value is None:
            continue
        if isinstance(value, dict):
            parts = [f"{key.replace('_', ' ')} {part}" for key, part in value.items() if part]
            if not parts:
                continue
            value = ", ".join(parts)
        stdout.print(f"{name.replace('_', ' ')}: {value}", markup=False)
    if "not_shown" in description:
        stdout.print(description["not_shown"], markup=False, style="yellow")
    else:
        _print_studies(description["studies"])
    return None


def _print_studies(studies: list[dict[str, Any]]) -> None:
    columns = ("study", "directions", "trials", "states", "best value", "first", "last")
    print_table(
        columns,
        (
            (
                study["name"],
                ", ".join(study["directions"]).lower(),
                str(study["n_trials"]),
                ", ".join(_states(study)),
                "" if study["best_value"] is None else str(study["best_value"]),
                _seconds(study["first_start_at"]),
                _seconds(study["last_complete_at"]),
            )
            for study in studies
        ),
    )


def _states(study: dict[str, Any]) -> Iterator[str]:
    for state, n in study["states"].items():
        beating = f" ({study['n_with_heartbeats']} with heartbeats)"
        yield f"{n} {state}" + (beating if state == "RUNNING" else "")


def _seconds(time: str | None) -> str:
    return "" if time is None else time[:19].replace("T", " ")
