import errno
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.errors import DataError
from data_pipeline.record import SCHEMA
from data_pipeline.shards import Corpus, Manifest
from data_pipeline.shards.manifest import ShardEntry, corpus_fingerprint
from data_pipeline.shards.verify import verify_corpus
from data_pipeline.shards.writer import ShardWriter


@pytest.fixture
def folder(build_from, random_records) -> Path:
    return build_from(random_records, shard_size_bytes=4096)


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_each_shard_is_one_uncompressed_batch(folder, random_records) -> None:
    shards = sorted(folder.glob("part-*.arrow"))
    for shard in shards:
        with pa.ipc.open_file(pa.memory_map(str(shard))) as file:
            assert file.schema.equals(SCHEMA)
            assert file.num_record_batches == 1
        # Only uncompressed files can be sliced without decoding.
        assert shard.stat().st_size > 4 * Corpus.open(folder).manifest.shards[0].points
    table = pa.concat_tables(pa.ipc.open_file(str(shard)).read_all() for shard in shards)
    assert table.column("item_id").to_pylist() == [record.item_id for record in random_records]


def test_datasets_opens_a_shard_as_it_is(folder, random_records, tmp_path) -> None:
    rows = datasets.load_dataset(
        "arrow",
        data_files=str(folder / "part-00000.arrow"),
        split="train",
        streaming=True,
        cache_dir=str(tmp_path / "cache"),
    )
    first = next(iter(rows))
    assert first["item_id"] == "s0"
    np.testing.assert_array_equal(np.array(first["target"], np.float32), random_records[0].values)


def test_series_longer_than_a_shard_gets_its_own(tmp_path, make_record) -> None:
    writer = ShardWriter(tmp_path, train_fraction=0.9, shard_size_bytes=4096)
    for length in (10, 5000, 20, 30):
        writer.add(make_record(np.arange(length)))
    assert [(shard.rows, shard.points) for shard in writer.close()] == [(1, 10), (1, 5000), (2, 50)]


def test_written_values_do_not_change_with_the_source_buffer(tmp_path, make_record) -> None:
    buffer = np.arange(40, dtype=np.float32)
    writer = ShardWriter(tmp_path, train_fraction=0.9)
    writer.add(make_record(buffer))
    buffer[:] = -1
    writer.close()
    target = pa.ipc.open_file(str(tmp_path / "part-00000.arrow")).get_batch(0).column("target")
    assert target[0].as_py() == list(range(40))


def test_whole_corpus_has_no_problems(folder) -> None:
    assert verify_corpus(folder) == []


def test_truncated_shard_is_named_with_both_sizes(folder) -> None:
    shard = folder / "part-00002.arrow"
    whole = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-10])
    expected = rf"part-00002\.arrow.*expected {whole} bytes but found {whole - 10}.*copy again"
    with pytest.raises(DataError, match=expected):
        Corpus.open(folder)
    assert len(problems := verify_corpus(folder)) == 1
    assert "part-00002.arrow" in problems[0]


def test_missing_shard_is_named(folder) -> None:
    (folder / "part-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"part-00001\.arrow: the shard is missing"):
        Corpus.open(folder)


def test_altered_byte_is_found_by_verify_and_names_the_shard(folder) -> None:
    shard = folder / "part-00003.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    problems = verify_corpus(folder)
    assert len(problems) == 1
    assert "part-00003.arrow" in problems[0]
    assert "sha256" in problems[0]


def test_shard_that_is_no_arrow_file_is_named(folder) -> None:
    shard = folder / "part-00000.arrow"
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(DataError, match=r"part-00000\.arrow.*cannot be read"):
        Corpus.open(folder).series(0)


def test_shard_that_the_manifest_does_not_know_is_a_problem(folder) -> None:
    (folder / "part-00099.arrow").touch()
    assert "part-00099.arrow" in verify_corpus(folder)[0]


def test_edited_split_or_counts_are_problems(folder) -> None:
    manifest = Manifest.read(folder)
    edit_manifest(folder, train_fraction=0.95)
    assert "fingerprint" in verify_corpus(folder)[0]
    entry = manifest.sources["set_1"]
    sources = manifest.sources | {"set_1": replace(entry, series=entry.series + 1)}
    replace(manifest, sources=sources).write(folder)
    assert "'set_1'" in verify_corpus(folder)[0]


def test_other_manifest_version_names_both_versions(folder) -> None:
    edit_manifest(folder, schema_version=7)
    with pytest.raises(DataError, match=r"schema version 7.*reads 1; build"):
        Corpus.open(folder)


def test_damaged_manifest_is_refused(folder) -> None:
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: is no manifest of a corpus"):
        Corpus.open(folder)
    (folder / "manifest.json").write_text('{"schema_version": 1}')
    with pytest.raises(DataError, match=r"manifest\.json: fingerprint"):
        Corpus.open(folder)


def test_fingerprint_depends_on_split_and_order_of_shards() -> None:
    a, b = (ShardEntry(file=name, rows=2, points=9, bytes=9, sha256=name) for name in "ab")
    prints = {
        corpus_fingerprint([a, b], 0.9),
        corpus_fingerprint([b, a], 0.9),
        corpus_fingerprint([a, b], 0.8),
        corpus_fingerprint([replace(a, held_out=[1]), b], 0.9),
        corpus_fingerprint([a, replace(b, held_out=[1])], 0.9),
    }
    assert len(prints) == 5


def test_fingerprint_without_held_out_series_is_that_of_older_programs() -> None:
    shard = ShardEntry(file="a", rows=2, points=9, bytes=9, sha256="a")
    identity = json.dumps([1, 0.9, ["a"]]).encode()
    assert corpus_fingerprint([shard], 0.9) == hashlib.sha256(identity).hexdigest()


def test_full_disk_names_path_and_bytes_and_leaves_no_shard(
    tmp_path, make_record, monkeypatch
) -> None:
    def write(self: object, batch: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa.ipc.RecordBatchFileWriter, "write_batch", write)
    writer = ShardWriter(tmp_path, train_fraction=0.9)
    writer.add(make_record(np.arange(1000)))
    with pytest.raises(DataError, match=r"part-00000\.arrow: the disk is full, 40\d\d bytes"):
        writer.close()
    assert list(tmp_path.iterdir()) == []
