"""Which windows are learned from, what of them is seen, and what of the table they may touch."""

import numpy as np
import pytest
import torch

from tsmoe.errors import ConfigError, DataError
from tsmoe.finetune.order import uniformly_spaced
from tsmoe.finetune.windows import Geometry, TableWindows
from tsmoe.inference import _Roll
from tsmoe.models import build_model
from tsmoe.ranks import Ranks

# Of the package: patches of 16, a context of 64, two patches in one pass.
BEFORE, AFTER = 48, 32
CONTEXT = 64
HOUR = 3
COVARIATES = {
    "table": {"covariates": ["hour", "b"], "known_future": ["hour"]},
    "mixing": {"num_channel_mixed_layers": 1},
}
MIXED = {"mixing": {"num_channel_mixed_layers": 1}}


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [(10, 10, range(10)), (10, 5, range(0, 10, 2)), (10, 3, (0, 3, 6)), (7, 2, (0, 3)),
     (5, 9, range(5)), (4, 1, (0,)), (10, 6, (0, 1, 3, 5, 6, 8))],
)  # fmt: skip
def test_few_windows_are_spaced_uniformly(count, wanted, expected) -> None:
    assert uniformly_spaced(count, wanted).tolist() == list(expected)


def test_window_holds_what_a_forecast_sees_and_what_follows(lay_out) -> None:
    run, split = lay_out()
    windows = TableWindows(run, split)
    assert windows.geometry == Geometry(
        context_length=BEFORE,
        before=BEFORE,
        after=AFTER,
        patch_length=16,
        prediction_length=32,
        last_patch=1,
    )
    assert len(windows.origins) == split.borders.train_end - CONTEXT - 32 + 1
    batch = windows.micro_batches(0, Ranks())[0]
    assert batch.values_BCL.shape == (16, 1, BEFORE + AFTER)
    for window in range(16):
        variate = int(batch.series_ids_B[window])
        values_L = batch.values_BCL[window, 0].numpy()
        # Found again in the table, at the one place where all of it fits.
        column_L = np.nan_to_num(split.scaled_LC[: split.borders.train_end, variate])
        places = [
            at for at in range(len(column_L) - 79) if np.allclose(column_L[at : at + 80], values_L)
        ]
        assert len(places) == 1 or variate == HOUR, "or the calendar, which repeats"
        is_recorded_L = np.isfinite(split.scaled_LC[places[0] : places[0] + 80, variate])
        observed_L = batch.observed_BCL[window, 0].numpy()
        assert (observed_L == is_recorded_L & (np.arange(80) < BEFORE)).all()
        assert (batch.is_target_BCL[window, 0].numpy() == is_recorded_L).all()


def test_horizon_alone_is_learned_where_wanted(lay_out) -> None:
    run, split = lay_out({"training": {"loss_on": "horizon"}, "table": {"prediction_length": 20}})
    batch = TableWindows(run, split).micro_batches(0, Ranks())[0]
    place_L = torch.arange(BEFORE + AFTER)
    allowed_L = (place_L >= BEFORE) & (place_L < BEFORE + 20)
    assert not batch.is_target_BCL[..., ~allowed_L].any()
    assert batch.is_target_BCL[..., allowed_L].float().mean() > 0.9


def test_nothing_of_validation_or_test_is_in_a_window(lay_out) -> None:
    run, split = lay_out()
    split.scaled_LC[split.borders.train_end :] = 1e9
    windows = TableWindows(run, split)
    for step in range(40):
        for batch in windows.micro_batches(step, Ranks()):
            assert batch.values_BCL.abs().max() < 1e6


def test_each_epoch_has_every_window_once_in_another_order(lay_out) -> None:
    run, split = lay_out({"table": {"few_shot": 0.2}})
    windows = TableWindows(run, split)
    items = windows._choices[windows._order.items(np.arange(2 * windows.num_windows))]
    first, second = np.split(items, 2)
    everything = list(range(windows.num_windows))
    assert sorted(first) == sorted(second) == everything
    assert first.tolist() != second.tolist()
    assert windows.num_windows == 4 * int(0.2 * (split.borders.train_end - CONTEXT - 31))


def test_ranks_and_passes_share_a_step_out(lay_out) -> None:
    run, split = lay_out()
    whole = TableWindows(run, split).micro_batches(3, Ranks())[0]
    run, split = lay_out({"training": {"micro_batch_size": 4}})
    windows = TableWindows(run, split)
    batches = [windows.micro_batches(3, Ranks(rank=rank, size=2)) for rank in (0, 1)]
    joined = torch.cat([batches[rank][part].values_BCL for part in (0, 1) for rank in (0, 1)])
    assert torch.equal(joined, whole.values_BCL)


def test_mixed_windows_have_all_variates_with_covariates_behind(lay_out) -> None:
    run, split = lay_out(COVARIATES)
    assert split.table.variates == ("a", "c", "b", "hour")
    assert (split.num_targets, split.num_covariates, split.num_known_future) == (2, 2, 1)
    batch = TableWindows(run, split).micro_batches(0, Ranks())[0]
    assert batch.values_BCL.shape == (16, 4, BEFORE + AFTER)
    assert batch.is_covariate_BC.tolist() == [[False, False, True, True]] * 16
    assert not batch.is_target_BCL[:, 2:].any()
    assert batch.is_target_BCL[:, :2].any()


def test_known_covariates_run_one_patch_ahead_and_are_seen(lay_out) -> None:
    run, split = lay_out(COVARIATES)
    batch = TableWindows(run, split).micro_batches(0, Ranks())[0]
    # The calendar repeats each 24 hours: what stands at a place tells which hour it is.
    own, ahead = (batch.values_BCL[:, at] for at in (1, 3))
    rows = split.scaled_LC
    for window in range(16):
        inside = [
            at for at in range(split.borders.train_end - 79)
            if np.allclose(np.nan_to_num(rows[at : at + 80, 1]), own[window].numpy())
        ]  # fmt: skip
        at = inside[0] + 16
        expected = rows[at : at + 80, 3]
        is_there = np.arange(at, at + 80) < split.borders.train_end
        np.testing.assert_allclose(ahead[window].numpy()[is_there], expected[is_there])
        # As in a forecast of 32 steps, nothing is known of what follows them.
        is_known = is_there & (np.arange(80) < BEFORE + 32 - 16)
        assert (batch.observed_BCL[window, 3].numpy() == is_known).all()
        assert not batch.observed_BCL[window, 2, BEFORE:].any(), "b is not known ahead"


@pytest.mark.parametrize("prediction_length", [8, 16, 24, 32])
def test_training_shows_what_a_forecast_does(lay_out, prediction_length) -> None:
    """The inputs of the model are the same, so that what is learned is of use."""
    run, split = lay_out(COVARIATES, {"table": {"prediction_length": prediction_length}})
    windows = TableWindows(run, split)
    geometry = windows.geometry
    model = build_model(run.model)
    for origin in windows.origins[::40]:
        batch = windows._batch(np.array([origin]), np.arange(split.num_variates)[None])
        length = run.model.context_length
        trained = torch.where(batch.observed_BCL, batch.values_BCL, torch.nan)[..., :length]
        rows = torch.from_numpy(split.scaled_LC.T.copy())[None]
        future = rows[:, -1:, origin : origin + prediction_length]
        roll = _Roll(model, rows[..., origin - length : origin], future, split.num_covariates)
        seen = roll.window(roll.patches_of_pass(prediction_length))
        inside = origin + geometry.after <= split.borders.train_end
        if inside:
            torch.testing.assert_close(trained, seen, equal_nan=True)


def test_some_variates_are_drawn_each_step_and_covariates_always(lay_out) -> None:
    run, split = lay_out(COVARIATES, {"training": {"max_variates": 1}})
    windows = TableWindows(run, split)
    chosen = {tuple(windows._chosen_variates(step)) for step in range(20)}
    assert chosen == {(0, 2, 3), (1, 2, 3)}
    assert windows.micro_batches(0, Ranks())[0].values_BCL.shape[1] == 3


def test_shorter_context_is_a_gap_before(lay_out) -> None:
    run, split = lay_out({"table": {"context_length": 20}})
    windows = TableWindows(run, split)
    assert windows.geometry.context_length == 20
    batch = windows.micro_batches(0, Ranks())[0]
    assert not batch.observed_BCL[..., : BEFORE - 20].any()
    assert batch.observed_BCL[..., BEFORE - 20 : BEFORE].float().mean() > 0.9


def test_too_few_windows_for_a_few_shot_are_refused(lay_out) -> None:
    run, split = lay_out({"table": {"few_shot": 0.001}})
    with pytest.raises(DataError, match=r"few_shot \(0.001\) of \d+ training windows is none"):
        TableWindows(run, split)


@pytest.mark.parametrize(
    ("table", "error", "named"),
    [
        ({"targets": ["x"]}, ConfigError, "no column 'x'"),
        ({"covariates": ["x"]}, ConfigError, "no column 'x'"),
        ({"covariates": ["a", "b", "c", "hour"]}, ConfigError, "leave one to forecast"),
        ({"prediction_length": 400}, DataError, "rows"),
    ],
)
def test_table_that_does_not_fit_is_refused(lay_out, table, error, named) -> None:
    with pytest.raises(error, match=named):
        lay_out(MIXED, {"table": table})
