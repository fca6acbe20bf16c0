"""The pages are followed literally, in a fresh folder; the command line's page is complete; the
demonstration demonstrates."""

from __future__ import annotations

import os
from pathlib import Path
import re
import subprocess
import sys

from benchmarks import harness
from benchmarks.__main__ import NAMES
from benchmarks.harness import Report
import pytest
import typer

from trialstore.cli.app import app

pytest.importorskip("pyarrow")

_ROOT = Path(__file__).parent.parent.parent
_DOCS = _ROOT / "docs"
_BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("page", "n_steps_min"),
    [("README.md", 1), ("docs/quickstart.md", 9), ("docs/migration.md", 4)],
)
def test_a_page_followed_literally(page: str, n_steps_min: int, tmp_path: Path) -> None:
    """One Python session for all blocks, and the commands in between as they stand."""
    steps = []
    for language, text in _BLOCK.findall((_ROOT / page).read_text()):
        if language == "python":
            steps.append(text)
            continue
        for line in text.splitlines():
            command = line.removeprefix("$ ")
            if command.startswith("pip "):
                continue
            assert command.startswith("trialstore "), line
            steps.append(f"_run({command!r})\n")
    assert len(steps) >= n_steps_min
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


def test_every_benchmark_is_on_its_page_and_runs_by_its_name() -> None:
    page = (_ROOT / "benchmarks" / "README.md").read_text().partition("## Results")[0]
    listed = re.findall(r"^\| `([a-z_]+)` ", page, re.MULTILINE)
    assert sorted(listed) == sorted(NAMES)
    for name, said in (("grpc_proxy", "--store"), ("grpc_prxy", "no benchmark grpc_prxy")):
        command = [sys.executable, "-m", "benchmarks", name, "--help"]
        ran = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
        assert (ran.returncode == 0) == (name in NAMES)
        assert said in ran.stdout + ran.stderr


def test_a_benchmark_makes_the_folder_it_is_given(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "one"
    with Report("none", harness.parser("").parse_args(["--json", "--folder", str(folder)])):
        assert folder.is_dir()


def test_the_demonstration_kills_a_worker_and_loses_nothing() -> None:
    recipe = (_ROOT / "Makefile").read_text().partition("\ndemo: ")[2].partition("\n\n")[0]
    assert recipe.endswith("python examples/demo.py")
    command = [sys.executable, str(_ROOT / "examples" / "demo.py"), "--trials", "15"]
    ran = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "SIGKILL for worker-1" in ran.stdout
    assert ", 0 of them are lost" in ran.stdout
    assert "plain Optuna reads the same trials" in ran.stdout
