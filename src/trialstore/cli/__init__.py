"""The command ``trialstore``: each command parses, opens, calls the library, and prints.

The commands are in ``app.py``'s list, a file each; what they share is in ``output.py``. Nothing
here knows about studies or trials: whatever a command does, a function of the library does.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line that this process was started with."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(
            f"The command line needs {error.name}: pip install 'trialstore[cli]'.", file=sys.stderr
        )
        sys.exit(2)
    from trialstore.cli.app import app

    app(prog_name="trialstore")
