import pytest
import torch
from torch import Tensor

from tsmoe.moe.assignment import Assignment
from tsmoe.moe.experts import Experts
from tsmoe.ranks import Ranks


def make_experts(**settings: object) -> Experts:
    sizes = {"d_model": 16, "d_ff": 8, "num_experts": 4, "layer_index": 1, "num_layers": 2}
    return Experts(**(sizes | {"seed": 5, "compute": "loop"} | settings))


def rows(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 16, generator=generator).to(dtype)


def answer(experts: Experts, rows_RD: Tensor, counts: list[int]) -> Tensor:
    """Let each expert answer its rows, which come in order of expert."""
    assignment = Assignment(
        order_M=torch.arange(len(rows_RD)), counts_E=torch.tensor(counts), top_k=1
    )
    return experts(rows_RD.unsqueeze(1), torch.ones(len(rows_RD), 1), assignment).squeeze(1)


@pytest.mark.parametrize("compute", ["loop", "grouped", "auto"])
def test_each_expert_serves_its_own_rows(compute: str) -> None:
    experts = make_experts(compute=compute)
    counts = [3, 0, 5, 1]
    answered_RD = answer(experts, rows(9), counts)
    first = 0
    for expert, count in enumerate(counts):
        row_RD = rows(9)[first : first + count]
        gate, up = (row_RD @ experts.gate_up_weight[expert]).chunk(2, dim=-1)
        expected_RD = (gate * gate.sigmoid() * up) @ experts.down_weight[expert]
        torch.testing.assert_close(answered_RD[first : first + count], expected_RD)
        first += count


# bf16 has 8 bits of mantissa; sums of 16 rounded products agree to about 1 %.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_grouped_matmul_and_loop_agree_in_values_and_gradients(dtype, tolerance: float) -> None:
    found = []
    for compute in ("loop", "grouped"):
        experts = make_experts(compute=compute).to(dtype)
        rows_RD = rows(12, dtype).requires_grad_()
        answered_RD = answer(experts, rows_RD, [6, 0, 4, 2])
        answered_RD.square().sum().backward()
        found.append((answered_RD, rows_RD.grad, *(p.grad for p in experts.parameters())))
    for loop, grouped in zip(*found, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("compute", ["loop", "grouped", "auto"])
@pytest.mark.parametrize("counts", [[3, 0, 4, 0], [0, 0, 0, 0]])
def test_idle_expert_still_gets_a_zero_gradient(compute: str, counts: list[int]) -> None:
    experts = make_experts(compute=compute)
    answer(experts, rows(sum(counts)), counts).square().sum().backward()
    for parameter in experts.parameters():
        is_busy = [bool(gradient.abs().sum() > 0) for gradient in parameter.grad]
        assert is_busy == [count > 0 for count in counts]


def test_start_of_an_expert_does_not_depend_on_the_number_of_ranks() -> None:
    whole = make_experts()
    halves = [make_experts(ranks=Ranks(rank=rank, size=2)) for rank in range(2)]
    assert [list(half.global_ids) for half in halves] == [[0, 1], [2, 3]]
    for name, parameter in whole.named_parameters():
        joined = torch.cat([half.get_parameter(name) for half in halves])
        assert torch.equal(joined, parameter)


def test_start_depends_on_seed_layer_and_expert_and_not_on_torchs_random_state() -> None:
    torch.manual_seed(1)
    first = make_experts().gate_up_weight
    torch.manual_seed(2)
    assert torch.equal(make_experts().gate_up_weight, first)
    for other in (make_experts(seed=6), make_experts(layer_index=0)):
        assert not torch.equal(other.gate_up_weight, first)
    assert not torch.equal(first[0], first[1])


def test_start_is_as_wide_as_documented() -> None:
    experts = make_experts(d_model=256, d_ff=128, num_layers=8)
    # 65,536 numbers each: the deviation is known to 0.3 %.
    assert experts.gate_up_weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert experts.down_weight.std().item() == pytest.approx((2 * 8 * 128) ** -0.5, rel=0.02)


def test_auto_does_not_group_rows_that_are_not_aligned(monkeypatch) -> None:
    calls = []
    plain = torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        "torch.nn.functional.grouped_mm",
        lambda *arguments, **options: calls.append(1) or plain(*arguments, **options),
    )
    # 6 floats are 24 bytes; grouped matmul wants multiples of 16.
    crooked = make_experts(d_ff=6, compute="auto")
    assert answer(crooked, rows(4), [1, 1, 1, 1]).shape == (4, 16)
    assert not calls
    answer(make_experts(compute="auto"), rows(4), [1, 1, 1, 1])
    assert len(calls) == 2


def test_autocast_computes_in_its_own_precision() -> None:
    experts = make_experts(compute="grouped")
    with torch.autocast("cpu", torch.bfloat16):
        assert answer(experts, rows(4), [1, 1, 1, 1]).dtype == torch.bfloat16
    assert experts.gate_up_weight.dtype == torch.float32
