"""A block whose activations are computed again goes by the decision of its first pass."""

import pytest
import torch
from torch import Tensor

from tsmoe.models import build_model
from tsmoe.models.time_tracker import TimeTracker, TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.moe.routers import SequenceRouter, SequenceRouterConfig
from tsmoe.moe.routing import Decision

LAYERS = 3


def make_model(mode: str, *, recomputes: bool) -> TimeTracker:
    config = TimeTrackerConfig(
        patch_length=4, patch_stride=4, context_length=32, d_model=16, num_heads=2,
        num_layers=LAYERS,
        feed_forward=MoEConfig(
            num_experts=4, d_ff_expert=8, d_ff_shared=8, router=SequenceRouterConfig(mode=mode)
        ),
    )  # fmt: skip
    return build_model(config, recomputes_activations=recomputes)


def gradients(model: TimeTracker, *, is_packed: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradient of each parameter, and each layer's load."""
    generator = torch.Generator().manual_seed(0)
    values_BCL = torch.randn(6, 1, 32, generator=generator).cumsum(-1)
    series_BCN = torch.tensor([0, 0, 0, -1, 1, 1, 1, 1]).expand(6, 1, 8) if is_packed else None
    observed_BCL = torch.ones_like(values_BCL, dtype=torch.bool)
    output = model(values_BCL, observed_BCL, series_BCN=series_BCN)
    output.prediction_BCNPK.square().mean().backward()
    # Without a graph of variates their biases take no part.
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return grads, [r.load_E for r in output.routings]


@pytest.fixture
def noisy_decisions(monkeypatch: pytest.MonkeyPatch) -> list[Decision]:
    """Decisions with noise on the scores, so that no two are alike; and a list of them."""
    made: list[Decision] = []
    decide = SequenceRouter._decide

    def decide_with_noise(router: SequenceRouter, scores: Tensor, spans: object) -> Decision:
        generator = torch.Generator().manual_seed(len(made))
        made.append(decide(router, scores + torch.rand(scores.shape, generator=generator), spans))
        return made[-1]

    monkeypatch.setattr(SequenceRouter, "_decide", decide_with_noise)
    return made


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("mode", ["sequence", "prefix", "token"])
def test_gradients_are_those_of_the_first_decision(
    noisy_decisions: list[Decision], mode: str, is_packed: bool
) -> None:
    stored, load = gradients(make_model(mode, recomputes=False), is_packed=is_packed)
    assert len(noisy_decisions) == LAYERS
    noisy_decisions.clear()
    again, load_again = gradients(make_model(mode, recomputes=True), is_packed=is_packed)
    assert len(noisy_decisions) == LAYERS
    assert all(torch.equal(*pair) for pair in zip(load, load_again, strict=True))
    assert all(torch.equal(*pair) for pair in zip(stored, again, strict=True))


def test_each_step_decides_anew(noisy_decisions: list[Decision]) -> None:
    model = make_model("token", recomputes=True)
    gradients(model, is_packed=False)
    gradients(model, is_packed=False)
    assert len(noisy_decisions) == 2 * LAYERS
