import pytest
import torch
from torch import Tensor

from tsmoe.models.time_tracker import TimeTracker
from tsmoe.moe.layer import MoEConfig
from tsmoe.moe.routers import SequenceRouterConfig


def gradient_norm(model: TimeTracker, values_BCL: Tensor) -> float:
    """Backpropagate the mean square of all predictions, in normalised units."""
    model.zero_grad()
    observed_BCL = ~values_BCL.isnan()
    model(values_BCL, observed_BCL).prediction_BCNPK.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    return torch.stack([gradient.norm() for gradient in gradients]).norm().item()


def half_constant(walks_BCL: Tensor) -> Tensor:
    values_BCL = walks_BCL.clone()
    values_BCL[..., :32] = 5.0
    return values_BCL


HARD_WINDOWS = {
    "constant": lambda walks: torch.full_like(walks, 3.0),
    "zero": torch.zeros_like,
    "half constant": half_constant,
    "all missing": lambda walks: torch.full_like(walks, torch.nan),
    "one observation": lambda walks: walks.masked_fill(torch.arange(64) != 40, torch.nan),
    "huge": lambda walks: walks * 1e30,
    "tiny": lambda walks: walks * 1e-20,
}


@pytest.mark.parametrize("name", HARD_WINDOWS)
@pytest.mark.parametrize("mode", ["prefix", "sequence"])
def test_gradient_of_hard_windows_is_finite_and_of_ordinary_size(
    make_model, walks_BCL, name: str, mode: str
) -> None:
    router = SequenceRouterConfig(mode=mode)
    feed_forward = MoEConfig(num_experts=4, d_ff_expert=16, d_ff_shared=16, router=router)
    model = make_model(feed_forward=feed_forward)
    ordinary = gradient_norm(model, walks_BCL)
    assert gradient_norm(model, HARD_WINDOWS[name](walks_BCL)) < 20 * ordinary


def test_tokens_of_zero_would_blow_the_gradient_up(make_model, walks_BCL) -> None:
    # What the bias of the embedding is for: without it the test above fails.
    model = make_model()
    sound = gradient_norm(model, half_constant(walks_BCL))
    torch.nn.init.zeros_(model.embed.values.bias)
    assert gradient_norm(model, half_constant(walks_BCL)) > 1000 * sound


def test_every_trainable_parameter_learns(make_model, walks_BCL) -> None:
    model = make_model()
    walks_BCL[..., 20:23] = torch.nan
    gradient_norm(model, walks_BCL)
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == {name for name, _ in model.named_parameters() if "variate_bias" in name}
    idle = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert idle == []


def test_computing_activations_again_gives_the_same_gradients(tiny_config, walks_BCL) -> None:
    found = []
    for recomputes in (False, True):
        model = TimeTracker(tiny_config, recomputes_activations=recomputes)
        gradient_norm(model, walks_BCL)
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_dropout_acts_in_training_only(make_model, walks_BCL) -> None:
    model = make_model(dropout=0.5)
    observed_BCL = torch.ones_like(walks_BCL, dtype=torch.bool)
    with torch.no_grad():
        first, second = (model(walks_BCL, observed_BCL).prediction_BCNPK for _ in range(2))
        assert torch.equal(first, second)
        model.train()
        assert not torch.equal(model(walks_BCL, observed_BCL).prediction_BCNPK, first)
