"""Settings of fine-tuning: presets, short forms, and what does not fit together."""

import pytest
import yaml

from tsmoe.__main__ import main
from tsmoe.config import encode
from tsmoe.errors import ConfigError
from tsmoe.finetune.config import resolve_finetune
from tsmoe.tasks.config import resolve_tasks
from tsmoe.train.run_config import FINE_TUNING, read_preset

BASE = ["model=pkg", "data=t.csv"]


def test_short_forms_are_the_settings_that_they_stand_for() -> None:
    short = resolve_finetune("full", ["model=pkg", "data=t.csv", "few_shot=0.1"])
    long = resolve_finetune("full", ["start=pkg", "table.path=t.csv", "table.few_shot=0.1"])
    assert short == long
    assert (short.start, short.table.path, short.table.few_shot) == ("pkg", "t.csv", 0.1)


@pytest.mark.parametrize("preset", ["full", "channel_mixed", "head", "low_rank"])
def test_presets_resolve_and_say_what_they_are(preset) -> None:
    config = resolve_finetune(preset, BASE)
    assert config.mixing.num_channel_mixed_layers == (2 if preset == "channel_mixed" else 0)
    assert config.trainable.trains == (preset if preset in ("head", "low_rank") else "all")
    assert config.run == f"runs/finetune/{preset}"
    assert encode(config)["start"] == "pkg"


def test_from_scratch_brings_its_model() -> None:
    config = resolve_finetune("from_scratch", ["data=t.csv"])
    assert config.model is not None
    assert config.start is None


@pytest.mark.parametrize(
    ("preset", "settings", "named"),
    [
        ("full", ["data=t.csv"], "model=PACKAGE"),
        ("full", ["model=pkg"], "data=TABLE"),
        ("full", [*BASE, "few_shot=0"], "few_shot"),
        ("full", [*BASE, "few_shot=1.5"], "few_shot"),
        ("full", [*BASE, "table.prediction_length=0"], "prediction_length"),
        ("full", [*BASE, "table.targets=[]"], "targets"),
        ("full", [*BASE, "table.targets=[a,b]", "table.covariates=[b]"], "no column twice"),
        ("full", [*BASE, "table.covariates=[b]"], "num_channel_mixed_layers is 0"),
        ("channel_mixed", [*BASE, "table.known_future=[b]"], "'b'"),
        ("full", [*BASE, "training.max_variates=3"], "max_variates"),
        ("channel_mixed", [*BASE, "training.max_variates=0"], "max_variates"),
        ("channel_mixed", [*BASE, "mixing.graph.alpha=1.5"], "alpha"),
        ("low_rank", [*BASE, "trainable.low_rank.rank=0"], "rank"),
        ("full", [*BASE, "trainable.trains=foo"], "trains"),
        ("full", [*BASE, "optimizer.lr_scales={head: 0}"], "lr_scales.head"),
        ("from_scratch", ["data=t.csv", "model=pkg"], "one of the two"),
        ("from_scratch", ["data=t.csv", "trainable.trains=head"], "no start"),
        ("full", [*BASE, "model.patch_length=8"], "model.patch_length: a package brings its own"),
        ("full", [*BASE, "nonsense=1"], "nonsense"),
        ("nonsense", BASE, "is no preset"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(preset, settings, named) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        resolve_finetune(preset, settings)
    assert "\n" not in str(caught.value)


def test_settings_typed_before_the_type_they_belong_to_are_kept() -> None:
    config = resolve_finetune("full", [*BASE, "engine.zero_stage=2", "engine.type=deepspeed"])
    assert (config.engine.type, config.engine.zero_stage) == ("deepspeed", 2)


def test_settings_of_a_task_typed_before_its_type_are_kept() -> None:
    preset = read_preset("patch_moe_univariate", FINE_TUNING)
    settings = ["data=t.csv", "tasks.forecast.prediction_length=48", "tasks.forecast.type=series"]
    config = resolve_tasks(preset, "patch_moe_univariate", settings)
    assert (config.tasks["forecast"].type, config.tasks["forecast"].prediction_length) == (
        "series", 48
    )  # fmt: skip


def test_settings_of_presets_and_files_of_fine_tuning_are_printed(tmp_path, capsys) -> None:
    assert main(["config", "patch_moe_forecast", "data=t.csv", "seed=3"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["data"], printed["seed"], printed["model"]["norms_first"]) == ("t.csv", 3, True)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(printed))
    assert main(["config", str(tmp_path / "own.yaml")]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == printed
    assert main(["config", "full", *BASE]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["optimizer"]["lr"] == 0.0002


@pytest.mark.parametrize(
    ("command", "preset"), [("pretrain", "full"), ("finetune", "time_tracker_mini")]
)
def test_presets_of_the_other_command_are_known(command, preset, capsys) -> None:
    other = {"pretrain": "finetune", "finetune": "pretrain"}[command]
    assert main([command, preset]) == 2
    assert f"{preset} is a preset of tsmoe {other}" in capsys.readouterr().err
