"""PatchMoE: what it sees, what it must not see, and what each head answers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tsmoe.heads.task import (
    ClassificationHeadConfig,
    ForecastHeadConfig,
    ReconstructionHeadConfig,
)
from tsmoe.models import build_model
from tsmoe.models.block import DenseConfig
from tsmoe.models.patch_moe import PatchMoE, PatchMoEConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.moe.routers import LinearRouterConfig, RecurrentRouterConfig

B, C, L, P, Q, Y = 3, 2, 24, 4, 10, 5

CONFIG = PatchMoEConfig(
    patch_length=P,
    context_length=L,
    d_model=16,
    num_heads=2,
    num_layers=2,
    dropout=0.0,
    feed_forward=MoEConfig(
        num_experts=4,
        d_ff_expert=16,
        d_ff_shared=16,
        router=RecurrentRouterConfig(d_router=8, noise=0.0),
    ),
    heads={
        "ahead": ForecastHeadConfig(prediction_length=Q),
        "fill": ReconstructionHeadConfig(),
        "tell": ClassificationHeadConfig(num_classes=Y, num_variates=C, dropout=0.0),
        "pool": ClassificationHeadConfig(
            num_classes=Y, num_variates=C, dropout=0.0, pooling="mean_max"
        ),
    },
)


def model_of(**changes) -> PatchMoE:
    model = build_model(replace(CONFIG, **changes), seed=1)
    assert isinstance(model, PatchMoE)
    return model.eval()


@pytest.fixture(name="values_BCL")
def random_values() -> Tensor:
    return torch.randn(B, C, L, generator=torch.Generator().manual_seed(0)) + 3


def all_of(values_BCL: Tensor) -> Tensor:
    return torch.ones_like(values_BCL, dtype=torch.bool)


def test_each_head_answers_in_its_own_shape(values_BCL) -> None:
    model = model_of()
    shapes = {"ahead": (B, C, Q), "fill": (B, C, L), "tell": (B, Y), "pool": (B, Y)}
    for task, shape in shapes.items():
        output = model(values_BCL, all_of(values_BCL), task)
        assert output.prediction.shape == shape
        assert output.tokens_BCND.shape == (B, C, L // P, 16)
        assert len(output.routings) == 2


def test_forecast_in_other_units_is_the_same_forecast(values_BCL) -> None:
    model = model_of()
    plain = model(values_BCL, all_of(values_BCL), "ahead").prediction
    moved = model(10 * values_BCL - 7, all_of(values_BCL), "ahead").prediction
    # The floor of RevIN, 1e-5 of the variance, is all that knows the unit.
    torch.testing.assert_close(moved, 10 * plain - 7, rtol=1e-3, atol=1e-3)


def test_level_and_scale_are_seen_where_windows_are_not_normalised(values_BCL) -> None:
    model = model_of(normalises_windows=False)
    plain, moved = (
        model(values, all_of(values), "tell").prediction
        for values in (values_BCL, 10 * values_BCL - 7)
    )
    assert not torch.allclose(plain, moved, atol=0.1)


def test_window_that_patches_do_not_fit_begins_with_a_part_of_one(values_BCL) -> None:
    uneven = model_of(context_length=L - 2)
    short_BCL = values_BCL[..., 2:]
    assert uneven(short_BCL, all_of(short_BCL), "fill").prediction.shape == (B, C, L - 2)
    whole = model_of()
    shown = all_of(values_BCL)
    shown[..., :2] = False
    for task in ("ahead", "fill", "tell"):
        expected = whole(values_BCL, shown, task).prediction
        expected = expected[..., 2:] if task == "fill" else expected
        found = uneven(short_BCL, all_of(short_BCL), task).prediction
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("task", ["ahead", "fill", "tell"])
def test_values_that_are_not_shown_have_no_effect(values_BCL, task) -> None:
    model, shown = model_of(), all_of(values_BCL)
    shown[:, 0, 5:9] = False
    expected = model(values_BCL, shown, task).prediction
    for other in (torch.nan, 1e6):
        hidden = torch.where(shown, values_BCL, other)
        torch.testing.assert_close(model(hidden, shown, task).prediction, expected)


def test_reconstruction_departs_from_a_straight_line(values_BCL) -> None:
    model, shown = model_of(fills_gaps=True), all_of(values_BCL)
    shown[0, 0, 5:9] = shown[1, 1, :3] = False
    torch.nn.init.zeros_(model.heads["fill"].project.weight)
    filled = model(values_BCL, shown, "fill").prediction
    torch.testing.assert_close(filled[shown], values_BCL[shown], rtol=1e-4, atol=1e-4)
    weight = torch.arange(1, 5) / 5
    line = torch.lerp(values_BCL[0, 0, 4], values_BCL[0, 0, 9], weight)
    torch.testing.assert_close(filled[0, 0, 5:9], line, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        filled[1, 1, :3], values_BCL[1, 1, 3].expand(3), rtol=1e-4, atol=1e-4
    )
    hidden = torch.where(shown, values_BCL, torch.nan)
    for task in ("ahead", "fill", "tell"):
        expected = model(values_BCL, shown, task).prediction
        torch.testing.assert_close(model(hidden, shown, task).prediction, expected)


def test_block_norms_what_it_leaves_or_what_it_sees(values_BCL) -> None:
    generator = torch.Generator().manual_seed(3)
    for norms_first in (False, True):
        model = model_of(norms_first=norms_first, feed_forward=DenseConfig(d_ff=32))
        block = model.blocks[0]
        first, second = block.attention_norm, block.feed_forward_norm
        for norm in (first, second):
            norm.weight.data.normal_(generator=generator)
            norm.bias.data.normal_(generator=generator)
        tokens_BCND = 5 + 3 * torch.randn(B, C, L // P, 16, generator=generator)
        found_BCND, *_ = block(tokens_BCND, None, None)
        if norms_first:
            between_BCND = tokens_BCND + block._attend(first(tokens_BCND), None)
            expected_BCND = between_BCND + block.feed_forward(second(between_BCND))
        else:
            between_BCND = first(tokens_BCND + block._attend(tokens_BCND, None))
            expected_BCND = second(between_BCND + block.feed_forward(between_BCND))
        torch.testing.assert_close(found_BCND, expected_BCND)


def with_shortcut(shortcut: str) -> PatchMoE:
    head = ForecastHeadConfig(prediction_length=Q, shortcut=shortcut)
    return model_of(heads={"ahead": head})


@pytest.mark.parametrize("shortcut", ["from_mean", "from_last"])
def test_forecast_begins_with_the_mean_or_the_last_value(values_BCL, shortcut) -> None:
    shown = all_of(values_BCL)
    shown[:, 0, 5:9] = False
    expected_BC = (values_BCL * shown).sum(-1) / shown.sum(-1)
    if shortcut == "from_last":
        expected_BC = values_BCL[..., -1]
    model = with_shortcut(shortcut)
    forecast_BCQ = model(values_BCL, shown).prediction
    torch.testing.assert_close(forecast_BCQ, expected_BC[..., None].expand(-1, -1, Q))
    shown[..., -1] = False
    mean_BC1 = (values_BCL * shown).sum(-1, keepdim=True) / shown.sum(-1, keepdim=True)
    torch.testing.assert_close(model(values_BCL, shown).prediction, mean_BC1.expand(-1, -1, Q))


def test_shortcut_is_a_linear_map_of_the_normalised_window(values_BCL) -> None:
    shown = all_of(values_BCL)
    shown[:, 0, 5:9] = False
    model = with_shortcut("from_mean")
    plain = model_of(heads={"ahead": ForecastHeadConfig(prediction_length=Q)})
    model.load_state_dict(plain.state_dict(), strict=False)
    shortcut_QL = torch.randn(Q, L, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.heads["ahead"].shortcut.weight.copy_(shortcut_QL)
    added_BCQ = model(values_BCL, shown).prediction - plain(values_BCL, shown).prediction
    loc_BC1, scale_BC1 = plain.statistics(values_BCL, shown)
    window_BCL = torch.where(shown, (values_BCL - loc_BC1) / scale_BC1, 0)
    torch.testing.assert_close(added_BCQ, window_BCL @ shortcut_QL.T * scale_BC1, atol=1e-4, rtol=0)


def test_variates_do_not_see_one_another(values_BCL) -> None:
    model = model_of()
    changed = values_BCL.clone()
    changed[:, 1] += torch.randn(L)
    for task in ("ahead", "fill"):
        before, after = (
            model(values, all_of(values), task).prediction for values in (values_BCL, changed)
        )
        assert torch.equal(before[:, 0], after[:, 0])
        assert not torch.allclose(before[:, 1], after[:, 1])


def test_patches_see_both_directions(values_BCL) -> None:
    model = model_of()
    for place in (0, L - 1):
        changed = values_BCL.clone()
        changed[0, 0, place] += 5
        shown = all_of(values_BCL)
        moved = (
            model(changed, shown, "fill").prediction - model(values_BCL, shown, "fill").prediction
        )
        assert (moved[0, 0].abs() > 1e-4).all()


@pytest.mark.parametrize("head", ["tell", "pool"])
def test_classes_do_not_depend_on_what_fills_a_short_case(values_BCL, head) -> None:
    model, shown = model_of(normalises_windows=False), all_of(values_BCL)
    shown[0, :, : 2 * P] = False
    tokens = model(values_BCL, shown, "tell").tokens_BCND
    pooled = model.heads[head](tokens, shown.unflatten(-1, (-1, P)).any(-1), values_BCL)
    spoiled = tokens.clone()
    spoiled[0, :, :2] = 1e3
    again = model.heads[head](spoiled, shown.unflatten(-1, (-1, P)).any(-1), values_BCL)
    torch.testing.assert_close(pooled, again)


def test_window_of_which_nothing_is_shown_gives_finite_answers(values_BCL) -> None:
    model = model_of()
    for task in ("ahead", "fill", "tell", "pool"):
        answer = model(values_BCL, ~all_of(values_BCL), task).prediction
        assert answer.isfinite().all()


def test_router_is_told_the_task(values_BCL) -> None:
    told, untold = model_of(has_task_embedding=True), model_of()
    for model, differs in ((told, True), (untold, False)):
        scores = [
            model(values_BCL, all_of(values_BCL), task).routings[0].scores_BCNE
            for task in ("ahead", "fill")
        ]
        assert torch.equal(*scores) is not differs


def test_heads_that_rest_have_a_gradient_of_zero(values_BCL) -> None:
    rests = ForecastHeadConfig(prediction_length=Q, shortcut="from_last")
    model = model_of(heads={**CONFIG.heads, "rests": rests}).train()
    model(values_BCL, all_of(values_BCL), "ahead").prediction.square().sum().backward()
    assert model.heads["ahead"].project.weight.grad.abs().sum() > 0
    for task in ("fill", "tell", "pool", "rests"):
        assert model.heads[task].project.weight.grad.abs().sum() == 0
    assert model.heads["rests"].shortcut.weight.grad.abs().sum() == 0


@pytest.mark.parametrize(
    "router", [RecurrentRouterConfig(d_router=8, noise=1.0), LinearRouterConfig(noise=1.0)]
)
def test_recomputed_activations_give_the_same_gradient(values_BCL, router) -> None:
    config = replace(CONFIG, feed_forward=replace(CONFIG.feed_forward, router=router))
    gradients = []
    for recomputes in (False, True):
        model = build_model(config, seed=1, recomputes_activations=recomputes).train()
        torch.manual_seed(3)  # of the noise
        output = model(values_BCL, all_of(values_BCL), "ahead")
        loss = output.prediction.square().mean()
        loss = loss + sum(r.router_scores_BCNE.square().mean() for r in output.routings)
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_dense_twin_routes_nothing(values_BCL) -> None:
    model = model_of(feed_forward=DenseConfig(d_ff=32))
    assert model.routers() == []
    assert model(values_BCL, all_of(values_BCL), "ahead").routings == ()


def test_seed_decides_the_weights() -> None:
    first, again, other = (build_model(CONFIG, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.position.weight, again.position.weight)
    assert not torch.equal(first.position.weight, other.position.weight)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context_length": 2}, ["context_length (2)", "patch"]),
        ({"num_heads": 3}, ["d_model (16)", "num_heads (3)"]),
        ({"dropout": 1.0}, ["dropout (1.0)"]),
        (
            {"has_task_embedding": True, "feed_forward": DenseConfig()},
            ["has_task_embedding", "recurrent"],
        ),
        (
            {"normalises_windows": False, "heads": {"a": ForecastHeadConfig(shortcut="from_mean")}},
            ["tasks.a.shortcut", "normalises_windows"],
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, words) -> None:
    with pytest.raises(ValueError, match=r"must|only|use") as raised:
        replace(CONFIG, **changes)
    assert all(word in str(raised.value) for word in words)


def test_windows_and_tasks_that_the_model_does_not_know_are_refused(values_BCL) -> None:
    model = model_of()
    with pytest.raises(ValueError, match=r"20 points.*context_length \(24\)"):
        model(values_BCL[..., :20], all_of(values_BCL)[..., :20], "fill")
    for task in ("sing", None):
        with pytest.raises(ValueError, match=r"task is .*ahead, fill, tell, pool"):
            model(values_BCL, all_of(values_BCL), task)
    with pytest.raises(ValueError, match=r"1 variates.*made for 2"):
        model(values_BCL[:, :1], all_of(values_BCL)[:, :1], "tell")
