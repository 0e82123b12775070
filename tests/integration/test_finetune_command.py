"""`tsmoe finetune` as a user calls it: what it leaves, keeps, goes on with and refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from finetune_run import SMALL, SMALL_MODEL, write_package, write_table
from tsmoe.__main__ import main
from tsmoe.checkpoint.package import load_package, save_package
from tsmoe.config import merge_layers
from tsmoe.inference import Forecaster
from tsmoe.models import build_model

TIMEOUT = 120
# Two variates of the small model fit, three do not.
FREE_BYTES = 1_300_000
MIXED = {
    "mixing": {"num_channel_mixed_layers": 1},
    "table": {"covariates": ["b", "hour"], "known_future": ["hour"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    write_table(folder / "table.csv", gaps=True)
    write_package(folder / "package")
    return folder


@pytest.fixture(name="write_config")
def config_writer(tmp_path):
    """Write a file of settings and return the words of the command up to the run's folder."""

    def write(*settings: dict) -> list[str]:
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(merge_layers({"run": "unused"}, SMALL, *settings)))
        return ["finetune", str(path), f"run={tmp_path / 'run'}"]

    return write


def inputs(folder: Path, table: str = "table.csv", package: str = "package") -> list[str]:
    return [f"model={folder / package}", f"data={folder / table}"]


def test_fine_tuned_package_is_better_than_its_start(
    folder, write_config, tmp_path, capsys
) -> None:
    """All that the run leaves, and that its figures are those of the package that it leaves."""
    assert main([*write_config(), *inputs(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "package", "result.json",
        "DONE",
    }  # fmt: skip
    assert not (run / "graph.csv").exists(), "nothing is mixed"
    assert result["handed_over"] == "fine_tuned"
    scores = result["test"]["results"]
    assert list(scores) == ["zero_shot", "fine_tuned", "linear", "seasonal_naive", "naive"]
    assert scores["fine_tuned"]["mse"] < 0.9 * scores["zero_shot"]["mse"]
    errors = result["validation_mse"]
    assert list(errors["errors"]) == ["0", "2", "4", "6"]
    assert errors["errors"]["0"] == pytest.approx(errors["start_error"], rel=1e-5)
    assert errors["errors"][str(result["best_step"])] == min(errors["errors"].values())
    for package, row in ((run / "package", "fine_tuned"), (folder / "package", "zero_shot")):
        words = ["evaluate", str(package), "--data", str(folder / "table.csv"), "--json", "-"]
        assert main([*words, "--context", "64", "--horizon", "32"]) == 0
        found = json.loads(capsys.readouterr().out)["results"][0]
        assert found["mse"] == pytest.approx(scores[row]["mse"], rel=1e-5)
    card = load_package(run / "package")[1]
    assert card["step"] == result["best_step"]
    assert card["table"]["targets"] == ["a", "b", "c", "hour"]


def test_package_that_was_fine_tuned_can_be_fine_tuned_again(
    folder, write_config, tmp_path, capsys
) -> None:
    words = write_config()
    assert main([*words, *inputs(folder), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    again = [f"model={tmp_path / 'run' / 'package'}", f"data={folder / 'table.csv'}"]
    assert main([*words, *again, f"run={tmp_path / 'again'}", "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["test"]["results"]["zero_shot"] == first["test"]["results"]["fine_tuned"]
    assert main([*words, f"model={tmp_path / 'run'}", f"data={folder / 'table.csv'}"]) != 0
    assert f"model={tmp_path / 'run' / 'package'}" in capsys.readouterr().err


def test_few_windows_only_are_learned_from(folder, write_config, caplog) -> None:
    with caplog.at_level("INFO"):
        assert main([*write_config(), *inputs(folder), "few_shot=0.1"]) == 0
    # 500 rows: 350 to learn from, 255 windows of 64 and 32 rows, 25 of them, 4 variates.
    assert "100 training windows" in caplog.text


def test_covariates_are_used_and_the_graph_is_left(folder, write_config, tmp_path, capsys) -> None:
    words = [*write_config(MIXED), *inputs(folder), "training.steps=30", "optimizer.lr=0.01"]
    assert main([*words, "training.validate_every_steps=10", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["handed_over"] == "fine_tuned"
    run = tmp_path / "run"
    lines = (run / "graph.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 4
    edges = {tuple(line.split(",")[:2]): line.split(",")[3] for line in lines[1:]}
    assert edges["a", "b"] == edges["c", "hour"] == "1.000000"
    assert edges["b", "a"] == edges["hour", "c"] == "0.000000"
    assert (run / "graph.png").read_bytes()[:4] == b"\x89PNG"
    # Columns of the package's covariates are found in the table by name.
    words = ["evaluate", str(run / "package"), "--data", str(folder / "table.csv"), "--json", "-"]
    assert main([*words, "--context", "64", "--horizon", "32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["variates"]) == ["a", "c"]
    expected = result["test"]["results"]["fine_tuned"]["mse"]
    assert found["results"][0]["mse"] == pytest.approx(expected, rel=1e-5)
    assert main(["report", str(run)]) == 0
    assert (run / "report" / "graph.png").exists()
    page = (run / "report" / "report.html").read_text()
    assert 'alt="graph"' in page
    assert result["verdict"] in page


def test_forecast_takes_covariates_that_are_known_ahead(
    folder, write_config, tmp_path, capsys
) -> None:
    assert main([*write_config(MIXED), *inputs(folder), "training.steps=2"]) == 0
    package = str(tmp_path / "run" / "package")
    assert Forecaster.load(package).mixes_variates, "or nothing is shown"
    table = pd.read_csv(folder / "table.csv")
    table.loc[460:, ["a", "b", "c"]] = np.nan
    ahead = tmp_path / "ahead.csv"
    table.to_csv(ahead, index=False)
    capsys.readouterr()
    assert main(["forecast", package, str(ahead), "--horizon", "40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "date,a,c"
    assert len(lines) == 41
    assert lines[1].startswith(table["date"][460])
    assert main(["forecast", package, str(ahead), "--horizon", "41"]) == 2
    assert "rows with these columns alone, or use --horizon 40" in capsys.readouterr().err
    assert main(["forecast", package, str(folder / "table.csv"), "--horizon", "1"]) == 2
    advice = capsys.readouterr().err
    assert "hour must be known for the 1 steps" in advice
    assert "--horizon" not in advice, "which would be refused in turn"
    table.drop(columns="hour").to_csv(ahead, index=False)
    assert main(["forecast", package, str(ahead), "--horizon", "40"]) == 2
    assert "no column 'hour', a covariate" in capsys.readouterr().err


def test_start_that_is_kept_still_knows_what_is_forecast(
    folder, write_config, tmp_path, capsys
) -> None:
    words = [*write_config(MIXED), *inputs(folder), "optimizer.lr=1e9", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["handed_over"] == "zero_shot"
    table = pd.read_csv(folder / "table.csv")
    table.loc[460:, ["a", "b", "c"]] = np.nan
    table.to_csv(tmp_path / "ahead.csv", index=False)
    package = str(tmp_path / "run" / "package")
    assert main(["forecast", package, str(tmp_path / "ahead.csv"), "--horizon", "40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "date,a,c"
    assert lines[1].startswith(table["date"][460])


def test_mixed_package_forecasts_the_columns_that_it_learned(
    folder, write_config, tmp_path, capsys
) -> None:
    some = {"table": {"targets": ["c"], "covariates": ["b"], "context_length": 40},
            "mixing": {"num_channel_mixed_layers": 1}}  # fmt: skip
    assert main([*write_config(some), *inputs(folder), "optimizer.lr=0.01", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["handed_over"] == "fine_tuned"
    words = ["evaluate", str(tmp_path / "run" / "package"), "--data", str(folder / "table.csv")]
    words += ["--context", "40", "--horizon", "32", "--json", "-"]
    for more in ([], ["--columns", "c"]):
        assert main([*words, *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert list(found["variates"]) == ["c"]
        expected = result["test"]["results"]["fine_tuned"]["mse"]
        assert found["results"][0]["mse"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_nothing_worse_than_the_start_is_handed_over(
    folder, write_config, tmp_path, capsys, lr
) -> None:
    assert main([*write_config(), *inputs(folder), f"optimizer.lr={lr}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["handed_over"] == "zero_shot"
    assert "holds the start as it was" in result["verdict"]
    assert "fine_tuned" not in result["test"]["results"]
    start, kept = (load_package(path)[0] for path in (folder / "package", tmp_path / "run/package"))
    for (name, expected), found in zip(start.named_parameters(), kept.parameters(), strict=True):
        assert (expected == found).all(), name


def test_patience_ends_training_early(folder, write_config, capsys) -> None:
    words = [*write_config(), *inputs(folder), "optimizer.lr=1.0", "training.steps=500"]
    assert main([*words, "stopping.patience=3", "--json"]) == 0
    errors = list(json.loads(capsys.readouterr().out)["validation_mse"]["errors"].values())
    assert len(errors) < 50
    assert len(errors) - 1 - errors.index(min(errors)) == 3


def test_training_from_scratch_needs_no_package(folder, write_config, capsys) -> None:
    model = yaml.safe_load((folder / "package" / "model.yaml").read_text())
    words = [*write_config({"model": model}), f"data={folder / 'table.csv'}"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["handed_over"] == "fine_tuned"
    assert result["best_step"] > 0
    assert next(iter(result["test"]["results"])) == "fine_tuned"
    assert result["validation_mse"]["start_error"] is None


def test_nothing_learned_from_scratch_is_an_error(folder, write_config, tmp_path, capsys) -> None:
    model = yaml.safe_load((folder / "package" / "model.yaml").read_text())
    words = [*write_config({"model": model}), f"data={folder / 'table.csv'}"]
    assert main([*words, "optimizer.lr=1e9"]) != 0
    assert "lower optimizer.lr" in capsys.readouterr().err
    assert not (tmp_path / "run" / "package").exists()


@pytest.mark.parametrize("kind", ["all", "low_rank"])
def test_stopped_run_goes_on_and_ends_as_if_never_stopped(
    folder, write_config, tmp_path, kind
) -> None:
    long = {"dropout": 0.1, "training": {"steps": 40, "validate_every_steps": 10},
            "trainable": {"trains": kind}, "stopping": {"patience": 9}}  # fmt: skip
    words = [*write_config(long), *inputs(folder)]
    whole = [word.replace("/run", "/whole") for word in words]
    assert main(whole) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "tsmoe", *words],
        stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + TIMEOUT
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 13:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 75
    assert (tmp_path / "run" / "REQUEUE").exists()
    assert not (tmp_path / "run" / "package").exists()
    assert main(words) == 0
    results = [
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "whole")
    ]
    assert results[0] == results[1]
    assert not (tmp_path / "run" / "REQUEUE").exists()
    models = [load_package(tmp_path / name / "package")[0] for name in ("run", "whole")]
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert (ours == theirs).all()


def test_run_that_is_done_says_its_result_again(folder, write_config, tmp_path, capsys) -> None:
    words = [*write_config(), *inputs(folder), "--json"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert main(words) == 0
    assert capsys.readouterr().out == first
    for setting in (
        "seed=1", "stopping.max_windows=5", "optimizer.lr=0.5", "training.loss_on=horizon",
        "training.error_unit=window", "training.global_batch_size=32", "training.target_clip=5",
    ):  # fmt: skip
        assert main([*words, setting]) != 0
        name = setting.split("=")[0]
        name = name.split(".")[0] if name.startswith("optimizer") else name
        assert f"other settings ({name})" in capsys.readouterr().err
    assert main([*words, "table.season=12"]) == 0, "a baseline's alone"


def test_run_is_not_continued_from_another_start(folder, write_config, tmp_path, capsys) -> None:
    shutil.copytree(folder / "package", tmp_path / "start")
    words = [*write_config(), f"model={tmp_path / 'start'}", f"data={folder / 'table.csv'}"]
    assert main(words) == 0
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "start", moved)
    again = [word.replace(str(tmp_path / "start"), str(moved)) for word in words]
    assert main(again) == 0, "the same weights elsewhere"
    write_package(tmp_path / "start", has_quantiles=True)
    assert main(words) != 0
    assert "model, start_sha256" in capsys.readouterr().err


def test_gaps_that_leave_no_linear_baseline_do_not_stop_the_run(
    folder, write_config, tmp_path, capsys
) -> None:
    def sieve(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[::20, ["a", "b", "c", "hour"]] = np.nan
        return table

    words = [*write_config(), f"model={folder / 'package'}", altered(folder, tmp_path, sieve)]
    assert main([*words, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["test"]["results"]
    assert list(scores) == ["zero_shot", "fine_tuned", "seasonal_naive", "naive"]


def test_windows_without_anything_to_learn_are_left_out(
    folder, write_config, tmp_path, capsys
) -> None:
    def half(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[150:349, ["a", "b", "c", "hour"]] = np.nan
        return table

    words = [*write_config(), f"model={folder / 'package'}", altered(folder, tmp_path, half)]
    one = ["training.global_batch_size=1", "training.micro_batch_size=1", "training.steps=20"]
    assert main([*words, *one, "training.loss_on=horizon", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "broke off" not in result["verdict"]
    assert "20" in result["validation_mse"]["errors"]


def altered(folder: Path, tmp_path: Path, change) -> str:
    table = pd.read_csv(folder / "table.csv")
    path = tmp_path / "altered.csv"
    change(table).to_csv(path, index=False)
    return f"data={path}"


@pytest.mark.parametrize(
    ("change", "settings", "named"),
    [
        (lambda t: t[:80], [], "train: 96 needed, 56 there"),
        (lambda t: t.assign(b=np.nan), [], "(350 rows) of b;"),
        (lambda t: t, ["table.targets=[a,zzz]"], "no column 'zzz'"),
        (lambda t: t, ["table.split=[.nan,0.1,0.2]"], "three positive shares"),
        (lambda t: t, ["table.season=-3"], "season (-3)"),
        (lambda t: t, ["seed=-1"], "seed (-1)"),
        (lambda t: t, ["optimizer.lr=.nan"], "lr (nan)"),
        (lambda t: t, ["mixing.num_channel_mixed_layers=-1"], "num_channel_mixed_layers (-1)"),
        (lambda t: t.assign(date=t["date"].where(t.index != 40, "2024-01-02 15:30")), [], "'date'"),
        (lambda t: t, ["table.split=[0.5,0.1,0.1,0.1]"], "table.split"),
    ],
)  # fmt: skip
def test_table_that_cannot_be_used_is_one_clear_line(
    folder, write_config, tmp_path, capsys, change, settings, named
) -> None:
    words = [*write_config(), f"model={folder / 'package'}", altered(folder, tmp_path, change)]
    assert main([*words, *settings]) in (2, 3)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tsmoe: ")]
    assert len(lines) == 1
    assert named in lines[0]


def test_constant_variate_is_learned_beside_others(folder, write_config, tmp_path, capsys) -> None:
    constant = altered(folder, tmp_path, lambda t: t.assign(b=7.0))
    assert main([*write_config(), f"model={folder / 'package'}", constant, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert np.isfinite(result["test"]["results"]["fine_tuned"]["mse"])


def test_more_variates_than_memory_holds_are_refused_with_what_fits(
    folder, write_config, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("tsmoe.finetune.memory.free_bytes", lambda _: FREE_BYTES)
    mixed = {"mixing": {"num_channel_mixed_layers": 1}}
    words = [*write_config(mixed), *inputs(folder)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "windows of 4 variates take" in error
    most = int(error.split("training.max_variates=")[1].split()[0])
    assert most == 2
    assert main([*words, f"training.max_variates={most}"]) == 0


def test_horizon_need_be_no_multiple_of_the_patch(folder, write_config, tmp_path) -> None:
    assert main([*write_config(), *inputs(folder), "table.prediction_length=37"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test"]["horizon"] == 37


def test_package_of_other_patches_brings_its_own(folder, write_config, tmp_path, capsys) -> None:
    other = replace(SMALL_MODEL, patch_length=8, patch_stride=4, context_length=56)
    save_package(tmp_path / "other", build_model(other), {})
    words = [*write_config(), f"model={tmp_path / 'other'}", f"data={folder / 'table.csv'}"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["context"] == 56
    assert load_package(tmp_path / "run" / "package")[0].config == other
