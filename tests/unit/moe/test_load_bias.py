import torch

from tsmoe.moe.routers import SequenceRouterConfig, build_router
from tsmoe.moe.routers.load_bias import LoadBias


def test_busy_experts_are_lowered_and_idle_ones_raised() -> None:
    balance = LoadBias(4)
    balance.update(torch.tensor([9, 0, 4, 3]), rate=0.01)
    torch.testing.assert_close(balance.bias_E, torch.tensor([-0.01, 0.01, 0.0, 0.01]))


def test_even_load_leaves_the_bias_alone() -> None:
    balance = LoadBias(3)
    balance.update(torch.tensor([7, 7, 7]), rate=0.01)
    assert balance.bias_E.tolist() == [0, 0, 0]


def test_unit_of_the_load_does_not_matter() -> None:
    tokens, sequences = LoadBias(3), LoadBias(3)
    tokens.update(torch.tensor([30, 60, 210]), rate=0.5)
    sequences.update(torch.tensor([1, 2, 7]), rate=0.5)
    assert torch.equal(tokens.bias_E, sequences.bias_E)


def test_updates_fill_up_an_idle_expert() -> None:
    torch.manual_seed(0)
    router = build_router(SequenceRouterConfig(mode="token", top_k=1), 16, 4)
    with torch.no_grad():
        router.clusters_ED *= 0.1
        # All tokens have a positive first coordinate, which the last expert dislikes.
        router.clusters_ED[3] = -torch.eye(16)[0]
    tokens_BCND = torch.randn(8, 1, 32, 16)
    tokens_BCND[..., 0] = tokens_BCND[..., 0].abs() + 1
    first = router(tokens_BCND, None)[0].load_E
    for _ in range(400):
        load_E = router(tokens_BCND, None)[0].load_E
        router.balance.update(load_E, rate=0.002)
    assert first[3] == 0
    assert load_E.min() > 0.7 * load_E.float().mean()
