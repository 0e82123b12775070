import pytest
import torch
from torch import Tensor

from tsmoe.batch import WindowBatch
from tsmoe.heads import NextPatchHead, QuantileHeadConfig
from tsmoe.heads.point import PointHead
from tsmoe.heads.quantile import QuantileHead
from tsmoe.losses import ErrorUnit, LossTerms, next_patch_loss, target_patches
from tsmoe.models.output import ModelOutput
from tsmoe.nn.instance_norm import InstanceStatistics

NO_CLIP = float("inf")


def make_batch(values_BL: Tensor, is_target_BL: Tensor | None = None) -> WindowBatch:
    if is_target_BL is None:
        is_target_BL = torch.ones_like(values_BL, dtype=torch.bool)
    return WindowBatch(
        values_BCL=values_BL[:, None],
        observed_BCL=is_target_BL[:, None],
        is_target_BCL=is_target_BL[:, None],
        series_ids_B=torch.arange(len(values_BL)),
    )


def make_output(
    prediction_BCNPK: Tensor, *, loc: float = 0.0, scale: float = 1.0, is_degenerate: bool = False
) -> ModelOutput:
    shape = prediction_BCNPK.shape[:3]
    statistics = InstanceStatistics(
        loc_BCN1=torch.full((*shape, 1), loc),
        scale_BCN1=torch.full((*shape, 1), scale),
        is_degenerate_BCN=torch.full(shape, is_degenerate),
    )
    return ModelOutput(prediction_BCNPK=prediction_BCNPK, statistics=statistics, routings=())


def loss_of(
    prediction: Tensor,
    target: Tensor,
    is_target: Tensor,
    clip: float = NO_CLIP,
    **of_output: object,
) -> LossTerms:
    """Compare predictions of shape BCNP by squared error in the unit of each token."""
    output = make_output(prediction[..., None], **of_output)
    return next_patch_loss(
        PointHead(4, 3), output, target, is_target, target_clip=clip, error_unit="token"
    )


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, targets and mask of four windows."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 4, 1, 2, 3, generator=generator)
    return prediction, target, torch.rand(4, 1, 2, 3, generator=generator) > 0.4


def test_target_of_a_token_is_the_patch_after_it() -> None:
    batch = make_batch(torch.arange(9.0)[None])
    target_BCNP, is_target_BCNP = target_patches(batch, patch_length=3, patch_stride=3)
    assert target_BCNP[0, 0].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert is_target_BCNP.all()


def test_targets_of_overlapping_patches_overlap() -> None:
    # Tokens of the context 0..7 are 0-3, 2-5 and 4-7.
    batch = make_batch(torch.arange(12.0)[None], torch.arange(12)[None] != 6)
    target_BCNP, is_target_BCNP = target_patches(batch, patch_length=4, patch_stride=2)
    assert target_BCNP[0, 0].tolist() == [[4, 5, 6, 7], [6, 7, 8, 9], [8, 9, 10, 11]]
    assert is_target_BCNP[0, 0].sum(-1).tolist() == [3, 3, 4]


@pytest.mark.parametrize("stride", [8, 4, 2, 1])
def test_there_are_as_many_targets_as_tokens(make_model, stride: int) -> None:
    model = make_model(patch_stride=stride, context_length=40)
    values_BCL = torch.randn(1, 1, model.config.window_length)
    batch = make_batch(values_BCL[:, 0])
    target_BCNP, _ = target_patches(batch, patch_length=8, patch_stride=stride)
    context_BCL = values_BCL[..., :40]
    output = model(context_BCL, torch.ones_like(context_BCL, dtype=torch.bool))
    assert output.prediction_BCNPK.shape[:4] == target_BCNP.shape


def test_errors_are_summed_by_window(case) -> None:
    prediction, target, is_target = case
    terms = loss_of(prediction, target, is_target)
    squares = (prediction - target).square() * is_target
    torch.testing.assert_close(terms.error_B, squares.sum((1, 2, 3)))
    assert terms.count_B.tolist() == is_target.sum((1, 2, 3)).tolist()


def test_sums_of_parts_of_a_batch_add_up(case) -> None:
    whole = loss_of(*case)
    parts = [loss_of(*(tensor[place] for tensor in case)) for place in (slice(1), slice(1, 4))]
    assert torch.equal(torch.cat([part.error_B for part in parts]), whole.error_B)
    assert torch.equal(torch.cat([part.count_B for part in parts]), whole.count_B)


@pytest.mark.parametrize("filler", [1e30, -1e30, float("inf")])
def test_masked_points_never_count(case, filler: float) -> None:
    prediction, target, is_target = case
    prediction.requires_grad_()
    plain = loss_of(prediction, target, is_target, 10.0)
    filled = loss_of(prediction, target.masked_fill(~is_target, filler), is_target, 10.0)
    assert torch.equal(filled.error_B, plain.error_B)
    filled.error_B.sum().backward()
    assert prediction.grad[~is_target].abs().max() == 0
    assert prediction.grad[is_target].abs().min() > 0


def test_errors_are_measured_in_the_tokens_own_scale(case) -> None:
    prediction, target, is_target = case
    plain = loss_of(prediction, target, is_target)
    other_unit = loss_of(prediction, target * 1e3 + 5e4, is_target, loc=5e4, scale=1e3)
    # 5e4 in float32 is resolved to 4e-3: 4e-6 of the scale.
    torch.testing.assert_close(other_unit.error_B, plain.error_B, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("error_unit", ["window", "values"])
@pytest.mark.parametrize("head", [PointHead(4, 3), QuantileHead(QuantileHeadConfig(), 4, 3)])
def test_errors_can_be_measured_in_the_scale_of_the_window_or_as_they_are(
    head: NextPatchHead, error_unit: ErrorUnit
) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = len(head.quantile_levels) or 1
    prediction_BCNPK = torch.randn(4, 1, 2, 3, levels, generator=generator)
    target_BCNP = 50 + torch.randn(4, 1, 2, 3, generator=generator)
    statistics = InstanceStatistics(
        loc_BCN1=50 + torch.randn(4, 1, 2, 1, generator=generator),
        scale_BCN1=0.5 + torch.rand(4, 1, 2, 1, generator=generator),
        is_degenerate_BCN=torch.zeros(4, 1, 2, dtype=torch.bool),
    )
    output = ModelOutput(prediction_BCNPK=prediction_BCNPK, statistics=statistics, routings=())
    terms = next_patch_loss(
        head,
        output,
        target_BCNP,
        torch.ones(4, 1, 2, 3, dtype=torch.bool),
        target_clip=NO_CLIP,
        error_unit=error_unit,
    )
    in_its_unit_BCNPK = (
        prediction_BCNPK * statistics.scale_BCN1[..., None] + statistics.loc_BCN1[..., None]
    )
    unit_BC11 = statistics.scale_BCN1[:, :, -1:]
    if error_unit == "values":
        unit_BC11 = torch.ones_like(unit_BC11)
    expected = head.point_errors(in_its_unit_BCNPK / unit_BC11[..., None], target_BCNP / unit_BC11)
    # Differences of numbers near 50 in float32: 4e-6 each.
    torch.testing.assert_close(terms.error_B, expected.sum((1, 2, 3)), rtol=1e-4, atol=1e-4)


def test_targets_are_clipped_in_scales_and_predictions_are_not() -> None:
    prediction = torch.tensor([0.0, 0.0, 6.0]).reshape(1, 1, 1, 3)
    target = torch.tensor([1000.0, -1000.0, 80.0]).reshape(1, 1, 1, 3)
    is_target = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    terms = loss_of(prediction, target, is_target, 4.0, scale=20.0)
    assert terms.error_B.tolist() == [16 + 16 + 4]


def test_tokens_that_saw_only_a_constant_count_but_have_no_error(case) -> None:
    prediction, target, is_target = case
    prediction.requires_grad_()
    terms = loss_of(prediction, target, is_target, 10.0, scale=1e-15, is_degenerate=True)
    terms.error_B.sum().backward()
    assert terms.error_B.abs().max() == 0
    assert prediction.grad.abs().max() == 0
    assert terms.count_B.tolist() == is_target.sum((1, 2, 3)).tolist()


def test_loss_is_float32_for_a_bfloat16_model(case) -> None:
    prediction, target, is_target = case
    terms = loss_of(prediction.bfloat16(), target, is_target)
    assert (terms.error_B.dtype, terms.count_B.dtype) == (torch.float32, torch.int64)
