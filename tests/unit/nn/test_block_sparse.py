"""Attention in tiles against attention with a mask over all pairs of tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tsmoe.nn import block_sparse, causal_tiles, score_tiles
from tsmoe.nn.attention import AnyVariateAttention
from tsmoe.nn.block_sparse import attend_in_tiles, is_gathered
from tsmoe.nn.rotary import rotary_tables, split_rotated

H, WIDTH = 2, 4
WAYS = {"gathered": 0.0, "causal": float("inf")}
# All connected; isolated variates beside a hub; one-way edges; random degrees.
GRAPHS = ("all", "hub", "chain", "random")


def graph(kind: str, windows: int, variates: int) -> Tensor:
    shape = (windows, variates, variates)
    adjacency_BCC = torch.zeros(shape, dtype=torch.bool)
    match kind:
        case "all":
            adjacency_BCC[:] = True
        case "hub":
            adjacency_BCC[:, 0] = True
        case "chain":
            adjacency_BCC |= torch.eye(variates, dtype=torch.bool).roll(1, dims=-1)
        case "random":
            adjacency_BCC = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4
    return adjacency_BCC | torch.eye(variates, dtype=torch.bool)


def random_heads(windows: int, variates: int, patches: int, dtype: torch.dtype) -> list[Tensor]:
    """Draw query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    shape = (windows, variates, patches, H, WIDTH)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(4)]


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, own_H: Tensor, other_H: Tensor, adjacency: Tensor
) -> Tensor:
    """Attend with one score for every pair of tokens, left to autograd."""
    _, variates, patches, *_ = query.shape
    scores = torch.einsum("bimhd,bjnhd->bhimjn", query, key) / query.shape[-1] ** 0.5
    is_own = torch.eye(variates, dtype=torch.bool)[:, None, :, None]
    per_head = (slice(None), None, None, None, None)
    scores = scores + torch.where(is_own, own_H[per_head], other_H[per_head])
    is_past = torch.ones(patches, patches, dtype=torch.bool).tril()
    is_allowed = adjacency[:, None, :, None, :, None] & is_past[:, None, :]
    weights = scores.masked_fill(~is_allowed, -torch.inf).flatten(-2).softmax(-1)
    return torch.einsum("bhimjn,bjnhd->bimhd", weights.view_as(scores), value)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(block_sparse, "GATHERED_PAIR_COST", WAYS[request.param])
    return request.param


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 5), (3, 6, 1), (2, 5, 4), (2, 7, 5)], ids=str)
@pytest.mark.parametrize("scores_at_most", [1, 150, 2**19])
def test_tiles_of_any_size_equal_dense_masks_with_gradients(
    way, kind: str, sizes: tuple[int, int, int], scores_at_most: int, monkeypatch
) -> None:
    monkeypatch.setattr(score_tiles, "SCORES_AT_MOST", scores_at_most)
    monkeypatch.setattr(causal_tiles, "QUERIES_AT_LEAST", 8)
    adjacency_BCC = graph(kind, *sizes[:2])
    *inputs, grad = random_heads(*sizes, torch.float64)
    own_H = torch.tensor([0.8, -0.6], dtype=torch.float64)
    leaves = [part.requires_grad_() for part in (*inputs, own_H)]
    expected = dense_attention(*inputs, own_H, torch.zeros_like(own_H), adjacency_BCC)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    found = attend_in_tiles(*inputs, own_H, adjacency_BCC)
    found_grads = torch.autograd.grad(found, leaves, grad)
    for one, other in zip((found, *found_grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_windows_of_a_batch_go_the_cheaper_way_each_and_stay_equal() -> None:
    variates, patches = 12, 3
    adjacency_BCC = torch.cat([graph(kind, 1, variates) for kind in ("all", "chain", "hub", "all")])
    assert is_gathered(adjacency_BCC, patches).tolist() == [False, True, True, False]
    *inputs, grad = random_heads(4, variates, patches, torch.float64)
    own_H = torch.tensor([0.8, -0.6], dtype=torch.float64)
    leaves = [part.requires_grad_() for part in (*inputs, own_H)]
    expected = dense_attention(*inputs, own_H, torch.zeros_like(own_H), adjacency_BCC)
    found = attend_in_tiles(*inputs, own_H, adjacency_BCC)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_layer_gives_every_parameter_the_gradient_of_dense_masks(way) -> None:
    torch.manual_seed(0)
    attention = AnyVariateAttention(H * WIDTH, H, rotary_base=10000.0).double()
    with torch.no_grad():
        attention.same_variate_bias_H += torch.tensor([0.7, -0.5])
        attention.other_variate_bias_H += torch.tensor([-0.2, 0.9])
    tokens_BCND = torch.randn(2, 5, 4, H * WIDTH, dtype=torch.float64)
    adjacency_BCC = graph("random", 2, 5)

    projected = attention.query_key_value(tokens_BCND.flatten(0, 1)).unflatten(-1, (3, H, -1))
    tables = rotary_tables(torch.arange(4), WIDTH, base=10000.0)
    query, key, value = (part.unflatten(0, (2, 5)) for part in split_rotated(projected, *tables))
    attended = dense_attention(
        query,
        key,
        value,
        attention.same_variate_bias_H,
        attention.other_variate_bias_H,
        adjacency_BCC,
    )
    expected = attention.output(attended.flatten(-2))
    found = attention(tokens_BCND, adjacency_BCC)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    parameters = dict(attention.named_parameters())
    slope = torch.randn_like(found)
    for name, one, other in zip(
        parameters,
        torch.autograd.grad(found, parameters.values(), slope),
        torch.autograd.grad(expected, parameters.values(), slope),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n} {m}")


def test_what_is_no_neighbour_has_no_influence_and_no_gradient(way) -> None:
    adjacency_BCC = graph("all", 2, 5)
    adjacency_BCC[:, 1, 3] = False
    query, key, value, _ = random_heads(2, 5, 4, torch.float32)
    own_H = torch.zeros(H)
    before = attend_in_tiles(query, key, value, own_H, adjacency_BCC)
    for part in (key, value):
        part[:, 3] = 1e4
    key.requires_grad_()
    value.requires_grad_()
    after = attend_in_tiles(query, key, value, own_H, adjacency_BCC)
    assert torch.equal(after[:, 1], before[:, 1])
    assert not torch.equal(after[:, 2], before[:, 2])
    for grad in torch.autograd.grad(after[:, 1].sum(), (key, value)):
        assert not grad[:, 3].any()
        assert grad[:, 2].any()


def test_bfloat16_is_as_near_as_rounded_inputs_allow(way) -> None:
    adjacency_BCC = graph("random", 2, 5)
    *inputs, grad = [part.bfloat16() for part in random_heads(2, 5, 4, torch.float32)]
    inputs[0] *= 16  # scores of 30, which bfloat16 resolves to 0.1, their weights to 10 %
    own_H = torch.tensor([0.8, -0.6])
    leaves = [part.requires_grad_() for part in inputs]
    found = attend_in_tiles(*leaves, own_H, adjacency_BCC)
    exact = [part.detach().double().requires_grad_() for part in inputs]
    expected = dense_attention(*exact, own_H.double(), torch.zeros(H).double(), adjacency_BCC)
    assert found.dtype == torch.bfloat16
    # Scores are float32; weights, values and sums are rounded to 8 bits, 2^-8 of about 2.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02)
    for one, other in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(expected, exact, grad.double()),
        strict=True,
    ):
        assert one.dtype == torch.bfloat16
        # Of the largest: slopes are differences of products rounded to 8 bits.
        assert (one.double() - other).abs().max() < 0.03 * other.abs().max()


def test_variate_that_may_not_see_itself_is_refused() -> None:
    adjacency_BCC = graph("all", 2, 5)
    adjacency_BCC[1, 3, 3] = False
    *inputs, _ = random_heads(2, 5, 4, torch.float32)
    with pytest.raises(ValueError, match="variate 3 of window 1"):
        attend_in_tiles(*inputs, torch.zeros(H), adjacency_BCC)


def peak_bytes(kind: str, variates: int, patches: int) -> int:
    """Count the bytes that a forward and a backward pass hold at most, beyond their inputs."""
    *inputs, grad = random_heads(1, variates, patches, torch.float32)
    leaves = [part.requires_grad_() for part in (*inputs, torch.zeros(H))]
    adjacency_BCC = graph(kind, 1, variates)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        attend_in_tiles(*leaves, adjacency_BCC).backward(grad)
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def test_memory_stays_far_below_one_score_for_each_pair(way, monkeypatch) -> None:
    monkeypatch.setattr(score_tiles, "SCORES_AT_MOST", 2**14)
    variates, patches = 120, 6
    bytes_of_pairs = H * (variates * patches) ** 2 * 4
    bytes_of_tensor = H * WIDTH * variates * patches * 4
    # Output, gradients and what is laid out anew: some 20 tensors; of a tile its scores and slopes
    # and, where they are gathered, keys, values and their gradients.
    allowed = 25 * bytes_of_tensor + 6 * score_tiles.SCORES_AT_MOST * 4
    assert bytes_of_pairs > 3 * allowed
    assert 8 * bytes_of_tensor < peak_bytes("all", variates, patches) < allowed


@pytest.mark.parametrize(("variates", "is_kept"), [(4 * WIDTH, True), (4 * WIDTH + 1, False)])
def test_weights_are_kept_where_they_are_no_more_than_the_rest(
    variates: int, is_kept: bool, monkeypatch
) -> None:
    monkeypatch.setattr(block_sparse, "GATHERED_PAIR_COST", float("inf"))
    *inputs, _ = random_heads(1, variates, 1, torch.float32)
    leaves = [part.requires_grad_() for part in inputs]
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        attend_in_tiles(*leaves, torch.zeros(H), graph("all", 1, variates))
    heads = 4 * inputs[0].numel()
    assert sum(sizes) == H + heads + is_kept * H * variates**2


def test_reference_of_this_file_is_softmax_attention() -> None:
    query, key, value, _ = random_heads(1, 1, 6, torch.float64)
    zeros_H = torch.zeros(H, dtype=torch.float64)
    found = dense_attention(query, key, value, zeros_H, zeros_H, graph("all", 1, 1))
    query, key, value = (part[:, 0].transpose(1, 2) for part in (query, key, value))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(found[:, 0].transpose(1, 2), expected)
