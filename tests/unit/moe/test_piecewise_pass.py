"""Experts piece by piece against every expert on every token, where pieces are many or none."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tsmoe.moe import piecewise_pass
from tsmoe.moe.assignment import Assignment
from tsmoe.moe.grouped_pass import run_grouped
from tsmoe.moe.piecewise_pass import run_piecewise

U, E, D, WIDTH = 37, 4, 16, 8


def inputs(dtype: torch.dtype, *, top_k: int, tokens: int) -> tuple[list[Tensor], Assignment]:
    """Draw units, weights and experts; the last expert is idle and the first has half of all."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tilt_E = torch.tensor([0.7, 0.0, 0.0, -9.0])
    ids_UK = (torch.rand(U, E, generator=generator) + tilt_E).topk(top_k).indices
    leaves = [draw(U, tokens, D), draw(U, top_k).float().abs(), draw(E, D, 2 * WIDTH) / 4]
    leaves.append(draw(E, WIDTH, D) / 4)
    assignment = Assignment.of(ids_UK, ids_UK.flatten().bincount(minlength=E))
    return [leaf.requires_grad_() for leaf in leaves], assignment


def run_naively(
    units_UND: Tensor, weights_UK: Tensor, gate_up: Tensor, down: Tensor, assignment: Assignment
) -> Tensor:
    """Let each choice be computed by itself, in double precision."""
    expert_M = torch.arange(E).repeat_interleave(assignment.counts_E)
    places = sorted(zip(assignment.order_M.tolist(), expert_M.tolist(), strict=True))
    sums = [torch.zeros(units_UND.shape[1:], dtype=torch.float64) for _ in range(U)]
    for choice, expert in places:
        unit, place = divmod(choice, assignment.top_k)
        gate, up = (units_UND[unit].double() @ gate_up[expert].double()).chunk(2, dim=-1)
        answer = (F.silu(gate) * up) @ down[expert].double()
        sums[unit] = sums[unit] + weights_UK[unit, place].double() * answer
    return torch.stack(sums)


# float32: sums of some tens of products in another order. bf16: 8 bits of mantissa, rounded in
# each of five stages.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("run", [run_piecewise, run_grouped])
def test_values_and_gradients_are_those_of_choices_one_by_one(
    run, top_k: int, tokens: int, dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of 37 units the busiest expert gets several pieces, all of them filled up in bf16.
    monkeypatch.setattr(piecewise_pass, "_PIECE_ROWS", 10)
    found = []
    for function in (run_naively, run):
        leaves, assignment = inputs(dtype, top_k=top_k, tokens=tokens)
        answer = function(*leaves, assignment)
        gradient = torch.randn(answer.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        answer.backward(gradient.to(answer.dtype))
        found.append([answer.detach(), *(leaf.grad for leaf in leaves)])
    for expected, got in zip(*found, strict=True):
        error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_fill_up_a_piece_are_no_rows(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory starts as NaN here, so that a row that is not zeroed shows."""
    monkeypatch.setattr(piecewise_pass, "pays_for_new_shapes", lambda _: True)
    monkeypatch.setattr(
        piecewise_pass._Rows,
        "__init__",
        lambda self, like, count, width: setattr(
            self, "_rows", like.new_full((count, width), float("nan"))
        ),
    )
    leaves, assignment = inputs(dtype, top_k=2, tokens=1)
    answer = run_piecewise(*leaves, assignment)
    answer.float().square().sum().backward()
    assert answer.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_few_shapes_are_multiplied_whatever_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()
    plain = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, **out: shapes.add(a.shape[0]) or plain(a, b, **out)
    )
    for seed in range(20):
        leaves, _ = inputs(torch.bfloat16, top_k=1, tokens=1)
        ids_UK = torch.randint(0, E, (U, 1), generator=torch.Generator().manual_seed(seed))
        counts_E = ids_UK.flatten().bincount(minlength=E)
        run_piecewise(*leaves, Assignment.of(ids_UK, counts_E))
    assert shapes <= {16, 32}


def test_a_piece_is_filled_up_by_little_and_has_few_sizes() -> None:
    sizes = {rows: piecewise_pass._fill_up(rows) for rows in range(1, 2049)}
    assert len(set(sizes.values())) <= 80
    assert all(rows <= filled < rows + 16 or filled < 1.07 * rows for rows, filled in sizes.items())
    assert sum(filled / rows - 1 for rows, filled in sizes.items() if rows >= 256) / 1793 < 0.03


def test_piecewise_keeps_neither_rows_nor_answers() -> None:
    kept = []
    leaves, assignment = inputs(torch.float32, top_k=2, tokens=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run_piecewise(*leaves, assignment)
    own = {leaf.data_ptr() for leaf in leaves}
    numbers = sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in own)
    assert numbers == 2 * U * 2 * WIDTH  # gate and up of each choice


@pytest.mark.parametrize("keeps", [False, True])
def test_without_gradients_no_piece_outlives_its_turn(
    keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piecewise_pass, "_PIECE_ROWS", 10)
    made: list[weakref.ref] = []
    most_alive = 0
    plain = torch.mm

    def watch(left: Tensor, right: Tensor, **out: Tensor) -> Tensor:
        nonlocal most_alive
        product = plain(left, right, **out)
        if not out:
            made.append(weakref.ref(product))
            most_alive = max(most_alive, sum(each() is not None for each in made))
        return product

    monkeypatch.setattr(torch, "mm", watch)
    leaves, assignment = inputs(torch.float32, top_k=2, tokens=1)
    with torch.set_grad_enabled(keeps):
        run_piecewise(*leaves, assignment)
    assert len(made) > 5
    # The one before dies when its name is given to the next.
    assert most_alive == len(made) if keeps else most_alive <= 2


def test_blocks_of_ranks_are_put_in_order_of_expert() -> None:
    counts_Se = torch.tensor([[2, 0, 1], [1, 3, 0]])
    assignment = Assignment.of_blocks(counts_Se, 7)
    # Rank 0 sent 0, 1 for the first expert and 2 for the third, rank 1 sent 3 and then 4, 5, 6.
    assert assignment.order_M.tolist() == [0, 1, 3, 4, 5, 6, 2]
    assert assignment.counts == [3, 3, 1]


@pytest.mark.parametrize("fills_up_first", [True, False])
def test_backward_cuts_as_forward_did_whatever_the_setting_says_by_then(
    fills_up_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, assignment = inputs(torch.float32, top_k=2, tokens=3)
    expected = torch.autograd.grad(run_piecewise(*tensors, assignment).square().sum(), tensors)
    monkeypatch.setattr(piecewise_pass, "pays_for_new_shapes", lambda _: fills_up_first)
    summed_UND = run_piecewise(*tensors, assignment)
    monkeypatch.setattr(piecewise_pass, "pays_for_new_shapes", lambda _: not fills_up_first)
    found = torch.autograd.grad(summed_UND.square().sum(), tensors)
    for gradient, twin in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, twin)
