"""`tsmoe predict`: answers for data that nobody has labelled, and what bad input gets."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from task_run import SMALL, TASKS, Settings, write_files
from tsmoe.__main__ import main
from tsmoe.config import merge_layers
from tsmoe.evaluate.anomaly_metrics import auc_roc

ENOUGH: Settings = {"training": {"steps": 40, "validate_every_steps": 20}}
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
    return {**write_files(folder), "series": write_series(folder / "series.parquet")}


@pytest.fixture(scope="module")
def packages(folder, files) -> dict[str, str]:
    """A package of each task, long enough trained to have learned something."""
    found = {}
    for task in ("anomaly", "imputation", "classification", "series", "forecast"):
        tasks = {"tasks": {task: SERIES if task == "series" else TASKS[task]}}
        config = folder / f"{task}.yaml"
        config.write_text(yaml.safe_dump(merge_layers({"run": "unused"}, SMALL, tasks, ENOUGH)))
        run = folder / f"run-{task}"
        assert main(["finetune", str(config), f"data={files[task]}", f"run={run}"]) == 0
        found[task] = str(run / "package")
    return found


def result_of(package: str, task: str) -> dict[str, float]:
    found = json.loads((Path(package).parent / "result.json").read_text())["test"][task]["results"]
    return found[0]


def predict(package: str, data: Path, out: Path, *options: str) -> pd.DataFrame:
    assert main(["predict", package, str(data), "--out", str(out), *options]) == 0
    return pd.read_csv(out)


def test_rows_are_scored_as_they_were_judged(packages, files, tmp_path) -> None:
    rows = pd.read_parquet(files["anomaly"])
    test = rows[rows["split"] == "test"].reset_index(drop=True)
    unlabelled = test.drop(columns=["split", "label"])
    unlabelled.to_parquet(tmp_path / "new.parquet")
    found = predict(packages["anomaly"], tmp_path / "new.parquet", tmp_path / "out.csv")
    assert list(found) == ["entity", "score", "is_anomaly"]
    assert found["entity"].tolist() == test["entity"].tolist()
    expected = result_of(packages["anomaly"], "anomaly")
    scores = found["score"].to_numpy()
    assert auc_roc(scores, test["label"].to_numpy() == 1) == pytest.approx(expected["auc_roc"])
    card = json.loads((Path(packages["anomaly"]) / "card.json").read_text())
    threshold = card["tasks"]["anomaly"]["threshold"]
    assert threshold == pytest.approx(expected["threshold"])
    assert found["is_anomaly"].tolist() == (scores > threshold).tolist()
    assert 0 < found["is_anomaly"].mean() < 0.5
    # Rows in another order, with times that tell the right one.
    times = unlabelled.assign(time=pd.date_range("2024", periods=len(test), freq="min"))
    mixed = times.sample(frac=1, random_state=0)
    mixed.to_parquet(tmp_path / "mixed.parquet")
    again = predict(packages["anomaly"], tmp_path / "mixed.parquet", tmp_path / "mixed.csv")
    assert list(again) == ["entity", "time", "score", "is_anomaly"]
    np.testing.assert_allclose(again["score"], scores[mixed.index], rtol=1e-4)


def test_gaps_are_filled_and_the_rest_stays(packages, files, tmp_path) -> None:
    table = pd.read_csv(files["imputation"])
    holes = table.copy()
    is_hole = np.random.default_rng(0).random(len(table)) < 0.25
    holes.loc[is_hole, "wave 1"] = holes.loc[256, "wave 2"] = np.nan
    holes.to_csv(tmp_path / "holes.csv", index=False)
    found = predict(packages["imputation"], tmp_path / "holes.csv", tmp_path / "out.csv")
    assert list(found) == list(table)
    assert np.isfinite(found.drop(columns="date")).all(axis=None)
    is_there = holes.notna()
    pd.testing.assert_frame_equal(
        found.where(is_there).drop(columns="date"), holes.drop(columns="date"), rtol=1e-5
    )
    error = (found["wave 1"] - table["wave 1"])[is_hole].std()
    assert error < 0.8 * table["wave 1"][is_hole].std()


def test_cases_are_classified_as_they_were_judged(packages, files, tmp_path) -> None:
    cases = pq.read_table(files["classification"])
    labels = np.array(cases["label"].to_pylist())
    is_test = np.array(cases["split"].to_pylist()) == "test"
    pq.write_table(cases.filter(is_test).select(["dims"]), tmp_path / "new.parquet")
    found = predict(packages["classification"], tmp_path / "new.parquet", tmp_path / "out.csv")
    assert list(found) == ["case", "class", "probability fast", "probability slow"]
    accuracy = (found["class"].to_numpy() == labels[is_test]).mean()
    assert accuracy == result_of(packages["classification"], "classification")["accuracy"]
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
    higher = write_series(tmp_path / "higher.parquet", more=100)
    found = predict(packages["series"], higher, tmp_path / "out.csv")
    plain = np.array([float(line.split(",")[2]) for line in lines[1:]])
    np.testing.assert_allclose(found["forecast"], plain + 100, atol=2e-3)
    assert np.abs(plain[:8]).max() < 2 < np.abs(plain[8:]).max() < 18


def test_several_tasks_are_told_apart_by_name(files, tmp_path, capsys) -> None:
    # Cases have two channels, the table has three variates, and each is learned in its turn.
    tasks = {
        name: {**TASKS[name], "path": str(files[name])}
        for name in ("forecast", "anomaly", "classification")
    }
    tasks["near"] = {**TASKS["forecast"], "path": str(files["forecast"]), "prediction_length": 8}
    more = {"run": str(tmp_path / "run"), "tasks": tasks, "model": {"has_task_embedding": True}}
    config = tmp_path / "several.yaml"
    config.write_text(yaml.safe_dump(merge_layers(SMALL, more, {"training": {"steps": 9}})))
    assert main(["finetune", str(config)]) == 0
    package = str(tmp_path / "run" / "package")
    cases, table = str(files["classification"]), str(files["forecast"])
    assert main(["predict", package, cases]) == 2
    named = "anomaly (anomaly), classification (classification), forecast (forecast)"
    assert f"name the task; the package has {named}" in capsys.readouterr().err
    assert main(["predict", package, cases, "--task", "classification"]) == 0
    assert capsys.readouterr().out.startswith("case,class,")
    assert main(["predict", package, table, "--task", "near"]) == 2
    assert "tsmoe forecast" in capsys.readouterr().err
    assert main(["forecast", package, table, "--horizon", "8", "--task", "near"]) == 0
    capsys.readouterr()
    assert main(["forecast", package, table, "--task", "anomaly"]) == 2
    assert "tsmoe predict" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "changed", "options", "code", "named"),
    [
        ("anomaly", lambda t: t.replace({"entity": {"m2": "m9"}}), [], 3, "entities m9; it knows"),
        ("anomaly", lambda t: t.drop(columns="entity"), [], 3, "entities new"),
        ("anomaly", lambda t: t.drop(columns="f1"), [], 3, "no column f1"),
        ("anomaly", lambda t: t.assign(f1="x"), [], 3, "are no numbers"),
        ("anomaly", lambda t: t.assign(f1=np.inf), [], 3, "row 1: infinite"),
        ("anomaly", lambda t: t, ["--entity-column", "who"], 2, "no column 'who'"),
        ("anomaly", lambda t: t, ["--task", "imputation"], 2, "0 tasks of the kind imputation"),
        ("anomaly", lambda t: t, ["--ignore-time"], 2, "no use for it"),
        ("imputation", lambda t: t.assign(**{"wave 1": np.nan}), [], 3, "nothing is observed"),
        ("imputation", lambda t: t.drop(columns="wave 1"), [], 2, "no column 'wave 1'"),
        ("classification", lambda t: t.drop(columns="dims"), [], 3, "no column dims"),
        ("classification", lambda t: t[:0], [], 3, "no rows"),
        ("classification", lambda t: t, ["--time-column", "a"], 2, "no use for it"),
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


def test_package_of_an_earlier_version_is_told_what_it_lacks(
    packages, files, tmp_path, capsys
) -> None:
    import shutil

    shutil.copytree(packages["anomaly"], tmp_path / "package")
    card = json.loads((tmp_path / "package" / "card.json").read_text())
    del card["tasks"]["anomaly"]["threshold"]
    (tmp_path / "package" / "card.json").write_text(json.dumps(card))
    assert main(["predict", str(tmp_path / "package"), str(files["anomaly"])]) == 3
    assert "'threshold'" in capsys.readouterr().err
