"""A shortcut that is least squares of what a start misses, and runs that begin with it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune_run import SMALL_MODEL, small_finetune, write_package
from tsmoe.checkpoint.package import load_package, model_from_checkpoint
from tsmoe.checkpoint.resume import open_checkpoint
from tsmoe.config import encode
from tsmoe.errors import CheckpointError, DataError
from tsmoe.finetune.fitted_shortcut import fit_shortcut
from tsmoe.finetune.loop import finetune, prepare_start
from tsmoe.finetune.start import open_start
from tsmoe.finetune.windows import TableWindows
from tsmoe.inference import Forecaster
from tsmoe.models import build_model

FITTED = {"linear_shortcut": "least_squares"}
KEEPS_ALL = {"checkpoint": {"keep": 9}}
# Rows that are seen, those to forecast in a pass, points of a patch and those that a map sees.
CONTEXT, HORIZON, PATCH, SEEN = 48, 32, 16, 64
CPU = torch.device("cpu")
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def fit(lay_out, folder, *settings: dict):
    run, split = lay_out(FITTED, *settings)
    start = open_start(str(folder / "package"))
    model = build_model(run.model, seed=5)
    prepare_start(model, run=run, start=start)
    windows = TableWindows(run, split)
    return fit_shortcut(model, windows, CPU), windows, split, Forecaster(start.build(), {}, CPU)


def ridge_by_hand(inputs_RW, targets_RP, ridge: float):
    penalty = ridge * np.square(inputs_RW).sum(0).mean()
    wide_RW = np.concatenate((inputs_RW, np.sqrt(penalty) * np.eye(SEEN)))
    wide_RP = np.concatenate((targets_RP, np.zeros((SEEN, targets_RP.shape[1]))))
    return np.linalg.lstsq(wide_RW, wide_RP, rcond=None)[0]


@pytest.mark.parametrize("horizon", [HORIZON, 20])
def test_it_is_the_ridge_regression_of_what_a_share_of_the_forecast_misses(
    lay_out, folder, horizon: int
) -> None:
    """Forecasts by another way than the fit's, rows one by one."""
    settings = {"table": {"prediction_length": horizon, "targets": ["a", "c"]}}
    fitted, windows, split, forecaster = fit(lay_out, folder, settings)
    # Behind the steps to forecast patches are fitted too, as far as the train part goes.
    train_LC = np.pad(
        split.scaled_LC[: split.borders.train_end], ((0, HORIZON), (0, 0)), constant_values=np.nan
    )
    contexts, targets = [], []
    for origin in windows.origins:
        for variate in range(split.num_targets):
            contexts.append(train_LC[origin - CONTEXT : origin, variate])
            targets.append(train_LC[origin : origin + HORIZON, variate])
    context_RL, target_RQ = np.array(contexts, float), np.array(targets, float)
    forecast_RQ = forecaster.forecast_batch(context_RL[:, None], HORIZON).mean_BCQ[:, 0]
    mean_R1 = np.nanmean(context_RL, axis=1, keepdims=True)
    seen_RL = np.nan_to_num(context_RL - mean_R1)
    split_at = len(seen_RL) - int(len(seen_RL) * 0.2)
    errors, maps = dict.fromkeys(SHARES, 0.0), {}
    for ahead in range(2):
        steps = slice(ahead * PATCH, (ahead + 1) * PATCH)
        # The second patch is forecast by a token at the end of a gap.
        inputs_RW = np.pad(seen_RL, ((0, 0), (0, PATCH) if ahead else (PATCH, 0)))
        is_whole_R = np.isfinite(target_RQ[:, steps]).all(1)
        if not ahead:  # where the last patch is missing, it is the other map that is used
            is_whole_R &= np.isfinite(context_RL[:, -PATCH:]).any(1)
        is_early_R = is_whole_R & (np.arange(len(seen_RL)) < split_at)
        is_late_R = is_whole_R & ~is_early_R
        for share in SHARES:
            missed = target_RQ - mean_R1 - share * (forecast_RQ - mean_R1)
            missed = missed[:, steps]
            by_ridge = {}
            for ridge in RIDGES:
                found = ridge_by_hand(inputs_RW[is_early_R], missed[is_early_R], ridge)
                by_ridge[ridge] = np.square(inputs_RW[is_late_R] @ found - missed[is_late_R]).sum()
            ridge = min(by_ridge, key=by_ridge.get)
            errors[share] += by_ridge[ridge]
            maps[share, ahead] = ridge_by_hand(inputs_RW[is_whole_R], missed[is_whole_R], ridge)
    assert fitted.share == min(errors, key=errors.get)
    for ahead in range(2):
        weight_PW = fitted.weight[ahead * PATCH : (ahead + 1) * PATCH].numpy()
        expected_WP = maps[fitted.share, ahead]
        assert np.abs(expected_WP).max() > 0.01
        np.testing.assert_allclose(weight_PW.T, expected_WP, atol=2e-3 * np.abs(expected_WP).max())


def test_patches_further_ahead_than_the_horizon_are_fitted_too(lay_out, folder) -> None:
    near, *_ = fit(lay_out, folder, {"table": {"prediction_length": 10}})
    far, *_ = fit(lay_out, folder, {"table": {"prediction_length": HORIZON}})
    assert near.share == far.share
    assert far.weight[PATCH:].abs().max() > 0.01
    torch.testing.assert_close(near.weight[PATCH:], far.weight[PATCH:])
    assert not torch.allclose(near.weight[:PATCH], far.weight[:PATCH]), "which sees more rows"


def test_of_mixed_windows_all_targets_are_seen(lay_out, folder) -> None:
    mixed = {
        "mixing": {"num_channel_mixed_layers": 1},
        "table": {"targets": ["a", "b", "c"], "covariates": ["hour"], "known_future": ["hour"]},
        "training": {"max_variates": 1},
    }
    run, split = lay_out(FITTED, mixed)
    windows = TableWindows(run, split)
    batch = windows.whole_batch(np.arange(4))
    assert batch.values_BCL.shape[:2] == (4, 4)
    assert batch.is_target_BCL.any(-1)[0].tolist() == [True, True, True, False]
    model = build_model(run.model, seed=5)
    prepare_start(model, run=run, start=open_start(str(folder / "package")))
    assert fit_shortcut(model, windows, CPU).weight.abs().max() > 0.01


@pytest.mark.parametrize("trains", ["all", "head", "experts", "low_rank"])
def test_what_is_to_learn_does_get_a_gradient(tmp_path, folder, trains: str) -> None:
    """A share of 0 would leave a head that rests nothing to pass on."""
    config = small_finetune(
        tmp_path / "run", folder / "table.csv", FITTED, {"trainable": {"trains": trains}},
        start=folder / "package",
    )  # fmt: skip
    finetune(config)
    errors = result_of(tmp_path / "run")["validation_mse"]["errors"]
    assert len(set(errors.values())) == 4, errors


def test_quantiles_are_kept_whole(tmp_path, folder) -> None:
    from tsmoe.finetune.start import resolve_run
    from tsmoe.finetune.table import open_table
    from tsmoe.finetune.windows import context_rows

    package = write_package(tmp_path / "package", has_quantiles=True)
    config = small_finetune(tmp_path / "run", folder / "table.csv", FITTED, start=package)
    start = open_start(config.start)
    run = resolve_run(config, start)
    model = build_model(run.model)
    prepare_start(model, run=run, start=start)
    split = open_table(config.table, context_length=context_rows(run))
    fitted = fit_shortcut(model, TableWindows(run, split), CPU)
    assert fitted.share == 1
    assert fitted.weight.abs().max() > 0


# 95 rows to learn from: 64 that are seen and 16 after them, but not 64 and 32.
SHORT = {"table": {"prediction_length": 16, "split": [0.19, 0.2, 0.61], "targets": ["c"]}}


def too_sparse(split) -> None:
    split.scaled_LC[::10] = np.nan


@pytest.mark.parametrize(
    ("change", "settings", "named"),
    [
        (too_sparse, {}, "all 16 points of a patch"),
        (None, {"table": {"few_shot": 0.006, "targets": ["a"]}}, "needs 10 training windows"),
        (None, SHORT, "looks ahead"),
    ],
)
def test_too_little_to_fit_is_told(lay_out, change, settings: dict, named: str) -> None:
    run, split = lay_out(FITTED, settings)
    if change is not None:
        change(split)
    model = build_model(run.model, seed=5)
    with pytest.raises(DataError, match=f"{named}.*linear_shortcut=learned"):
        fit_shortcut(model, TableWindows(run, split), CPU)


def result_of(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def test_a_run_begins_with_it_and_it_rests(tmp_path, lay_out, folder) -> None:
    fitted, *_ = fit(lay_out, folder)
    config = small_finetune(
        tmp_path / "run", folder / "table.csv", FITTED, KEEPS_ALL, start=folder / "package"
    )
    finetune(config)
    checkpoints = tmp_path / "run/checkpoints"
    begun = model_from_checkpoint(*open_checkpoint(checkpoints / "step_00000000"))
    start = open_start(config.start).state["head.project.weight"]
    torch.testing.assert_close(begun.head.project.weight.data, fitted.share * start)
    last = model_from_checkpoint(*open_checkpoint(checkpoints / "step_00000006"))
    assert not torch.equal(last.embed.values.weight, begun.embed.values.weight)
    for model in (begun, last):
        assert torch.equal(model.shortcut.project.weight.data, fitted.weight)
    errors = result_of(tmp_path / "run")["validation_mse"]
    assert errors["errors"]["0"] < errors["start_error"]


def test_going_on_does_not_fit_again(tmp_path, folder, monkeypatch) -> None:
    from tsmoe.finetune import loop

    settings = ({"training": {"steps": 2}}, FITTED)
    finetune(small_finetune(tmp_path / "run", folder / "table.csv", *settings,
                            start=folder / "package"))  # fmt: skip
    (tmp_path / "run/DONE").unlink()
    monkeypatch.setattr(loop, "fit_shortcut", None)
    longer = small_finetune(
        tmp_path / "run", folder / "table.csv", FITTED, start=folder / "package"
    )
    finetune(longer)
    assert set(result_of(tmp_path / "run")["validation_mse"]["errors"]) == set("0246")


def test_a_run_is_not_continued_with_the_other_kind(tmp_path, folder) -> None:
    run, table, start = tmp_path / "run", folder / "table.csv", folder / "package"
    finetune(small_finetune(run, table, {"training": {"steps": 2}}, FITTED, start=start))
    other = small_finetune(run, table, {"linear_shortcut": "learned"}, start=start)
    with pytest.raises(CheckpointError, match="other settings \\(linear_shortcut\\)"):
        finetune(other)


def test_from_scratch_it_is_the_whole_forecast_at_first(tmp_path, folder) -> None:
    scratch = {"model": encode(SMALL_MODEL), **FITTED, "optimizer": {"lr": 30.0}}
    config = small_finetune(tmp_path / "run", folder / "table.csv", scratch, start=None)
    finetune(config)
    found = result_of(tmp_path / "run")
    assert found["best_step"] == 0
    assert "than the shortcut it began with" in found["verdict"]
    model, _ = load_package(tmp_path / "run/package")
    assert model.head.project.weight.abs().max() == 0
    errors = found["test"]["results"]
    assert errors["fine_tuned"]["mse"] == pytest.approx(errors["linear"]["mse"], rel=0.15)
