"""The list of commands."""

from __future__ import annotations

import typer

from trialstore.cli import (
    bench,
    check,
    compact,
    copy,
    dashboard,
    delete_study,
    export,
    info,
    repair,
    serve,
    stale,
    upgrade,
    watch,
)

_EPILOG = (
    "Exit codes: 0 done, 1 something was found (check, repair, stale, copy --verify), 2 wrong "
    "usage, 3 the store is not there or can't be reached, 4 it is damaged or of another version, "
    "130 interrupted."
)

app = typer.Typer(
    help="Look after stores of Optuna studies. URL is whatever trialstore.get_storage takes: "
    "sqlite:///file.db, postgresql+psycopg://…, mysql+pymysql://…, redis://…, "
    "journal:///path or a path, grpc://host:port.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("info")(info.info)
app.command("check")(check.check)
app.command("repair")(repair.repair)
app.command("copy")(copy.copy)
app.command("export")(export.export)
app.command("import")(export.import_)
app.command("upgrade")(upgrade.upgrade)
app.command("compact")(compact.compact)
app.command("stale")(stale.stale)
app.command("serve")(serve.serve)
app.command("watch")(watch.watch)
app.command("dashboard")(dashboard.dashboard)
app.command("bench")(bench.bench)
app.command("delete-study")(delete_study.delete_study)
