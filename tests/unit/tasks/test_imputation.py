"""What is hidden, and the simple ways to fill it."""

import numpy as np
import pytest

from task_run import write_waves
from tsmoe.errors import DataError
from tsmoe.tasks.config import ImputationTaskConfig, MaskConfig
from tsmoe.tasks.imputation import ImputationTask, draw_mask, fill_rows, fill_simply


@pytest.mark.parametrize("kind", ["points", "blocks"])
@pytest.mark.parametrize("share", [0.125, 0.5])
def test_mask_hides_its_share_of_the_points(kind, share) -> None:
    generator = np.random.default_rng(0)
    hidden = np.stack([draw_mask((4, 96), kind, share, 12, generator) for _ in range(500)])
    assert hidden.mean() == pytest.approx(share, abs=0.02)
    # Every step alike, those at the ends too.
    np.testing.assert_allclose(hidden.mean(axis=(0, 1)), share, atol=0.06)


def test_blocks_are_stretches_and_points_are_not() -> None:
    def mean_run(kind: str) -> float:
        hidden_L = draw_mask((1, 20_000), kind, 0.25, 12, np.random.default_rng(1))[0]
        starts = hidden_L & ~np.concatenate(([False], hidden_L[:-1]))
        return hidden_L.sum() / starts.sum()

    assert mean_run("points") == pytest.approx(4 / 3, abs=0.1)
    assert mean_run("blocks") > 12


def test_simple_fills_are_those_of_their_names() -> None:
    values = np.array([[[np.nan, 1, np.nan, np.nan, 4, np.nan], [np.nan] * 6]], np.float32)
    filled = fill_simply(values)
    np.testing.assert_allclose(filled["linear_interpolation"][0, 0], [1, 1, 2, 3, 4, 4])
    np.testing.assert_allclose(filled["window_mean"][0, 0], [2.5, 1, 2.5, 2.5, 4, 2.5])
    assert (filled["linear_interpolation"][0, 1] == 0).all()


@pytest.fixture
def task(tmp_path) -> ImputationTask:
    path = write_waves(tmp_path / "waves.csv")
    config = ImputationTaskConfig(mask=MaskConfig(shares=(0.25,), kinds=("points",)))
    return ImputationTask("fill", config, str(path), context_length=32)


def test_targets_are_what_is_hidden_and_recorded(task) -> None:
    items = np.arange(0, task.num_train, 7)
    batch = task.training_batch(items, items)
    is_recorded = np.isfinite(task._store.cut(task._starts["train"][items], 32))
    shown, target = batch.observed_BCL.numpy(), batch.is_target_BCL.numpy()
    assert not (shown & target).any()
    np.testing.assert_array_equal(shown | target, is_recorded)
    assert target.mean() == pytest.approx(0.25, abs=0.03)
    assert not is_recorded.all(), "the gap of the file is neither shown nor asked for"


def test_masks_are_drawn_for_positions_not_for_windows_or_ranks(task) -> None:
    items = np.array([3, 3])
    first, second = task.training_batch(items, np.array([10, 11])).is_target_BCL
    assert (first != second).any()
    again = task.training_batch(items[:1], np.array([11])).is_target_BCL[0]
    assert (again == second).all()
    whole = task.validation_batch(np.arange(4)).is_target_BCL
    assert (task.validation_batch(np.arange(2, 4)).is_target_BCL == whole[2:]).all()


class _Perfect:
    """Fills with the truth."""

    context_length = 32

    def predict(self, values_BCL, task, *, shown_BCL):
        return values_BCL


def test_only_what_was_hidden_and_recorded_is_scored(task) -> None:
    results = {row["model"]: row for row in task.evaluate(_Perfect()).results}
    assert results["tsmoe"]["masked_mse"] == 0
    assert 0 < results["linear_interpolation"]["masked_mse"] < results["window_mean"]["masked_mse"]


def test_mask_that_hides_nothing_recorded_is_an_error(task) -> None:
    task._store._rows_RC[:] = np.nan
    with pytest.raises(DataError, match="hides no recorded value"):
        task.evaluate(_Perfect())


class _Watched:
    """Answers with the values that it is shown, or where in its window each stands."""

    context_length = 16

    def __init__(self, *, tells_places: bool) -> None:
        self.tells_places = tells_places

    def predict(self, values_BCL, task):
        assert task == "gaps"
        if self.tells_places:
            return np.broadcast_to(np.arange(16, dtype=np.float32), values_BCL.shape)
        return np.nan_to_num(values_BCL, nan=-1)


@pytest.mark.parametrize("length", [5, 16, 17, 24, 40, 41, 100])
def test_rows_are_filled_from_the_window_in_whose_middle_they_are(length) -> None:
    rows_LC = np.random.default_rng(0).normal(size=(length, 3)).astype(np.float32)
    rows_LC[2] = np.nan
    filled_LC = fill_rows(_Watched(tells_places=False), "gaps", rows_LC)
    np.testing.assert_array_equal(filled_LC, np.nan_to_num(rows_LC, nan=-1))
    place_L = fill_rows(_Watched(tells_places=True), "gaps", rows_LC)[:, 0]
    assert place_L[-1] == 15, "the last window ends with the table"
    inner_L = place_L[8:-8]
    assert ((inner_L >= 4) & (inner_L <= 12)).all()
