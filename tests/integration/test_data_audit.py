"""`tsmoe data audit` as a user calls it, without a process of its own."""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsmoe.commands import data
from tsmoe.errors import ConfigError, DataError


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    data.add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *argv])
    return args.run(args)


def walk(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=length).cumsum().astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus that holds a scaled part of one of two evaluation tables."""
    folder = tmp_path_factory.mktemp("audit")
    leaked = pa.table({"date": np.arange(1_000) + 10**9, "load [red]": walk(1_000, 0)})
    pq.write_table(leaked, folder / "leaked.parquet")
    pq.write_table(pa.table({"load": walk(1_000, 1)}), folder / "apart.parquet")
    series = [walk(800, 2), 5 * leaked["load [red]"].to_numpy()[200:700] - 3]
    table = {"item_id": ["own", "taken"], "target": [values.tolist() for values in series]}
    pq.write_table(pa.table(table), folder / "series.parquet")
    (folder / "corpus.yaml").write_text("sources: [{type: parquet, path: series.parquet}]\n")
    corpus = str(folder / "corpus")
    assert run("build", str(folder / "corpus.yaml"), "--out", corpus, "--processes", "1") == 0
    return folder


def test_clean_corpus_exits_with_0(folder, capsys) -> None:
    assert run("audit", str(folder / "corpus"), "--against", str(folder / "apart.parquet")) == 0
    shown = capsys.readouterr().out
    assert "none of 16 windows is in the corpus" in shown
    assert "2 series, 1,300 points" in shown


def test_overlap_exits_with_3_and_is_shown(folder, capsys) -> None:
    files = [str(folder / name) for name in ("apart.parquet", "leaked.parquet")]
    assert run("audit", str(folder / "corpus"), "--against", *files) == DataError.exit_code == 3
    shown = capsys.readouterr().out
    assert "6 of 32 windows are in the corpus" in shown
    (line,) = [line for line in shown.splitlines() if "taken" in line]
    for cell in ("leaked.parquet", "load [red]", "201", "500", "series", "5 * table -3"):
        assert cell in line


@pytest.mark.parametrize("to_file", [False, True])
def test_json_holds_everything(folder, tmp_path, capsys, to_file) -> None:
    out = tmp_path / "audit.json"
    where = [str(out)] if to_file else []
    leaked = str(folder / "leaked.parquet")
    assert run("audit", str(folder / "corpus"), "--against", leaked, "--json", *where) == 3
    shown = capsys.readouterr().out
    document = json.loads(out.read_text() if to_file else shown)
    assert document["clean"] is False
    (table,) = document["tables"]
    assert (table["variates"], table["windows"], table["found"]) == (1, 16, 6)
    (overlap,) = table["overlaps"]
    assert (overlap["item_id"], overlap["row"], overlap["position"]) == ("taken", 201, 1)
    assert (overlap["steps"], overlap["windows"]) == (500, 6)
    assert overlap["scale"] == pytest.approx(5)


def test_mistakes_are_told_before_the_work(folder, tmp_path) -> None:
    corpus, table = str(folder / "corpus"), str(folder / "apart.parquet")
    with pytest.raises(DataError, match=r"nowhere\.parquet: no such file"):
        run("audit", corpus, "--against", str(tmp_path / "nowhere.parquet"))
    with pytest.raises(ConfigError, match=r"--json .*\.json"):
        run("audit", corpus, "--against", table, "--json", str(tmp_path / "report.txt"))
    with pytest.raises(SystemExit):
        run("audit", corpus)
