"""The pages are followed literally, in a fresh folder; the command line's page is complete."""

from __future__ import annotations

import os
from pathlib import Path
import re
import subprocess
import sys

import pytest
import typer

from trialstore.cli.app import app

pytest.importorskip("pyarrow")

_DOCS = Path(__file__).parent.parent.parent / "docs"
_BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["quickstart", "migration"])
def test_a_page_followed_literally(page: str, tmp_path: Path) -> None:
    """One Python session for all blocks, and the commands in between as they stand."""
    steps = []
    for language, text in _BLOCK.findall((_DOCS / f"{page}.md").read_text()):
        if language == "python":
            steps.append(text)
            continue
        for line in text.splitlines():
            command = line.removeprefix("$ ")
            if command.startswith("pip "):
                continue
            assert command.startswith("trialstore "), line
            steps.append(f"_run({command!r})\n")
    assert len(steps) >= 3
    script = tmp_path / "page.py"
    script.write_text(
        "import shlex, subprocess, sys\n"
        "def _run(command):\n"
        "    arguments = shlex.split(command)[1:]\n"
        "    subprocess.run([sys.executable, '-m', 'trialstore', *arguments], check=True)\n"
        + "\n".join(steps)
    )
    folder = tmp_path / "fresh"
    folder.mkdir()
    ran = subprocess.run(
        [sys.executable, str(script)], cwd=folder, capture_output=True, text=True, env=os.environ
    )
    assert ran.returncode == 0, ran.stderr


def test_every_command_is_on_its_page() -> None:
    text = (_DOCS / "cli.md").read_text()
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    listed = re.findall(r"^\| `([a-z-]+) ", text, re.MULTILINE)
    assert sorted(listed) == sorted(commands)
    for name, command in commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.name == "help" or getattr(parameter, "help", None), (name, parameter)
