"""Cells of the PatchMoE tables: their commands resolve, and no run passes for another one."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tsmoe.tasks.config import resolve_tasks
from tsmoe.train.run_config import FINE_TUNING, read_preset

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(name="patch_moe")
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import patch_moe

    yield patch_moe
    for name in ("patch_moe", "record"):
        sys.modules.pop(name, None)


def test_each_router_can_be_typed_for_each_set(patch_moe) -> None:
    for suite in patch_moe.SUITES.values():
        preset = read_preset(suite.preset, FINE_TUNING)
        for name, settings in suite.sets.items():
            for router in patch_moe.ROUTERS:
                words = ["data=x", *suite.settings, *patch_moe.of_router(router, settings)]
                run = resolve_tasks(preset, suite.preset, words)
                found = run.model.feed_forward
                if router != "dense":
                    assert found.router.type == ("linear" if "linear" in router else "recurrent")
                elif name == "ETTh1:96:336":
                    assert (found.d_ff, run.model.d_model) == (96, 16)
                else:
                    assert found.type == "dense"


def test_run_of_another_command_is_not_taken_for_this_one(patch_moe, tmp_path) -> None:
    args = argparse.Namespace(
        data=tmp_path / "data", out=tmp_path / "runs", task="forecast", settings=[]
    )
    suite, name = patch_moe.SUITES["forecast"], "ETTh1:96:336"
    run = args.out / "forecast-ETTh1-96-336-recurrent-0"
    run.mkdir(parents=True)
    (run / "DONE").touch()
    (run / "cell.json").write_text(json.dumps({"command": "tsmoe finetune other", "preset": "1"}))
    with pytest.raises(SystemExit, match="another command"):
        patch_moe.run_cell(suite, name, "recurrent", 0, args)


def test_picture_leaves_out_what_has_no_figure(patch_moe, tmp_path) -> None:
    cells = [
        {
            "set": "ETTh1:96:336",
            "router": router,
            "seed": seed,
            "validation_error": 1.0,
            "results": [{"model": "tsmoe", "mse": value}],
        }
        for router, seed, value in (("a", 0, 1.0), ("a", 1, None), ("b", 0, 1.1), ("c", 0, None))
    ]
    patch_moe.draw("mse", cells, tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 5_000
