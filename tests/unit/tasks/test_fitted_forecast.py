"""Forecasts that begin as least squares over the training windows, and what is handed over then."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from task_run import small_run, write_waves
from tsmoe.checkpoint.package import load_package, model_from_checkpoint
from tsmoe.checkpoint.resume import open_checkpoint
from tsmoe.finetune.order import uniformly_spaced
from tsmoe.models import build_model
from tsmoe.tasks.config import TaskRun
from tsmoe.tasks.fitted_shortcut import fit_shortcut
from tsmoe.tasks.run import open_tasks, train_tasks

FITTED = {"tasks": {"forecast": {"shortcut": "least_squares"}}}
L, Q = 32, 16


def opened(tmp_path: Path, file: Path, *settings):
    config = small_run(tmp_path / "run", {"forecast": file}, FITTED, *settings)
    task = open_tasks(config)["forecast"]
    run = TaskRun.of(config, {"forecast": task.head()}, task.context_length)
    return task, build_model(run.model)


def write(path: Path, values_LC: np.ndarray) -> Path:
    times = pd.date_range("2024-01-01", periods=len(values_LC), freq="h")
    columns = {f"v{place}": values_L for place, values_L in enumerate(values_LC.T)}
    pd.DataFrame({"date": times, **columns}).to_csv(path, index=False)
    return path


def rows_by_hand(task, count: int, batch_of) -> tuple[np.ndarray, np.ndarray]:
    """Return what is seen and what follows, less the mean of what is seen, one by one."""
    inputs, targets = [], []
    for place in range(count):
        batch = batch_of(np.array([place]))
        for values, seen, is_target in zip(
            batch.values_BCL[0].double(), batch.observed_BCL[0], batch.is_target_BCL[0], strict=True
        ):
            mean = values[:L][seen[:L]].mean() if seen.any() else 0.0
            if is_target[L:].all():
                inputs.append(torch.where(seen[:L], values[:L] - mean, 0).numpy())
                targets.append((values[L:] - mean).numpy())
    return np.array(inputs), np.array(targets)


@pytest.mark.parametrize("is_univariate", [False, True])
def test_it_is_the_ridge_regression_that_validates_best(tmp_path, is_univariate) -> None:
    generator = np.random.default_rng(1)
    values_LC = np.sin(np.arange(420) / 5)[:, None] + generator.normal(size=(420, 2)) * [0.3, 2.0]
    values_LC[100:104, 0] = values_LC[250, 1] = np.nan
    file = write(tmp_path / "waves.csv", values_LC)
    task, model = opened(tmp_path, file, {"tasks": {"forecast": {"is_univariate": is_univariate}}})
    inputs_RL, targets_RQ = rows_by_hand(
        task, task.num_train, lambda items: task.training_batch(items, items)
    )
    held_RL, held_RQ = rows_by_hand(task, task.num_validation, task.validation_batch)
    assert np.isfinite(inputs_RL).all()
    maps = {}
    for ridge in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        penalty = ridge * np.square(inputs_RL).sum(0).mean()
        wide_RL = np.concatenate((inputs_RL, np.sqrt(penalty) * np.eye(L)))
        wide_RQ = np.concatenate((targets_RQ, np.zeros((L, Q))))
        found_LQ = np.linalg.lstsq(wide_RL, wide_RQ, rcond=None)[0]
        maps[float(np.square(held_RL @ found_LQ - held_RQ).mean())] = found_LQ
    expected_LQ = maps[min(maps)]
    assert len(maps) == 7
    assert np.abs(expected_LQ).max() > 0.02
    np.testing.assert_allclose(fit_shortcut(task, model).numpy().T, expected_LQ, atol=1e-5)


def test_a_run_begins_with_it_and_it_rests(tmp_path) -> None:
    file = write_waves(tmp_path / "waves.csv")
    config = small_run(tmp_path / "run", {"forecast": file}, FITTED)
    task, model = opened(tmp_path, file)
    fitted_QL = fit_shortcut(task, model)
    _, result = train_tasks(config)
    assert result is not None
    found = model_from_checkpoint(*open_checkpoint(tmp_path / "run/checkpoints/step_00000006"))
    assert torch.equal(found.heads["forecast"].shortcut.weight, fitted_QL)
    assert found.heads["forecast"].project.weight.abs().max() > 0
    places = uniformly_spaced(task.num_validation, config.stopping.max_windows)
    batch = task.validation_batch(places)
    values_BCW = batch.values_BCL
    mean_BC1 = values_BCW[..., :L].mean(-1, keepdim=True)
    forecast_BCQ = (values_BCW[..., :L] - mean_BC1) @ fitted_QL.T + mean_BC1
    expected = (forecast_BCQ - values_BCW[..., L:]).square().mean().item()
    errors = json.loads((tmp_path / "run/result.json").read_text())["validation_error"]["errors"]
    assert errors["0"] == pytest.approx(expected, rel=1e-3)
    assert errors["0"] < 0.7, "of a variance of 1"


@pytest.mark.parametrize("shortcut", ["least_squares", "from_mean", "from_last"])
def test_what_it_began_with_is_handed_over_where_nothing_is_better(tmp_path, shortcut) -> None:
    file = write_waves(tmp_path / "waves.csv")
    config = small_run(
        tmp_path / "run",
        {"forecast": file},
        {"tasks": {"forecast": {"shortcut": shortcut}}, "optimizer": {"lr": 30.0}},
    )
    _, result = train_tasks(config)
    assert result.best_step == 0
    assert "nothing learned is better on validation than the shortcut it began" in result.verdict
    model, card = load_package(result.package)
    assert card["step"] == 0
    assert model.heads["forecast"].project.weight.abs().max() == 0
    by_model = {row["model"]: row["mse"] for row in result.evaluations["forecast"].results}
    if shortcut == "from_last":
        assert by_model["tsmoe"] == pytest.approx(by_model["naive"], rel=1e-3)
    if shortcut == "least_squares":
        assert by_model["tsmoe"] == pytest.approx(by_model["linear"], rel=0.1)


def test_it_is_fitted_to_what_the_model_shows_it(tmp_path) -> None:
    """Where gaps are filled by lines, the map sees the lines."""
    values_LC = np.sin(np.arange(400) / 5)[:, None] + np.zeros((400, 2))
    values_LC[40:200:9] = np.nan
    file = write(tmp_path / "gaps.csv", values_LC)
    short = {"tasks": {"forecast": {"prediction_length": 4}}}
    maps = []
    for fills_gaps in (False, True):
        task, model = opened(tmp_path, file, short, {"model": {"fills_gaps": fills_gaps}})
        batch = task.training_batch(np.arange(task.num_train), np.arange(task.num_train))
        shown = []
        model.heads["forecast"].shortcut.register_forward_hook(
            lambda _, arguments, __, shown=shown: shown.append(arguments[0])
        )
        with torch.no_grad():
            model(**model.arguments(batch))
        _, scale_BC1 = model.statistics(batch.values_BCL[..., :L], batch.observed_BCL[..., :L])
        is_whole_BC = batch.is_target_BCL[..., L:].all(-1)
        seen_RL = (shown[0] * scale_BC1)[is_whole_BC].double().numpy()
        maps.append(fit_shortcut(task, model).double().numpy())
        normal_LL = seen_RL.T @ seen_RL
        loc_BC1, _ = model.statistics(batch.values_BCL[..., :L], batch.observed_BCL[..., :L])
        target_RQ = (batch.values_BCL[..., L:] - loc_BC1)[is_whole_BC].double().numpy()
        fits = [
            np.linalg.solve(
                normal_LL + ridge * np.diag(normal_LL).mean() * np.eye(L), seen_RL.T @ target_RQ
            ).T
            for ridge in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
        ]
        assert min(np.abs(found - maps[-1]).max() for found in fits) < 1e-3
    assert np.abs(maps[0] - maps[1]).max() > 1e-2


def test_where_no_window_is_whole_steps_are_interpolated(tmp_path) -> None:
    whole_LC = np.sin(np.arange(400) / 5)[:, None]
    holes_LC = whole_LC.copy()
    holes_LC[::5] = np.nan
    holes, whole = (
        fit_shortcut(*opened(tmp_path, write(tmp_path / f"{name}.csv", values_LC)))
        for name, values_LC in (("holes", holes_LC), ("whole", whole_LC))
    )
    assert holes.abs().max() > 0.01
    seen_L = torch.sin(torch.arange(L) / 5)
    seen_L = seen_L - seen_L.mean()
    torch.testing.assert_close(holes @ seen_L, whole @ seen_L, atol=0.3, rtol=0)
