import json
from pathlib import Path

import pytest

from tsmoe.engine.deepspeed_config import (
    OWNED_BY_RUN_CONFIG,
    DeepSpeedEngineConfig,
    deepspeed_json,
)
from tsmoe.errors import ConfigError


def settings_for(config: DeepSpeedEngineConfig, *, precision: str = "fp32") -> dict:
    return deepspeed_json(
        config,
        precision=precision,
        clip_grad_norm=1.5,
        is_on_gpu=False,
        micro_batch_size=4,
        gradient_accumulation_steps=3,
    )


def settings_with_file(path: Path, content: object) -> dict:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return settings_for(DeepSpeedEngineConfig(zero_stage=2, config_file=str(path)))


def test_stage_that_fails_with_experts_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"zero_stage is 0.*gradient norm.*use 1"):
        DeepSpeedEngineConfig(zero_stage=0)


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="zero_stage is 7"):
        DeepSpeedEngineConfig(zero_stage=7)
    with pytest.raises(ValueError, match=r"expert_parallel_size \(0\)"):
        DeepSpeedEngineConfig(expert_parallel_size=0)


def test_run_config_decides_what_it_owns() -> None:
    settings = settings_for(DeepSpeedEngineConfig(zero_stage=2), precision="bf16")
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 1.5
    assert settings["bf16"]["enabled"] is True
    assert settings_for(DeepSpeedEngineConfig())["bf16"]["enabled"] is False


def test_file_may_set_the_rest(tmp_path: Path) -> None:
    content: dict = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}
    settings = settings_with_file(tmp_path / "ds.json", content)
    found = settings["zero_optimization"]
    assert found == {"overlap_comm": True, "stage": 2, "reduce_bucket_size": 20_000_000}
    content["zero_optimization"] = {"reduce_bucket_size": 1000}
    settings = settings_with_file(tmp_path / "ds.json", content)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000
    assert settings["wall_clock_breakdown"] is True


@pytest.mark.parametrize("key", OWNED_BY_RUN_CONFIG)
def test_file_may_not_set_what_the_run_config_owns(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=r"ds\.json.*belongs to the run config") as caught:
        settings_with_file(tmp_path / "ds.json", {key: {}, "wall_clock_breakdown": True})
    assert f"{key}: set {OWNED_BY_RUN_CONFIG[key]}" in str(caught.value)


def test_file_may_not_contradict_the_stage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage is 1 and engine\.zero_stage is 2"):
        settings_with_file(tmp_path / "ds.json", {"zero_optimization": {"stage": 1}})
    settings_with_file(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("offload_optimizer", {"device": "cpu"}, r"offload_optimizer .*engine\.offloads_optimizer"),
        ("zero_hpz_partition_size", 2, "zero_hpz_partition_size .*experts"),
        ("compute_grad_norm", False, "compute_grad_norm .*report"),
        ("offload_param", {"device": "nvme"}, "offload_param .*device cpu"),
        ("offload_param", {"device": "cpu"}, "offload_param .*only stage 3"),
    ],
)
def test_file_may_not_set_what_was_never_right_with_experts(
    tmp_path: Path, key: str, value: object, says: str
) -> None:
    with pytest.raises(ConfigError, match=rf"ds\.json.*{says}"):
        settings_with_file(tmp_path / "ds.json", {"zero_optimization": {key: value}})


def test_offload_goes_to_host_memory_with_the_optimizer_of_the_run() -> None:
    settings = settings_for(DeepSpeedEngineConfig(offloads_optimizer=True))
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert settings["zero_force_ds_cpu_optimizer"] is False
    assert "offload_optimizer" not in settings_for(DeepSpeedEngineConfig())["zero_optimization"]


@pytest.mark.parametrize(("content", "says"), [("{", "not valid JSON"), ("[]", "got list")])
def test_unusable_file_is_refused_by_name(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"ds\.json.*{says}"):
        settings_with_file(tmp_path / "ds.json", content)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: no such file.*engine\.config_file"):
        settings_for(DeepSpeedEngineConfig(config_file=str(tmp_path / "none.json")))
