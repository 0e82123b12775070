"""The CUDA path of graph attention, as far as a CPU runs it: uncompiled, with device checks lifted.

Uncompiled FlexAttention evaluates the same mask and score functions for every pair of tokens, and
its backward pass differentiates them, so what is ours of this path is tested wholly.
"""

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from tsmoe.nn import flex, graph_attention
from tsmoe.nn.block_sparse import attend_in_tiles
from tsmoe.nn.flex import TokenOrder, attend_by_flex, mask_function
from tsmoe.nn.graph_attention import attend_over_graph, graph_path

B, C, N, H, WIDTH = 2, 5, 4, 2, 16


@pytest.fixture(params=["by time", "by variate"])
def uncompiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "BLOCK_TOKENS", C if request.param == "by time" else C + 1)
    functions = (torch_flex.flex_attention, torch_flex.create_block_mask)
    monkeypatch.setattr(flex, "_compiled", lambda: functions)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)


def random_graph() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    is_drawn_BCC = torch.rand(B, C, C, generator=generator) < 0.4
    return is_drawn_BCC | torch.eye(C, dtype=torch.bool)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_tiles_with_gradients(uncompiled) -> None:
    generator = torch.Generator().manual_seed(1)
    *inputs, grad = [torch.randn(B, C, N, H, WIDTH, generator=generator) for _ in range(4)]
    leaves = [part.requires_grad_() for part in (*inputs, torch.tensor([0.8, -0.6]))]
    found = attend_by_flex(*leaves, random_graph())
    expected = attend_in_tiles(*leaves, random_graph())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_mask_is_the_product_of_graph_and_past(uncompiled) -> None:
    adjacency_BCC, order = random_graph(), TokenOrder(C, N)
    mask = torch_flex.create_mask(mask_function(adjacency_BCC, order), B, 1, C * N, C * N, "cpu")
    is_past_NN = torch.ones(N, N, dtype=torch.bool).tril()
    pair = (is_past_NN, adjacency_BCC[1]) if order.is_by_time else (adjacency_BCC[1], is_past_NN)
    assert torch.equal(mask[1, 0], torch.kron(*pair))


def test_empty_blocks_are_skipped() -> None:
    def share(adjacency_CC: torch.Tensor, patches: int) -> float:
        order = TokenOrder(len(adjacency_CC), patches)
        tokens = order.variates * patches
        is_allowed = mask_function(adjacency_CC[None], order)
        block_mask = torch_flex.create_block_mask(is_allowed, 1, None, tokens, tokens, "cpu")
        return 1 - block_mask.sparsity() / 100

    # By time: blocks on and below the diagonal, 8 steps of one block each.
    assert share(torch.ones(128, 128, dtype=torch.bool), 8) == pytest.approx(36 / 64)
    # By variate: 8 variates of one block each that see themselves alone.
    assert share(torch.eye(8, dtype=torch.bool), 128) == pytest.approx(8 / 64)


def test_device_decides_the_path(monkeypatch) -> None:
    assert graph_path(torch.device("cpu")) == "tiles"
    assert graph_path(torch.device("cuda", 0)) == "flex"
    taken = []
    monkeypatch.setattr(graph_attention, "graph_path", lambda _: "flex")
    monkeypatch.setattr(graph_attention, "attend_by_flex", lambda *_: taken.append("flex"))
    heads = torch.zeros(B, C, N, H, WIDTH)
    attend_over_graph(heads, heads, heads, torch.zeros(H), random_graph())
    assert taken == ["flex"]
