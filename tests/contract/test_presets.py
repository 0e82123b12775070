"""What every preset must do: it decodes, fits its ranks, and builds."""

import pytest
import torch

from tsmoe.config import decode, encode
from tsmoe.models import build_model
from tsmoe.moe.layer import MoEConfig
from tsmoe.train.run_config import RunConfig, preset_names, read_preset, resolve


@pytest.fixture(params=preset_names())
def name(request) -> str:
    return request.param


def test_there_are_presets() -> None:
    assert "time_tracker_tiny" in preset_names()


def test_preset_decodes_and_survives_being_saved(name) -> None:
    config = resolve(name, [])
    assert decode(RunConfig, encode(config), origin="saved") == config


def test_preset_says_where_the_run_goes_and_what_it_trains_on(name) -> None:
    values = read_preset(name)
    assert values["run"].startswith("runs/")
    assert values["corpus"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_preset_trains_on_one_rank_and_on_two(name, ranks: int) -> None:
    config = resolve(name, [])
    config.check_world_size(ranks)
    assert config.training.gradient_accumulation_steps(ranks) >= 1
    assert config.expert_parallel_size(ranks) == ranks, "experts are spread where there are ranks"


def test_preset_runs_without_deepspeed(name) -> None:
    resolve(name, ["engine.type=plain"]).check_world_size(1)


def test_preset_builds(name) -> None:
    config = resolve(name, []).model
    with torch.device("meta"):  # shapes alone: the weights of the large ones do not fit a test
        model = build_model(config)
        prediction = model.head(torch.zeros(1, 1, 1, config.d_model))
    assert prediction.shape[:4] == (1, 1, 1, config.patch_length)
    assert len(model.blocks) == config.num_layers
    assert all(parameter.is_meta for parameter in model.parameters())
    if isinstance(config.feed_forward, MoEConfig):
        assert len(model.routers()) == config.num_layers


def test_tiny_preset_predicts() -> None:
    config = resolve("time_tracker_tiny", []).model
    model = build_model(config)
    values_BCL = torch.randn(2, 1, config.context_length)
    output = model(values_BCL, torch.ones_like(values_BCL, dtype=torch.bool))
    assert output.prediction_BCNPK.shape == (2, 1, 14, 48, 1)
    assert output.prediction_BCNPK.isfinite().all()
