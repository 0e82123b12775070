"""A supervised run on two ranks is that of one process: balance loss, routing and tasks alike."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rank_pool import run_on_ranks
from task_run import Settings, small_run, train_all, write_files
from tsmoe.config import merge_layers

LINEAR: Settings = {"model": {"feed_forward": {"router": {"type": "linear"}}}}
TOLD: Settings = {
    "model": {"has_task_embedding": True, "norms_first": True},
    "tasks": {"forecast": {"shortcut": "from_last"}},
}
KINDS: dict[str, tuple[tuple[str, ...], Settings]] = {
    "forecast": (("forecast",), {}),
    "anomaly-linear": (("anomaly",), LINEAR),
    "classification": (("classification",), {}),
    "forecast+imputation": (("forecast", "imputation"), TOLD),
    "forecast-fitted": (("forecast",), {"tasks": {"forecast": {"shortcut": "least_squares"}}}),
}
# Each rank sees half of the batch, in one pass: the balance loss is over both.
HALVES: Settings = {"training": {"micro_batch_size": 4}}


def spread(zero_stage: int, expert_ranks: int) -> Settings:
    return {
        "engine": {
            "type": "deepspeed",
            "zero_stage": zero_stage,
            "expert_parallel_size": expert_ranks,
        }
    }


VARIANTS: dict[str, tuple[str, Settings]] = {
    **{f"{kind}-plain": (kind, {}) for kind in KINDS},
    **{f"{kind}-stage1_ep2": (kind, spread(1, 2)) for kind in KINDS},
    "forecast-fitted-stage3_ep1": ("forecast-fitted", spread(3, 1)),
    "forecast-stage2_ep1": ("forecast", spread(2, 1)),
    "forecast+imputation-stage3_ep2": ("forecast+imputation", spread(3, 2)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def files(folder) -> dict[str, Path]:
    return write_files(folder)


def config_of(kind: str, run: Path, files: dict[str, Path], *settings: Settings) -> Any:
    names, own = KINDS[kind]
    return small_run(run, {name: files[name] for name in names}, own, *settings)


@pytest.fixture(scope="module")
def alone(folder, files) -> dict[str, Settings]:
    configs = [config_of(kind, folder / f"alone-{kind}", files) for kind in KINDS]
    (found,) = run_on_ranks(train_all, configs, num_ranks=1, time_limit=120)
    return dict(zip(KINDS, found, strict=True))


@pytest.fixture(scope="module")
def together(folder, files) -> dict[str, Settings]:
    configs = [
        config_of(kind, folder / name, files, merge_layers(settings, HALVES))
        for name, (kind, settings) in VARIANTS.items()
    ]
    found, others = run_on_ranks(train_all, configs, num_ranks=2, time_limit=240)
    assert set(others) == {None}
    return dict(zip(VARIANTS, found, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_come_to_what_one_process_does(alone, together, variant) -> None:
    expected, found = alone[VARIANTS[variant][0]], together[variant]
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=2e-4)
    assert found["loads"][0] == expected["loads"][0]
    errors = [run["result"]["validation_error"]["errors"] for run in (found, expected)]
    for step, error in errors[1].items():
        assert errors[0][step] == pytest.approx(error, rel=1e-3)
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][name], weight, atol=3e-4, err_msg=name)


def test_kinds_do_differ(alone) -> None:
    endings = [tuple(np.round(run["losses"], 6)) for run in alone.values()]
    assert len(set(endings)) == len(KINDS)
