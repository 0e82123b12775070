"""`tsmoe predict`: answers for data that nobody has labelled, and what bad input gets."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from task_run import SMALL, TASKS, Settings, write_files
from tsmoe.__main__ import main
from tsmoe.config import merge_layers
from tsmoe.evaluate.anomaly_metrics import auc_roc
from tsmoe.tasks.predictor import TaskForecaster, load_predictor
from tsmoe.tasks.reopen import reopen_task

ENOUGH: Settings = {"training": {"steps": 40, "validate_every_steps": 20}}
MACHINES: Settings = {"entity_column": "who", "time_column": "tick"}
SERIES: Settings = {"type": "series", "prediction_length": 8, "season": 7}


def write_series(path: Path, *, more: float = 0.0) -> Path:
    steps = np.arange(120)
    rows = {
        "item_id": ["a", "b"],
        "target": [(np.sin(steps / 3) + more).tolist(), (np.sin(steps / 5) * 9 + more).tolist()],
    }
    pd.DataFrame(rows).to_parquet(path, index=False)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def files(folder) -> dict[str, Path]:
    """A file of each task, in units of their own."""
    found = {**write_files(folder), "series": write_series(folder / "series.parquet")}
    table = pd.read_csv(found["imputation"])
    waves = [name for name in table if name.startswith("wave")]
    table[waves] = table[waves] * 50 + 1000
    found["imputation"] = folder / "levels.csv"
    table.to_csv(found["imputation"], index=False)
    rows = pd.read_parquet(found["anomaly"])
    # Times that run across the machines, and rows that do not follow them.
    rows["tick"] = rows.groupby("entity").cumcount()
    rows = rows.rename(columns={"entity": "who"}).sample(frac=1, random_state=0)
    rows.to_parquet(found["anomaly"], index=False)
    cases = pd.read_parquet(found["classification"])
    cases["dims"] = [[channel * 50 + 1000 for channel in dims] for dims in cases["dims"]]
    cases["case_id"] = [f"c{number}" for number in range(len(cases))]
    cases.to_parquet(found["classification"], index=False)
    return found


@pytest.fixture(scope="module")
def packages(folder, files) -> dict[str, str]:
    """A package of each task, long enough trained to have learned something."""
    found = {}
    more = {"anomaly": {**MACHINES, "hidden_share": 0.25}, "series": SERIES}
    for task in ("anomaly", "imputation", "classification", "series", "forecast"):
        tasks = {"tasks": {task: {**TASKS.get(task, {}), **more.get(task, {})}}}
        # Without its own norm a window is forecast in the unit of the training part.
        norm = {"model": {"normalises_windows": task != "series"}}
        config = folder / f"{task}.yaml"
        settings = merge_layers({"run": "unused"}, SMALL, tasks, ENOUGH, norm)
        config.write_text(yaml.safe_dump(settings))
        run = folder / f"run-{task}"
        assert main(["finetune", str(config), f"data={files[task]}", f"run={run}"]) == 0
        found[task] = str(run / "package")
    return found


def result_of(package: str, task: str) -> dict[str, float]:
    found = json.loads((Path(package).parent / "result.json").read_text())["test"][task]["results"]
    return found[0]


def card_of(package: str, task: str) -> dict[str, float]:
    return json.loads((Path(package) / "card.json").read_text())["tasks"][task]


def predict(package: str, data: Path, out: Path, *options: str) -> pd.DataFrame:
    assert main(["predict", package, str(data), "--out", str(out), *options]) == 0
    return pd.read_csv(out)


def test_rows_are_scored_as_they_were_judged(packages, files, tmp_path) -> None:
    rows = pd.read_parquet(files["anomaly"])
    test = rows[rows["split"] == "test"].reset_index(drop=True)
    unlabelled = test.drop(columns=["split", "label"]).assign(installed=pd.Timestamp("2020-01-01"))
    unlabelled.to_parquet(tmp_path / "new.parquet")
    found = predict(packages["anomaly"], tmp_path / "new.parquet", tmp_path / "out.csv")
    assert list(found) == ["who", "tick", "score", "is_anomaly"]
    pd.testing.assert_frame_equal(found[["who", "tick"]], test[["who", "tick"]])
    expected = result_of(packages["anomaly"], "anomaly")
    scores = found["score"].to_numpy()
    assert auc_roc(scores, test["label"].to_numpy() == 1) == pytest.approx(expected["auc_roc"])
    threshold = card_of(packages["anomaly"], "anomaly")["threshold"]
    assert threshold == pytest.approx(expected["threshold"])
    assert found["is_anomaly"].tolist() == (scores > threshold).tolist()
    assert 0 < found["is_anomaly"].mean() < 0.5
    # Columns of other names.
    renamed = unlabelled.rename(columns={"who": "machine", "tick": "second"})
    renamed.to_parquet(tmp_path / "renamed.parquet")
    columns = ("--entity-column", "machine", "--time-column", "second")
    again = predict(
        packages["anomaly"], tmp_path / "renamed.parquet", tmp_path / "again.csv", *columns
    )
    np.testing.assert_array_equal(again["score"], scores)


def test_too_few_rows_are_scored_with_a_warning(packages, files, tmp_path, caplog) -> None:
    few = pd.read_parquet(files["anomaly"]).sort_values("tick").groupby("who").head(5)
    few.to_parquet(tmp_path / "few.parquet")
    found = predict(packages["anomaly"], tmp_path / "few.parquet", tmp_path / "out.csv")
    assert len(found) == 10
    assert "5 rows are fewer than the 32 of a window" in caplog.text


def test_recordings_without_entities_are_of_the_one_that_was_learned(tmp_path, capsys) -> None:
    machines = pd.read_parquet(write_files(tmp_path)["anomaly"])
    one = machines[machines["entity"] == "m1"]
    one.drop(columns="entity").to_parquet(tmp_path / "one.parquet")
    one.to_parquet(tmp_path / "named.parquet")
    packages = {}
    for name in ("one", "named"):
        config, run = tmp_path / f"{name}.yaml", tmp_path / name
        settings = {"run": str(run), "tasks": {"anomaly": TASKS["anomaly"]}}
        config.write_text(yaml.safe_dump(merge_layers(SMALL, settings)))
        assert main(["finetune", str(config), f"data={tmp_path / name}.parquet"]) == 0
        packages[name] = str(run / "package")
    other = one.drop(columns=["entity", "label", "split"])
    other.to_parquet(tmp_path / "other.parquet")
    found = predict(packages["one"], tmp_path / "other.parquet", tmp_path / "out.csv")
    assert list(found) == ["score", "is_anomaly"]
    capsys.readouterr()
    one.assign(entity="m2").to_parquet(tmp_path / "stranger.parquet")
    for file, code, says in (("stranger", 3, "entities m2; it knows m1"),
                             ("other", 2, "no entity column 'entity'")):  # fmt: skip
        assert main(["predict", packages["named"], str(tmp_path / f"{file}.parquet")]) == code
        assert says in capsys.readouterr().err


def test_gaps_are_filled_and_the_rest_stays(packages, files, tmp_path) -> None:
    table = pd.read_csv(files["imputation"])
    holes = table.assign(count=2**24 + 1 + np.arange(len(table)), note="as it is")
    is_hole = np.random.default_rng(0).random(len(table)) < 0.25
    holes.loc[is_hole, "wave 1"] = holes.loc[256, "wave 2"] = np.nan
    holes.loc[7, "wave 2"] = 1234.567890123
    holes.to_csv(tmp_path / "holes.csv", index=False)
    found = predict(packages["imputation"], tmp_path / "holes.csv", tmp_path / "out.csv")
    waves = ["wave 0", "wave 1", "wave 2"]
    assert np.isfinite(found[waves]).all(axis=None)
    pd.testing.assert_frame_equal(found.where(holes.notna()), holes, rtol=1e-12)
    error = (found["wave 1"] - table["wave 1"])[is_hole].std()
    assert error < 0.8 * table["wave 1"][is_hole].std()
    assert abs(found["wave 1"][is_hole].mean() - 1000) < 20


def times_like(kind: str, rows: int) -> pd.Series:
    times = pd.Series(pd.date_range("2024-01-01", periods=rows, freq="h"))
    return {
        "zone": lambda: times.dt.tz_localize("Europe/Berlin", ambiguous=False),
        "text": lambda: times.dt.strftime("%d/%m/%Y %H:%M"),
        "epoch": lambda: times.astype("datetime64[s]").astype("int64"),
        "plain": lambda: times,
    }[kind]()


@pytest.mark.parametrize("kind", ["zone", "text", "epoch", "plain"])
def test_times_that_a_table_leaves_out_are_filled_too(
    packages, files, tmp_path, caplog, kind
) -> None:
    table = pd.read_csv(files["imputation"])
    table["date"] = times_like(kind, len(table))
    # Another column of times in front, and numbers that no float64 holds.
    table.insert(0, "received", pd.date_range("2020", periods=len(table), freq="D"))
    table["id"] = 2**60 + np.arange(len(table))
    table["wave 2"] = table["wave 2"].astype(np.float32)
    fewer = table.drop(index=range(200, 230))
    fewer.set_index("id").to_parquet(tmp_path / "fewer.parquet")
    out = tmp_path / "out.parquet"
    words = ["predict", packages["imputation"], str(tmp_path / "fewer.parquet"), "--out", str(out)]
    with caplog.at_level("INFO"):
        assert main(words) == 0
    found, given = (pq.read_table(path) for path in (out, tmp_path / "fewer.parquet"))
    assert found.schema.equals(given.schema)
    assert "30 rows of times that the file leaves out were added" in caplog.text
    assert "wave 2 is missing for 30 rows from row 201 on" in caplog.text
    ids = found["id"].to_pylist()
    assert ids[200:230] == [None] * 30
    assert ids[:200] + ids[230:] == fewer["id"].tolist()
    if kind == "text":  # those that were there, and others as texts of times
        times = pd.Series(found["date"].to_pylist())
        assert times[:200].tolist() + times[230:].tolist() == fewer["date"].tolist()
        assert times[200] == "2024-01-09 08:00:00"
    else:
        assert found["date"].to_pylist() == pa.table(table)["date"].to_pylist()
    for name in ("wave 0", "wave 1", "wave 2"):
        assert np.isfinite(found[name].to_numpy()).all()


def test_rows_as_they_stand_may_be_asked_for_and_times_again(packages, files, tmp_path) -> None:
    table = pd.read_csv(files["imputation"]).drop(index=range(200, 230))
    table.to_csv(tmp_path / "fewer.csv", index=False)
    for options, rows in (([], 400), (["--ignore-time"], 370), (["--time-column", "date"], 400)):
        found = predict(
            packages["imputation"], tmp_path / "fewer.csv", tmp_path / "out.csv", *options
        )
        assert len(found) == rows
    table.drop(columns="date").to_csv(tmp_path / "timeless.csv", index=False)
    found = predict(
        packages["imputation"], tmp_path / "timeless.csv", tmp_path / "out.csv", "--ignore-time"
    )
    assert len(found) == 370


def test_columns_that_csv_cannot_hold_want_parquet(packages, files, tmp_path, capsys) -> None:
    table = pa.table(pd.read_csv(files["imputation"]))
    pairs = pa.array([[("a", 1)]] * len(table), pa.map_(pa.string(), pa.int64()))
    late = pa.array([2**31 - 1] * len(table), pa.int32()).cast(pa.date32())
    pq.write_table(
        table.append_column("pairs", pairs).append_column("late", late), tmp_path / "odd.parquet"
    )
    words = ["predict", packages["imputation"], str(tmp_path / "odd.parquet")]
    assert main(words) == 2
    assert "a column that CSV cannot hold" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "out.parquet")]) == 0
    assert pq.read_table(tmp_path / "out.parquet")["late"].equals(pa.chunked_array([late]))


def test_cases_are_classified_as_they_were_judged(packages, files, tmp_path) -> None:
    cases = pd.read_parquet(files["classification"])
    test = cases[cases["split"] == "test"].reset_index(drop=True)
    test[["case_id", "dims"]].to_parquet(tmp_path / "new.parquet")
    found = predict(packages["classification"], tmp_path / "new.parquet", tmp_path / "out.csv")
    assert list(found) == ["case_id", "case", "class", "probability fast", "probability slow"]
    assert found["case_id"].tolist() == test["case_id"].tolist()
    accuracy = (found["class"] == test["label"]).mean()
    assert accuracy == result_of(packages["classification"], "classification")["accuracy"] > 0.7
    both = found[["probability fast", "probability slow"]]
    np.testing.assert_allclose(both.sum(axis=1), 1, rtol=1e-5)
    assert (both.idxmax(axis=1).str.removeprefix("probability ") == found["class"]).all()


def test_series_are_continued_in_their_own_unit(packages, files, tmp_path, capsys) -> None:
    capsys.readouterr()
    assert main(["predict", packages["series"], str(files["series"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "item_id,step,forecast"
    assert [line.split(",")[:2] for line in lines[1:]] == [
        [name, str(step)] for name in "ab" for step in range(1, 9)
    ]
    plain = np.array([float(line.split(",")[2]) for line in lines[1:]])
    higher = write_series(tmp_path / "higher.parquet", more=100)
    found = predict(packages["series"], higher, tmp_path / "out.csv")
    np.testing.assert_allclose(found["forecast"], plain + 100, atol=2e-3)
    assert np.abs(plain[:8]).max() < 2 < np.abs(plain[8:]).max() < 18
    # The very forecasts that were judged, of the series without the steps that judged them.
    series = pd.read_parquet(files["series"])
    series["target"] = [values[:-8] for values in series["target"]]
    series.to_parquet(tmp_path / "shorter.parquet")
    shorter = predict(packages["series"], tmp_path / "shorter.parquet", tmp_path / "short.csv")
    predictor = load_predictor(packages["series"], device="cpu")
    task = reopen_task(predictor, "series", str(files["series"]))
    judged = task._forecasts(TaskForecaster(predictor, "series"))
    np.testing.assert_allclose(shorter["forecast"], judged.ravel(), rtol=1e-5)


def test_several_tasks_are_told_apart_by_name(files, tmp_path, capsys, caplog) -> None:
    # Cases have two channels, the table has three variates, and each is learned in its turn.
    tasks = {
        name: {**TASKS[name], "path": str(files[name])}
        for name in ("forecast", "anomaly", "classification")
    }
    tasks["anomaly"] |= MACHINES
    tasks["near"] = {**TASKS["forecast"], "path": str(files["forecast"]), "prediction_length": 8}
    more = {"run": str(tmp_path / "run"), "tasks": tasks, "model": {"has_task_embedding": True}}
    config = tmp_path / "several.yaml"
    config.write_text(yaml.safe_dump(merge_layers(SMALL, more, {"training": {"steps": 9}})))
    with caplog.at_level("INFO"):
        assert main(["finetune", str(config)]) == 0
    assert "validation error of each task: anomaly " in caplog.text
    package = str(tmp_path / "run" / "package")
    cases, table = str(files["classification"]), str(files["forecast"])
    assert main(["predict", package, cases]) == 2
    named = "anomaly (anomaly), classification (classification), forecast (forecast), near"
    assert f"it has {named} (forecast); name one by --task" in capsys.readouterr().err
    assert main(["predict", package, cases, "--task", "classification"]) == 0
    assert capsys.readouterr().out.startswith("split,label,case_id,case,class,")
    assert main(["predict", package, table, "--task", "near"]) == 2
    assert "tsmoe forecast" in capsys.readouterr().err
    assert main(["forecast", package, table, "--horizon", "8", "--task", "near"]) == 0
    capsys.readouterr()
    assert main(["forecast", package, table, "--task", "anomaly"]) == 2
    assert "tsmoe predict" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "changed", "options", "code", "named"),
    [
        ("anomaly", lambda t: t.replace({"who": {"m2": "m9"}}), [], 3, "entities m9; it knows"),
        ("anomaly", lambda t: t.drop(columns="who"), [], 2, "no entity column 'who'"),
        ("anomaly", lambda t: t.drop(columns="tick"), [], 2, "no time column 'tick'"),
        ("anomaly", lambda t: t.drop(columns="f1"), [], 3, "no column f1"),
        ("anomaly", lambda t: t.assign(f1="x"), [], 3, "row 1: 'x' is not a number"),
        ("anomaly", lambda t: t.assign(f1=np.inf), [], 3, "row 1: inf is infinite"),
        ("anomaly", lambda t: t, ["--entity-column", "whom"], 2, "no entity column 'whom'"),
        ("anomaly", lambda t: t, ["--time-column", "f0"], 2, "'f0' is something else"),
        ("anomaly", lambda t: t, ["--task", "imputation"], 2, "no task of the kind or name"),
        ("anomaly", lambda t: t, ["--ignore-time"], 2, "--ignore-time is given, but"),
        ("imputation", lambda t: t.assign(**{"wave 1": np.nan}), [], 3, "nothing is observed"),
        ("imputation", lambda t: t.drop(columns="wave 1"), [], 2, "variates of the package: "),
        ("classification", lambda t: t.drop(columns="dims"), [], 3, "no column dims"),
        ("classification", lambda t: t[:0], [], 3, "no rows"),
        ("classification", lambda t: t, ["--time-column", "a"], 2, "no use for it"),
        ("classification", lambda t: t.assign(case=1), [], 3, "'case' would stand twice"),
        ("series", lambda t: t.drop(columns="target"), [], 3, "no column target"),
        ("forecast", lambda t: t, [], 2, "tsmoe forecast"),
        ("series", lambda t: t, ["--batch-size", "0"], 2, "--batch-size"),
        ("series", lambda t: t, ["--out", "x.txt"], 2, ".csv or .parquet"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    packages, files, tmp_path, capsys, task, changed, options, code, named
) -> None:
    path = files[task]
    table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    changed(table).to_parquet(tmp_path / "new.parquet", index=False)
    capsys.readouterr()
    assert main(["predict", packages[task], str(tmp_path / "new.parquet"), *options]) == code
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1, captured.err
    assert not captured.out


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ("anomaly", "threshold"), ("anomaly", "entities"), ("anomaly", "variates"),
        ("anomaly", "hidden_share"), ("imputation", "mean"), ("imputation", "variates"),
        ("classification", "classes"), ("series", "type"),
    ],
)  # fmt: skip
def test_package_of_an_earlier_version_is_told_what_it_lacks(
    packages, files, tmp_path, capsys, task, key
) -> None:
    shutil.copytree(packages[task], tmp_path / "package")
    card = json.loads((tmp_path / "package" / "card.json").read_text())
    del card["tasks"][task][key]
    (tmp_path / "package" / "card.json").write_text(json.dumps(card))
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "package"), str(files[task])]) == 3
    assert f"package: the card of the package does not say '{key}'" in capsys.readouterr().err


def test_folder_of_a_run_is_told_from_its_package(packages, files, capsys) -> None:
    assert main(["predict", str(Path(packages["series"]).parent), str(files["series"])]) == 3
    assert f"that of the run is {packages['series']}" in capsys.readouterr().err
