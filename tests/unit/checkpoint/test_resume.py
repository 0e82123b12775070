import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tsmoe.checkpoint.layout import find_damage, read_meta
from tsmoe.checkpoint.resume import check_same_model, newest_checkpoint, open_checkpoint
from tsmoe.config import encode
from tsmoe.errors import CheckpointError
from tsmoe.models.time_tracker import TimeTrackerConfig


@pytest.fixture
def folder(tmp_path, make_saver, save) -> Path:
    """Checkpoints of the steps 4 and 8."""
    saver = make_saver()
    assert save(saver, 4)
    assert save(saver, 8)
    return tmp_path / "checkpoints"


def truncate(checkpoint: Path) -> str:
    path = checkpoint / "dense.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return "bytes instead of"


def alter(checkpoint: Path) -> str:
    path = checkpoint / "dense.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return "sha256 differs"


def remove(checkpoint: Path) -> str:
    (checkpoint / "dense.safetensors").unlink()
    return "dense.safetensors is missing"


def remove_meta(checkpoint: Path) -> str:
    (checkpoint / "meta.json").unlink()
    return "no meta.json"


def cut_meta(checkpoint: Path) -> str:
    path = checkpoint / "meta.json"
    path.write_text(path.read_text()[:40])
    return "cannot be read"


def age_meta(checkpoint: Path) -> str:
    path = checkpoint / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    return "format version 99, but this tsmoe reads 1"


DAMAGES = [truncate, alter, remove, remove_meta, cut_meta, age_meta]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_with_the_reason(folder, caplog, damage) -> None:
    reason = damage(folder / "step_00000008")
    path, meta = newest_checkpoint(folder)
    assert (path.name, meta.step) == ("step_00000004", 4)
    assert "passed over" in caplog.text
    assert "step_00000008" in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_whole_checkpoint_is_an_error(folder, damage) -> None:
    for checkpoint in folder.glob("step_*"):
        damage(checkpoint)
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is whole"):
        newest_checkpoint(folder)


def test_latest_decides_which_is_newest(folder) -> None:
    (folder / "latest").write_text("step_00000004")
    assert newest_checkpoint(folder)[0].name == "step_00000004"


def test_latest_that_names_nothing_is_warned_of(folder, caplog) -> None:
    (folder / "latest").write_text("step_00000012\n")
    assert newest_checkpoint(folder)[0].name == "step_00000008"
    assert "step_00000012, which is not there" in caplog.text


def test_latest_that_is_rubbish_is_warned_of(folder, caplog) -> None:
    (folder / "latest").write_bytes(b"step_0\xff\x00\x9c")
    assert newest_checkpoint(folder)[0].name == "step_00000008"
    assert "which is not there" in caplog.text


def test_folder_without_checkpoints_has_no_newest(tmp_path) -> None:
    assert newest_checkpoint(tmp_path) is None


def test_checkpoint_is_opened_by_its_run_its_parent_or_itself(folder) -> None:
    for path in (folder.parent, folder, folder / "step_00000008"):
        found, meta = open_checkpoint(path)
        assert (found.name, meta.step) == ("step_00000008", 8)
    assert open_checkpoint(folder / "step_00000004")[1].step == 4


def test_opening_what_is_no_checkpoint_says_what_to_name(folder, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no meta\.json.*runs/NAME"):
        open_checkpoint(tmp_path / "empty")
    truncate(folder / "step_00000004")
    with pytest.raises(CheckpointError, match="bytes instead of"):
        open_checkpoint(folder / "step_00000004")


def test_whole_checkpoint_has_no_damage(folder) -> None:
    checkpoint = folder / "step_00000008"
    assert find_damage(checkpoint, read_meta(checkpoint)) is None


def test_another_model_is_told_by_its_differing_keys(meta_of) -> None:
    meta = meta_of(4)
    check_same_model(meta, {"model": {"d_model": 8}, "seed": 5}, Path("run"))
    with pytest.raises(CheckpointError) as raised:
        check_same_model(meta, {"model": {"d_model": 16, "head": {"type": "point"}}}, Path("run"))
    assert "model.d_model is 8 there and 16 here" in str(raised.value)
    assert "model.head is None there" in str(raised.value)


def test_settings_that_are_younger_than_a_checkpoint_had_their_default(meta_of) -> None:
    model = encode(TimeTrackerConfig())
    older = {name: value for name, value in model.items() if name != "linear_shortcut"}
    meta = replace(meta_of(4), config={"model": older})
    check_same_model(meta, {"model": model}, Path("run"))
    other = encode(TimeTrackerConfig(linear_shortcut=True))
    with pytest.raises(CheckpointError, match=r"model\.linear_shortcut is False there and True"):
        check_same_model(meta, {"model": other}, Path("run"))


def test_checkpoint_that_was_committed_after_latest_is_the_newest(folder) -> None:
    # A kill between the two writes leaves this: `latest` is older than the newest checkpoint.
    (folder / "latest").write_text("step_00000004")
    before_commit = (folder / "step_00000008" / "meta.json").stat().st_mtime_ns - 1
    os.utime(folder / "latest", ns=(before_commit, before_commit))
    assert newest_checkpoint(folder)[0].name == "step_00000008"
