"""`tsmoe data` as a user calls it, without a process of its own."""

import argparse
import json
from pathlib import Path

import pytest

from tsmoe.commands import data
from tsmoe.errors import ConfigError, DataError


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    data.add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *argv])
    return args.run(args)


@pytest.fixture(scope="module")
def shared_corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    assert run("build", "tiny", "--out", str(folder)) == 0
    return folder


def test_build_reports_counts_and_then_that_it_is_up_to_date(tmp_path, capsys) -> None:
    out = str(tmp_path / "tiny")
    assert run("build", "tiny", "--out", out, "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["series"], first["points"], first["up_to_date"]) == (489, 2691614, False)
    assert run("build", "tiny", "--out", out) == 0
    assert "up to date: 489 series, 2,691,614 points" in capsys.readouterr().out


def test_build_shows_what_was_dropped(tmp_path, capsys) -> None:
    (tmp_path / "flow.csv").write_text("a,b\n" + "".join(f"{row},7\n" for row in range(50)))
    (tmp_path / "corpus.yaml").write_text("sources: [{type: csv, path: flow.csv}]")
    assert run("build", str(tmp_path / "corpus.yaml"), "--out", str(tmp_path / "out")) == 0
    output = capsys.readouterr().out
    assert "1 series dropped" in output
    assert "constant" in output
    assert "flow_b" in output


def test_build_mistakes_are_config_errors(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        run("build", "none.yaml", "--out", str(tmp_path / "out"))
    (tmp_path / "corpus.yaml").write_text("sources: [{type: csv, path: none.csv}]")
    with pytest.raises(ConfigError, match=r"sources\.0\.path: no file matches .*none\.csv"):
        run("build", str(tmp_path / "corpus.yaml"), "--out", str(tmp_path / "out"))


def test_status_of_a_whole_corpus(shared_corpus, capsys) -> None:
    assert run("status", str(shared_corpus), "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert status["whole"]
    assert (status["series"], status["drops"], len(status["fingerprint"])) == (489, {}, 64)
    with pytest.raises(DataError, match="no such folder"):
        run("status", str(shared_corpus / "nowhere"))


def test_damage_makes_verify_and_status_exit_with_3(tmp_path, capsys) -> None:
    run("build", "tiny", "--out", str(tmp_path / "tiny"))
    assert run("verify", str(tmp_path / "tiny")) == 0
    shard = tmp_path / "tiny" / "part-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 255
    shard.write_bytes(content)
    capsys.readouterr()
    assert run("verify", str(tmp_path / "tiny"), "--json") == 3
    assert "part-00000.arrow" in json.loads(capsys.readouterr().out)["problems"][0]
    shard.write_bytes(content[:-1])
    assert run("status", str(tmp_path / "tiny")) == 3
    assert "damaged" in capsys.readouterr().out


def test_stats_list_every_source(shared_corpus, capsys) -> None:
    assert run("stats", str(shared_corpus)) == 0
    table = capsys.readouterr().out
    for word in ("nyc_airport_weather", "111,744", "2,691,614", "744 / 744 / 744"):
        assert word in table
    assert run("stats", str(shared_corpus), "--json") == 0
    sources = json.loads(capsys.readouterr().out)["sources"]
    assert sum(source["points"] for source in sources) == 2691614


def test_inspect_describes_and_draws_a_series(shared_corpus, tmp_path, capsys) -> None:
    picture = tmp_path / "series.png"
    assert run("inspect", str(shared_corpus), "--index", "5", "--plot", str(picture), "--json") == 0
    series = json.loads(capsys.readouterr().out)
    assert series["train_points"] == series["points"] * 9 // 10
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run("inspect", str(shared_corpus), "--item", series["item_id"]) == 0
    assert series["item_id"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--index", "489"), "0 to 488"),
        (("--plot", "x.pdf"), r"ends in \.png"),
        (("--plot", "/nowhere/x.png"), "cannot be written"),
    ],
)
def test_inspect_mistakes_are_config_errors(shared_corpus, options, words) -> None:
    with pytest.raises(ConfigError, match=words):
        run("inspect", str(shared_corpus), *options)
