"""What a package remembers of its data, and what of that holds for another file."""

import torch

from task_run import small_run, train_all, write_files, write_waves
from tsmoe.tasks.predictor import TaskForecaster, load_forecaster, load_predictor
from tsmoe.tasks.reopen import reopen_task
from tsmoe.tasks.report import results_table


def test_another_file_is_opened_with_what_it_has(tmp_path) -> None:
    files = write_files(tmp_path)
    config = small_run(
        tmp_path / "run",
        {"forecast": files["forecast"]},
        {
            "tasks": {"forecast": {"columns": ["wave 0"], "time_column": "date"}},
            "training": {"steps": 3},
        },
    )
    train_all([config])
    predictor = load_predictor(tmp_path / "run" / "package")
    own = reopen_task(predictor, "forecast", str(files["forecast"]))
    assert own.table.variates == ("wave 0",)
    other = write_waves(tmp_path / "other.csv", rows=500, variates=2)
    assert reopen_task(predictor, "forecast", str(other)).table.variates == ("wave 0", "wave 1")
    some = reopen_task(predictor, "forecast", str(other), columns=["wave 1"], prediction_length=20)
    assert some.table.variates == ("wave 1",)
    assert some.config.prediction_length == 20
    forecaster = load_forecaster(tmp_path / "run" / "package", device="cpu")
    assert isinstance(forecaster, TaskForecaster)
    assert forecaster.prediction_length == 16
    # A horizon beyond the head's is rolled: its first steps are those of one pass.
    context = torch.randn(2, 3, 40).numpy()
    far, near = (forecaster.forecast_batch(context, steps).mean_BCQ for steps in (40, 16))
    assert far.shape == (2, 3, 40)
    assert (far[..., :16] == near).all()


def test_many_figures_stand_below_one_another() -> None:
    few = results_table([{"model": "a", "mse": 1.0}, {"model": "b", "mse": None}])
    assert len(few.columns) == 2
    assert few.row_count == 2
    many = results_table([{"model": "a", **{f"figure_{n}": float(n) for n in range(9)}}])
    assert len(many.columns) == 2
    assert many.row_count == 9
