"""Rows of a stream: each once in an epoch, over all ranks, and from any row on."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsmoe.data.stream_rows import MAX_LANES, SeriesStream, unusable
from tsmoe.data.stream_source import StreamConfig, open_stream
from tsmoe.errors import DataError


def write_files(folder: Path, sizes: list[int], *, kind: str = "parquet", chunk: int = 3) -> Path:
    """Write files of so many rows; the value of a series is its number over all files."""
    folder.mkdir(exist_ok=True)
    first = 0
    for number, size in enumerate(sizes):
        ids = range(first, first + size)
        first += size
        table = pa.table(
            {"item_id": [str(i) for i in ids], "target": [np.full(4, i, np.float32) for i in ids]},
            schema=pa.schema({"item_id": pa.string(), "target": pa.list_(pa.float32())}),
        )
        file = folder / f"train-{number:05d}.{kind}"
        if kind == "parquet":
            pq.write_table(table, file, row_group_size=chunk)
        else:
            with pa.ipc.new_stream(str(file), table.schema) as writer:
                writer.write_table(table, max_chunksize=chunk)
    return folder


def stream_of(folder: Path, **settings: object) -> SeriesStream:
    config = StreamConfig(path=str(folder))
    return SeriesStream(open_stream(config), config, **settings)


def epoch_of(stream: SeriesStream) -> list[int]:
    """Read the rest of the present epoch and the first row of the next one."""
    epoch, found = stream.epoch, []
    while True:
        records = stream.next_row()
        if stream.epoch > epoch:
            return found
        found += [int(record.item_id) for record in records]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_every_row_comes_once_an_epoch_however_uneven_the_files(tmp_path, kind) -> None:
    folder = write_files(tmp_path / "a", [2, 1, 30, 3], kind=kind)
    assert sorted(epoch_of(stream_of(folder))) == list(range(36))


def test_files_are_read_in_turn(tmp_path) -> None:
    folder = write_files(tmp_path / "a", [10, 10, 10], kind="arrow")
    assert {number // 10 for number in epoch_of(stream_of(folder))[:3]} == {0, 1, 2}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("sizes", [[6] * 8, [5] * 9, [1, 40, 2, 2, 7], [30]], ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_rows_of_an_epoch(tmp_path, kind, sizes, world_size) -> None:
    folder = write_files(tmp_path / "a", sizes, kind=kind)
    streams = [stream_of(folder, seed=3, rank=r, world_size=world_size) for r in range(world_size)]
    of_ranks = [epoch_of(stream) for stream in streams]
    assert sorted(itertools.chain(*of_ranks)) == list(range(sum(sizes)))
    assert all(of_ranks), "no rank goes without"


def test_rank_reads_only_its_own_files_where_there_are_enough(tmp_path, monkeypatch) -> None:
    folder = write_files(tmp_path / "a", [2] * 9, kind="arrow")  # 9 is no multiple of 4
    opened: list[object] = []
    real_open = pa.ipc.open_stream
    monkeypatch.setattr(pa.ipc, "open_stream", lambda file: opened.append(file) or real_open(file))
    for rank in range(4):
        stream = stream_of(folder, rank=rank, world_size=4)
        assert stream.has_shard_for_each
        opened.clear()  # one was opened for its columns
        rows = [stream.next_row() for _ in range(4 if rank else 6)]
        assert stream.epoch == 0
        assert len(rows) == 2 * len(opened)


def test_files_that_cannot_be_dealt_are_read_by_all_and_that_is_said(tmp_path, caplog) -> None:
    folder = write_files(tmp_path / "a", [8, 8], kind="arrow")
    stream = stream_of(folder, rank=0, world_size=3, logs=True)
    assert not stream.has_shard_for_each
    assert "2 shards for 3 ranks: every rank reads all rows and keeps one in 3" in caplog.text
    caplog.clear()
    stream_of(folder, rank=0, world_size=2, logs=True)
    assert not caplog.text


def test_parquet_file_is_dealt_by_its_row_groups(tmp_path) -> None:
    folder = write_files(tmp_path / "a", [24], chunk=2)
    assert stream_of(folder, world_size=4).has_shard_for_each


def test_seed_and_epoch_shuffle_the_files(tmp_path) -> None:
    folder = write_files(tmp_path / "a", [1] * (3 * MAX_LANES), kind="arrow")

    def epochs(seed: int | None) -> list[list[int]]:
        stream = stream_of(folder, seed=seed)
        rows = [int(stream.next_row()[0].item_id) for _ in range(2 * 3 * MAX_LANES)]
        return [rows[: len(rows) // 2], rows[len(rows) // 2 :]]

    (first, second), (other, _), (unshuffled, again) = epochs(0), epochs(1), epochs(None)
    assert sorted(first) == sorted(second) == sorted(other) == list(range(3 * MAX_LANES))
    assert first != second
    assert first != other
    assert unshuffled == again
    assert epochs(0) == [first, second]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_goes_on_with_the_next_row_from_anywhere(tmp_path, kind, world_size) -> None:
    folder = write_files(tmp_path / "a", [7, 1, 12, 4], kind=kind)
    ranks = {"seed": 5, "rank": world_size - 1, "world_size": world_size}
    if world_size == 5:
        # Lanes of few rows: this rank has none in some of them.
        assert (kind == "parquet") == stream_of(folder, **ranks).has_shard_for_each
    stream = stream_of(folder, **ranks)
    states, rows = [json.dumps(stream.state())], []
    for _ in range(90 // world_size):
        rows.append([record.item_id for record in stream.next_row()])
        stream.count(None)
        states.append(json.dumps(stream.state()))
    assert stream.epoch >= 2
    for number, state in enumerate(states):
        again = stream_of(folder, **ranks, state=json.loads(state))
        assert json.dumps(again.state()) == state
        ahead = [[record.item_id for record in again.next_row()] for _ in rows[number:][:9]]
        assert ahead == rows[number:][:9], number


def test_state_of_another_data_set_is_refused(tmp_path) -> None:
    state = stream_of(write_files(tmp_path / "a", [2, 2], kind="arrow")).state()
    with pytest.raises(DataError, match="had 2 shards to read in turn and has 3 now"):
        stream_of(write_files(tmp_path / "b", [2, 2, 2], kind="arrow"), state=state)


def test_stream_without_rows_is_refused(tmp_path) -> None:
    for number, kind in enumerate(("parquet", "arrow")):
        folder = write_files(tmp_path / str(number), [0], kind=kind, chunk=1)
        if kind == "parquet":
            schema = pa.schema({"target": pa.list_(pa.float32())})
            pq.ParquetWriter(folder / "train-00000.parquet", schema).close()
        with pytest.raises(DataError, match=r"the stream has no row; check stream\.path"):
            stream_of(folder).next_row()
    few = write_files(tmp_path / "b", [2], kind="arrow")
    with pytest.raises(DataError, match=r"no row for rank 2 of 3; .* or start fewer ranks"):
        stream_of(few, rank=2, world_size=3).next_row()


def test_epoch_is_told_with_its_drops(tmp_path, caplog) -> None:
    folder = write_files(tmp_path / "a", [3])
    stream = stream_of(folder, logs=True)
    with caplog.at_level("INFO"):
        for reason in (None, "too_short", "constant", None):
            stream.next_row()
            stream.count(reason)
    assert "epoch 0: 1 series used; not used: constant 1, too_short 1" in caplog.text
    assert stream.tally.used == 2
    assert stream.tally.drops == Counter(too_short=1, constant=1)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 9], None),
        ([1, 2, 3], "too_short"),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, np.inf], "infinite"),
        ([np.nan] * 9 + [1], "no_observation"),
        ([4] * 9 + [1], "constant"),
    ],
)
def test_series_of_no_use_has_a_reason(values, reason) -> None:
    series = np.array(values, np.float32)
    assert unusable(series, len(series) * 9 // 10, 3) == reason
