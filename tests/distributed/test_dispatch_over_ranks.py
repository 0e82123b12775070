"""Experts spread over two ranks give what one process gives on the tokens of both.

Shapes: B windows, C variates, N patches, D model width, E routed experts, K experts per token.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rank_pool import run_on_ranks
from tsmoe import ranks as ranks_module
from tsmoe.moe.dispatch import run_experts
from tsmoe.moe.experts import ExpertCompute, Experts
from tsmoe.moe.layer import MoEConfig, MoELayer
from tsmoe.moe.plan import plan_dispatch
from tsmoe.moe.replay import RoutingRecord
from tsmoe.moe.routers.sequence import SequenceRouter, SequenceRouterConfig
from tsmoe.nn.spans import SeriesSpans
from tsmoe.ranks import CommunicationMeter, CommunicationRecord, PendingRows, Ranks

NUM_EXPERTS, D_MODEL, D_FF, PATCHES = 4, 16, 24, 5
MODES = ("sequence", "prefix", "token")
# Added to the scores that choose, which lie between 0 and 1.
BIASES = {
    "balanced": (0.0, 0.0, 0.0, 0.0),
    "all on rank 0": (9.0, 9.0, 0.0, 0.0),
    "all on rank 1": (0.0, 0.0, 9.0, 9.0),
    "an idle one on each rank": (9.0, -9.0, 9.0, -9.0),
}
WINDOWS = {"even": (4, 4), "uneven": (8, 3), "a rank without any": (5, 0)}


@dataclass(frozen=True, kw_only=True)
class Case:
    mode: str
    bias_E: tuple[float, ...]
    windows: tuple[int, int]
    compute: ExpertCompute = "auto"


@dataclass(frozen=True, kw_only=True)
class Passed:
    """Outcome of a forward and a backward pass over some tokens."""

    output_BCND: Tensor
    tokens_gradient_BCND: Tensor
    weights_gradient_BCNK: Tensor
    clusters_gradient_ED: Tensor
    gate_up_gradient: Tensor
    down_gradient: Tensor
    load_E: Tensor


CASES = [
    *(
        Case(mode=mode, bias_E=bias, windows=windows)
        for mode in MODES
        for bias in BIASES.values()
        for windows in WINDOWS.values()
    ),
    *(
        Case(mode="prefix", bias_E=BIASES["balanced"], windows=(8, 3), compute=compute)
        for compute in ("loop", "grouped")
    ),
]


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Draw the tokens of both ranks and what the gradient of the output shall be."""
    generator = torch.Generator().manual_seed(1)
    shape = (sum(case.windows), 2, PATCHES, D_MODEL)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def pass_tokens(case: Case, tokens_BCND: Tensor, gradient_BCND: Tensor, ranks: Ranks) -> Passed:
    torch.manual_seed(0)
    config = SequenceRouterConfig(mode=case.mode)  # type: ignore[arg-type]
    router = SequenceRouter(config, D_MODEL, NUM_EXPERTS)
    router.balance.bias_E.copy_(torch.tensor(case.bias_E))
    experts = Experts(
        d_model=D_MODEL, d_ff=D_FF, num_experts=NUM_EXPERTS, layer_index=0, num_layers=1, seed=0,
        compute=case.compute, ranks=ranks,
    )  # fmt: skip
    tokens_BCND = tokens_BCND.clone().requires_grad_()
    routing, _ = router(tokens_BCND, None)
    # Detached for the experts, so that the gradient of tokens is theirs alone.
    weights_BCNK = routing.weights_BCNK.detach().clone().requires_grad_()
    apart = dataclasses.replace(routing, weights_BCNK=weights_BCNK)
    plan = plan_dispatch(apart, ranks, layer_index=0)
    output_BCND = run_experts(tokens_BCND, apart, experts, plan)
    output_BCND.backward(gradient_BCND)
    routing.weights_BCNK.backward(weights_BCNK.grad)
    return Passed(
        output_BCND=output_BCND.detach(),
        tokens_gradient_BCND=tokens_BCND.grad,
        weights_gradient_BCNK=weights_BCNK.grad,
        clusters_gradient_ED=router.clusters_ED.grad,
        gate_up_gradient=experts.gate_up_weight.grad,
        down_gradient=experts.down_weight.grad,
        load_E=routing.load_E,
    )


def pass_own_tokens() -> list[Passed]:
    """On a rank: pass this rank's windows of every case."""
    ranks = ranks_module.start()
    passed = []
    for case in CASES:
        split = case.windows[0]
        own = slice(None, split) if ranks.is_first else slice(split, None)
        tokens_BCND, gradient_BCND = inputs(case)
        passed.append(pass_tokens(case, tokens_BCND[own], gradient_BCND[own], ranks))
    return passed


@pytest.fixture(scope="module")
def both_ranks() -> dict[Case, tuple[Passed, Passed]]:
    first, second = run_on_ranks(pass_own_tokens)
    return dict(zip(CASES, zip(first, second, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_give_the_result_of_one_process_on_all_tokens(both_ranks, case: Case) -> None:
    first, second = both_ranks[case]
    alone = pass_tokens(case, *inputs(case), Ranks())
    per_token = ("output_BCND", "tokens_gradient_BCND", "weights_gradient_BCNK")
    per_expert = ("gate_up_gradient", "down_gradient")
    for name in (*per_token, *per_expert):
        joined = torch.cat((getattr(first, name), getattr(second, name)))
        # Sums of some tens of float32 products, in another order.
        torch.testing.assert_close(joined, getattr(alone, name), rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(
        first.clusters_gradient_ED + second.clusters_gradient_ED,
        alone.clusters_gradient_ED,
        rtol=1e-5,
        atol=1e-5,
    )
    assert torch.equal(first.load_E + second.load_E, alone.load_E)


@pytest.mark.parametrize("mode", MODES)
def test_idle_expert_still_gets_a_zero_gradient(both_ranks, mode: str) -> None:
    bias_E = BIASES["all on rank 0"]
    _, second = both_ranks[Case(mode=mode, bias_E=bias_E, windows=(8, 3))]
    assert torch.equal(second.gate_up_gradient, torch.zeros(2, D_MODEL, 2 * D_FF))
    assert torch.equal(second.down_gradient, torch.zeros(2, D_FF, D_MODEL))


def make_layer(ranks: Ranks, *, mode: str = "prefix") -> MoELayer:
    torch.manual_seed(0)
    config = MoEConfig(
        num_experts=NUM_EXPERTS,
        d_ff_expert=D_FF,
        d_ff_shared=D_FF,
        router=SequenceRouterConfig(mode=mode),  # type: ignore[arg-type]
    )
    return MoELayer(
        config, d_model=D_MODEL, layer_index=3, num_layers=4, seed=0,
        make_experts=lambda **settings: Experts(**settings, ranks=ranks),
    )  # fmt: skip


def layer_gradients(
    layer: MoELayer, *, recomputes: bool, is_packed: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Return a layer's output and gradients and its load, with uneven tokens on the ranks."""
    rank = layer.experts.ranks.rank
    generator = torch.Generator().manual_seed(rank)
    windows = (8, 3)[rank]
    tokens_BCND = torch.randn(windows, 1, PATCHES, D_MODEL, generator=generator).requires_grad_()
    spans = None
    if is_packed:
        series_N = torch.tensor([0, 0, -1, 1, 1])
        spans = SeriesSpans.of(series_N.expand(windows, 1, PATCHES))
    if recomputes:
        hidden_BCND, routing, _ = checkpoint(
            layer, tokens_BCND, None, spans=spans, record=RoutingRecord(), use_reentrant=False
        )
    else:
        hidden_BCND, routing, _ = layer(tokens_BCND, None, spans=spans)
    hidden_BCND.square().sum().backward()
    grads = [tokens_BCND.grad, *(p.grad for p in layer.parameters())]
    return [hidden_BCND.detach(), *grads], routing.load_E


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a rank saw of passes through a layer."""

    is_equal: bool
    """Whether computing again gives the same, bit for bit."""
    decisions: tuple[int, int]
    """Counted without and with computing again."""
    plain: list[CommunicationRecord]
    recomputed: list[CommunicationRecord]
    exact: list[Tensor]
    rounded: list[Tensor]
    """The same with rows that travel in bf16."""
    rounded_records: list[CommunicationRecord]
    packed_is_equal: bool


def measure_layers() -> dict[str, Measured]:
    """On a rank: pass tokens through a layer of each mode."""
    meter = CommunicationMeter()
    ranks = dataclasses.replace(ranks_module.start(), meter=meter)
    measured = {}
    for mode in MODES:
        exact, load_E = layer_gradients(make_layer(ranks, mode=mode), recomputes=False)
        plain = meter.take()
        again, load_again_E = layer_gradients(make_layer(ranks, mode=mode), recomputes=True)
        recomputed = meter.take()
        on_wire = dataclasses.replace(ranks, wire_dtype=torch.bfloat16)
        rounded, _ = layer_gradients(make_layer(on_wire, mode=mode), recomputes=False)
        rounded_records = meter.take()
        packed, packed_again = (
            layer_gradients(make_layer(ranks, mode=mode), recomputes=r, is_packed=True)[0]
            for r in (False, True)
        )
        meter.take()
        measured[mode] = Measured(
            is_equal=all(torch.equal(a, b) for a, b in zip(exact, again, strict=True)),
            decisions=(int(load_E.sum()), int(load_again_E.sum())),
            plain=plain,
            recomputed=recomputed,
            exact=exact,
            rounded=rounded,
            rounded_records=rounded_records,
            packed_is_equal=all(map(torch.equal, packed, packed_again)),
        )
    return measured


@pytest.fixture(scope="module")
def measured_layers() -> list[dict[str, Measured]]:
    return run_on_ranks(measure_layers)


@pytest.mark.parametrize("mode", MODES)
def test_recomputed_activations_change_neither_gradients_nor_loads(measured_layers, mode) -> None:
    for rank, measured in enumerate(measured_layers):
        per_window = 1 if mode == "sequence" else PATCHES
        assert measured[mode].is_equal
        assert measured[mode].packed_is_equal
        assert measured[mode].decisions == 2 * ((8, 3)[rank] * per_window * 2,)


def sums(records: list[CommunicationRecord]) -> dict[tuple[str, str], tuple[int, int, int]]:
    return {
        (r.kind, r.label.direction): (r.calls, r.rows_out, r.bytes_out)
        for r in records
        if r.label is not None and r.label.layer == 3
    }


@pytest.mark.parametrize("mode", MODES)
def test_meter_counts_what_leaves_a_rank(measured_layers, mode: str) -> None:
    first, second = (sums(measured[mode].plain) for measured in measured_layers)
    counts = ("all_to_all_counts", "to_experts")
    assert first.pop(counts) == second.pop(counts) == (1, 0, 2 * 8)  # once, two int64 of four
    ways = {direction: key for key in first for direction in key[1:]}
    assert set(ways) == {
        "to_experts", "from_experts", "gradient_to_experts", "gradient_from_experts"
    }  # fmt: skip
    for mine, theirs in ((first, second), (second, first)):
        _, rows, num_bytes = mine[ways["to_experts"]]
        # What goes comes back: rows, then gradients the other way round.
        assert mine[ways["gradient_to_experts"]][1] == rows > 0
        for direction in ("from_experts", "gradient_from_experts"):
            assert theirs[ways[direction]][1] == rows
        tokens_per_unit = PATCHES if mode == "sequence" else 1
        assert num_bytes == rows * D_MODEL * 4 + rows // tokens_per_unit * 4  # and their weights


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_that_is_computed_again_tells_its_counts_once(measured_layers, mode: str) -> None:
    for measured in measured_layers:
        plain, again = sums(measured[mode].plain), sums(measured[mode].recomputed)
        counts = ("all_to_all_counts", "to_experts")
        assert again[counts] == plain[counts]
        to_experts = ("all_to_all", "to_experts")
        assert again[to_experts][1] == 2 * plain[to_experts][1]  # rows do travel again


@pytest.mark.parametrize("mode", MODES)
def test_bf16_on_the_wire_halves_bytes_and_rounds_rows_only(measured_layers, mode: str) -> None:
    for measured in measured_layers:
        plain, rounded = sums(measured[mode].plain), sums(measured[mode].rounded_records)
        for way in (("all_to_all", "to_experts"), ("all_to_all", "gradient_to_experts")):
            rows = plain[way][1]
            assert rounded[way][1] == rows
            assert plain[way][2] - rounded[way][2] == rows * D_MODEL * 2
        for exact, got in zip(measured[mode].exact, measured[mode].rounded, strict=True):
            # Each row is rounded to 8 bits, 4e-3, on each of four ways; sums average that out.
            error = (got - exact).norm() / exact.norm()
            assert 0 < error < 1e-2


def order_of_events() -> list[str]:
    """On a rank: what happens in which order, forward and backward."""
    ranks = ranks_module.start()
    layer = make_layer(ranks)
    events: list[str] = []
    start, wait = Ranks.start_all_to_all, PendingRows.wait

    def start_and_tell(self: Ranks, rows: Tensor, **settings: Any) -> PendingRows:
        if rows.dim() > 1:
            events.append(f"start {settings['label'].direction}")
        return start(self, rows, **settings)

    def wait_and_tell(self: PendingRows) -> Tensor:
        if self._got.dim() > 1:
            events.append(f"wait {self._label.direction}")
        return wait(self)

    Ranks.start_all_to_all, PendingRows.wait = start_and_tell, wait_and_tell
    assert layer.always_on is not None
    layer.always_on.register_forward_hook(lambda *_: events.append("shared"))
    layer.always_on.gate_up.weight.register_hook(lambda _: events.append("shared backward"))
    layer_gradients(layer, recomputes=False)
    return events


def test_shared_experts_compute_while_rows_travel() -> None:
    for events in run_on_ranks(order_of_events):
        assert events == [
            "start to_experts",
            "shared",
            "wait to_experts",
            "start from_experts",
            "wait from_experts",
            "start gradient_to_experts",
            "wait gradient_to_experts",
            "start gradient_from_experts",
            "shared backward",
            "wait gradient_from_experts",
        ]
