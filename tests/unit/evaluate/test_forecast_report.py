from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tsmoe.errors import ConfigError
from tsmoe.evaluate.metrics import ForecastScores
from tsmoe.evaluate.report import (
    ForecastPicture,
    check_output,
    draw_forecast,
    replace_file,
    scores_table,
)


def scores(mse: float, mae: float, crps: float | None = None) -> ForecastScores:
    return ForecastScores(
        mse=mse, mae=mae, mase=None, crps=crps, variate_mse=(mse,), observed_fraction=1.0
    )


def read_png(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


def test_lowest_error_of_each_column_is_bold() -> None:
    console = Console(width=80, force_terminal=True, record=True)
    console.print(scores_table({"tsmoe": scores(0.25, 0.75, 0.5), "naive": scores(0.5, 0.6)}))
    text = console.export_text(styles=True)
    assert "\x1b[1m0.2500" in text
    assert "\x1b[1m0.6000" in text
    assert "\x1b[1m0.7500" not in text
    assert "\x1b[1m0.5000" in text, "the only crps is the best one"
    assert "mase" not in text


@pytest.mark.parametrize("num_variates", [1, 6])
def test_picture_is_a_png_with_at_most_four_panels(tmp_path: Path, num_variates: int) -> None:
    generator = np.random.default_rng(0)
    context_CL = generator.standard_normal((num_variates, 30)).astype(np.float32)
    context_CL[0, 3:6] = np.nan
    mean_CQ = np.zeros((num_variates, 10), np.float32)
    picture = ForecastPicture(
        variates=tuple(f"v{place}" for place in range(num_variates)),
        context_CL=context_CL,
        mean_CQ=mean_CQ,
        truth_CQ=mean_CQ + 1,
        quantiles_CQK=mean_CQ[..., None] + np.array([-1, 0, 1]),
        quantile_levels=(0.1, 0.5, 0.9),
        times=np.datetime64("2020-01-01T00", "us") + np.arange(40) * np.timedelta64(1, "h"),
    )
    draw_forecast(picture, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = read_png(tmp_path / "picture.png")
    assert pixels.std() > 0.05, "something is drawn"
    assert pixels.shape[0] == pytest.approx((min(num_variates, 4) * 2.4 + 0.6) * 120, abs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_picture_of_a_point_forecast_needs_neither_truth_nor_times(tmp_path: Path) -> None:
    picture = ForecastPicture(variates=("a",), context_CL=np.zeros((1, 5)), mean_CQ=np.ones((1, 3)))
    draw_forecast(picture, tmp_path / "picture.png")
    assert read_png(tmp_path / "picture.png").ndim == 3


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    target.write_text("old")

    def write_half() -> None:
        with replace_file(target) as unfinished:
            unfinished.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("name", "named"), [("out.txt", ".csv"), ("nowhere/out.csv", "nowhere")])
def test_output_that_cannot_be_written_is_refused(tmp_path: Path, name: str, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"--out.*{named}"):
        check_output("--out", str(tmp_path / name), (".csv", ".parquet"))
