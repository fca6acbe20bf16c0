"""``trialstore copy``."""

from __future__ import annotations

from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
import typer

from trialstore.cli.output import (
    Exit,
    Json,
    Study,
    command,
    fail,
    print_json,
    print_table,
    progress,
    stdout,
)
from trialstore.cli.stores import any_log, existing_log
from trialstore.stores.transfer import CopiedStudy, copy as copy_studies

Source = Annotated[str, typer.Argument(metavar="SRC", help="From here.", show_default=False)]
Target = Annotated[
    str, typer.Argument(metavar="DST", help="To here; made if not there.", show_default=False)
]
Verify = Annotated[bool, typer.Option("--verify", help="Read both in the end and compare.")]
Zone = Annotated[
    str | None,
    typer.Option(
        "--source-timezone",
        metavar="ZONE",
        help="Where Optuna 4 wrote the source: the zone of its workers, say Europe/Berlin.",
        show_default=False,
    ),
]


@command
def copy(
    source: Source,
    target: Target,
    study: Study = None,
    verify: Verify = False,
    source_timezone: Zone = None,
    as_json: Json = False,
) -> Exit | None:
    """Copy studies from any store to any other; run it again to go on after an interruption.

    Numbers, times, states, values and attributes stay as they are; ids are the target's own.
    Exit code 1 if a verification finds a difference.
    """
    zone = None if source_timezone is None else _zone(source_timezone)
    if source == target:
        fail("SRC and DST are one store.")
    with (
        existing_log(source) as src,
        any_log(target) as dst,
        progress("Copying", None, quiet=as_json) as advance,
    ):
        copied = copy_studies(
            src, dst, study=study, verify=verify, source_timezone=zone, progress=advance
        )
    if as_json:
        print_json([msgspec.to_builtins(one) for one in copied])
    else:
        _print(copied, verify)
    return Exit.FINDINGS if any(one.differences for one in copied) else None


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        fail(f"{name!r} is no time zone; they are called Europe/Berlin, America/New_York, UTC.")


def _print(copied: list[CopiedStudy], verify: bool) -> None:
    print_table(
        ("study", "trials", "new"),
        ((one.name, str(one.n_trials), str(one.n_new)) for one in copied),
    )
    for one in copied:
        if one.whole_seconds:
            stdout.print(
                f"{one.name}: {one.whole_seconds} trials have whole seconds in the target, whose "
                "columns hold no fractions.",
                markup=False,
            )
        for difference in one.differences:
            where = f"trial {difference.number}" if difference.number >= 0 else "the study"
            stdout.print(
                f"{one.name}: {where} differs in {', '.join(difference.fields)}.", markup=False
            )
    if verify and not any(one.differences for one in copied):
        stdout.print("Verified: both are the same.")
