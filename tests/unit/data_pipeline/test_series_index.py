"""Opening a corpus by its index, and checking again only what has changed."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards import Corpus, Manifest, resident, verify
from data_pipeline.shards.index import SeriesIndex, read_index, write_index
from data_pipeline.shards.manifest import corpus_fingerprint
from data_pipeline.shards.reader import open_shard
from data_pipeline.shards.verify import verify_changed, verify_corpus
from data_pipeline.storage import FileCache, Store

HELD_OUT = {1: [0, 1], 3: [1]}
"""Rows by shard."""


@pytest.fixture
def plain(build_from, random_records) -> Path:
    """Build a corpus of many shards, without index and held-out series."""
    folder = build_from(random_records, shard_size_bytes=4096)
    manifest = replace(Manifest.read(folder), index=None)
    (folder / "series.arrow").unlink(missing_ok=True)
    manifest.write(folder)
    return folder


@pytest.fixture
def indexed(plain) -> Path:
    """Give that corpus an index and held-out series."""
    manifest = Manifest.read(plain)
    shards = [
        replace(shard, held_out=HELD_OUT.get(number, []))
        for number, shard in enumerate(manifest.shards)
    ]
    parts = [SeriesIndex.of_shard(open_shard(plain / s.file), s.held_out) for s in shards]
    replace(
        manifest,
        shards=shards,
        fingerprint=corpus_fingerprint(shards, manifest.train_fraction),
        index=write_index(Store.at(plain), SeriesIndex.join(parts)),
    ).write(plain)
    return plain


def forbid(monkeypatch, module: object, name: str) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(module, name, refuse)


def settle(folder: Path) -> None:
    """Make files look as if they had been written a while ago."""
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TSMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("data_pipeline.shards.stamps._SETTLED_NS", 0)


def test_index_tells_what_the_shards_tell(plain, indexed) -> None:
    manifest = replace(Manifest.read(indexed), index=None)
    manifest.write(indexed)
    from_shards = Corpus.open(indexed)
    assert len({shard.rows for shard in manifest.shards}) > 1
    path = indexed / "series.arrow"
    index = read_index(path, name="i", num_series=manifest.num_series)
    assert index.equals(from_shards.index)
    assert not index.equals(replace(index, held_out=~index.held_out))
    assert not index.equals(replace(index, lengths=index.lengths + 1))


def test_corpus_with_an_index_opens_no_shard(indexed, random_records, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        forbid(patch, resident, "open_shard")
        corpus = Corpus.open(indexed)
        assert corpus.lengths.tolist() == [len(record.values) for record in random_records]
        np.testing.assert_allclose(
            corpus.observed_fractions(),
            [1 - np.isnan(record.values).mean() for record in random_records],
            rtol=1e-6,
        )
        with pytest.raises(AssertionError, match="open_shard"):
            corpus.series(0)
    for number, record in enumerate(random_records):
        np.testing.assert_array_equal(corpus.series(number), record.values)


def test_held_out_series_have_no_training_part(indexed) -> None:
    corpus = Corpus.open(indexed)
    first = np.searchsorted(corpus.series_shards, [1, 1, 3]) + np.array([0, 1, 1])
    assert np.flatnonzero(corpus.held_out).tolist() == first.tolist()
    assert np.flatnonzero(corpus.train_lengths == 0).tolist() == first.tolist()
    assert (corpus.lengths[first] > 0).all()


def test_every_series_knows_its_shard(indexed) -> None:
    corpus = Corpus.open(indexed)
    assert corpus.series_shards.dtype == np.int32
    rows = [shard.rows for shard in corpus.manifest.shards]
    assert np.bincount(corpus.series_shards).tolist() == rows


def test_whole_corpus_with_index_has_no_problems(indexed) -> None:
    assert verify_corpus(indexed) == []
    assert verify_changed(Corpus.open(indexed)) == []


def test_damaged_index_is_found(indexed) -> None:
    path = indexed / "series.arrow"
    content = bytearray(path.read_bytes())
    at = content.index(np.float32(Corpus.open(indexed).observed_fractions()[0]).tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    for problems in (verify_corpus(indexed), verify_changed(Corpus.open(indexed))):
        assert len(problems) == 1
        assert "series.arrow: the content has changed" in problems[0]
    path.write_bytes(content[:-8])
    with pytest.raises(DataError, match=r"series\.arrow: the series index is damaged"):
        Corpus.open(indexed)
    path.unlink()
    with pytest.raises(DataError, match=r"series\.arrow: the series index is missing"):
        Corpus.open(indexed)


def test_index_of_another_corpus_is_found(indexed) -> None:
    manifest = Manifest.read(indexed)
    right = Corpus.open(indexed).index
    wrong = replace(right, lengths=right.lengths[::-1])
    replace(manifest, index=write_index(Store.at(indexed), wrong)).write(indexed)
    assert "is not the index of these shards" in verify_corpus(indexed)[0]
    fewer = SeriesIndex.of_shard(open_shard(indexed / "part-00000.arrow"))
    replace(manifest, index=write_index(Store.at(indexed), fewer)).write(indexed)
    with pytest.raises(DataError, match=rf"has {len(fewer)} series, but the manifest has 40"):
        Corpus.open(indexed)


def test_manifest_of_an_older_program_is_read(plain) -> None:
    path = plain / "manifest.json"
    text = path.read_text()
    assert text.count('"held_out"') == len(Manifest.read(plain).shards)
    old = text.replace(',\n   "held_out": []', "").replace(',\n "index": null', "")
    assert "held_out" not in old
    assert '"index"' not in old
    path.write_text(old)
    assert verify_corpus(plain) == []
    assert not Corpus.open(plain).held_out.any()


# Verification that need not be repeated.


def test_unchanged_shards_are_not_read_again(indexed, monkeypatch) -> None:
    corpus = Corpus.open(indexed)
    read: list[str] = []

    def count(path: Path) -> str:
        read.append(path.name)
        return real(path)

    real = verify.file_sha256
    monkeypatch.setattr(verify, "file_sha256", count)
    names = {shard.file for shard in corpus.manifest.shards} | {"series.arrow"}
    settle(indexed)
    assert verify_changed(corpus) == []
    assert set(read) == names
    read.clear()
    assert verify_changed(corpus) == []
    assert read == []
    (indexed / "part-00001.arrow").touch()
    assert verify_changed(corpus) == []
    assert read == ["part-00001.arrow"]


def test_change_of_a_stamped_shard_is_found(indexed) -> None:
    corpus = Corpus.open(indexed)
    settle(indexed)
    assert verify_changed(corpus) == []
    path = indexed / "part-00002.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, (1e9, 1e9))  # as a copy that keeps the times would leave it
    for _ in range(2):  # what is damaged gets no stamp
        assert "part-00002.arrow: the content has changed" in verify_changed(corpus)[0]


def test_file_that_has_just_been_written_is_read_again(indexed, monkeypatch) -> None:
    monkeypatch.setattr("data_pipeline.shards.stamps._SETTLED_NS", 10**12)
    corpus = Corpus.open(indexed)
    assert verify_changed(corpus) == []
    forbid(monkeypatch, verify, "file_sha256")
    with pytest.raises(AssertionError, match="file_sha256"):
        verify_changed(corpus)


def test_torn_stamps_are_as_good_as_none(indexed, tmp_path) -> None:
    corpus = Corpus.open(indexed)
    settle(indexed)
    verify_changed(corpus)
    (stamps,) = (tmp_path / "cache" / "verified").iterdir()
    whole = stamps.read_bytes()
    for torn in (whole[:-9], b"[]", b'{"part-00000.arrow": 3}'):
        stamps.write_bytes(torn)
        assert verify_changed(corpus) == []
        assert stamps.read_bytes() == whole


def test_cache_that_cannot_be_written_does_not_stop_training(indexed, monkeypatch) -> None:
    monkeypatch.setenv("TSMOE_CACHE", "/proc/nowhere")
    assert verify_changed(Corpus.open(indexed)) == []


def test_missing_shard_and_edited_manifest_are_problems(indexed) -> None:
    corpus = Corpus.open(indexed)
    edited = replace(corpus.manifest, train_fraction=0.5)
    corpus.manifest = edited
    assert "fingerprint" in verify_changed(corpus)[0]
    (indexed / "part-00001.arrow").unlink()
    assert "part-00001.arrow: the shard is missing" in verify_changed(corpus)[0]


# A store that is not local, without a server.


def test_remote_corpus_without_index_is_read_from_its_shards(plain, tmp_path) -> None:
    store = Store.at("memory://bucket/plain")
    for name in Store.at(plain).files():
        store.put_file(name, plain / name)
    cache = FileCache(folder=tmp_path / "small", limit_bytes=12_000)
    corpus, same = Corpus.open(store, cache=cache), Corpus.open(plain)
    assert corpus.index.equals(same.index)
    generator = np.random.default_rng(0)
    series = generator.integers(0, corpus.num_series, 50)
    starts = np.zeros(50, np.int64)
    np.testing.assert_array_equal(
        corpus.gather(series, starts, 30), same.gather(series, starts, 30)
    )
    assert cache.used_bytes() <= cache.limit_bytes
    assert verify_corpus(store) == []
    store.write_bytes("part-00099.arrow", b"x")
    assert "part-00099.arrow: the shard is not in the manifest" in verify_corpus(store)[0]


def test_view_outlives_its_shard(indexed, tmp_path) -> None:
    store = Store.at("memory://bucket/indexed")
    for name in Store.at(indexed).files():
        store.put_file(name, indexed / name)
    cache = FileCache(folder=tmp_path / "small", limit_bytes=12_000)
    corpus = Corpus.open(store, cache=cache)
    view = corpus.series(0)
    expected = view.copy()
    for number in range(corpus.num_series):
        corpus.series(number)
    assert not (cache.folder / corpus.manifest.shards[0].sha256).exists()
    np.testing.assert_array_equal(view, expected)


@pytest.mark.alone
def test_million_series_open_in_a_moment(tmp_path, plain) -> None:
    count = 200_000
    index = SeriesIndex.join([Corpus.open(plain).index] * (count // 40))
    entry = write_index(Store.at(tmp_path / "many"), index)
    begun = time.perf_counter()
    mapped = read_index(tmp_path / "many" / entry.file, name="i", num_series=count)
    assert time.perf_counter() - begun < 0.5
    assert not mapped.lengths.flags.owndata
    assert not mapped.source_ids.flags.owndata
