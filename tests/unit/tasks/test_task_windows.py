"""Windows of segments, of tables and of cases, and whose turn it is."""

import numpy as np
import pandas as pd
import pytest

from task_run import small_run, write_files, write_shapes, write_waves
from tsmoe.errors import ConfigError, DataError
from tsmoe.ranks import Ranks
from tsmoe.tasks.case_data import read_cases
from tsmoe.tasks.classification import CaseScaler, ClassificationTask
from tsmoe.tasks.config import ClassificationTaskConfig, ForecastTaskConfig, TaskRun
from tsmoe.tasks.forecast import TableForecastTask
from tsmoe.tasks.run import TaskWork, _context_length, open_tasks
from tsmoe.tasks.windows import WindowStore

L, Q = 32, 16


def test_store_cuts_across_nothing_but_the_frame() -> None:
    segments = [
        np.arange(6, dtype=np.float32)[:, None],
        100 + np.arange(4, dtype=np.float32)[:, None],
    ]
    store = WindowStore(segments, lead=3)
    starts = np.concatenate((store.starts(0, -2, 0), store.starts(1, -1, 1)))
    found = store.cut(starts, 3)[:, 0]
    np.testing.assert_array_equal(
        found,
        [[np.nan, np.nan, 0], [np.nan, 0, 1], [0, 1, 2],
         [np.nan, 100, 101], [100, 101, 102], [101, 102, 103]],
    )  # fmt: skip
    assert [store.segment_of(int(start) + 2) for start in starts] == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(store.count_recorded(starts, 0, 3), [1, 2, 3, 2, 3, 3])


@pytest.fixture
def waves(tmp_path) -> str:
    return str(write_waves(tmp_path / "waves.csv"))


@pytest.mark.parametrize("is_univariate", [False, True])
def test_forecast_windows_stay_in_their_part(waves, is_univariate) -> None:
    config = ForecastTaskConfig(prediction_length=Q, is_univariate=is_univariate)
    task = TableForecastTask("f", config, waves, context_length=L)
    variates = 1 if is_univariate else 3
    copies = 3 if is_univariate else 1
    train_end, validation_end = 280, 320
    assert task.num_train == copies * (train_end - L - Q + 1)
    assert task.num_validation == copies * (validation_end - train_end - Q + 1)
    batch = task.training_batch(np.array([0, task.num_train - 1]), np.array([0, 1]))
    assert batch.values_BCL.shape == (2, variates, L + Q)
    assert not batch.observed_BCL[..., L:].any()
    assert not batch.is_target_BCL[..., :L].any()
    scaled_LC = task.scaler.scale(task.table.values_LC)
    last = scaled_LC[train_end - L - Q : train_end, -variates:].T
    np.testing.assert_array_equal(batch.values_BCL[1].numpy(), last)
    if is_univariate:
        assert task.series_name(int(batch.series_ids_B[1])) == "wave 2"


def test_gaps_are_neither_shown_nor_asked_for(waves) -> None:
    task = TableForecastTask("f", ForecastTaskConfig(prediction_length=Q), waves, context_length=L)
    items = np.arange(task.num_train)
    batch = task.training_batch(items, items)
    is_gap = (batch.values_BCL == 0) & ~batch.observed_BCL & ~batch.is_target_BCL
    assert is_gap[:, 0, :L].any()
    assert is_gap[:, 0, L:].any()
    assert not is_gap[:, 1].any() or not is_gap[:, 1, :L].any()


def test_each_class_is_learned_and_validated(tmp_path) -> None:
    path = write_shapes(tmp_path / "s.parquet", cases=20)
    task = ClassificationTask(
        "c", ClassificationTaskConfig(), str(path), context_length=99, patch_length=8
    )
    labels = task.data.train.labels
    assert sorted([*task._train_M, *task._validation_M]) == list(range(20))
    for part, count in ((task._train_M, 8), (task._validation_M, 2)):
        assert np.bincount(labels[part]).tolist() == [count, count]
    assert task.context_length == 32  # the longest case, in whole patches
    batch = task.training_batch(np.arange(4), np.arange(4))
    lengths = [task.data.train.values[case].shape[1] for case in task._train_M[:4]]
    assert batch.observed_BCL[:, 0].sum(-1).tolist() == lengths
    assert batch.observed_BCL[..., -1].all(), "cases end at the last step"


def test_class_of_one_case_is_refused(tmp_path) -> None:
    path = write_shapes(tmp_path / "s.parquet", cases=4)
    frame = pd.read_parquet(path)
    frame.loc[0, "label"] = "rare"
    frame.to_parquet(path)
    with pytest.raises(DataError, match=r"class 'rare' has 1 training case; 2 are needed"):
        ClassificationTask(
            "c", ClassificationTaskConfig(), str(path), context_length=32, patch_length=8
        )


def test_case_scaler_ignores_what_is_missing_and_keeps_constants(tmp_path) -> None:
    cases = [np.array([[1, 3, np.nan], [5, 5, 5]], np.float32), np.array([[5], [5]], np.float32)]
    scaler = CaseScaler.fit(cases)
    np.testing.assert_allclose(scaler.mean_C, [3, 5])
    np.testing.assert_allclose(scaler.std_C, [np.std([1, 3, 5]), 1])
    assert read_cases(write_shapes(tmp_path / "s.parquet")).classes == ("fast", "slow")


def test_tasks_take_turns_and_all_ranks_see_every_window_once(tmp_path) -> None:
    files = write_files(tmp_path)
    names = ("forecast", "imputation")
    config = small_run(tmp_path / "run", {name: files[name] for name in names})
    tasks = open_tasks(config)
    run = TaskRun.of(config, {n: t.head() for n, t in tasks.items()}, _context_length(tasks))
    work = TaskWork(run, tasks, Ranks())
    assert [work.micro_batches(step, Ranks())[0].task for step in range(4)] == [*names, *names]
    whole = work.micro_batches(4, Ranks())[0]
    half = small_run(
        tmp_path / "run", {name: files[name] for name in names},
        {"training": {"micro_batch_size": 2}},
    )  # fmt: skip
    work = TaskWork(TaskRun.of(half, run.model.heads, 32), tasks, Ranks())
    parts = [
        batch for rank in range(2) for batch in work.micro_batches(4, Ranks(rank=rank, size=2))
    ]
    rows = sorted(row.tobytes() for part in parts for row in part.values_BCL.numpy())
    assert rows == sorted(row.tobytes() for row in whole.values_BCL.numpy())


def test_tasks_of_unequal_length_are_refused(tmp_path) -> None:
    files = write_files(tmp_path)
    config = small_run(tmp_path / "run", {"forecast": files["forecast"]})
    tasks = open_tasks(config)
    tasks["other"] = TableForecastTask(
        "other", ForecastTaskConfig(prediction_length=8), str(files["forecast"]), context_length=40
    )
    with pytest.raises(ConfigError, match=r"forecast 32, other 40"):
        _context_length(tasks)
