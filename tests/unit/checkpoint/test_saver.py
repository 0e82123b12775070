import errno
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from tsmoe.checkpoint import saver as saver_module
from tsmoe.checkpoint.elastic import StateReader
from tsmoe.checkpoint.layout import find_damage, read_meta
from tsmoe.checkpoint.resume import newest_checkpoint
from tsmoe.errors import CheckpointError


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_checkpoint_is_seen_only_when_it_is_whole(folder, make_saver, meta_of, monkeypatch) -> None:
    goes_on = threading.Event()

    def slow_save(path: Path, tensors: dict) -> None:
        goes_on.wait(10)
        real_save(path, tensors)

    real_save = saver_module.write_tensors
    monkeypatch.setattr(saver_module, "write_tensors", slow_save)
    saver = make_saver()
    saver.begin(meta_of(4), {"dense.safetensors": {"value/weight": torch.ones(4)}})
    assert saver.is_pending
    assert saver.is_writing
    assert newest_checkpoint(folder) is None
    goes_on.set()
    assert saver.finish()
    assert not saver.is_pending
    assert names(folder) == ["latest", "step_00000004"]
    assert (folder / "latest").read_text() == "step_00000004"
    path, meta = newest_checkpoint(folder)
    assert (meta.step, meta.windows_seen) == (4, 64)
    assert find_damage(path, meta) is None
    with StateReader(path, meta) as reader:
        assert torch.equal(reader.tensor("value", "weight"), torch.ones(4))


def test_leftovers_of_a_killed_run_are_cleared(folder, make_saver, save) -> None:
    assert save(make_saver(), 2)
    (folder / ".incomplete-step_00000004").mkdir()
    (folder / ".incomplete-step_00000004" / "dense.safetensors").write_bytes(b"half")
    (folder / ".incomplete-latest").write_text("step_0")
    make_saver()
    assert names(folder) == ["latest", "step_00000002"]


def test_newest_and_milestones_are_kept(folder, make_saver, save) -> None:
    saver = make_saver(keep=2, milestone_every_steps=4)
    for step in range(1, 8):
        assert save(saver, step)
    assert names(folder) == ["latest", "step_00000004", "step_00000006", "step_00000007"]
    assert (folder / "latest").read_text() == "step_00000007"


def test_copies_under_other_names_are_left_alone(folder, make_saver, save) -> None:
    saver = make_saver(keep=1)
    assert save(saver, 4)
    shutil.copytree(folder / "step_00000004", folder / "step_00000004.bak")
    assert save(saver, 8)
    assert names(folder) == ["latest", "step_00000004.bak", "step_00000008"]
    assert newest_checkpoint(folder)[0].name == "step_00000008"


def test_files_may_be_read_by_whom_others_may(folder, make_saver, save) -> None:
    former = os.umask(0o022)
    try:
        assert save(make_saver(), 4)
    finally:
        os.umask(former)
    mode = (folder / "step_00000004" / "dense.safetensors").stat().st_mode
    assert mode & 0o777 == 0o644


def test_saving_a_step_again_replaces_it(folder, make_saver, save) -> None:
    saver = make_saver()
    assert save(saver, 4)
    (folder / "step_00000004" / "dense.safetensors").write_bytes(b"")
    assert save(saver, 4)
    path, meta = newest_checkpoint(folder)
    assert find_damage(path, meta) is None


def test_checkpoint_is_kept_beside_later_damaged_ones(folder, make_saver, save) -> None:
    """After damage a run goes on from an older step; what it saves then must not be pruned."""
    saver = make_saver(keep=1)
    assert save(saver, 8)
    (folder / "step_00000008" / "dense.safetensors").write_bytes(b"")
    assert save(saver, 6)
    path, _ = newest_checkpoint(folder)
    assert path.name == "step_00000006"


def test_full_disk_leaves_the_earlier_checkpoint_and_nothing_half_written(
    folder, make_saver, save, monkeypatch, caplog
) -> None:
    saver = make_saver()
    assert save(saver, 4)
    with monkeypatch.context() as patch:
        patch.setattr(saver_module, "write_tensors", no_space)
        assert not save(saver, 8)
    assert "step 8 was not saved" in caplog.text
    assert "No space left" in caplog.text
    assert "free some space" in caplog.text
    assert not list(folder.glob(".incomplete-*"))
    path, meta = newest_checkpoint(folder)
    assert path.name == "step_00000004"
    assert find_damage(path, meta) is None
    assert save(saver, 12)
    assert newest_checkpoint(folder)[0].name == "step_00000012"


def test_checkpoint_counts_as_saved_where_only_latest_could_not_be_written(
    folder, make_saver, save, monkeypatch, caplog
) -> None:
    saver = make_saver()
    assert save(saver, 4)
    with monkeypatch.context() as patch:
        patch.setattr(saver_module, "write_text", no_space)
        assert save(saver, 8)
    assert "could not tidy up" in caplog.text
    (folder / "latest").unlink()
    assert newest_checkpoint(folder)[0].name == "step_00000008"


def test_last_checkpoint_must_succeed(make_saver, save, meta_of, monkeypatch) -> None:
    saver = make_saver()
    assert save(saver, 4)
    monkeypatch.setattr(saver_module, "write_tensors", no_space)
    saver.begin(meta_of(8), {"dense.safetensors": {"value/weight": torch.ones(4)}})
    with pytest.raises(CheckpointError, match="last checkpoint could not be saved"):
        saver.close(must_succeed=True)


def test_next_begin_commits_the_checkpoint_before(folder, make_saver, meta_of) -> None:
    saver = make_saver()
    for step in (4, 8):
        saver.begin(meta_of(step), {"dense.safetensors": {"value/weight": torch.ones(4)}})
    assert (folder / "latest").read_text() == "step_00000004"
    saver.close(must_succeed=True)
    assert (folder / "latest").read_text() == "step_00000008"
    assert read_meta(folder / "step_00000008").step == 8


@pytest.mark.parametrize("settings", [{"every_steps": 0}, {"keep": 0}])
def test_config_needs_at_least_one(settings) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(settings))} \(0\)"):
        saver_module.CheckpointConfig(**settings)
