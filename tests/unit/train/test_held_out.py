"""Which held-out windows are shown while training, and what of them."""

import numpy as np
import torch

from tsmoe.batch import WindowBatch
from tsmoe.heads import QuantileHeadConfig
from tsmoe.models.output import TaskOutput
from tsmoe.train.held_out import WINDOWS_SHOWN, HeldOutForecasts, draw_forecasts


def batch_of(values_BCL: torch.Tensor, *, targets: int, **fields: object) -> WindowBatch:
    """Let the last points be targets that the model may not see."""
    is_target_BCL = torch.zeros_like(values_BCL, dtype=torch.bool)
    is_target_BCL[..., -targets:] = True
    return WindowBatch(
        values_BCL=values_BCL,
        observed_BCL=~is_target_BCL,
        is_target_BCL=is_target_BCL,
        series_ids_B=torch.arange(len(values_BCL)),
        **fields,
    )


def windows(count: int, length: int = 72) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 50 + torch.randn(count, 1, length, generator=generator).cumsum(-1)


def seen(model, batch: WindowBatch) -> list:
    show = HeldOutForecasts("series {}".format)
    with torch.no_grad():
        show.see(model, batch, model(**model.arguments(batch)))
    return show.found


def test_forecast_is_the_last_tokens_in_the_unit_of_the_values(make_model) -> None:
    model, batch = make_model(), batch_of(windows(20), targets=8)
    found = seen(model, batch)
    assert [forecast.name for forecast in found] == [f"series {i}" for i in (0, 3, 7, 11, 15, 19)]
    with torch.no_grad():
        output = model(**model.arguments(batch))
    loc, scale = output.statistics.loc_BCN1, output.statistics.scale_BCN1
    for forecast, window in zip(found, (0, 3, 7, 11, 15, 19), strict=True):
        values = batch.values_BCL[window, 0].numpy()
        np.testing.assert_array_equal(forecast.context_L, values[32:64])
        np.testing.assert_array_equal(forecast.target_Q, values[64:])
        normalised = output.prediction_BCNPK[window, 0, -1, :, 0]
        expected = normalised * scale[window, 0, -1] + loc[window, 0, -1]
        np.testing.assert_allclose(forecast.forecast_Q, expected.numpy(), rtol=1e-6)
        assert forecast.band_2Q is None


def test_quantiles_become_a_band_around_the_median(make_model) -> None:
    model = make_model(head=QuantileHeadConfig(levels=(0.1, 0.5, 0.9)))
    for forecast in seen(model, batch_of(windows(3), targets=8)):
        low_Q, high_Q = forecast.band_2Q
        assert (low_Q <= forecast.forecast_Q).all()
        assert (forecast.forecast_Q <= high_Q).all()
        assert (low_Q < high_Q).any()


def test_windows_without_a_target_are_passed_over(make_model) -> None:
    batch = batch_of(windows(9), targets=8)
    batch.is_target_BCL[[0, 4, 8]] = False
    found = seen(make_model(), batch)
    assert [f.name for f in found] == [f"series {i}" for i in (1, 2, 3, 5, 6, 7)]
    batch.is_target_BCL[:] = False
    assert seen(make_model(), batch) == []


def test_of_packed_windows_only_the_last_series_is_shown(make_model) -> None:
    series_BCN = torch.tensor([[[3, 3, 3, -1, 5, 5, 5, 5]], [[3, 3, 3, 3, 3, 3, 3, -1]]])
    batch = batch_of(windows(2), targets=8, series_BCN=series_BCN)
    (forecast,) = seen(make_model(), batch)
    np.testing.assert_array_equal(forecast.context_L, batch.values_BCL[0, 0, 32:64].numpy())
    batch = batch_of(windows(2), targets=8, series_BCN=series_BCN.roll(1, -1)[:1].repeat(2, 1, 1))
    assert np.isfinite(seen(make_model(), batch)[0].context_L).sum() == 24


def test_tasks_show_what_is_forecast_not_what_is_filled_in() -> None:
    values = windows(4, length=40)

    def show(steps: int, **fields: object) -> list:
        output = TaskOutput(
            prediction=torch.zeros(4, 1, steps), tokens_BCND=torch.zeros(0), routings=()
        )
        found = HeldOutForecasts(str)
        batch = batch_of(values, targets=10, **fields)
        found.see(None, batch, output, series_name="of the task {}".format)
        return found.found

    assert [len(f.forecast_Q) for f in show(10)] == [10] * 4
    assert show(10)[0].name == "of the task 0"
    assert show(40) == []
    assert show(10, labels_B=torch.zeros(4)) == []


def test_first_block_that_has_windows_is_kept(make_model) -> None:
    show = HeldOutForecasts(str)
    context_BCL, target_BCQ = np.zeros((2, 3, 50)), np.full((2, 3, 4), np.nan)
    show.add(context_BCL, target_BCQ, np.zeros((2, 3, 4, 1)))
    target_BCQ[1, 2] = 1.0
    show.add(context_BCL, target_BCQ, np.zeros((2, 3, 4, 1)))
    show.add(context_BCL, target_BCQ + 7, np.zeros((2, 3, 4, 1)))
    assert [(forecast.name, forecast.target_Q[0]) for forecast in show.found] == [("2", 1.0)]
    assert len(show.found[0].context_L) == 16


def test_picture_is_small_and_shows_truth_and_forecast(make_model) -> None:
    found = seen(make_model(), batch_of(windows(20), targets=8))
    found[0].context_L[3:6] = np.nan
    found[1].forecast_Q[:] = np.inf
    picture = draw_forecasts(found)
    assert len(found) == WINDOWS_SHOWN
    assert picture.dtype == np.uint8
    assert picture.shape == (405, 720, 3)
    colours = {tuple(colour) for colour in np.unique(picture.reshape(-1, 3), axis=0)}
    assert {(0x2A, 0x6F, 0x97), (0xE0, 0x7A, 0x1F)} <= colours
