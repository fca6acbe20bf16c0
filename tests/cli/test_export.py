"""``export`` and ``import``: Optuna's columns, and back exactly what was exported."""

from __future__ import annotations

import csv
from datetime import datetime, timedelta, timezone
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

import optuna
import pytest

import stores
from stores import KINDS, Cli, new_url
import trialstore
from trialstore.stores import frames
from trialstore.testing.contents import storage_contents

pa = pytest.importorskip("pyarrow")


def _optunas_columns(study: optuna.Study) -> list[str]:
    """The names that ``trials_dataframe`` gives, from the code that it takes them from."""
    from optuna.study import _dataframe

    attrs: tuple[str, ...] = (
        "number", "value", "datetime_start", "datetime_complete", "duration", "params",
        "user_attrs", "system_attrs", "state",
    )  # fmt: skip
    if len(study.directions) > 1:
        attrs = ("number", "values", *attrs[2:])
    records = _dataframe._create_records_and_aggregate_column(study, attrs)
    return _dataframe._flatten_columns(records[1])


@pytest.fixture
def filled(tmp_path: Path) -> tuple[str, optuna.Study]:
    url = f"sqlite:///{tmp_path}/filled.db"
    study = stores.fill(trialstore.get_storage(url))
    return url, study


@pytest.mark.parametrize("name", ["colours", "colours, several"])
def test_the_columns_are_those_of_optuna(
    name: str, filled: tuple[str, optuna.Study], tmp_path: Path, cli: Cli
) -> None:
    url, study = filled
    if name != "colours":
        study = optuna.load_study(study_name=name, storage=trialstore.get_storage(url))
        study.set_metric_names(["speed", "size"])
    told = cli.json("export", url, "--study", name, "-o", f"{tmp_path}/a.csv")
    assert told["columns"] == _optunas_columns(study)
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["number"]) for row in rows] == [trial.number for trial in study.trials]
    first = study.trials[0]
    assert first.datetime_start is not None
    start = first.datetime_start.astimezone(timezone.utc).isoformat()
    assert rows[0]["datetime_start"] == start
    assert float(rows[0]["params_x"]) == first.params["x"]
    cli.json("export", url, "--study", name, "-o", f"{tmp_path}/a.json")
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["state"] for row in rows] == [trial.state.name for trial in study.trials]


def test_other_programs_can_read_numbers_that_are_not_finite(tmp_path: Path, cli: Cli) -> None:
    url = f"sqlite:///{tmp_path}/filled.db"
    study = optuna.create_study(storage=trialstore.get_storage(url), study_name="odd")
    trial = study.ask()
    trial.set_user_attr("loss", float("nan"))
    trial.set_user_attr("losses", {"all": [1.5, float("-inf")]})
    study.tell(trial, float("inf"))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    cli.json("export", url, "--study", "odd", "-o", f"{tmp_path}/a.json")
    (row,) = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    losses = {"all": [1.5, "-inf"]}
    assert (row["value"], row["user_attrs_loss"], row["user_attrs_losses"]) == (
        "inf",
        "nan",
        losses,
    )
    cli.json("export", url, "--study", "odd", "-o", f"{tmp_path}/a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert json.loads(line["user_attrs_losses"], parse_constant=refuse) == losses
    assert (line["value"], line["user_attrs_loss"]) == ("inf", "nan")


@pytest.mark.parametrize("suffix", ["jsonl", "JSONL", "parquet", "arrow"])
@pytest.mark.parametrize("name", ["colours", "colours, several", "colours, empty"])
def test_what_is_exported_comes_back(
    suffix: str, name: str, filled: tuple[str, optuna.Study], tmp_path: Path, cli: Cli
) -> None:
    url, study = filled
    file = f"{tmp_path}/a.{suffix}"
    odd = study.ask()
    for key, value in {"none": None, "big": 1 << 70, "nan": float("nan"), "list": [1]}.items():
        odd.set_user_attr(key, value)
    odd.set_user_attr("note", 7)  # elsewhere it is text
    odd.report(float("inf"), 3)
    study._storage.flush()  # type: ignore[attr-defined]
    before = storage_contents(study._storage, ids=False)[name]
    assert cli.json("export", url, "--study", name, "-o", file)["n_trials"] == len(
        before["trials"]
    )
    target = f"{tmp_path}/back.journal"
    assert cli.json("import", file, target)["n_new"] == len(before["trials"])
    assert cli.json("import", file, target)["n_new"] == 0
    assert storage_contents(trialstore.get_storage(target), ids=False)[name] == before
    cli.json("import", file, target, "--study", "again")
    assert storage_contents(trialstore.get_storage(target), ids=False)["again"] == before


@pytest.mark.parametrize("kind", KINDS)
def test_from_and_into_every_kind(kind: str, tmp_path: Path, cli: Cli) -> None:
    url, other = new_url(kind, tmp_path), new_url(kind, tmp_path)
    study = stores.fill(trialstore.get_storage(url))
    cli.json("export", url, "--study", "colours", "-o", f"{tmp_path}/a.parquet")
    cli.json("import", f"{tmp_path}/a.parquet", other)
    back = optuna.load_study(study_name="colours", storage=trialstore.get_storage(other))
    assert [trial.params for trial in back.trials] == [trial.params for trial in study.trials]
    table = pa.parquet.read_table(f"{tmp_path}/a.parquet")
    assert table["state"].to_pylist() == [trial.state.name for trial in study.trials]


def test_a_file_that_is_there_is_overwritten_with_force_only(
    filled: tuple[str, optuna.Study], tmp_path: Path, cli: Cli
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("mine")
    command = ["export", filled[0], "--study", "colours", "-o", str(path)]
    refused = cli(*command)
    assert (refused.code, path.read_text()) == (2, "mine")
    assert "--force" in refused.err
    assert cli(*command, "--force").code == 0
    assert path.read_text() != "mine"


@pytest.mark.parametrize(("n_lines", "torn"), [(0, '{"num'), (2, '{"num'), (2, "7")])
def test_a_cut_file_is_named_with_the_line(
    n_lines: int, torn: str, filled: tuple[str, optuna.Study], tmp_path: Path, cli: Cli
) -> None:
    path = tmp_path / "a.jsonl"
    assert cli("export", filled[0], "--study", "colours", "-o", str(path)).code == 0
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:n_lines]) + torn)
    refused = cli("import", str(path), f"{tmp_path}/b.journal")
    assert (refused.code, f"{path}, line {n_lines + 1}" in refused.err) == (2, True), refused


def test_some_columns_only(filled: tuple[str, optuna.Study], tmp_path: Path, cli: Cli) -> None:
    url, _ = filled
    file = f"{tmp_path}/a.parquet"
    some = ["--columns", "params_x,number"]
    cli.json("export", url, "--study", "colours", "-o", file, *some)
    assert pa.parquet.read_table(file).column_names == ["params_x", "number"]
    result = cli("import", file, f"{tmp_path}/b.journal")
    assert result.code == 2
    assert "without --columns" in result.err
    wrong = ["export", url, "--study", "colours", "-o", f"{tmp_path}/b.csv", "--columns", "colour"]
    result = cli(*wrong)
    assert result.code == 2
    assert "params_colour" in result.err
    assert not (tmp_path / "b.csv").exists()


def test_to_arrow(filled: tuple[str, optuna.Study], monkeypatch: pytest.MonkeyPatch) -> None:
    _, study = filled
    trials = study.trials

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a FrozenTrial was built")

    monkeypatch.setattr("trialstore.contents.FrozenTrial", refuse)
    table = trialstore.to_arrow(study)
    assert table.column_names == _columns_known(trials, study)
    assert table["params_x"].to_pylist() == [trial.params.get("x") for trial in trials]
    assert table["value"].to_pylist() == [trial.value for trial in trials]
    assert table["params_n"].type == pa.int64()
    assert trialstore.to_arrow(study, columns=["number"]).column_names == ["number"]
    colours = [
        None if cell is None else json.loads(cell) for cell in table["params_colour"].to_pylist()
    ]
    assert colours == [trial.params.get("colour") for trial in trials]


def _columns_known(trials: list[optuna.trial.FrozenTrial], study: optuna.Study) -> list[str]:
    names = ["number", "value", "datetime_start", "datetime_complete", "duration"]
    for field in ("params", "user_attrs", "system_attrs"):
        keys = {key for trial in trials for key in getattr(trial, field)}
        names += [f"{field}_{key}" for key in sorted(keys)]
    return [*names, "state"]


def test_to_arrow_of_a_study_in_memory_and_of_optunas_own() -> None:
    study = stores.fill(trialstore.InMemoryStorage())
    assert trialstore.to_arrow(study).num_rows == len(study.trials)
    with pytest.raises(TypeError, match="of Optuna's"):
        trialstore.to_arrow(optuna.create_study())


_MOMENT = datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=timezone.utc)
_CELLS: dict[str, list[Any]] = {
    "int": [0, -(1 << 63), (1 << 63) - 1],
    "float": [-0.0, float("nan"), float("-inf"), 5e-324],
    "bool": [True, False, False, True, True, False, True, False, True],
    "str": ["", "a\0b", "\N{GRINNING FACE}", "long" * 9_999],
    "time": [_MOMENT, datetime(9999, 12, 31, tzinfo=timezone.utc)],
    "duration": [timedelta(0), timedelta(microseconds=-1), timedelta(days=9_999)],
}


@pytest.mark.parametrize("kind", _CELLS)
def test_an_array_is_what_pyarrow_makes_of_the_cells(kind: Any) -> None:
    from trialstore.stores import arrow

    for cells in ([], [None], [None, *_CELLS[kind]], [*_CELLS[kind], None] * 7):
        made = arrow._array(frames.Column("a", "number", None, kind), cells)
        made.validate(full=True)
        same = pa.array(cells, arrow._TYPES[kind])
        assert repr(made.to_pylist()) == repr(same.to_pylist())
        assert made.type == same.type and made.null_count == same.null_count


def test_pandas_is_not_imported_for_it(filled: tuple[str, optuna.Study], tmp_path: Path) -> None:
    url, _ = filled
    script = "import sys, trialstore.cli as c; sys.modules['pandas'] = c; c.main()"
    command = ["export", url, "--study", "colours", "-o", f"{tmp_path}/a.parquet"]
    ran = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
