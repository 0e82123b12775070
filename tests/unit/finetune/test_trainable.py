"""What learns and what rests, additions of low rank, and what a start is loaded into."""

from dataclasses import replace

import pytest
import torch

from finetune_run import SMALL_MODEL
from tsmoe.errors import CheckpointError, ConfigError
from tsmoe.finetune.low_rank import LowRankConfig, insert_low_rank, merge_low_rank
from tsmoe.finetune.start import open_start, resolve_run
from tsmoe.finetune.trainable import TrainableConfig, count_trainable, prepare_finetuning
from tsmoe.models import build_model
from tsmoe.models.block import DenseConfig
from tsmoe.models.time_tracker import TimeTracker
from tsmoe.nn.variate_graph import VariateGraphConfig


def model_of(**settings: object) -> TimeTracker:
    return build_model(replace(SMALL_MODEL, **settings), seed=2)


def learning(model: TimeTracker) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def predict(model: TimeTracker) -> torch.Tensor:
    values_BCL = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    return model(values_BCL, torch.ones_like(values_BCL, dtype=torch.bool)).prediction_BCNPK


def test_all_learns_but_what_mixing_alone_uses() -> None:
    model = model_of()
    prepare_finetuning(model, TrainableConfig())
    rests = {name for name, _ in model.named_parameters()} - learning(model)
    assert rests == {
        f"blocks.{layer}.attention.{which}_variate_bias_H"
        for layer in (0, 1) for which in ("same", "other")
    }  # fmt: skip


@pytest.mark.parametrize("trains", ["all", "head", "experts", "low_rank"])
def test_what_mixing_uses_learns_in_mixed_layers_whatever_else_does(trains) -> None:
    graph = VariateGraphConfig(is_alpha_learned=True)
    model = model_of(num_channel_mixed_layers=1, graph=graph)
    prepare_finetuning(model, TrainableConfig(trains=trains))
    assert {name for name in learning(model) if "bias_H" in name or "alpha" in name} == {
        "blocks.1.attention.same_variate_bias_H",
        "blocks.1.attention.other_variate_bias_H",
        "variate_graph.alpha_logit",
    }


@pytest.mark.parametrize("trains", ["all", "head", "experts", "low_rank"])
def test_a_shortcut_learns_whatever_else_does(trains) -> None:
    model = model_of(linear_shortcut=True)
    prepare_finetuning(model, TrainableConfig(trains=trains))
    assert "shortcut.project.weight" in learning(model)


def test_a_shortcut_that_is_fitted_rests() -> None:
    model = model_of(linear_shortcut=True)
    prepare_finetuning(model, TrainableConfig(), shortcut_learns=False)
    assert "shortcut.project.weight" not in learning(model)


def test_routers_rest_where_wanted() -> None:
    model = model_of()
    prepare_finetuning(model, TrainableConfig(freezes_routers=True))
    assert not any(".router." in name for name in learning(model))
    assert any(".experts." in name for name in learning(model))


def test_experts_of_a_dense_model_cannot_learn() -> None:
    model = model_of(feed_forward=DenseConfig(d_ff=32))
    with pytest.raises(ConfigError, match="is dense"):
        prepare_finetuning(model, TrainableConfig(trains="experts"))


def test_additions_change_nothing_at_first_and_are_few() -> None:
    model = model_of().eval()
    before = predict(model)
    prepare_finetuning(model, TrainableConfig(trains="low_rank", low_rank=LowRankConfig(rank=2)))
    torch.testing.assert_close(predict(model), before)
    assert count_trainable(model) < 0.2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("feed_forward", ["moe", "dense"])
def test_merged_additions_predict_the_same_by_plain_weights(feed_forward) -> None:
    dense = {"feed_forward": DenseConfig(d_ff=32)} if feed_forward == "dense" else {}
    model = model_of(**dense).eval()
    names = [name for name, _ in model.named_parameters()]
    before = predict(model)
    insert_low_rank(model, LowRankConfig(rank=3, scale=1.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "low_rank_up" in name:
                parameter.normal_(std=0.3)
    changed = predict(model)
    assert (changed - before).abs().max() > 0.01
    merge_low_rank(model)
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(predict(model), changed, rtol=1e-4, atol=1e-5)


def test_start_is_loaded_whole_and_new_parameters_stay(lay_out, folder) -> None:
    run, _ = lay_out(
        {"mixing": {"num_channel_mixed_layers": 2, "graph": {"is_alpha_learned": True}}}
    )
    start = open_start(str(folder / "package"))
    model = build_model(run.model, seed=9)
    start.load_into(model)
    for name, parameter in model.named_parameters():
        if name != "variate_graph.alpha_logit":
            assert torch.equal(parameter, start.state[name]), name
    assert model.variate_graph.alpha.item() == pytest.approx(0.9)


def test_start_that_is_none_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="neither a package nor a run"):
        open_start(str(tmp_path))
    (tmp_path / "model.yaml").write_text("")
    with pytest.raises(CheckpointError, match=r"model\.yaml: a file; name the folder"):
        open_start(str(tmp_path / "model.yaml"))


def test_run_in_the_folder_of_its_start_is_refused(lay_out, folder) -> None:
    with pytest.raises(ConfigError, match="choose another run="):
        lay_out({"run": str(folder / "table" / ".." / "package")})


def test_start_is_at_first_what_it_was_with_a_new_shortcut(lay_out, folder) -> None:
    run, _ = lay_out({"linear_shortcut": "learned"})
    start = open_start(str(folder / "package"))
    model = build_model(run.model, seed=9).eval()
    start.load_into(model)
    assert model.shortcut is not None
    assert torch.equal(predict(model), predict(start.build()))


def test_a_shortcut_that_the_model_has_stays(lay_out, folder) -> None:
    run, _ = lay_out()
    start = open_start(str(folder / "package"))
    start = replace(start, model=replace(start.model, linear_shortcut=True))
    assert resolve_run(run.config, start).model.linear_shortcut
    config = replace(run.config, linear_shortcut="least_squares")
    with pytest.raises(ConfigError, match=r"linear_shortcut is least_squares, but .* has one"):
        resolve_run(config, start)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mixing": {"num_channel_mixed_layers": 3}}, "at most the 2 layers"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_settings_that_the_model_cannot_meet_are_refused(lay_out, settings, named) -> None:
    with pytest.raises(ConfigError, match=named):
        lay_out(settings)


def test_resolved_model_is_that_of_the_start(lay_out, folder) -> None:
    run, _ = lay_out({"dropout": 0.25})
    start = open_start(str(folder / "package"))
    assert run.model == replace(start.model, dropout=0.25)
    assert resolve_run(run.config, start) == run
