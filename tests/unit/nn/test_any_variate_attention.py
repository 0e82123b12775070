import pytest
import torch
from torch import Tensor

from tsmoe.nn.attention import AnyVariateAttention

B, C, N, D, H = 2, 3, 5, 8, 2


@pytest.fixture
def attention() -> AnyVariateAttention:
    torch.manual_seed(0)
    return AnyVariateAttention(D, H, rotary_base=10000.0).double()


@pytest.fixture(name="tokens_BCND")
def random_tokens() -> Tensor:
    return torch.randn(B, C, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def all_connected() -> Tensor:
    return torch.ones(B, C, C, dtype=torch.bool)


def alone() -> Tensor:
    return torch.eye(C, dtype=torch.bool).expand(B, C, C)


def set_biases(attention: AnyVariateAttention, same: float, other: float) -> None:
    with torch.no_grad():
        attention.same_variate_bias_H += torch.tensor([same, -same])
        attention.other_variate_bias_H += torch.tensor([other, -other])


def reference(attention: AnyVariateAttention, tokens_BCND: Tensor, adjacency_BCC: Tensor) -> Tensor:
    """Eq. (3) of the paper, one query at a time, with rotation by complex numbers."""
    width = D // H
    speed_d = attention.rotary_base ** (-torch.arange(width // 2) / (width // 2))
    query, key, value = (
        attention.query_key_value(tokens_BCND).unflatten(-1, (3, H, width)).unbind(3)
    )
    query, key = (torch.complex(*part.chunk(2, dim=-1)) for part in (query, key))
    answer = torch.zeros(B, C, N, H, width, dtype=torch.float64)
    for b, i, m in torch.cartesian_prod(*map(torch.arange, (B, C, N))).tolist():
        turn_Nd = torch.exp(1j * (m - torch.arange(N))[:, None] * speed_d)
        products = query[b, i, m] * turn_Nd[:, None] * key[b].conj()
        scores_CNH = products.real.sum(-1) / width**0.5 + attention.other_variate_bias_H
        own_bias_H = attention.same_variate_bias_H - attention.other_variate_bias_H
        scores_CNH[i] += own_bias_H
        scores_CNH[~adjacency_BCC[b, i]] = -torch.inf
        scores_CNH[:, m + 1 :] = -torch.inf
        weights_CNH = scores_CNH.flatten(0, 1).softmax(0).unflatten(0, (C, N))
        answer[b, i, m] = (weights_CNH[..., None] * value[b]).sum((0, 1))
    return attention.output(answer.flatten(-2))


def test_attention_is_the_papers_equation(attention, tokens_BCND) -> None:
    set_biases(attention, 0.7, -0.4)
    adjacency_BCC = all_connected()
    adjacency_BCC[0, 0, 2] = adjacency_BCC[1, 2, 1] = False
    with torch.no_grad():
        # Rotary tables are float32.
        torch.testing.assert_close(
            attention(tokens_BCND, adjacency_BCC),
            reference(attention, tokens_BCND, adjacency_BCC),
            rtol=0,
            atol=1e-5,
        )


def test_permuting_variates_permutes_the_output(attention, tokens_BCND) -> None:
    set_biases(attention, 0.5, -0.3)
    order = torch.tensor([2, 0, 1])
    adjacency_BCC = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1]]).bool().expand(B, C, C)
    plain = attention(tokens_BCND, adjacency_BCC)
    permuted = attention(tokens_BCND[:, order], adjacency_BCC[:, order][:, :, order])
    torch.testing.assert_close(permuted, plain[:, order], rtol=0, atol=1e-12)


def test_identity_adjacency_equals_the_channel_independent_path(attention, tokens_BCND) -> None:
    independent = attention(tokens_BCND)
    torch.testing.assert_close(attention(tokens_BCND, alone()), independent, rtol=0, atol=1e-12)
    assert (attention(tokens_BCND, all_connected()) - independent).abs().max() > 0.01


def test_unconnected_variate_has_no_influence(attention, tokens_BCND) -> None:
    adjacency_BCC = all_connected()
    adjacency_BCC[:, 0, 2] = False
    before = attention(tokens_BCND, adjacency_BCC)
    tokens_BCND[:, 2] += 1
    change_BCND = (attention(tokens_BCND, adjacency_BCC) - before).abs()
    assert change_BCND[:, 0].max() == 0
    assert change_BCND[:, 1].max() > 0.01


@pytest.mark.parametrize("is_mixed", [False, True])
def test_later_patches_of_no_variate_matter(attention, tokens_BCND, is_mixed: bool) -> None:
    adjacency_BCC = all_connected() if is_mixed else None
    before = attention(tokens_BCND, adjacency_BCC)
    tokens_BCND[:, :, 3:] += 1
    change_BCND = (attention(tokens_BCND, adjacency_BCC) - before).abs()
    assert change_BCND[:, :, :3].max() == 0
    assert change_BCND[:, :, 3:].amin(dim=(0, 1, 3)).min() > 0


def test_biases_between_variates_learn_only_with_an_adjacency(attention, tokens_BCND) -> None:
    biases = (attention.same_variate_bias_H, attention.other_variate_bias_H)
    attention(tokens_BCND).square().sum().backward()
    assert all(bias.grad is None for bias in biases)
    attention(tokens_BCND, all_connected()).square().sum().backward()
    assert all(bias.grad.abs().min() > 0 for bias in biases)


def test_larger_same_variate_bias_draws_attention_home(attention, tokens_BCND) -> None:
    independent = attention(tokens_BCND)
    apart = (attention(tokens_BCND, all_connected()) - independent).abs().max()
    with torch.no_grad():
        attention.same_variate_bias_H += 30
    assert (attention(tokens_BCND, all_connected()) - independent).abs().max() < 1e-6 * apart
