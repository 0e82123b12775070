"""`tsmoe plan` as a user calls it."""

import json

import pytest

from tsmoe.__main__ import main
from tsmoe.train.run_config import preset_names


def plan(capsys, *arguments: str) -> tuple[int, dict, str]:
    """Return exit code, numbers and what was said on stderr."""
    code = main(["plan", *arguments, "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else {}, captured.err


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_planned_and_fits(capsys, preset) -> None:
    ranks = "2" if preset.endswith("tiny") else "8"
    code, numbers, _ = plan(capsys, preset, "--gpus-per-node", ranks)
    assert code == 0
    assert numbers["fits"]
    assert numbers["peak_bytes"] == sum(numbers["memory_bytes"].values())
    assert numbers["step_seconds"]["total"] == pytest.approx(
        sum(v for k, v in numbers["step_seconds"].items() if k != "total")
    )
    assert numbers["largest_micro_batch_size"] >= numbers["layout"]["training.micro_batch_size"]
    assert all(assumption["source"] for assumption in numbers["assumptions"].values())


def plan_large(capsys, *arguments: str) -> tuple[int, dict, str]:
    """Plan the large preset on 64 GPUs."""
    return plan(capsys, "time_tracker_large", "--nodes", "8", *arguments)


def test_settings_may_stand_before_and_after_options(capsys) -> None:
    code, numbers, _ = plan(
        capsys, "time_tracker_large", "training.micro_batch_size=32", "--nodes", "8",
        "engine.zero_stage=2", "--gpu", "h200", "engine.expert_parallel_size=4",
    )  # fmt: skip
    assert code == 0
    assert numbers["layout"]["training.micro_batch_size"] == 32
    assert numbers["layout"]["engine.zero_stage"] == 2
    assert numbers["layout"]["engine.expert_parallel_size"] == 4


@pytest.mark.parametrize("unknown", ["--zero-stage=2", "zero"])
def test_what_is_neither_setting_nor_option_is_refused(capsys, unknown) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "time_tracker_large", "--nodes", "8", unknown])
    assert f"unrecognized arguments: {unknown}" in capsys.readouterr().err


def test_text_names_parts_exchanges_and_sources(capsys) -> None:
    assert main(["plan", "time_tracker_large", "--nodes", "8"]) == 0
    text = capsys.readouterr().out
    for words in (
        "64 ranks: 429.0 M parameters",
        "expert parallel 8 x 8, ZeRO 1",
        "moments",
        "dispatch buffers",
        "all_to_all     rows of tokens    over     8    48 x",
        "largest micro-batch that fits",
        "suggested",
        "40% of peak, assumed",
        "data sheet of h100",
    ):
        assert words in text


def test_what_cannot_fit_is_refused_with_part_and_way_out(capsys) -> None:
    code, numbers, said = plan_large(capsys, "training.micro_batch_size=64", "--memory-gib", "1.5")
    assert code == 2
    assert not numbers["fits"]
    assert "does not fit" in said
    assert "most of it activations" in said
    most = numbers["largest_micro_batch_size"]
    assert 0 < most < 64
    assert f"training.micro_batch_size={most} is the most that fits" in said
    # The settings that it tells to try do fit.
    changed = said.split("; try ")[1].split()
    code, numbers, _ = plan_large(capsys, *changed, "--memory-gib", "1.5")
    assert code == 0, changed
    assert numbers["fits"]


def test_what_fits_nowhere_is_said_so(capsys) -> None:
    code, numbers, said = plan_large(capsys, "--memory-gib", "0.2")
    assert code == 2
    assert numbers["largest_micro_batch_size"] == 0
    assert numbers["suggestions"] == []
    assert "no layout over 64 ranks fits" in said


def test_settings_change_the_prediction(capsys) -> None:
    base = plan_large(capsys)[1]
    recomputed = plan_large(capsys, "training.recomputes_activations=true")[1]
    assert recomputed["memory_bytes"]["activations"] < base["memory_bytes"]["activations"] / 2
    offloaded = plan_large(capsys, "engine.offloads_optimizer=true")[1]
    assert offloaded["host_bytes"] > 0 == base["host_bytes"]
    slow = plan_large(capsys, "--network-gbps", "10")[1]
    assert slow["step_seconds"]["reduction"] > 5 * base["step_seconds"]["reduction"]
    assert slow["assumptions"]["network_bandwidth"]["source"].endswith("given")


def test_measured_rates_are_used_and_named(capsys, tmp_path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"flops": 1e12, "latency": 1e-3}))
    numbers = plan_large(capsys, "--measured", str(path))[1]
    assert numbers["assumptions"]["flops"] == {"value": 1e12, "source": f"measured, {path}"}
    assert not numbers["is_bound_by_launches"]


def test_this_machine_can_be_planned_for(capsys) -> None:
    code, numbers, _ = plan(capsys, "time_tracker_tiny", "--gpu", "cpu", "--gpus-per-node", "2")
    assert code == 0
    assert "measured" in numbers["assumptions"]["peak_flops"]["source"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "abacus"], "--gpu abacus: not in the table"),
        (["--gpu", "v100"], "has no bf16 tensor cores"),
        (["--nodes", "0"], "--nodes must be at least 1"),
        (["--tflops", "-3"], "--tflops must be a finite number above 0, got -3"),
        (["--imbalance", "0.5"], "--imbalance must be a finite number, at least 1"),
        (["--imbalance", "nan"], "--imbalance must be a finite number"),
        (["--memory-gib", "nan"], "--memory-gib must be a finite number above 0"),
        (["--tflops", "inf"], "--tflops must be a finite number above 0"),
        (["--network-gbps", "-1"], "--network-gbps must be a finite number above 0"),
        (["--nodes", "3"], "training.global_batch_size"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, says) -> None:
    code, _, said = plan(capsys, "time_tracker_large", *arguments)
    assert code == 2
    assert says in said
    assert len(said.strip().splitlines()) == 1
