import json
from dataclasses import replace
from pathlib import Path

import pytest

from tsmoe.cost.machine import Machine, gpu_machine
from tsmoe.cost.measured import with_measured
from tsmoe.errors import ConfigError

MACHINE = gpu_machine("a100", precision="bf16", ranks_per_node=8)


def step(number: int, *, flops: float, **cost: object) -> dict[str, object]:
    return {"step": number, "speed/step_seconds": 0.5, "speed/flops_per_second": flops,
            "speed/of_step_before": cost}  # fmt: skip


def write_run(folder: Path, steps: list[dict[str, object]]) -> Path:
    steps[0]["speed/start"] = {"ranks": 2}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    return folder


def test_rates_of_a_json_file_replace_assumed_ones(tmp_path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"results": {"flops": 1.5e14, "latency": 1e-5, "machine": "x"}}))
    machine = with_measured(MACHINE, path)
    assert (machine.flops.value, machine.latency.value) == (1.5e14, 1e-5)
    assert machine.flops.source == f"measured, {path}"
    assert machine.memory_bandwidth == MACHINE.memory_bandwidth


def test_a_run_on_another_kind_of_device_is_refused(tmp_path) -> None:
    run = write_run(tmp_path, [step(n, flops=1e12, compute_seconds=[0.2]) for n in range(9)])
    path = run / "metrics.jsonl"
    product = "fp32 matrix product of size 1024 on 1 thread(s), measured"
    path.write_text(path.read_text().replace('{"ranks": 2}', json.dumps({"peak_is": product})))
    with pytest.raises(ConfigError, match="say nothing of a100"):
        with_measured(MACHINE, run)
    with_measured(replace(MACHINE, is_gpu=False), run)


def test_a_run_tells_rates_of_a_rank_after_its_first_steps(tmp_path) -> None:
    cost = {"compute_seconds": [0.2, 0.3], "all_to_all_share": 0.1, "bytes_out": 4_000_000}
    slow = {"compute_seconds": [9.0, 9.0], "all_to_all_share": 0.9, "bytes_out": 4_000_000}
    steps = [step(n, flops=1e12, **(slow if n < 5 else cost)) for n in range(9)]
    machine = with_measured(MACHINE, write_run(tmp_path, steps))
    # 0.5e12 operations, half by each rank, in 0.25 s; 2 MB from each in 0.05 s.
    assert machine.flops.value == pytest.approx(1e12)
    assert machine.link_bandwidth.value == pytest.approx(40e6)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[1]", "holds none of flops"),
        ('{"speed": 1}', "holds none of flops"),
        ('{"flops": -1}', "flops is -1, not a finite number above 0"),
        ('{"flops": "fast"}', "flops is 'fast'"),
        ('{"flops": NaN}', "flops is nan"),
    ],
)
def test_file_of_no_use_is_refused(tmp_path, text, says) -> None:
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        with_measured(MACHINE, path)


def test_run_of_no_use_is_refused(tmp_path) -> None:
    def refuse(folder: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            with_measured(MACHINE, folder)
        return str(caught.value)

    assert "cannot be read" in refuse(tmp_path / "none")
    write_run(tmp_path, [step(n, flops=1e12) for n in range(8)])
    assert "tells its compute time" in refuse(tmp_path)
    (tmp_path / "config.yaml").write_text("training: {recomputes_activations: true}\n")
    assert "recomputes activations" in refuse(tmp_path)


def test_every_rate_is_a_field_of_a_machine() -> None:
    from tsmoe.cost.measured import RATES

    assert set(RATES) | {"memory"} == set(MACHINE.assumptions)
    assert isinstance(MACHINE, Machine)
