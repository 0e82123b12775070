"""Fine-tuning on two ranks is the run of one process, whatever learns and however it is spread."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_run import (
    Settings,
    finetune_all,
    same_start,
    small_finetune,
    write_package,
    write_table,
)
from rank_pool import run_on_ranks
from tsmoe.config import merge_layers


def spread(zero_stage: int, expert_ranks: int) -> Settings:
    return {
        "engine": {
            "type": "deepspeed",
            "zero_stage": zero_stage,
            "expert_parallel_size": expert_ranks,
        }
    }


# Two variates whose edges are all but sure, so that ranks, which draw their own, draw alike.
MIXED: Settings = {
    "table": {"targets": ["b", "c"]},
    "mixing": {"num_channel_mixed_layers": 1, "graph": {"alpha": 1 - 1e-6}},
}
KINDS: dict[str, Settings] = {
    "all": {},
    "head": {"trainable": {"trains": "head"}},
    "experts": {"trainable": {"trains": "experts"}},
    "low_rank": {"trainable": {"trains": "low_rank", "freezes_routers": True}},
    "lr_scales": {"optimizer": {"lr_scales": {"head": 3.0, "experts": 0.1}}},
    "mixed": MIXED,
    "shortcut": {"linear_shortcut": "learned"},
    "fitted": {"linear_shortcut": "least_squares"},
}
PASSES: Settings = {"training": {"micro_batch_size": 4}}
VARIANTS = [
    ("all", {}),
    *((kind, spread(1, 2)) for kind in KINDS),
    *((kind, spread(3, 2)) for kind in ("all", "head", "low_rank", "mixed", "shortcut", "fitted")),
    ("experts", spread(2, 1)),
    ("mixed", {}),
]


def name_of(variant: tuple[str, Settings]) -> str:
    engine = variant[1].get("engine")
    layout = "plain" if engine is None else "stage{zero_stage}_ep{expert_parallel_size}"
    return f"{variant[0]}-{layout.format(**engine or {})}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    write_table(folder / "table.csv", gaps=True)
    write_package(folder / "package")
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, dict[str, Any]]:
    """What one plain process comes to, one pass a step."""
    configs = [
        small_finetune(
            folder / f"alone_{kind}", folder / "table.csv", settings, start=folder / "package"
        )
        for kind, settings in KINDS.items()
    ]
    (found,) = run_on_ranks(finetune_all, configs, num_ranks=1, time_limit=120)
    return dict(zip(KINDS, found, strict=True))


@pytest.fixture(scope="module")
def together(folder) -> dict[str, dict[str, Any]]:
    """What two ranks come to, two passes a step."""
    configs = [
        small_finetune(
            folder / name_of(variant),
            folder / "table.csv",
            merge_layers(KINDS[variant[0]], variant[1], PASSES),
            start=folder / "package",
        )
        for variant in VARIANTS
    ]
    found, others = run_on_ranks(finetune_all, configs, num_ranks=2, time_limit=240)
    assert set(others) == {None}
    return dict(zip(map(name_of, VARIANTS), found, strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_two_ranks_come_to_what_one_process_does(alone, together, variant) -> None:
    expected, found = alone[variant[0]], together[name_of(variant)]
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=2e-4)
    errors = [run["result"]["validation_mse"] for run in (found, expected)]
    assert errors[0]["start_error"] == pytest.approx(errors[1]["start_error"], rel=1e-5)
    assert errors[0]["errors"].keys() == errors[1]["errors"].keys() == set("0246")
    for step, error in errors[1]["errors"].items():
        assert errors[0]["errors"][step] == pytest.approx(error, rel=1e-3)
    assert found["result"]["best_step"] == expected["result"]["best_step"] > 0
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][name], weight, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_what_is_to_rest_rests_on_any_number_of_ranks(folder, alone, together, variant) -> None:
    for found in (alone[variant[0]], together[name_of(variant)]):
        rests = same_start(found, folder / "package")
        match variant[0]:
            case "head":
                learned = {name for name, same in rests.items() if not same}
                assert learned == {n for n in rests if n.startswith(("head.", "output_norm."))}
            case "experts":
                learned = {name for name, same in rests.items() if not same}
                assert learned
                assert all(".experts." in n or ".always_on." in n for n in learned)
            case "low_rank":
                resting = (".router.", ".experts.", "embed.", "norm.weight")
                assert all(
                    same for name, same in rests.items()
                    if any(part in name for part in resting) and "output_norm" not in name
                )  # fmt: skip
                assert not rests["blocks.0.attention.query_key_value.weight"]
                assert not rests["blocks.1.feed_forward.always_on.down.weight"]
            case _:
                assert not rests["embed.values.weight"]
        if variant[0] in ("shortcut", "fitted"):
            assert np.abs(found["weights"]["shortcut.project.weight"]).max() > 1e-3


def test_kinds_do_differ(alone) -> None:
    endings = [tuple(np.round(run["losses"], 6)) for run in alone.values()]
    assert len(set(endings)) == len(KINDS)
