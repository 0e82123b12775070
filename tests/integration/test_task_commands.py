"""PatchMoE as a user meets it: each task from the command line, and what bad input gets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from task_run import SMALL, TASKS, Settings, write_files, write_machines, write_shapes, write_waves
from tsmoe.__main__ import main
from tsmoe.config import merge_layers

PRESETS = ("forecast", "univariate", "anomaly", "imputation", "classification", "multitask")
FASTER: Settings = {"training": {"steps": 40, "validate_every_steps": 20}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def files(folder) -> dict[str, Path]:
    return write_files(folder)


def write_config(path: Path, task: str, *settings: Settings) -> str:
    path.write_text(
        yaml.safe_dump(
            merge_layers({"run": "unused"}, SMALL, {"tasks": {task: TASKS[task]}}, *settings)
        )
    )
    return str(path)


@pytest.fixture(scope="module")
def trained(folder, files) -> dict[str, Path]:
    """A run of each task, long enough to have learned something."""
    runs = {}
    for task in TASKS:
        config = write_config(folder / f"{task}.yaml", task, FASTER)
        runs[task] = folder / f"run-{task}"
        assert main(["finetune", config, f"data={files[task]}", f"run={runs[task]}"]) == 0
    return runs


def results(run: Path, task: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a run by model, the last one of each."""
    found = json.loads((run / "result.json").read_text())["test"][task]
    return {row["model"]: row for row in found["results"]}


def test_each_task_leaves_a_run_and_learns(trained) -> None:
    for run in trained.values():
        assert {path.name for path in run.iterdir()} >= {
            "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "package", "result.json",
            "DONE",
        }  # fmt: skip
    assert results(trained["forecast"], "forecast")["tsmoe"]["mse"] < 0.5
    by_model = results(trained["imputation"], "imputation")
    assert by_model["tsmoe"]["masked_mse"] < by_model["window_mean"]["masked_mse"]
    assert results(trained["anomaly"], "anomaly")["tsmoe"]["auc_roc"] > 0.6
    assert results(trained["classification"], "classification")["tsmoe"]["accuracy"] > 0.75


def test_evaluate_repeats_the_figures_of_the_run(trained, files, capsys) -> None:
    for task, run in trained.items():
        capsys.readouterr()
        words = ["evaluate", str(run / "package"), "--task", task, "--data", str(files[task])]
        assert main([*words, "--json", "-"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found == json.loads((run / "result.json").read_text())["test"][task]
        assert ("notes" in found) is (task == "anomaly")
    words = ["evaluate", str(trained["anomaly"] / "package"), "--task", "anomaly"]
    assert main([*words, "--data", str(files["anomaly"])]) == 0
    assert "point_adjusted_f1 counts an anomaly as found whole" in capsys.readouterr().out


def test_metrics_tell_loads_and_the_balance_loss(trained) -> None:
    lines = [json.loads(line) for line in (trained["forecast"] / "metrics.jsonl").open()]
    step = next(line for line in lines if "loss/train" in line)
    tokens = 8 * 3 * 4  # windows, variates, patches
    assert [sum(load) for load in step["experts"]["load"]] == [2 * tokens] * 2
    assert 0.2 < step["loss/regulariser"] < 0.2 * 2 * 2
    assert step["speed/mfu"] is None or step["speed/mfu"] > 0


def test_forecast_command_reads_any_unit(trained, folder, tmp_path, capsys) -> None:
    table = pd.read_csv(folder / "waves.csv")
    moved = table.copy()
    moved.iloc[:, 1:] = 1000 * moved.iloc[:, 1:] + 5e4
    moved.to_csv(tmp_path / "moved.csv", index=False)
    found = []
    for path in (folder / "waves.csv", tmp_path / "moved.csv"):
        capsys.readouterr()
        words = ["forecast", str(trained["forecast"] / "package"), str(path)]
        assert main([*words, "--horizon", "20", "--json"]) == 0
        forecast = json.loads(capsys.readouterr().out)
        found.append(np.array([v["mean"] for v in forecast["variates"].values()]))
    assert found[0].shape == (3, 20)
    np.testing.assert_allclose(found[1], 1000 * found[0] + 5e4, rtol=1e-3, atol=5)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_begins_to_train(preset, files, folder, tmp_path) -> None:
    task = {"univariate": "forecast", "multitask": "forecast"}.get(preset, preset)
    waves = write_waves(tmp_path / "long.csv", rows=1500)
    path = waves if task in ("forecast", "imputation") else files[task]
    words = ["finetune", f"patch_moe_{preset}", f"data={path}", f"run={tmp_path / 'run'}"]
    fast = ["training.steps=4", "training.validate_every_steps=4", "stopping.max_windows=8",
            "training.global_batch_size=8", "training.micro_batch_size=8"]  # fmt: skip
    assert main([*words, *fast, "training.device=cpu", "optimizer.lr=0.003"]) == 0
    expected = {"forecast", "imputation"} if preset == "multitask" else {task}
    assert set(json.loads((tmp_path / "run" / "result.json").read_text())["test"]) == expected


def test_interrupted_run_goes_on_to_the_same_weights(folder, files, tmp_path) -> None:
    config = write_config(tmp_path / "c.yaml", "forecast")
    ends = []
    for run, stops in (("whole", []), ("parts", [3])):
        words = ["finetune", config, f"data={files['forecast']}", f"run={tmp_path / run}"]
        for steps in [*stops, 6]:
            # The learning rate is a function of all steps, so a stop is a checkpoint taken away.
            assert main([*words, "training.steps=6"]) == 0
            if steps != 6:
                for name in ("step_00000006",):
                    folder_of = tmp_path / run / "checkpoints" / name
                    folder_of.rename(tmp_path / "away")
                    (folder_of.parent / "latest").write_text("step_00000003\n")
        ends.append(json.loads((tmp_path / run / "result.json").read_text()))
    assert ends[0]["validation_error"] == ends[1]["validation_error"]
    assert ends[0]["test"] == ends[1]["test"]


def test_other_settings_in_the_same_folder_are_refused(trained, files, folder, capsys) -> None:
    config = str(folder / "forecast.yaml")
    words = ["finetune", config, f"data={files['forecast']}", f"run={trained['forecast']}"]
    assert main([*words, "balance_loss.alpha=0.5"]) == 3
    assert "balance_loss" in capsys.readouterr().err
    assert (trained["forecast"] / "package").exists()


def refused(words: list[str], capsys) -> tuple[int, str]:
    """Return exit code and the one line of an error."""
    capsys.readouterr()
    code = main(words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tsmoe: ")]
    assert len(lines) == 1, lines
    return code, lines[0]


@pytest.mark.parametrize(
    ("task", "settings", "code", "words"),
    [
        ("forecast", ["tasks.forecast.prediction_length=300"], 3, ["too few rows", "300"]),
        ("forecast", ["tasks.forecast.columns=[nowhere]"], 2, ["nowhere", "wave 0"]),
        ("forecast", ["model=package"], 2, ["model=package", "from scratch"]),
        ("forecast", ["model.has_task_embedding=true"], 2, ["has_task_embedding", "one task"]),
        ("forecast", ["model.context_length=7"], 2, ["context_length (7)", "one patch"]),
        (
            "forecast",
            ["model.feed_forward.router={type: sequence}"],
            2,
            ["balance_loss", "sequence", "alpha"],
        ),
        ("forecast", ["tasks.forecast.path=none.csv"], 3, ["none.csv"]),
        ("imputation", ["tasks.imputation.mask.shares=[1.0]"], 2, ["shares", "learn from"]),
        ("imputation", ["tasks.imputation.mask.shares=[]"], 2, ["shares"]),
        ("anomaly", ["tasks.anomaly.label_column=nothing"], 2, ["nothing"]),
        ("anomaly", ["tasks.anomaly.validation_share=1"], 2, ["validation_share (1.0)"]),
        ("anomaly", ["tasks.anomaly.hidden_share=0.9"], 2, ["hidden_share (0.9)", "0.5"]),
        ("anomaly", ["tasks.anomaly.hidden_share=0.01"], 2, ["hidden_share (0.01)", "4 patches"]),
        ("imputation", ["tasks.imputation.mask.shares=[1e-9]"], 2, ["shares", "96"]),
        ("imputation", ["tasks.imputation.mask.block_length=50"], 2, ["block_length (50)", "32"]),
        ("forecast", ["tasks.forecast.season=-5"], 2, ["season (-5)"]),
        ("forecast", ["tasks.train={type: forecast}"], 2, ["'train' can be no name"]),
        ("forecast", ["tasks.my_expert={type: forecast}"], 2, ["'my_expert'"]),
        ("classification", ["tasks.classification.validation_share=0"], 2, ["validation_share"]),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_in_one_line(
    files, folder, tmp_path, capsys, task, settings, code, words
) -> None:
    config = write_config(tmp_path / "c.yaml", task)
    found, line = refused(
        ["finetune", config, f"data={files[task]}", f"run={tmp_path / 'run'}", *settings], capsys
    )
    assert found == code, line
    assert all(word in line for word in words), line
    assert not (tmp_path / "run" / "package").exists()


def edited(path: Path, edit: Any) -> Path:
    frame = pd.read_parquet(path)
    frame = edit(frame)
    frame.to_parquet(path, index=False)
    return path


def test_train_part_with_labelled_anomalies_is_refused_or_left_out(tmp_path, capsys) -> None:
    def label(frame: pd.DataFrame) -> pd.DataFrame:
        is_train = frame["split"] == "train"
        frame.loc[is_train, "label"] = 0.0
        frame.loc[frame.index[10:15], "label"] = 1.0
        return frame

    path = edited(write_machines(tmp_path / "m.parquet"), label)
    config = write_config(tmp_path / "c.yaml", "anomaly")
    words = ["finetune", config, f"data={path}", f"run={tmp_path / 'run'}"]
    code, line = refused(words, capsys)
    assert code == 3
    assert "5 rows of the train part" in line
    assert "leaves_out_labelled=true" in line
    assert main([*words, "tasks.anomaly.leaves_out_labelled=true"]) == 0


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda f: f.assign(label=np.where(f["split"] == "test", "new", f["label"])), ["new"]),
        (lambda f: f.assign(label="one"), ["one"]),
    ],
)
def test_classes_that_cannot_be_learned_are_refused(tmp_path, capsys, edit, words) -> None:
    path = edited(write_shapes(tmp_path / "s.parquet"), edit)
    config = write_config(tmp_path / "c.yaml", "classification")
    run = tmp_path / "run"
    code, line = refused(["finetune", config, f"data={path}", f"run={run}"], capsys)
    assert code == 3
    assert all(word in line for word in words), line


def test_packages_are_told_apart(trained, files, tmp_path, capsys) -> None:
    package = str(trained["anomaly"] / "package")
    for words, told in (
        (["--task", "forecast", "--data", str(files["forecast"])], ["no task", "anomaly"]),
        (["--task", "anomaly", "--data", str(files["anomaly"]), "--context", "99"], ["99", "32"]),
        (
            ["--task", "anomaly", "--data", str(files["anomaly"]), "--protocol", "gift"],
            ["--protocol gift"],
        ),
        (
            ["--task", "anomaly", "--data", str(files["anomaly"]), "--columns", "f0"],
            ["columns", "anomaly"],
        ),
    ):
        code, line = refused(["evaluate", package, *words], capsys)
        assert code == 2, line
        assert all(word in line for word in told), line
    table = str(files["forecast"])
    code, line = refused(["forecast", package, table, "--horizon", "4"], capsys)
    assert code == 2
    assert "the package does not forecast" in line
    words = ["finetune", "full", f"model={package}", f"data={table}", f"run={tmp_path / 'r'}"]
    code, line = refused(words, capsys)
    assert code == 3
    assert "patch_moe" in line


def test_series_of_their_own_are_forecast(tmp_path, capsys) -> None:
    generator = np.random.default_rng(0)
    names = [f"s{number}" for number in range(6)]
    waves = [
        10 + 3 * np.sin(np.arange(length) * 2 * np.pi / 12) + generator.normal(size=length)
        for length in range(120, 180, 10)
    ]
    frame = pd.DataFrame({"item_id": names, "target": [w[:-8].astype(np.float32) for w in waves]})
    frame.to_parquet(tmp_path / "train.parquet")
    frame["target"] = [wave[-8:].astype(np.float32) for wave in waves]
    frame.to_parquet(tmp_path / "test.parquet")
    config = write_config(
        tmp_path / "c.yaml",
        "forecast",
        FASTER,
        {"tasks": {"forecast": {"type": "series", "prediction_length": 8, "season": 12}}},
    )
    words = ["finetune", config, f"data={tmp_path / 'train.parquet'}", f"run={tmp_path / 'run'}"]
    assert main([*words, f"tasks.forecast.test_path={tmp_path / 'test.parquet'}"]) == 0
    found = results(tmp_path / "run", "forecast")
    assert set(found) == {"tsmoe", "naive2", "naive"}
    assert found["naive2"]["owa"] == pytest.approx(1)
    assert found["tsmoe"]["mase"] < found["naive"]["mase"]
    package = str(tmp_path / "run" / "package")
    capsys.readouterr()
    words = ["evaluate", package, "--task", "series", "--data", str(tmp_path / "train.parquet")]
    assert main([*words, "--test-data", str(tmp_path / "test.parquet"), "--json", "-"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {row["model"]: row for row in again["results"]} == found


def test_series_that_have_no_figures_are_left_out_and_counted(tmp_path) -> None:
    wave = 10 + np.sin(np.arange(120) * 2 * np.pi / 12) + np.arange(120) / 50
    kinds = {"fine": wave, "constant": np.full(120, 3.0), "gap": np.where(wave > 11, np.nan, wave)}
    frame = pd.DataFrame(
        {"item_id": list(kinds), "target": [v.astype(np.float32) for v in kinds.values()]}
    )
    frame.to_parquet(tmp_path / "series.parquet")
    config = write_config(
        tmp_path / "c.yaml",
        "forecast",
        {"tasks": {"forecast": {"type": "series", "prediction_length": 8, "season": 12}}},
    )
    words = ["finetune", config, f"data={tmp_path / 'series.parquet'}", f"run={tmp_path / 'run'}"]
    assert main(words) == 0
    found = json.loads((tmp_path / "run" / "result.json").read_text())["test"]["forecast"]
    assert (found["series"], found["series_left_out"]) == (1, 2)


def test_packages_of_several_tasks_are_evaluated_by_kind_or_name(files, tmp_path, capsys) -> None:
    config = write_config(
        tmp_path / "c.yaml",
        "forecast",
        {"model": {"has_task_embedding": True},
         "tasks": {"imputation": TASKS["imputation"], "far": {**TASKS["forecast"],
                                                              "prediction_length": 24}}},
    )  # fmt: skip
    run, data = tmp_path / "run", str(files["forecast"])
    assert main(["finetune", config, f"data={data}", f"run={run}"]) == 0
    test = json.loads((run / "result.json").read_text())["test"]
    for task, name in (("imputation", "imputation"), ("far", "far"), ("forecast", "forecast")):
        capsys.readouterr()
        words = ["evaluate", str(run / "package"), "--task", task, "--data", data, "--json", "-"]
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out) == test[name]


def test_tasks_in_another_order_are_another_run(files, tmp_path, capsys) -> None:
    orders = [("forecast", "imputation"), ("imputation", "forecast")]
    for number, names in enumerate(orders):
        path = tmp_path / f"{number}.yaml"
        tasks = {name: TASKS[name] for name in names}
        settings = merge_layers({"run": "unused"}, SMALL, {"tasks": tasks})
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        words = ["finetune", str(path), f"data={files['forecast']}", f"run={tmp_path / 'run'}"]
        capsys.readouterr()
        assert main(words) == (3 if number else 0)
    assert "order of tasks" in capsys.readouterr().err


def test_the_same_file_by_another_path_is_evaluated_alike(
    files, tmp_path, capsys, monkeypatch
) -> None:
    config = write_config(
        tmp_path / "c.yaml", "forecast", {"tasks": {"forecast": {"columns": ["wave 1"]}}}
    )
    data = files["forecast"]
    assert main(["finetune", config, f"data={data}", f"run={tmp_path / 'run'}"]) == 0
    monkeypatch.chdir(data.parent)
    found = []
    for spelled in (str(data), data.name, f"./{data.name}"):
        capsys.readouterr()
        words = ["evaluate", str(tmp_path / "run" / "package"), "--data", spelled, "--json", "-"]
        assert main(words) == 0
        found.append(json.loads(capsys.readouterr().out)["variates"])
    assert found[0] == found[1] == found[2]
    assert list(found[0]) == ["wave 1"]


def test_cases_of_another_length_are_evaluated(trained, tmp_path, capsys) -> None:
    frame = pd.read_parquet(write_shapes(tmp_path / "s.parquet"))
    frame["dims"] = [[np.tile(channel, 2) for channel in case] for case in frame["dims"]]
    frame.to_parquet(tmp_path / "long.parquet")
    package = str(trained["classification"] / "package")
    words = ["evaluate", package, "--task", "classification", "--data"]
    assert main([*words, str(tmp_path / "long.parquet"), "--json", "-"]) == 0


def test_value_out_of_all_proportion_scores_highest_and_breaks_nothing(files, tmp_path) -> None:
    frame = pd.read_parquet(files["anomaly"])
    places = frame.index[(frame["split"] == "test") & (frame["label"] == 1)][:1]
    frame.loc[places, "f0"] = 3e38
    frame.to_parquet(tmp_path / "m.parquet")
    config = write_config(tmp_path / "c.yaml", "anomaly")
    words = ["finetune", config, f"data={tmp_path / 'm.parquet'}", f"run={tmp_path / 'run'}"]
    assert main(words) == 0
    text = (tmp_path / "run" / "result.json").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
