"""Rates that were measured, in place of assumed ones."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tsmoe.config import read_yaml
from tsmoe.cost.machine import Assumption, Machine
from tsmoe.errors import ConfigError

# Fields of `Machine` that a JSON file may give, all in bytes, operations and seconds.
RATES = (
    "flops",
    "peak_flops",
    "memory_bandwidth",
    "link_bandwidth",
    "network_bandwidth",
    "host_bandwidth",
    "latency",
    "hop",
    "launch",
)
# A run's first steps warm up.
_WARM_UP_STEPS = 5


def with_measured(machine: Machine, path: Path) -> Machine:
    """Put measured rates in place of a machine's.

    Args:
        machine: as by data sheet.
        path: a JSON object with some of `RATES`, alone or under "results"; or a run's folder or
            metrics.jsonl, which tell the FLOP/s of its passes and the rate of its all-to-alls.

    Raises:
        ConfigError: if nothing of use is found there.
    """
    if path.is_dir():
        path = path / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--measured {path}: cannot be read: {error}") from None
    is_run = path.suffix == ".jsonl"
    rates = _of_run(path, text, machine) if is_run else _of_json(path, text)
    found = {
        name: Assumption(value=float(value), source=f"measured, {path}")
        for name, value in rates.items()
    }
    return replace(machine, **found)  # type: ignore[arg-type]


def _of_json(path: Path, text: str) -> dict[str, float]:
    try:
        values: Any = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--measured {path}: not valid JSON: {error}") from None
    if isinstance(values, dict):
        values = values.get("results", values)
    if not isinstance(values, dict) or not (names := values.keys() & set(RATES)):
        raise ConfigError(f"--measured {path}: holds none of {', '.join(RATES)}")
    bad = [n for n in sorted(names) if not _is_rate(values[n])]
    if bad:
        raise ConfigError(
            f"--measured {path}: {bad[0]} is {values[bad[0]]!r}, not a finite number above 0"
        )
    return {name: values[name] for name in names}


def _is_rate(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


def _of_run(path: Path, text: str, machine: Machine) -> dict[str, float]:
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise ConfigError(f"--measured {path}: line {number} is not valid JSON") from None
    config = path.with_name("config.yaml")
    if config.exists() and read_yaml(config).get("training", {}).get("recomputes_activations"):
        raise ConfigError(
            f"--measured {path}: the run recomputes activations, which its FLOP/s do not count; "
            "name one that does not"
        )
    peaks = [line["speed/start"].get("peak_is") for line in lines if "speed/start" in line]
    # `find_peak` of a run times a matrix product on a processor and looks a GPU up.
    if peaks and peaks[-1] and machine.is_gpu == ("matrix product" in peaks[-1]):
        raise ConfigError(
            f"--measured {path}: the run's peak is that of a {peaks[-1]}, so its rates say nothing "
            f"of {machine.name}; name a run on such a device, or choose --gpu by it"
        )
    steps = [line for line in lines if line.get("step", 0) >= _WARM_UP_STEPS]
    compute, exchange = [], []
    for step in steps:
        cost = step.get("speed/of_step_before", {})
        seconds = step.get("speed/step_seconds", 0.0)
        if by_rank := cost.get("compute_seconds"):
            flops = step["speed/flops_per_second"] * seconds / len(by_rank)
            compute.append(flops / statistics.mean(by_rank))
        waited = cost.get("all_to_all_share", 0.0) * seconds
        if waited and cost.get("bytes_out"):
            exchange.append(cost["bytes_out"] / _num_ranks(lines) / waited)
    if not compute:
        raise ConfigError(
            f"--measured {path}: no step after the first {_WARM_UP_STEPS} tells its compute time; "
            "let the run go on for longer"
        )
    rates = {"flops": statistics.median(compute)}
    if not _is_rate(rates["flops"]):
        raise ConfigError(
            f"--measured {path}: the median rate of its steps is {rates['flops']}; name a run "
            "whose steps were measured"
        )
    if exchange and _is_rate(statistics.median(exchange)):
        rates["link_bandwidth"] = statistics.median(exchange)
    return rates


def _num_ranks(lines: Sequence[dict[str, Any]]) -> int:
    starts = [line["speed/start"] for line in lines if "speed/start" in line]
    return int(starts[-1].get("ranks", 1)) if starts else 1
