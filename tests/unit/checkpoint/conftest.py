"""Small checkpoints without a model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tsmoe.checkpoint.layout import CheckpointMeta
from tsmoe.checkpoint.saver import CheckpointConfig, CheckpointSaver
from tsmoe.ranks import Ranks

Save = Callable[..., bool]


@pytest.fixture
def meta_of() -> Callable[[int], CheckpointMeta]:
    def make(step: int) -> CheckpointMeta:
        return CheckpointMeta(
            step=step, windows_seen=16 * step, config={"model": {"d_model": 8}},
            corpus_fingerprint="f" * 64,
        )  # fmt: skip

    return make


@pytest.fixture
def make_saver(tmp_path: Path) -> Callable[..., CheckpointSaver]:
    def make(**settings: object) -> CheckpointSaver:
        config = CheckpointConfig(**settings)  # type: ignore[arg-type]
        return CheckpointSaver(tmp_path / "checkpoints", config, Ranks())

    return make


@pytest.fixture
def save(meta_of: Callable[[int], CheckpointMeta]) -> Save:
    """Save a step whose only tensor holds its number; return whether it was."""

    def save_step(saver: CheckpointSaver, step: int) -> bool:
        tensor = torch.full((4,), float(step))
        saver.begin(meta_of(step), {"dense.safetensors": {"value/weight": tensor}})
        return saver.finish()

    return save_step
