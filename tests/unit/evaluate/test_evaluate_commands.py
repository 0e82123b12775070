"""`tsmoe evaluate` and `tsmoe forecast` with a fake package."""

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tsmoe.commands import evaluate, forecast
from tsmoe.errors import ConfigError
from tsmoe.evaluate.metrics import interpolate_levels


@pytest.fixture
def use_package(monkeypatch: pytest.MonkeyPatch, make_forecaster) -> Callable[..., object]:
    """Let any package path load a fake forecaster with the given settings."""

    def use(**settings: object) -> object:
        forecaster = make_forecaster(**settings)

        def load(path: str, *, device: str, **_: object) -> object:
            return forecaster

        for name in ("open_package", "load_forecaster"):
            monkeypatch.setattr(f"tsmoe.tasks.predictor.{name}", load)
        return forecaster

    return use


def write_csv(path: Path, values_LC: np.ndarray, freq: str | None = "h") -> str:
    frame = pd.DataFrame(values_LC, columns=[f"v{c}" for c in range(values_LC.shape[1])])
    if freq is not None:
        frame.insert(0, "date", pd.date_range("2020-01-01", periods=len(frame), freq=freq))
    frame.to_csv(path, index=False)
    return str(path)


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(required=True)
    evaluate.add_parser(subparsers)
    forecast.add_parser(subparsers)
    args = parser.parse_args(argv)
    return args.run(args)


def test_command_modules_import_nothing_heavy() -> None:
    code = (
        "import sys, tsmoe.commands.evaluate, tsmoe.commands.forecast; "
        "heavy = {'torch', 'numpy', 'pandas', 'matplotlib', 'rich'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_evaluate_writes_json_and_picture_and_prints_a_table(
    tmp_path: Path, capsys, daily_cycle, use_package
) -> None:
    use_package()
    data = write_csv(tmp_path / "mine.csv", daily_cycle)
    out, plot = tmp_path / "scores.json", tmp_path / "middle.png"
    options = ["--context", "48", "--horizon", "12", "--json", str(out), "--plot", str(plot)]
    assert run("evaluate", "package", "--data", data, *options) == 0
    document = json.loads(out.read_text())
    assert document["windows"] == 109
    assert document["results"][0]["model"] == "tsmoe"
    printed = capsys.readouterr().out
    assert "seasonal_naive" in printed
    assert f"{document['results'][0]['mse']:.4f}" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_evaluate_prints_only_json_on_request(
    tmp_path: Path, capsys, daily_cycle, use_package
) -> None:
    use_package()
    data = write_csv(tmp_path / "mine.csv", daily_cycle)
    options = ["--context", "48", "--horizon", "12", "--json", "-"]
    run(
        "evaluate", "package", "--data", data, *options, "--columns", "v1", "--split", "0.5,0.2,0.3"
    )
    document = json.loads(capsys.readouterr().out)
    assert list(document["variates"]) == ["v1"]
    assert document["windows"] == 180 - 12 + 1


def test_evaluate_by_gift_prints_what_is_relative(
    tmp_path: Path, capsys, daily_cycle, use_package
) -> None:
    use_package()
    data = write_csv(tmp_path / "mine.csv", daily_cycle)
    words = ["evaluate", "package", "--data", data, "--horizon", "12", "--protocol", "gift"]
    assert run(*words) == 0
    assert "relative" in capsys.readouterr().out
    assert run(*words, "--json", "-") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["protocol"], document["windows"]) == ("gift", 5)
    with pytest.raises(ConfigError, match="--plot and --split"):
        run(*words, "--split", "0.5,0.2,0.3")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--horizon", "0"], "--horizon.*0"),
        (["--context", "-3"], "--context.*-3"),
        (["--batch-size", "0"], "--batch-size.*0"),
        (["--split", "0.7,0.3"], "--split.*three"),
        (["--split", "a,b,c"], "--split.*numbers"),
        (["--columns", "a,,b"], "--columns"),
        (["--json", "scores.txt"], r"--json.*\.json"),
        (["--plot", "nowhere/x.png"], "--plot.*nowhere"),
    ],
)
def test_evaluate_names_the_option_that_cannot_be_used(options: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        run("evaluate", "package", "--data", "no_such.csv", *options)


def test_forecast_goes_on_where_the_table_ends(
    tmp_path: Path, capsys, daily_cycle, use_package
) -> None:
    forecaster = use_package()
    data = write_csv(tmp_path / "mine.csv", daily_cycle)
    assert run("forecast", "package", data, "--horizon", "3") == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out), parse_dates=["date"])
    assert list(frame.columns) == ["date", "v0", "v1"]
    # 600 hours are 25 days.
    assert list(frame["date"]) == list(pd.date_range("2020-01-26", periods=3, freq="h"))
    np.testing.assert_allclose(frame["v1"], daily_cycle[-1, 1], rtol=1e-6)
    assert forecaster.seen[0].shape == (1, 2, 48), "the context length of the package"
    np.testing.assert_allclose(forecaster.seen[0][0], daily_cycle[-48:].T, rtol=1e-6)


def test_monthly_timestamps_follow_the_calendar(tmp_path: Path, capsys, use_package) -> None:
    use_package()
    data = write_csv(tmp_path / "mine.csv", np.arange(36.0)[:, None], freq="MS")
    run("forecast", "package", data, "--horizon", "3")
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(frame["date"]) == ["2023-01-01", "2023-02-01", "2023-03-01"]


def test_table_without_timestamps_goes_on_by_row_number(
    tmp_path: Path, capsys, daily_cycle, use_package
) -> None:
    use_package()
    data = write_csv(tmp_path / "mine.csv", daily_cycle, freq=None)
    run("forecast", "package", data, "--horizon", "2")
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(frame.columns) == ["row", "v0", "v1"]
    assert list(frame["row"]) == [600, 601]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_quantiles_are_written_beside_their_variate(
    tmp_path: Path, capsys, daily_cycle, use_package, suffix: str
) -> None:
    use_package(quantile_levels=(0.1, 0.5, 0.9))
    data = write_csv(tmp_path / "mine.csv", daily_cycle)
    out, plot = tmp_path / f"next.{suffix}", tmp_path / "next.png"
    run(
        "forecast", "package", data, "--horizon", "5", "--quantiles", "0.1,0.3",
        "--out", str(out), "--plot", str(plot),
    )  # fmt: skip
    frame = pd.read_csv(out) if suffix == "csv" else pd.read_parquet(out)
    assert list(frame.columns) == ["date", "v0", "v0@0.1", "v0@0.3", "v1", "v1@0.1", "v1@0.3"]
    np.testing.assert_allclose(frame["v0@0.1"], frame["v0"] - 0.4, atol=1e-5)
    np.testing.assert_allclose(frame["v0@0.3"], frame["v0"] - 0.2, atol=1e-5)
    assert capsys.readouterr().out == ""
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_forecast_prints_json(tmp_path: Path, capsys, daily_cycle, use_package) -> None:
    use_package(quantile_levels=(0.1, 0.9))
    data = write_csv(tmp_path / "mine.csv", daily_cycle)
    run("forecast", "package", data, "--horizon", "2", "--quantiles", "0.5", "--json")
    document = json.loads(capsys.readouterr().out)
    assert document["time"] == ["2020-01-26 00:00:00", "2020-01-26 01:00:00"]
    assert (document["context"], document["horizon"], document["freq"]) == (48, 2, "h")
    first = document["variates"]["v0"]
    np.testing.assert_allclose(first["quantiles"]["0.5"], first["mean"], atol=1e-6)


def test_levels_between_those_of_the_head_are_interpolated() -> None:
    quantiles_CQK = np.array([[[0.0, 10.0, 30.0]]], dtype=np.float32)
    asked_CQK = interpolate_levels(quantiles_CQK, (0.1, 0.5, 0.9), (0.1, 0.2, 0.7, 0.9))
    np.testing.assert_allclose(asked_CQK[0, 0], [0, 2.5, 20, 30], rtol=1e-6)


@pytest.mark.parametrize(
    ("levels", "asked", "named"),
    [
        ((), "0.5", "point head"),
        ((0.1, 0.5, 0.9), "0.5,0.95", r"0\.95.*0\.1, 0\.5, 0\.9"),
        ((0.1, 0.9), "0.05", r"0\.05"),
        ((0.1, 0.9), "nan", "nan"),
        ((0.1, 0.9), "0.5,0.5", "twice"),
        ((0.1, 0.9), "half", "half"),
    ],
)
def test_levels_that_the_head_cannot_give_are_refused(
    tmp_path: Path, daily_cycle, use_package, levels: tuple, asked: str, named: str
) -> None:
    forecaster = use_package(quantile_levels=levels)
    data = write_csv(tmp_path / "mine.csv", daily_cycle)
    with pytest.raises(ConfigError, match=rf"--quantiles.*{named}"):
        run("forecast", "package", data, "--quantiles", asked)
    assert not forecaster.seen


def test_short_table_is_used_whole_but_a_context_beyond_it_is_refused(
    tmp_path: Path, daily_cycle, use_package
) -> None:
    forecaster = use_package()
    data = write_csv(tmp_path / "mine.csv", daily_cycle[:20])
    run("forecast", "package", data, "--horizon", "2")
    assert forecaster.seen[0].shape == (1, 2, 20)
    with pytest.raises(ConfigError, match=r"--context 30.*20"):
        run("forecast", "package", data, "--context", "30")


def test_two_columns_of_one_name_are_refused(tmp_path: Path, daily_cycle, use_package) -> None:
    use_package(quantile_levels=(0.1, 0.9))
    frame = pd.DataFrame(daily_cycle, columns=["a", "a@0.5"])
    frame.to_csv(tmp_path / "mine.csv", index=False)
    with pytest.raises(ConfigError, match=r"two columns 'a@0\.5'"):
        run("forecast", "package", str(tmp_path / "mine.csv"), "--quantiles", "0.5")
