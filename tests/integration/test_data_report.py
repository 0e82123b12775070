"""`tsmoe data report` as a user calls it, without a process of its own."""

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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A corpus of three sound series, a flat one, one that is clipped, and one that is short."""
    folder = tmp_path_factory.mktemp("report")
    wave = np.sin(np.arange(600) / 9) + np.random.default_rng(0).normal(size=600) / 9
    series = {
        "wave": wave,
        "wave_2": wave**2,
        "wave_3": wave**3,
        "flat": np.ones(600),
        "clipped": np.minimum(wave, 0.3),
        "short": wave[:10],
    }
    table = {"item_id": list(series), "target": [values.tolist() for values in series.values()]}
    pq.write_table(pa.table(table), folder / "waves.parquet")
    (folder / "corpus.yaml").write_text("sources: [{type: parquet, path: waves.parquet}]\n")
    out = folder / "corpus"
    assert run("build", str(folder / "corpus.yaml"), "--out", str(out), "--processes", "1") == 0
    return out


def test_report_says_what_was_dropped(corpus, capsys) -> None:
    assert run("report", str(corpus)) == 0
    output = capsys.readouterr().out
    assert "kept 3 of 6 series, 1,800 of 3,010 points" in output
    for reason in ("clipped", "constant", "too_short"):
        assert reason in output
    page = (corpus / "curation" / "report.html").read_text()
    assert all(name in page for name in ("wave_2", "clipped", "flat", "max_clipped_fraction"))


def test_report_goes_where_it_is_told(corpus, tmp_path, capsys) -> None:
    assert run("report", str(corpus), "--out", str(tmp_path / "new"), "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["kept"] == {"series": 3, "points": 1800}
    assert {name: count["series"] for name, count in numbers["reasons"].items()} == {
        "clipped": 1,
        "constant": 1,
        "too_short": 1,
    }
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == numbers
    assert (tmp_path / "new" / "report.html").exists()


def test_mistakes_are_one_line_each(corpus, tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out .*file is a file"):
        run("report", str(corpus), "--out", str(tmp_path / "file"))
    with pytest.raises(DataError, match="no such folder"):
        run("report", str(tmp_path / "nowhere"))
