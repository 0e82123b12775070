"""PatchMoE in the manner of scikit-learn."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from tsmoe.errors import DataError, TrainingError, TsmoeError
from tsmoe.tasks.answers import answer
from tsmoe.tasks.estimators import (
    PatchMoEAnomalyDetector,
    PatchMoEClassifier,
    PatchMoEForecaster,
    PatchMoEImputer,
)
from tsmoe.tasks.predictor import load_predictor

SMALL = (
    "model.patch_length=8", "model.d_model=16", "model.num_heads=2", "model.num_layers=1",
    "model.dropout=0", "model.feed_forward.d_ff_expert=16", "model.feed_forward.d_ff_shared=16",
    "model.feed_forward.router.d_router=8", "training.steps=40", "training.validate_every_steps=20",
    "training.global_batch_size=16", "training.micro_batch_size=16", "optimizer.lr=0.01",
    "stopping.max_windows=16",
)  # fmt: skip
SHORT = (*SMALL, "model.context_length=32")
ROWS = 400


def waves(rows: int = ROWS) -> np.ndarray:
    generator = np.random.default_rng(0)
    time = np.arange(rows)[:, None]
    return (
        100
        + 20 * np.sin(2 * np.pi * (time + np.array([0, 6])) / 16)
        + generator.normal(size=(rows, 2))
    )


def cases(count: int = 24) -> tuple[list[np.ndarray], np.ndarray]:
    generator = np.random.default_rng(1)
    labels = np.array(["fast", "slow"])[np.arange(count) % 2]
    periods = {"fast": 4, "slow": 16}
    found = []
    for label in labels:
        length = int(generator.integers(20, 33))
        phase = generator.uniform(0, 16)
        wave = np.sin(2 * np.pi * (np.arange(length) + phase) / periods[label])
        found.append(wave[None] + 0.1 * generator.normal(size=(1, length)))
    return found, labels


def test_forecaster_continues_the_rows_in_their_own_unit() -> None:
    values_LC = waves()
    model = PatchMoEForecaster([*SHORT, "tasks.forecast.prediction_length=16"]).fit(values_LC[:-16])
    ahead_QC = model.predict()
    assert ahead_QC.shape == (16, 2)
    naive = np.abs(values_LC[-17] - values_LC[-16:]).mean()
    assert np.abs(ahead_QC - values_LC[-16:]).mean() < 0.7 * naive
    np.testing.assert_allclose(model.predict(values_LC[-48:-16]), ahead_QC, rtol=1e-5)
    assert -1 < model.score(values_LC[200:]) < 0


def test_imputer_fills_gaps_and_keeps_what_is_there() -> None:
    values_LC = waves()
    gappy_LC = values_LC.copy()
    gappy_LC[100:104, 0] = gappy_LC[5, 1] = np.nan
    model = PatchMoEImputer(SHORT).fit(gappy_LC)
    filled_LC = model.transform(gappy_LC)
    is_there = np.isfinite(gappy_LC)
    np.testing.assert_allclose(filled_LC[is_there], values_LC[is_there], rtol=1e-6)
    missed = np.abs(filled_LC - values_LC)[~is_there].mean()
    assert missed < np.abs(values_LC - values_LC.mean(axis=0))[~is_there].mean()
    assert -1 < model.score(values_LC) < 0


def test_detector_scores_what_breaks_the_pattern() -> None:
    values_LC = waves(600)
    is_anomaly_L = np.zeros(200, bool)
    is_anomaly_L[60:80] = True
    test_LC = values_LC[400:].copy()
    test_LC[is_anomaly_L] += 60
    model = PatchMoEAnomalyDetector(SHORT).fit(values_LC[:400])
    assert model.score(test_LC, is_anomaly_L) > 0.8
    flags_L = model.predict(test_LC)
    assert set(flags_L) <= {-1, 1}
    np.testing.assert_array_equal(flags_L == -1, model.decision_function(test_LC) < 0)
    assert (flags_L == -1)[is_anomaly_L].mean() > (flags_L == -1)[~is_anomaly_L].mean()


def test_classifier_tells_cases_of_unequal_length_apart() -> None:
    found, labels = cases()
    model = PatchMoEClassifier(SMALL).fit(found, labels)
    assert model.classes_.tolist() == ["fast", "slow"]
    others, truth = cases(12)
    assert model.score(others, truth) > 0.8
    np.testing.assert_allclose(model.predict_proba(others).sum(axis=1), 1, rtol=1e-5)
    # One that is longer than all that were learned from: its end is seen.
    assert model.predict([np.tile(found[0], 3)]).shape == (1,)


def test_settings_survive_a_clone_and_seeds_decide() -> None:
    model = clone(PatchMoEForecaster(SHORT, seed=3))
    assert model.get_params() == {"settings": SHORT, "run": None, "seed": 3, "device": "auto"}
    settings = [*SHORT, "training.steps=2", "training.validate_every_steps=1",
                "tasks.forecast.shortcut=from_mean",
                "tasks.forecast.prediction_length=8"]  # fmt: skip
    first, again, other = (
        PatchMoEForecaster(settings, seed=seed).fit(waves()).predict() for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize(
    ("model", "asks"),
    [
        (PatchMoEForecaster(), lambda m: m.predict()),
        (PatchMoEForecaster(), lambda m: m.score(waves())),
        (PatchMoEImputer(), lambda m: m.transform(waves())),
        (PatchMoEAnomalyDetector(), lambda m: m.score_samples(waves())),
        (PatchMoEAnomalyDetector(), lambda m: m.score(waves(), np.zeros(ROWS))),
        (PatchMoEClassifier(), lambda m: m.predict(cases()[0])),
        (PatchMoEClassifier(), lambda m: m.score(*cases())),
    ],
)
def test_nothing_is_answered_before_fit(model, asks) -> None:
    with pytest.raises(NotFittedError, match="call fit before"):
        asks(model)


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        (lambda: PatchMoEForecaster(SHORT).fit(waves(50)), "50 rows|too few rows"),
        (lambda: PatchMoEForecaster(SHORT).fit(np.zeros((0, 2))), "shape"),
        (lambda: PatchMoEForecaster(SHORT).fit(waves() * np.inf), "infinite"),
        (lambda: PatchMoEImputer(SHORT).fit(waves() * [1, np.nan]), "no observed value"),
        (lambda: PatchMoEAnomalyDetector(SHORT).fit(waves() * np.nan), "nothing is recorded"),
        (
            lambda: PatchMoEAnomalyDetector(SHORT).fit(waves(), np.full(ROWS, 7)),
            "0, or 1 for anomalies",
        ),
        (lambda: PatchMoEForecaster(SHORT).fit([[1], [1, 2]]), "no array of numbers"),
        (
            lambda: PatchMoEForecaster([*SHORT, "tasks.forecast.columns=[a]"]).fit(waves()),
            "columns",
        ),
        (
            lambda: PatchMoEForecaster([*SHORT, "tasks.forecast.type=series"]).fit(waves()),
            "one task",
        ),
        (lambda: PatchMoEForecaster([*SHORT, "tasks.b.type=forecast"]).fit(waves()), "one task"),
        (lambda: PatchMoEClassifier(SMALL).fit(cases()[0], np.zeros(24)), "class"),
        (lambda: PatchMoEClassifier(SMALL).fit(cases()[0], None), "y is missing"),
        (lambda: PatchMoEClassifier(SMALL).fit(cases()[0], cases()[1][:5]), "24 cases"),
    ],
)
def test_arrays_that_cannot_be_learned_from_are_refused(fit, words) -> None:
    with pytest.raises(TsmoeError, match=words):
        fit()


def test_variate_of_which_all_is_missing_is_not_filled() -> None:
    settings = [*SHORT, "training.steps=2", "training.validate_every_steps=1"]
    model = PatchMoEImputer(settings).fit(waves())
    with pytest.raises(DataError, match="all points of variate 1 are missing"):
        model.transform(waves() * [1, np.nan])
    with pytest.raises(DataError, match="3 variates, fitted were 2"):
        model.transform(np.ones((40, 3)))


def test_another_number_of_variates_is_refused_everywhere() -> None:
    settings = [*SHORT, "training.steps=2", "training.validate_every_steps=1"]
    for model in (PatchMoEForecaster(settings), PatchMoEImputer(settings)):
        model.fit(waves())
        for other in (waves()[:, :1], np.hstack((waves(), waves()))):
            for ask in (model.score, model.predict):
                with pytest.raises(DataError, match="fitted were 2"):
                    ask(other)


def test_fit_leaves_torchs_random_numbers_alone_and_runs_in_threads() -> None:
    settings = [*SHORT, "training.steps=2", "training.validate_every_steps=1",
                "tasks.forecast.prediction_length=8"]  # fmt: skip
    state = torch.random.get_rng_state()
    expected = PatchMoEForecaster(settings).fit(waves()).predict()
    assert torch.equal(torch.random.get_rng_state(), state)
    with ThreadPoolExecutor(1) as pool:
        model = pool.submit(PatchMoEForecaster(settings).fit, waves()).result()
    np.testing.assert_array_equal(model.predict(), expected)


def test_imputer_fits_and_transforms_and_keeps_large_numbers() -> None:
    settings = [*SHORT, "training.steps=2", "training.validate_every_steps=1"]
    rows_LC = waves() + 1e9
    rows_LC[7, 0] = np.nan
    filled_LC = PatchMoEImputer(settings).fit_transform(rows_LC)
    is_there = np.isfinite(rows_LC)
    np.testing.assert_array_equal(filled_LC[is_there], rows_LC[is_there])
    assert np.isfinite(filled_LC).all()


def test_as_many_rows_as_are_asked_for_are_enough() -> None:
    settings = [*SHORT, "tasks.forecast.prediction_length=16", "training.steps=1"]
    with pytest.raises(DataError, match=r"about (\d+) are needed") as refused:
        PatchMoEForecaster(settings).fit(waves(60))
    needed = int(str(refused.value).split("about ")[1].split()[0])
    with pytest.raises(DataError, match="are needed"):
        PatchMoEForecaster(settings).fit(waves(needed - 12))
    PatchMoEForecaster([*settings, "optimizer.lr=1e-5"]).fit(waves(needed))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2.0])
def test_imputer_hides_a_part_of_the_points(share) -> None:
    model = PatchMoEImputer([*SHORT, "training.steps=20"]).fit(waves())
    with pytest.raises(TsmoeError, match="must lie between 0 and 1"):
        model.score(waves(), share=share)


@pytest.mark.parametrize("keeps_run", [True, False])
def test_nothing_learned_is_said_of_a_folder_that_is_there(tmp_path, keeps_run) -> None:
    run = str(tmp_path / "run") if keeps_run else None
    settings = [*SHORT, "optimizer.lr=1e9", "training.steps=4"]
    with pytest.raises(TrainingError, match="nothing learned is better") as refused:
        PatchMoEImputer(settings, run=run).fit(waves())
    assert str(refused.value).startswith(f"{run}: nothing" if keeps_run else "nothing")
    assert "or give more training.steps" in str(refused.value)


def test_package_of_a_detector_flags_what_the_detector_does(tmp_path) -> None:
    rows_LC, is_anomaly_L = waves(), np.zeros(ROWS, int)
    model = PatchMoEAnomalyDetector(SHORT, run=str(tmp_path / "run")).fit(rows_LC)
    names = ["variate 0", "variate 1"]
    rows_LC[300:310] = 100
    pd.DataFrame(rows_LC, columns=names).to_parquet(tmp_path / "rows.parquet")
    package = load_predictor(tmp_path / "run" / "package")
    found = answer(package, tmp_path / "rows.parquet").to_pandas()
    # The file holds float64, of which both see the same float32.
    np.testing.assert_allclose(found["score"], -model.score_samples(rows_LC), rtol=1e-3)
    flags_L = np.where(model.predict(rows_LC) == -1, 1, is_anomaly_L)
    assert (found["is_anomaly"] == flags_L).mean() > 0.99
    assert flags_L.any()
