"""Batches from a stream: which windows, in which order, and that they go on where they were."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stream_data import FILES, NUM_SERIES, write_stream
from tsmoe.batch import WindowBatch
from tsmoe.data.patch_mask import PatchMask
from tsmoe.data.stream import StreamBatches, Streamed, load_stream, stream_validation
from tsmoe.data.stream_source import StreamConfig
from tsmoe.errors import ConfigError, DataError
from tsmoe.ranks import Ranks

WINDOW, PATCH = 80, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_stream(tmp_path_factory.mktemp("stream"))


def stream(folder: Path, **settings: object) -> Streamed:
    return Streamed(StreamConfig(path=str(folder), mixed_windows=40, **settings))


def batches_of(streamed: Streamed, **settings: object) -> StreamBatches:
    settings = {"seed": 0, "mixup_share": 0.0, "micro_batch_size": 8, "ranks": Ranks()} | settings
    mask = PatchMask(context_length=64, patch_length=PATCH, lookahead_patches=1)
    return StreamBatches(streamed, window_length=WINDOW, patch_mask=mask, **settings)


def values(batches: list[WindowBatch]) -> torch.Tensor:
    return torch.cat([batch.values_BCL for batch in batches])


def test_windows_are_those_of_the_training_part_of_every_series(folder) -> None:
    # Values of series i at step t are 1000 * i + t: a window says where it was cut.
    streamed = stream(folder)
    batches = batches_of(streamed)
    seen = set()
    for item in range(40):
        batch = batches[item]
        for row in range(batch.num_windows):
            shown = batch.values_BCL[row, 0][batch.observed_BCL[row, 0]]
            series, first = divmod(int(shown[0]), 1000)
            seen.add(series)
            assert shown.diff().eq(1).all(), "a window is one stretch of one series"
            assert shown[-1] - 1000 * series < 0.9 * (100 + 10 * series)
            assert streamed.item_id(int(batch.series_ids_B[row])) == f"Web_set_{series}"
            # The short ones are filled up at the left.
            assert batch.observed_BCL[row, 0, -len(shown) :].all()
            assert len(shown) == min(WINDOW, int(0.9 * (100 + 10 * series)))
            assert first >= 0
    assert seen == set(range(NUM_SERIES))


def test_series_are_mixed_within_batches(folder) -> None:
    batches = batches_of(stream(folder, windows_per_series=2))
    kinds = [len(batches[item].series_ids_B.unique()) for item in range(10)]
    assert np.mean(kinds) > 5


@pytest.mark.parametrize("at", [0, 1, 5, 7, 23])
def test_goes_on_with_the_next_window(folder, at) -> None:
    undisturbed = batches_of(stream(folder))
    for item in range(at):
        undisturbed[item]
    ahead = [undisturbed[at + item] for item in range(12)]
    first = batches_of(stream(folder))
    for item in range(at + 2):  # read ahead of what is trained on
        first[item]
    position = json.loads(json.dumps(first.position_after(at)))
    second = batches_of(stream(folder), position=position, first_window=8 * at)
    assert torch.equal(values([second[item] for item in range(12)]), values(ahead))
    # Saved again at once, it is the same place.
    third = batches_of(
        stream(folder), position=batches_of(stream(folder), position=position).position_after(0)
    )
    assert torch.equal(third[0].values_BCL, ahead[0].values_BCL)


def test_position_beyond_its_block_is_refused(folder) -> None:
    position = batches_of(stream(folder)).position_after(0) | {"dealt": 1000}
    with pytest.raises(
        DataError, match=r"1000 windows of block 0 were dealt.*data set has changed"
    ):
        batches_of(stream(folder), position=position)


def test_seed_and_epoch_change_the_windows(folder) -> None:
    first, same, other = (batches_of(stream(folder), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first[0].values_BCL, same[0].values_BCL)
    assert not torch.equal(same[1].values_BCL, other[0].values_BCL)


def test_mixup_mixes_some_windows(folder) -> None:
    plain, mixed = batches_of(stream(folder)), batches_of(stream(folder), mixup_share=0.5)
    # Windows are drawn by the name of the folder too: of 8, all may stay as they are.
    pairs = [(plain[number].values_BCL, mixed[number].values_BCL) for number in range(6)]
    differ = torch.cat([(one != other).flatten(1).any(1) for one, other in pairs])
    assert 0 < differ.sum() < len(differ)


def test_thread_reads_the_same_batches_ahead(folder) -> None:
    plain = batches_of(stream(folder))
    ahead = load_stream(
        batches_of(stream(folder)), num_batches=12, num_workers=1, timeout_seconds=60
    )
    assert torch.equal(values(list(ahead)), values([plain[item] for item in range(12)]))


@pytest.mark.parametrize("world_size", [1, 2])
def test_validation_has_every_target_behind_the_split_once(folder, world_size) -> None:
    found: list[float] = []
    counts = set()
    for rank in range(world_size):
        batches = stream_validation(
            stream(folder, validation_series=5),
            window_length=WINDOW,
            patch_length=PATCH,
            max_windows=1000,
            batch_size=4,
            ranks=Ranks(rank=rank, size=world_size),
        )
        counts.add(len(batches))
        for batch in batches:
            found += batch.values_BCL[batch.is_target_BCL].tolist()
    series = sorted({int(value) // 1000 for value in found})
    assert len(series) == 5
    lengths = {number: 100 + 10 * number for number in series}
    assert sorted(found) == [
        1000 * number + step
        for number in series
        for step in range(lengths[number] * 9 // 10, lengths[number])
    ]
    assert len(counts) == 1, "all ranks take part in every batch"


def test_arrow_and_saved_folders_are_streamed(folder, tmp_path) -> None:
    import datasets

    saved = tmp_path / "saved"
    data = datasets.Dataset.from_parquet([str(file) for file in sorted(folder.glob("*.parquet"))])
    datasets.DatasetDict({"train": data}).save_to_disk(str(saved))
    batches = batches_of(stream(saved))
    seen = {int(v) // 1000 for v in values([batches[i] for i in range(40)]).amax(-1).flatten()}
    assert seen == set(range(NUM_SERIES))
    with pytest.raises(ConfigError, match="no split 'test'; splits: train"):
        stream(saved, split="test")


def test_useless_series_are_counted_and_left_out(tmp_path, caplog) -> None:
    rows = [[1.0] * 200, [1.0, 2.0], [np.inf] * 200, None, [np.nan] * 200, list(range(200))]
    pq.write_table(
        pa.table({"target": pa.array(rows, pa.list_(pa.float32()))}), tmp_path / "a.parquet"
    )
    with caplog.at_level("INFO"):
        batches = batches_of(stream(tmp_path))
        for item in range(20):
            assert values([batches[item]]).amax() > 100, "windows of the last row"
    words = (
        "epoch 0: 1 series used; "
        "not used: constant 1, infinite 1, no_observation 1, not_numeric 1, too_short 1"
    )
    assert words in caplog.text


def test_stream_without_a_usable_series_is_refused(tmp_path) -> None:
    pq.write_table(pa.table({"target": [[1.0, 2.0]] * 3}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"can be trained on \(0 series used; not used: too_short 3\)"
    ):
        batches_of(stream(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"values": [[1.0, 2.0]]}, "no column 'target'.*columns: values"),
        (None, "cannot be streamed"),
    ],
)
def test_folder_that_holds_no_series_is_refused(tmp_path, content, words) -> None:
    if content is not None:
        pq.write_table(pa.table(content), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=words):
        stream(tmp_path)


def test_unreachable_hub_is_named() -> None:
    with pytest.raises(DataError, match=r"no/such: cannot be streamed.*check stream.path"):
        Streamed(StreamConfig(path="no/such"))


def test_identity_is_that_of_the_definition(folder) -> None:
    assert stream(folder).fingerprint == stream(folder).fingerprint
    assert stream(folder).fingerprint != stream(folder, train_fraction=0.8).fingerprint


def test_a_folder_has_one_identity_however_it_is_named(folder, monkeypatch) -> None:
    absolute = stream(folder).fingerprint
    monkeypatch.chdir(folder.parent)
    assert stream(Path(folder.name)).fingerprint == absolute


def test_series_of_all_batches_of_a_large_step_can_be_named(folder) -> None:
    # One batch is of many blocks, and several are read before the first is trained on.
    streamed = Streamed(StreamConfig(path=str(folder), mixed_windows=2))
    batches = batches_of(streamed, micro_batch_size=16)
    held = [batches[item] for item in range(4)]
    for batch in held:
        for series, window_CL in zip(batch.series_ids_B, batch.values_BCL, strict=True):
            number = int(window_CL[0, -1]) // 1000
            assert streamed.item_id(int(series)) == f"Web_set_{number}"


def test_a_stream_without_a_part_to_validate_on_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train_fraction must be above 0 and below 1, got 1"):
        StreamConfig(path="x", train_fraction=1.0)


def test_a_file_without_rows_is_what_the_error_speaks_of(tmp_path) -> None:
    empty = pa.table({"target": pa.array([], pa.list_(pa.float32()))})
    pq.write_table(empty, tmp_path / "data-00000.parquet")
    with pytest.raises(DataError, match=r"no rows: leave that file out"):
        batches_of(stream(tmp_path))


def test_shards_are_the_files(folder) -> None:
    assert stream(folder).source.rows.num_shards == FILES
