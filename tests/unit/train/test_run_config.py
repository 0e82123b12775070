import pytest
import yaml

from tsmoe.config import decode, encode
from tsmoe.engine import PlainEngineConfig
from tsmoe.errors import ConfigError
from tsmoe.train.run_config import RunConfig, TrainingConfig, preset_names, resolve


def config_of(**sections: dict) -> RunConfig:
    return decode(RunConfig, {"run": "r", "corpus": "c", **sections}, origin="test")


def refusal(world_size: int, **sections: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        config_of(**sections).check_world_size(world_size)
    return str(caught.value)


def test_settings_go_over_the_preset() -> None:
    plain = resolve("time_tracker_tiny", [])
    changed = resolve("time_tracker_tiny", ["training.steps=7", "seed=3", "optimizer.lr=1e-4"])
    assert (changed.training.steps, changed.seed, changed.optimizer.lr) == (7, 3, 1e-4)
    assert changed.training.global_batch_size == plain.training.global_batch_size
    assert changed.model == plain.model


def test_later_settings_win() -> None:
    assert resolve("time_tracker_tiny", ["seed=1", "seed=2"]).seed == 2


def test_another_type_starts_from_its_defaults() -> None:
    config = resolve("time_tracker_tiny", ["engine.type=plain"])
    assert config.engine == PlainEngineConfig()
    dense = resolve("time_tracker_tiny", ["model.feed_forward={type: dense, d_ff: 9}"])
    assert encode(dense.model.feed_forward) == {"type": "dense", "d_ff": 9}


def test_preset_may_be_a_file(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("run: r\ncorpus: c\ntraining: {steps: 3}\n")
    assert resolve(str(path), []).training.steps == 3
    with pytest.raises(ConfigError, match=r"other\.yaml: no such file"):
        resolve(str(tmp_path / "other.yaml"), [])


def test_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="'time_tracker_tyni' is no preset") as caught:
        resolve("time_tracker_tyni", [])
    assert all(name in str(caught.value) for name in preset_names())


def test_wrong_setting_names_preset_and_path() -> None:
    with pytest.raises(
        ConfigError, match=r"time_tracker_tiny: training\.stepz.*did you mean steps"
    ):
        resolve("time_tracker_tiny", ["training.stepz=5"])
    with pytest.raises(ConfigError, match=r"model: context_length \(670\).*patch_stride \(48\)"):
        resolve("time_tracker_tiny", ["model.context_length=670"])


def test_batch_that_does_not_divide_names_all_three_numbers() -> None:
    batches = {"global_batch_size": 100, "micro_batch_size": 10}
    message = refusal(3, training=batches)
    assert "training.global_batch_size (100)" in message
    assert "training.micro_batch_size (10)" in message
    assert "ranks (3)" in message
    config = config_of(training=batches)
    config.check_world_size(5)
    assert config.training.gradient_accumulation_steps(5) == 2


@pytest.mark.parametrize(
    ("world_size", "advice"),
    [
        (512, {"global_batch_size": 32768, "micro_batch_size": 8}),
        (96, {"global_batch_size": 6144}),
    ],
)
def test_a_refused_number_of_ranks_comes_with_sizes_that_fit(world_size: int, advice: dict) -> None:
    sizes = {"global_batch_size": 4096, "micro_batch_size": 64}
    message = refusal(world_size, training=sizes)
    for name, value in advice.items():
        assert f"training.{name}={value}" in message
        config_of(training=sizes | {name: value}).check_world_size(world_size)
    assert ("or keep it" in message) == ("micro_batch_size" in advice)


def test_expert_parallel_size_must_divide_ranks_and_experts() -> None:
    engine = {"type": "deepspeed", "expert_parallel_size": 2}
    message = refusal(1, engine=engine)
    assert "engine.expert_parallel_size (2)" in message
    assert "ranks (1)" in message
    message = refusal(2, engine=engine, model={"feed_forward": {"type": "moe", "num_experts": 5}})
    assert "engine.expert_parallel_size (2)" in message
    assert "model.feed_forward.num_experts (5)" in message


@pytest.mark.parametrize(
    ("num_experts", "ranks", "expected"), [(8, 1, 1), (8, 2, 2), (8, 12, 4), (8, 16, 8), (5, 2, 1)]
)
def test_experts_are_spread_over_as_many_ranks_as_fit(
    num_experts: int, ranks: int, expected: int
) -> None:
    model = {"feed_forward": {"type": "moe", "num_experts": num_experts}}
    config = config_of(engine={"type": "deepspeed"}, model=model)
    assert config.expert_parallel_size(ranks) == expected


def test_experts_stay_together_without_deepspeed_and_without_experts() -> None:
    assert config_of(engine={"type": "plain"}).expert_parallel_size(4) == 1
    dense = {"feed_forward": {"type": "dense"}}
    assert config_of(engine={"type": "deepspeed"}, model=dense).expert_parallel_size(4) == 1


def test_dense_model_has_no_experts_to_spread() -> None:
    dense = {"feed_forward": {"type": "dense"}}
    message = refusal(2, engine={"type": "deepspeed", "expert_parallel_size": 2}, model=dense)
    assert "engine.expert_parallel_size is 2" in message
    assert "dense" in message
    config_of(engine={"type": "deepspeed"}, model=dense).check_world_size(2)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 0}, r"steps \(0\)"),
        ({"micro_batch_size": -1}, r"micro_batch_size \(-1\)"),
        ({"target_clip": 0.0}, r"target_clip \(0\.0\)"),
        ({"timeout_seconds": -2.0}, r"timeout_seconds \(-2\.0\)"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TrainingConfig(**settings)


def test_compiled_blocks_are_refused_under_stage_3_with_the_reason() -> None:
    compiled = {"compiles_blocks": True}
    with pytest.raises(ConfigError, match=r"compiles_blocks.*zero_stage is 3.*hooks"):
        config_of(training=compiled, engine={"type": "deepspeed", "zero_stage": 3})
    config_of(training=compiled, engine={"type": "deepspeed", "zero_stage": 2})


def test_stream_takes_the_place_of_a_preset_s_corpus_and_that_is_said(tmp_path, caplog) -> None:
    with caplog.at_level("INFO"):
        config = resolve("time_tracker_tiny", ["stream.path=a/b", "stream.name=c"])
    assert (config.corpus, config.stream.path, config.stream.name) == (None, "a/b", "c")
    assert "stream is given: corpus of time_tracker_tiny is left out" in caplog.text
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(encode(config)))
    assert resolve(str(saved), []) == config
    assert resolve(str(saved), ["stream.revision=d"]).stream.revision == "d"
    back = resolve(str(saved), ["corpus=mine"])
    assert (back.corpus, back.stream) == ("mine", None)


def test_corpus_and_stream_at_once_are_refused(tmp_path) -> None:
    words = "corpus is mine and stream.path is a/b; a run is trained on one of them"
    with pytest.raises(ConfigError, match=words):
        resolve("time_tracker_tiny", ["corpus=mine", "stream.path=a/b"])
    both = tmp_path / "both.yaml"
    both.write_text("run: r\ncorpus: mine\nstream: {path: a/b}\n")
    with pytest.raises(ConfigError, match=words):
        resolve(str(both), [])
    with pytest.raises(ConfigError, match=words):
        resolve(str(both), ["seed=1"])


def test_settings_typed_before_the_type_they_belong_to_are_kept() -> None:
    config = resolve(
        "time_tracker_tiny", ["model.feed_forward.d_ff=24", "model.feed_forward.type=dense"]
    )
    assert config.model.feed_forward.type == "dense"
    assert config.model.feed_forward.d_ff == 24
