import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards import Corpus


@pytest.fixture
def corpus(build_from, random_records) -> Corpus:
    return Corpus.open(build_from(random_records, shard_size_bytes=4096))


def naive_window(values: np.ndarray, start: int, length: int) -> np.ndarray:
    steps = range(start, start + length)
    return np.array([values[step] if step >= 0 else np.nan for step in steps], np.float32)


def test_series_come_back_in_order_as_views(corpus, random_records) -> None:
    assert len(corpus.manifest.shards) > 5
    assert corpus.num_series == len(random_records)
    for index, record in enumerate(random_records):
        np.testing.assert_array_equal(corpus.series(index), record.values)
        assert corpus.item_id(index) == record.item_id
        assert corpus.sources[corpus.source_ids[index]] == record.source
        assert corpus.domains[corpus.domain_ids[index]] == record.domain
    assert not corpus.series(0).flags.writeable
    np.testing.assert_array_equal(corpus.lengths, [len(item.values) for item in random_records])
    np.testing.assert_array_equal(
        corpus.train_lengths, [len(item.values) * 9 // 10 for item in random_records]
    )


@pytest.mark.parametrize("length", [1, 13, 40])
@pytest.mark.parametrize("earliest", [0, -60])
def test_gather_equals_slices_over_many_shards(corpus, random_records, length, earliest) -> None:
    generator = np.random.default_rng(1)
    series_ids = generator.integers(0, corpus.num_series, size=300)
    starts = generator.integers(earliest, corpus.lengths[series_ids] - length + 1)
    windows = corpus.gather(series_ids, starts, length)
    expected = [
        naive_window(random_records[series].values, start, length)
        for series, start in zip(series_ids, starts, strict=True)
    ]
    assert windows.dtype == np.float32
    np.testing.assert_array_equal(windows, np.stack(expected))


def test_gather_from_one_shard_equals_slices(corpus, random_records) -> None:
    windows = corpus.gather(np.array([1, 0, 1]), np.array([5, 0, 6]), 8)
    expected = [
        naive_window(random_records[i].values, start, 8) for i, start in ((1, 5), (0, 0), (1, 6))
    ]
    np.testing.assert_array_equal(windows, np.stack(expected))


def test_window_longer_than_its_series_starts_with_nan(corpus, random_records) -> None:
    length = 5000  # longer than any shard
    values = random_records[3].values
    window = corpus.gather(np.array([3]), np.array([len(values) - length]), length)[0]
    assert np.isnan(window[: length - len(values)]).all()
    np.testing.assert_array_equal(window[length - len(values) :], values)
    assert np.isnan(corpus.gather(np.array([3]), np.array([-20]), 10)).all()


def test_gathered_windows_can_be_written_to(corpus) -> None:
    before = corpus.series(0).copy()
    corpus.gather(np.array([0]), np.array([0]), 8)[:] = 0
    np.testing.assert_array_equal(corpus.series(0), before)


def test_no_windows_gather_to_no_rows(corpus) -> None:
    empty = np.array([], np.int64)
    assert corpus.gather(empty, empty, 16).shape == (0, 16)


def test_window_beyond_its_series_is_refused(corpus) -> None:
    end = int(corpus.lengths[2])
    with pytest.raises(IndexError, match=f"series 2, which has {end} points"):
        corpus.gather(np.array([0, 2]), np.array([0, end - 9]), 10)
    with pytest.raises(IndexError, match="series 40 does not exist"):
        corpus.gather(np.array([40]), np.array([0]), 10)
    with pytest.raises(IndexError, match="series -1 does not exist"):
        corpus.series(-1)


def test_pickled_corpus_maps_the_files_again(corpus) -> None:
    content = pickle.dumps(corpus)
    assert len(content) < 1000  # a path, not the data
    copy = pickle.loads(content)
    assert copy.fingerprint == corpus.fingerprint
    np.testing.assert_array_equal(copy.series(7), corpus.series(7))


def test_pickled_corpus_refuses_other_data(corpus, build_from, random_records) -> None:
    content = pickle.dumps(corpus)
    shutil.rmtree(corpus.path)
    build_from(random_records[:5])
    with pytest.raises(DataError, match="rebuilt while in use"):
        pickle.loads(content)


def test_series_is_found_by_name(corpus) -> None:
    assert corpus.find("s33") == 33
    with pytest.raises(DataError, match=r"'missing'.*'s0'"):
        corpus.find("missing")


def test_folder_without_manifest_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        Corpus.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no manifest\.json"):
        Corpus.open(tmp_path)
    (tmp_path / "BUILDING").mkdir()
    (tmp_path / "BUILDING" / "plan.json").touch()
    with pytest.raises(DataError, match="has not finished"):
        Corpus.open(tmp_path)
