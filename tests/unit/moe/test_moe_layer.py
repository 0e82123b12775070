import pytest
import torch

from tsmoe.moe.layer import MoEConfig, MoELayer
from tsmoe.moe.routers import SequenceRouterConfig
from tsmoe.nn.feed_forward import SwiGLU


def make_layer(**settings: object) -> MoELayer:
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "d_ff_expert": 8, "d_ff_shared": 8}
    config = MoEConfig(**(sizes | settings))
    return MoELayer(config, d_model=16, layer_index=0, num_layers=1, seed=0)


def test_output_is_the_sum_of_shared_and_routed_parts() -> None:
    tokens_BCND = torch.randn(2, 1, 3, 16, generator=torch.Generator().manual_seed(1))
    with_shared, without = make_layer(), make_layer(num_shared_experts=0)
    with torch.no_grad():
        without.router.clusters_ED.copy_(with_shared.router.clusters_ED)
    assert without.always_on is None
    shared = with_shared.always_on(tokens_BCND)
    torch.testing.assert_close(
        with_shared(tokens_BCND, None)[0], without(tokens_BCND, None)[0] + shared
    )
    assert shared.abs().max() > 0.01


def test_all_experts_alike_are_one_feed_forward_network() -> None:
    layer = make_layer(num_shared_experts=0)
    twin = SwiGLU(16, 8)
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight[:] = weight[:1].clone()
        twin.gate_up.weight.copy_(layer.experts.gate_up_weight[0].T)
        twin.down.weight.copy_(layer.experts.down_weight[0].T)
    tokens_BCND = torch.randn(2, 1, 3, 16)
    torch.testing.assert_close(layer(tokens_BCND, None)[0], twin(tokens_BCND))


def test_active_width_counts_shared_and_chosen_experts() -> None:
    config = MoEConfig(
        num_experts=8, num_shared_experts=2, d_ff_shared=10, d_ff_expert=7,
        router=SequenceRouterConfig(top_k=3),
    )  # fmt: skip
    assert config.active_d_ff == 2 * 10 + 3 * 7


def test_only_routed_parameters_have_expert_in_their_name() -> None:
    names = {name for name, _ in make_layer().named_parameters() if "expert" in name}
    assert names == {"experts.gate_up_weight", "experts.down_weight"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_experts": 2, "router": SequenceRouterConfig(top_k=3)}, r"top_k \(3\).*\(2\)"),
        ({"num_shared_experts": -1}, r"num_shared_experts \(-1\)"),
        ({"d_ff_expert": 0}, r"d_ff_expert \(0\)"),
    ],
)
def test_impossible_sizes_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MoEConfig(**settings)
