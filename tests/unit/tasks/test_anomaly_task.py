"""Windows, scores and thresholds of anomaly detection."""

import numpy as np
import pytest

from task_run import write_machines
from tsmoe.tasks.anomaly import AnomalyTask, reconstruction_scores
from tsmoe.tasks.config import AnomalyTaskConfig


class _Model:
    """Reconstructs zeros, and remembers what it was shown."""

    context_length = 32

    def __init__(self) -> None:
        self.shown: list[np.ndarray] = []

    def predict(self, values_BCL, task, *, shown_BCL):
        self.shown.append(shown_BCL & np.isfinite(values_BCL))
        return np.zeros_like(values_BCL)


@pytest.fixture
def task(tmp_path) -> AnomalyTask:
    path = write_machines(tmp_path / "machines.parquet")
    return AnomalyTask("watch", AnomalyTaskConfig(), str(path), context_length=32, patch_length=8)


@pytest.mark.parametrize("length", [5, 32, 70])
@pytest.mark.parametrize("hidden_share", [0.0, 0.25, 0.5])
def test_each_row_is_scored_once_by_its_own_error(length, hidden_share) -> None:
    values_LC = np.random.default_rng(0).normal(size=(length, 3)).astype(np.float32)
    values_LC[1, 2] = np.nan
    model = _Model()
    scores_L = reconstruction_scores(
        model, "watch", values_LC, patch_length=8, hidden_share=hidden_share
    )
    np.testing.assert_allclose(scores_L, np.nanmean(np.square(values_LC), axis=1), rtol=1e-6)
    shown = np.stack(model.shown)
    if not hidden_share:
        assert len(shown) == 1
        assert shown.sum() == np.isfinite(values_LC).sum()
    else:  # every value is hidden in one of the passes, and in one alone
        assert len(shown) == round(1 / hidden_share)
        assert shown.sum() == (len(shown) - 1) * np.isfinite(values_LC).sum()


def test_row_of_which_nothing_is_recorded_has_no_score() -> None:
    values_LC = np.ones((40, 2), np.float32)
    values_LC[5:9] = np.nan
    values_LC[20, 0] = np.nan
    scores_L = reconstruction_scores(_Model(), "w", values_LC, patch_length=8, hidden_share=0.0)
    assert np.flatnonzero(np.isnan(scores_L)).tolist() == [5, 6, 7, 8]


def test_rows_without_a_score_do_not_move_the_threshold(task) -> None:
    before = task.threshold(_Model())
    for train_LC, _ in task._scaled:
        train_LC[-40:-10] = np.nan
    after = task.threshold(_Model())
    rest = np.concatenate([train_LC[240:] for train_LC, _ in task._scaled])
    expected = np.nanquantile(np.square(rest).mean(axis=1), 0.99)
    assert after == pytest.approx(expected, rel=1e-5)
    assert after == pytest.approx(before, rel=0.2)


def test_training_windows_end_before_validation_begins(task) -> None:
    rows = len(task.data.entities[0].train_LC)
    border = int(rows * 0.8)
    for offset in task._store.offsets:
        ends = task._train_M + 32 - offset
        assert ends[(ends > 0) & (ends <= rows)].max() == border
    places = np.arange(task.num_train)
    ids = task.training_batch(places, places).series_ids_B
    assert {task.series_name(int(i)) for i in ids} == {"m1", "m2"}


@pytest.mark.parametrize("context", [32, 96, 200])
def test_validation_asks_for_every_row_of_its_part_and_for_no_other(tmp_path, context) -> None:
    path = write_machines(tmp_path / "m.parquet")
    task = AnomalyTask("w", AnomalyTaskConfig(), str(path), context_length=context, patch_length=8)
    rows = len(task.data.entities[0].train_LC)
    places = np.arange(task.num_validation)
    target_BL = task.validation_batch(places).is_target_BCL[:, 0].numpy()
    asked = np.unique((task._validation_M[:, None] + np.arange(context))[target_BL])
    expected = [offset + np.arange(int(rows * 0.8), rows) for offset in task._store.offsets]
    assert asked.tolist() == np.concatenate(expected).tolist()


def test_every_entity_is_scaled_by_its_own_train_part(task) -> None:
    for train_LC, _ in task._scaled:
        np.testing.assert_allclose(train_LC.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(train_LC.std(axis=0), 1, atol=1e-4)


def test_threshold_is_of_the_train_part_alone(task) -> None:
    before = task.evaluate(_Model()).results[0]["threshold"]
    for _, test_LC in task._scaled:
        test_LC *= 100
    after = task.evaluate(_Model())
    assert after.results[0]["threshold"] == before
    assert after.results[0]["flagged_fraction"] > 0.9
    assert set(after.tables["entities"]) == {"m1", "m2"}


def test_hidden_patches_are_the_targets(tmp_path) -> None:
    path = write_machines(tmp_path / "m.parquet")
    config = AnomalyTaskConfig(hidden_share=0.5)
    task = AnomalyTask("watch", config, str(path), context_length=32, patch_length=8)
    places = np.arange(200)
    batch = task.training_batch(places, places)
    shown, target = batch.observed_BCL.numpy(), batch.is_target_BCL.numpy()
    assert not (shown & target).any()
    by_patch = target.reshape(*target.shape[:2], 4, 8)
    assert (by_patch.any(-1) == by_patch.all(-1)).all()
    assert target.mean() == pytest.approx(0.5, abs=0.05)
