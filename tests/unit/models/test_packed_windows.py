"""Series that share a window are each seen as if alone."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tsmoe.batch import WindowBatch
from tsmoe.heads import QuantileHeadConfig
from tsmoe.losses import LossTerms, next_patch_loss, target_patches
from tsmoe.models.block import DenseConfig
from tsmoe.models.output import ModelOutput
from tsmoe.models.time_tracker import TimeTracker
from tsmoe.moe.layer import MoEConfig
from tsmoe.moe.routers import SequenceRouterConfig
from tsmoe.nn.instance_norm import InstanceNormConfig

PATCH = 8
# Sums over the same numbers in another order, and angles of other time indices; values of order 1.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
# Patches of three windows of nine; each series has its number, its length and its unit. Lengths
# that are no multiple of a patch, and windows that are not full.
WINDOWS = [[(7, 24), (3, 21), (9, 17)], [(5, 72)], [(1, 16), (8, 9), (2, 30)]]


@dataclass(frozen=True)
class Series:
    number: int
    values_L: Tensor
    """NaN where not observed."""


@pytest.fixture(name="packs")
def packs_of_series() -> list[list[Series]]:
    generator = torch.Generator().manual_seed(4)

    def make(number: int, length: int) -> Series:
        walk_L = torch.randn(length, generator=generator).cumsum(0)
        walk_L[torch.rand(length, generator=generator) < 0.1] = torch.nan
        return Series(number, 10.0 ** (number - 5) * (walk_L + number))

    packs = [[make(*series) for series in window] for window in WINDOWS]
    packs[0][1].values_L[:10] = torch.nan  # nothing is known of it in its first patch
    packs[2][0].values_L[:] = 3.0  # a constant has no scale
    return packs


def batch_of(packs: Sequence[Sequence[Series]], *, length: int, stride: int) -> WindowBatch:
    """Put series one after another, each in whole patches, the last at the end of the window."""
    values_BL = torch.full((len(packs), length), torch.nan)
    is_target_BL = torch.zeros(len(packs), length, dtype=torch.bool)
    series_BN = torch.full((len(packs), (length - 2 * PATCH) // stride + 1), -1)
    for row, pack in enumerate(packs):
        end = length
        for series in reversed(pack):
            count = len(series.values_L)
            values_BL[row, end - count : end] = series.values_L
            first = end - padded_length(count, stride)
            is_target_BL[row, first + PATCH : end] = True
            series_BN[row, first // stride : (end - 2 * PATCH) // stride + 1] = series.number
            end -= -(-count // PATCH) * PATCH
        assert end >= 0
    observed_BL = ~values_BL.isnan()
    return WindowBatch(
        values_BCL=values_BL.nan_to_num()[:, None],
        observed_BCL=observed_BL[:, None],
        is_target_BCL=(is_target_BL & observed_BL)[:, None],
        series_ids_B=torch.tensor([pack[0].number for pack in packs]),
        series_BCN=series_BN[:, None],
    )


def padded_length(count: int, stride: int) -> int:
    """Points of whole tokens over all but the last patch, and of that patch."""
    return max(0, -(-(count - 2 * PATCH) // stride)) * stride + 2 * PATCH


def alone(series: Series, *, stride: int) -> WindowBatch:
    """A window of the series and nothing else: no longer than its tokens."""
    length = padded_length(len(series.values_L), stride)
    values_L = torch.cat((torch.full((length - len(series.values_L),), torch.nan), series.values_L))
    observed_BCL = ~values_L.isnan()[None, None]
    return WindowBatch(
        values_BCL=values_L.nan_to_num()[None, None],
        observed_BCL=observed_BCL,
        is_target_BCL=observed_BCL,
        series_ids_B=torch.tensor([series.number]),
    )


def run(
    model: TimeTracker, batch: WindowBatch, error_unit: str = "window"
) -> tuple[ModelOutput, LossTerms]:
    context = slice(0, batch.values_BCL.shape[-1] - PATCH)
    output = model(
        batch.values_BCL[..., context],
        batch.observed_BCL[..., context],
        series_BCN=batch.series_BCN,
    )
    targets = target_patches(batch, patch_length=PATCH, patch_stride=model.config.patch_stride)
    terms = next_patch_loss(model.head, output, *targets, error_unit=error_unit, target_clip=10.0)
    return output, terms


def gradients(model: TimeTracker, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def settings_of(router: str, norm: str) -> dict:
    feed_forward = DenseConfig(d_ff=16)
    if router != "dense":
        feed_forward = MoEConfig(
            num_experts=4, d_ff_expert=16, d_ff_shared=16, router=SequenceRouterConfig(mode=router)
        )
    return {"feed_forward": feed_forward, "instance_norm": InstanceNormConfig(mode=norm)}


CASES = {
    f"{router}, {norm}": settings_of(router, norm)
    for router, norm in itertools.product(
        ("prefix", "token", "sequence", "dense"), ("prefix", "window")
    )
} | {
    "quantiles": {"head": QuantileHeadConfig(levels=(0.1, 0.5, 0.9))},
    "shortcut": {"linear_shortcut": True, "lookahead_patches": 2},
    "overlapping patches, shortcut": {"patch_stride": 4, "linear_shortcut": True},
    "overlapping patches": {"patch_stride": 4, **settings_of("prefix", "prefix")},
    "overlapping patches, whole series": {"patch_stride": 2, **settings_of("sequence", "window")},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("error_unit", ["window", "token"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_packed_series_are_predicted_routed_and_learned_as_if_alone(
    make_model, packs, settings: dict, error_unit: str, recomputes: bool
) -> None:
    model = make_model(**settings).train()
    model.recomputes_activations = recomputes
    for number, router in enumerate(model.routers()):  # as after some steps of balancing
        router.balance.bias_E += torch.tensor([0.01, -0.02, 0.015, 0.0]) * (number + 1)
    stride = model.config.patch_stride
    batch = batch_of(packs, length=model.config.window_length, stride=stride)
    packed, packed_terms = run(model, batch, error_unit)
    packed_gradients = gradients(model, packed_terms.error_B.sum())

    loss, count = torch.zeros(()), 0
    load_ME = [torch.zeros(4, dtype=torch.int64) for _ in packed.routings]
    for row, pack in enumerate(packs):
        for series in pack:
            single, terms = run(model, alone(series, stride=stride), error_unit)
            place = batch.series_BCN[row, 0] == series.number
            assert place.sum() == single.prediction_BCNPK.shape[2]
            for name in ("loc_BCN1", "scale_BCN1", "is_degenerate_BCN"):
                torch.testing.assert_close(
                    getattr(packed.statistics, name)[row, 0, place],
                    getattr(single.statistics, name)[0, 0],
                    **({} if name == "is_degenerate_BCN" else {"rtol": 1e-6, "atol": 1e-12}),
                )
            torch.testing.assert_close(
                packed.prediction_BCNPK[row, 0, place], single.prediction_BCNPK[0, 0], **TOLERANCE
            )
            for layer, (packed_routing, routing) in enumerate(
                zip(packed.routings, single.routings, strict=True)
            ):
                assert torch.equal(
                    packed_routing.expert_ids_BCNK[row, 0, place], routing.expert_ids_BCNK[0, 0]
                )
                torch.testing.assert_close(
                    packed_routing.weights_BCNK[row, 0, place], routing.weights_BCNK[0, 0]
                )
                load_ME[layer] += routing.load_E
            loss = loss + terms.error_B.sum()
            count += int(terms.count_B.sum())
    assert count == packed_terms.count_B.sum() > 0
    torch.testing.assert_close(packed_terms.error_B.sum(), loss, rtol=1e-5, atol=0)
    for routing, load_E in zip(packed.routings, load_ME, strict=True):
        assert routing.load_E.tolist() == load_E.tolist()
    single_gradients = gradients(model, loss)
    assert packed_gradients.keys() == single_gradients.keys()
    for name, gradient in single_gradients.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(
            packed_gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(scale), msg=name
        )


def outputs_of(model: TimeTracker, batch: WindowBatch) -> tuple[Tensor, ...]:
    """Everything that a token has, one tensor of (B, N, ..) each."""
    with torch.no_grad():
        output, terms = run(model, batch)
    return (
        output.prediction_BCNPK[:, 0],
        output.statistics.loc_BCN1[:, 0],
        output.statistics.scale_BCN1[:, 0],
        terms.error_BCN[:, 0],
        *(routing.weights_BCNK[:, 0] for routing in output.routings),
        *(routing.expert_ids_BCNK[:, 0] for routing in output.routings),
    )


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_what_one_series_holds_moves_no_bit_of_another(make_model, packs, settings: dict) -> None:
    model = make_model(**settings)
    if model.shortcut is not None:
        torch.nn.init.normal_(model.shortcut.project.weight, std=0.1)
    for router in model.routers():
        # All to the same two: matrix products of other numbers of rows may round otherwise, for
        # strangers in the batch as for those in the window.
        router.balance.bias_E += torch.tensor([10.0, -10.0, 10.0, -10.0])
    sizes = {"length": model.config.window_length, "stride": model.config.patch_stride}
    before = outputs_of(model, batch_of(packs, **sizes))
    changed = packs[0][1]
    generator = torch.Generator().manual_seed(5)
    changed.values_L.copy_(1e30 * torch.randn(len(changed.values_L), generator=generator))
    batch = batch_of(packs, **sizes)
    after = outputs_of(model, batch)
    is_other_BN = (batch.series_BCN[:, 0] != changed.number) & (batch.series_BCN[:, 0] >= 0)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[is_other_BN], other[is_other_BN])
    is_changed_BN = batch.series_BCN[:, 0] == changed.number
    assert not torch.equal(before[0][is_changed_BN], after[0][is_changed_BN])


def test_the_target_of_the_last_token_is_no_input(make_model, packs) -> None:
    model = make_model(**settings_of("sequence", "window"))
    sizes = {"length": model.config.window_length, "stride": PATCH}
    before = outputs_of(model, batch_of(packs, **sizes))[0]
    changed = packs[0][0]
    changed.values_L[-PATCH:] += 1e6
    batch = batch_of(packs, **sizes)
    is_token_BN = batch.series_BCN[:, 0] >= 0
    assert torch.equal(outputs_of(model, batch)[0][is_token_BN], before[is_token_BN])


def test_series_in_windows_longer_than_a_block_of_the_attention_kernel(make_model) -> None:
    # Kernels go through keys block by block: for a late series, all of an early block is masked.
    model = make_model(context_length=PATCH * 1300)
    generator = torch.Generator().manual_seed(0)
    pack = [
        Series(number, torch.randn(length, generator=generator))
        for number, length in enumerate([PATCH * 600, PATCH * 640, PATCH * 3])
    ]
    batch = batch_of([pack], length=model.config.window_length, stride=PATCH)
    with torch.no_grad():
        packed, _ = run(model, batch)
        single, _ = run(model, alone(pack[2], stride=PATCH))
    place = batch.series_BCN[0, 0] == 2
    torch.testing.assert_close(
        packed.prediction_BCNPK[0, 0, place], single.prediction_BCNPK[0, 0], **TOLERANCE
    )


def test_tokens_of_no_series_reach_no_expert(make_model, packs) -> None:
    model = make_model()
    rows: list[int] = []
    for block in model.blocks:
        block.feed_forward.experts.register_forward_pre_hook(
            lambda _, arguments: rows.append(len(arguments[2].order_M))
        )
    batch = batch_of(packs, length=model.config.window_length, stride=PATCH)
    with torch.no_grad():
        run(model, batch)
    assert rows == [2 * int((batch.series_BCN >= 0).sum())] * 2


def test_an_adjacency_is_refused(make_model, packs) -> None:
    model = make_model(num_channel_mixed_layers=1)
    batch = batch_of(packs, length=model.config.window_length, stride=PATCH)
    with pytest.raises(ValueError, match="packed windows hold strangers"):
        model(
            batch.values_BCL[..., :64],
            batch.observed_BCL[..., :64],
            torch.ones(3, 1, 1, dtype=torch.bool),
            series_BCN=batch.series_BCN,
        )


def test_series_must_be_told_for_every_patch(make_model, packs) -> None:
    model = make_model()
    batch = batch_of(packs, length=model.config.window_length, stride=PATCH)
    with pytest.raises(ValueError, match=r"series_BCN has shape \(3, 1, 7\).*\(3, 1, 8\)"):
        model(
            batch.values_BCL[..., :64],
            batch.observed_BCL[..., :64],
            series_BCN=batch.series_BCN[..., 1:],
        )
