"""What is recorded where the disk is full for a while."""

import errno
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tsmoe.train import durable_record
from tsmoe.train.durable_record import Board, LineFile


class FullFile:
    """Takes a part of what is written, as the last block of a disk does, and then nothing."""

    def __init__(self, file, *, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = self.file.write(data[: self.room])
        self.room -= count
        return count

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_whole_or_missing_and_the_file_says_which(tmp_path, caplog) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = LineFile(path)
    lines.write({"step": 0})
    file = lines._file
    lines._file = FullFile(file, room=5)
    for step in (1, 2, 3):
        lines.write({"step": step})
    assert read(path) == [{"step": 0}]  # not the first five bytes of step 1
    lines._file = file
    lines.write({"step": 4})
    lines.write({"step": 5})
    lines.close()
    assert read(path) == [
        {"step": 0},
        {"step": 4},
        {"step": 4, "missing": {"from_step": 1, "to_step": 3}},
        {"step": 5},
    ]
    assert caplog.text.count("cannot be written") == 1
    assert "is written again; steps 1 to 3 are missing" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_device_that_is_full_ends_nothing(caplog) -> None:
    lines = LineFile(Path("/dev/full"))
    lines.write({"step": 7})
    lines.close()
    assert "steps from 7 on are not recorded" in caplog.text
    assert "No space left" in caplog.text


def test_board_goes_on_in_another_file_of_events(tmp_path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(durable_record, "_SECONDS_BETWEEN_TRIES", 0.0)
    board = Board(tmp_path, purge_step=0)
    board.add_scalars({"loss": 1.0}, 0)
    board.flush()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    events = board._writer.file_writer.event_writer
    monkeypatch.setattr(events._async_writer._writer, "write", refuse)
    # The writer's thread prints its error; it is told here too.
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    board.add_scalars({"loss": 2.0}, 1)
    board.flush()  # here its error comes to light
    assert caplog.text.count("cannot be written") == 1
    board.add_scalars({"loss": 3.0}, 2)
    board.close()
    assert "is written again; steps 1 to 1 are missing" in caplog.text
    shown = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(point.step, point.value) for point in shown] == [(0, 1.0), (2, 3.0)]
