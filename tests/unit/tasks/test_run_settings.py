"""What of a run's settings reaches the model, and what a run must be continued with."""

import copy
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from task_run import Settings, small_run, write_waves
from tsmoe.ranks import Ranks
from tsmoe.tasks.config import TaskRun
from tsmoe.tasks.run import TaskWork, open_tasks


def work_of(folder, *settings: Settings) -> TaskWork:
    config = small_run(folder / "run", {"forecast": write_waves(folder / "waves.csv")}, *settings)
    tasks = open_tasks(config)
    run = TaskRun.of(config, {name: task.head() for name, task in tasks.items()}, 32)
    return TaskWork(run, tasks, Ranks())


def shortcut(value: str | None) -> Settings:
    return {"tasks": {"forecast": {"shortcut": value}}}


@pytest.mark.parametrize("value", ["from_mean", "from_last", None])
def test_shortcut_of_a_task_is_that_of_its_head(tmp_path, value) -> None:
    head = work_of(tmp_path, shortcut(value)).run.model.heads["forecast"]
    assert (head.shortcut, head.prediction_length) == (value, 16)


@pytest.mark.parametrize("value", ["from_last", None])
def test_shortcut_of_series_is_that_of_their_head(tmp_path, value) -> None:
    series = {"item_id": ["a", "b"], "target": [[float(i % 7) for i in range(200)]] * 2}
    pq.write_table(pa.table(series), tmp_path / "series.parquet")
    task = {"type": "series", "prediction_length": 8, "season": 7, "shortcut": value}
    path = {"path": str(tmp_path / "series.parquet")}
    config = small_run(tmp_path / "run", {}, {"tasks": {"many": {**task, **path}}})
    (opened,) = open_tasks(config).values()
    assert opened.head().shortcut == value


def test_setting_that_is_younger_than_a_checkpoint_had_its_default(tmp_path) -> None:
    work = work_of(tmp_path)
    saved = json.loads(json.dumps(work.settings()))
    older = copy.deepcopy(saved)
    del older["model"]["norms_first"], older["model"]["heads"]["forecast"]["shortcut"]
    del older["tasks"]["forecast"]["shortcut"]
    assert work.decisive(older) == work.decisive(saved) == work.decisive(work.settings())
    for other in (shortcut("from_mean"), {"model": {"norms_first": True}}):
        now = work_of(tmp_path, other)
        assert now.decisive(now.settings()) != now.decisive(older)


def test_run_goes_on_with_the_windows_of_a_step_alone(tmp_path) -> None:
    saved = work_of(tmp_path).settings()
    for training, is_other in (({"global_batch_size": 64}, True), ({"steps": 9}, False)):
        now = work_of(tmp_path, {"training": training})
        assert (now.decisive(now.settings()) != now.decisive(saved)) is is_other, training


def test_settings_of_another_program_are_compared_as_they_stand(tmp_path) -> None:
    work = work_of(tmp_path)
    strange = {**work.settings(), "optimiser": "unheard of"}
    strange["model"] = {**strange["model"], "d_model": 64, "colour": "blue"}
    assert work.decisive(strange)["model"]["colour"] == "blue"
