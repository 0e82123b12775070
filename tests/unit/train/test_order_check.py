from pathlib import Path

import pytest

from tsmoe.checkpoint.layout import CheckpointMeta
from tsmoe.config import decode, encode, merge_layers
from tsmoe.errors import CheckpointError
from tsmoe.train.order_check import check_same_order
from tsmoe.train.run_config import RunConfig

FOLDER = Path("runs/a/checkpoints/step_10")
PHASES = [{"from_step": 5, "source_temperature": 1.0}, {"from_step": 20, "domain_caps": {"A": 0.5}}]


def config(**data: object) -> RunConfig:
    return decode(RunConfig, {"run": "a", "corpus": "c", "data": data}, origin="test")


def check(before: RunConfig, now: RunConfig, *, without: str = "") -> None:
    saved = encode(before)
    saved["data"].pop(without, None)
    meta = CheckpointMeta(step=10, windows_seen=2560, config=saved, corpus_fingerprint="f")
    check_same_order(now, FOLDER, meta)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window_stride", 7),
        ("source_temperature", 0.25),
        ("source_weights", {"a": 2.0}),
        ("domain_caps", {"A": 0.5}),
        ("mixup_share", 0.5),
        ("resident_shards", 3),
    ],
)
def test_what_decides_the_order_must_stay(name: str, value: object) -> None:
    check(config(**{name: value}), config(**{name: value}))
    with pytest.raises(CheckpointError, match=rf"step_10.*data\.{name}=.*but data\.{name} is"):
        check(config(**{name: value}), config())


def test_workers_may_change() -> None:
    check(config(num_workers=0), config(num_workers=4))


@pytest.mark.parametrize("name", ["source_weights", "curriculum", "resident_shards"])
def test_checkpoint_from_before_a_setting_had_its_default(name: str) -> None:
    check(config(), config(), without=name)
    changed = {"source_weights": {"a": 2.0}, "curriculum": PHASES, "resident_shards": 1}
    with pytest.raises(CheckpointError, match=name):
        check(config(), config(**{name: changed[name]}), without=name)


def test_phases_that_have_begun_must_stay_and_those_to_come_may_change() -> None:
    check(config(curriculum=PHASES), config(curriculum=PHASES[:1]))
    check(config(curriculum=PHASES[:1]), config(curriculum=PHASES))
    with pytest.raises(CheckpointError, match=r"data\.curriculum"):
        check(config(curriculum=PHASES), config(curriculum=PHASES[1:]))


def test_size_of_the_step_must_stay_with_a_curriculum() -> None:
    larger = {"training": {"global_batch_size": 512}}

    def resized(before: RunConfig) -> RunConfig:
        return decode(RunConfig, merge_layers(encode(before), larger), origin="test")

    check(config(), resized(config()))
    with pytest.raises(CheckpointError, match=r"training\.global_batch_size=256, but .* is 512"):
        check(config(curriculum=PHASES), resized(config(curriculum=PHASES)))
