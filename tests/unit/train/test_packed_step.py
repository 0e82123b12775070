"""A training step on windows that several series share."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tsmoe.batch import WindowBatch
from tsmoe.data.loader import DataConfig
from tsmoe.errors import TrainingError
from tsmoe.heads.point import PointHead
from tsmoe.models.time_tracker import TimeTracker
from tsmoe.ranks import Ranks
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.run_config import RunConfig
from tsmoe.train.step import training_step

PATCH = 8


class BareEngine:
    """Runs the model and backpropagates; its update only tells the norm."""

    def __init__(self, model: TimeTracker) -> None:
        self.model, self.ranks = model, Ranks()

    def forward(self, batch: WindowBatch, *, last_micro_batch: bool):
        length = self.model.config.context_length
        return self.model(
            batch.values_BCL[..., :length],
            batch.observed_BCL[..., :length],
            series_BCN=batch.series_BCN,
        )

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        loss.backward()

    def discard(self) -> None:
        self.model.zero_grad()

    def update(self, *, lr: float) -> SimpleNamespace:
        squares = [p.grad.square().sum() for p in self.model.parameters() if p.grad is not None]
        return SimpleNamespace(grad_norm=float(torch.stack(squares).sum().sqrt()))


@pytest.fixture
def batch() -> WindowBatch:
    """Two windows of nine patches: series 11 and 12 in the first, 13 alone in the second."""
    generator = torch.Generator().manual_seed(0)
    values_BCL = torch.randn(2, 1, 72, generator=generator).cumsum(-1)
    observed_BCL = torch.ones_like(values_BCL, dtype=torch.bool)
    observed_BCL[0, 0, :12] = False  # a patch of fill, and half of the first of series 11
    is_target_BCL = observed_BCL.clone()
    is_target_BCL[0, 0, :16] = False
    is_target_BCL[0, 0, 40:48] = False
    is_target_BCL[1, 0, :8] = False
    series_BCN = torch.tensor(
        [[[-1, 11, 11, 11, -1, 12, 12, 12]], [[13, 13, 13, 13, 13, 13, 13, 13]]]
    )
    return WindowBatch(
        values_BCL=values_BCL,
        observed_BCL=observed_BCL,
        is_target_BCL=is_target_BCL,
        series_ids_B=torch.tensor([11, 13]),
        series_BCN=series_BCN,
    )


def step(engine: BareEngine, batches: list[WindowBatch]):
    return training_step(
        engine,
        batches,
        step=5,
        lr=1e-3,
        balance_rate=0.0,
        objective=NextPatchObjective(error_unit="window", target_clip=10.0),
        series_name=lambda number: f"series-{number}",
    )


def test_points_that_are_forecast_are_counted_once(make_model, batch) -> None:
    report = step(BareEngine(make_model()), [batch])
    # Three patches behind the first of series 11 and 12 each, eight of series 13.
    assert report.num_points == (3 + 3 + 8) * PATCH


def test_load_counts_tokens_of_series(make_model, batch) -> None:
    report = step(BareEngine(make_model()), [batch, batch])
    assert report.load_ME.sum(1).tolist() == [2 * 2 * (3 + 3 + 8)] * 2


def spoil(monkeypatch, bad_tokens: tuple[int, slice]) -> None:
    """Make the errors of some tokens of the first micro-batch not finite."""
    real_errors = PointHead.point_errors
    calls = []

    def point_errors(self, prediction_BCNPK, target_BCNP):
        errors_BCNP = real_errors(self, prediction_BCNPK, target_BCNP)
        if not calls:
            is_bad_BCNP = torch.zeros_like(errors_BCNP, dtype=torch.bool)
            row, tokens = bad_tokens
            is_bad_BCNP[row, :, tokens] = True
            errors_BCNP = errors_BCNP.masked_fill(is_bad_BCNP, torch.nan)
        calls.append(1)
        return errors_BCNP

    monkeypatch.setattr(PointHead, "point_errors", point_errors)


@pytest.mark.parametrize(
    ("bad_tokens", "name"), [((0, slice(5, 7)), 12), ((0, slice(1, 2)), 11), ((1, slice(3, 4)), 13)]
)
def test_error_names_the_series_and_not_its_neighbours(
    make_model, batch, monkeypatch, bad_tokens, name: int
) -> None:
    spoil(monkeypatch, bad_tokens)
    with pytest.raises(TrainingError, match="the loss is not finite") as raised:
        step(BareEngine(make_model()), [batch, batch])
    assert f"with a loss that is not finite: series-{name};" in str(raised.value)


def test_gradient_that_is_not_finite_names_all_by_their_loss(make_model, batch) -> None:
    engine = BareEngine(make_model())
    engine.update = lambda **_: SimpleNamespace(grad_norm=float("inf"))
    with pytest.raises(TrainingError, match="the gradient is not finite") as raised:
        step(engine, [batch])
    assert sorted(n for n in (11, 12, 13) if f"series-{n}" in str(raised.value)) == [11, 12, 13]


def test_packs_want_windows_of_whole_patches(tiny_config) -> None:
    settings = {"run": "unused", "corpus": "unused"}
    model = replace(tiny_config, patch_stride=4, context_length=60)
    RunConfig(model=model, **settings)
    with pytest.raises(
        ValueError,
        match=r"model.context_length \(60\) must be a multiple of model.patch_length \(8\) where "
        r"data.packs_short_series is true; nearest are 56 and 64",
    ):
        RunConfig(model=model, data=DataConfig(packs_short_series=True), **settings)
