"""A build in many pieces: tasks, processes, restarts, and what a kill leaves behind."""

import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest

import data_pipeline.build.block as block_module
import data_pipeline.build.lock as lock_module
from data_pipeline.build import build_corpus
from data_pipeline.config import load_corpus_config
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.shards import Corpus, Manifest
from data_pipeline.shards.verify import verify_corpus
from data_pipeline.steps.clean import CleanConfig
from data_pipeline.steps.mixup import SOURCE, MixupConfig
from data_pipeline.steps.split import is_held_out

UNITS = (4096,) * 8


def files_of(folder: Path) -> dict[str, str]:
    """Hash every file of a corpus by name."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith("lock")
    }


@pytest.fixture
def config(listed_config, random_records):
    """Eight blocks of five series, one of them a copy of a series of another block."""
    records = [*random_records[:-1], random_records[3]]
    return listed_config(records, unit_sizes=UNITS, shard_size_bytes=4096)


@pytest.fixture
def whole(config, tmp_path) -> dict[str, str]:
    """What one build without interruption leaves."""
    build_corpus(config, tmp_path / "whole")
    return files_of(tmp_path / "whole")


class CountingBuilds:
    """Counts the blocks that are built, and can stop before one of them."""

    def __init__(self, monkeypatch, *, fail_at: int | None = None) -> None:
        self.built: list[int] = []
        original = block_module.build_block

        def counted(config, block, **settings):
            if block.index == fail_at:
                raise KeyboardInterrupt
            self.built.append(block.index)
            return original(config, block, **settings)

        monkeypatch.setattr("data_pipeline.build.corpus.build_block", counted)


@pytest.mark.parametrize("num_tasks", [2, 3, 8, 11])
def test_tasks_make_the_same_bytes_as_one_build(config, whole, tmp_path, num_tasks) -> None:
    out = tmp_path / "tasks"
    results = [build_corpus(config, out, task=(n, num_tasks)) for n in range(num_tasks, 0, -1)]
    assert [result is None for result in results[:-1]] == [True] * (num_tasks - 1)
    assert results[-1] is not None
    assert files_of(out) == whole
    assert verify_corpus(out) == []


def test_tasks_that_end_at_the_same_moment_merge(config, whole, tmp_path, monkeypatch) -> None:
    """The first has looked for the blocks of the second before they were there, and ends after."""
    out = tmp_path / "out"
    is_refused = threading.Event()
    second: list[Manifest | None] = []
    thread = threading.Thread(target=lambda: second.append(build_corpus(config, out, task=(2, 2))))

    def tell(descriptor: int, kind: int) -> bool:
        is_free = take_lock(descriptor, kind)
        if not is_free:
            is_refused.set()
        return is_free

    take_lock = lock_module._lock
    monkeypatch.setattr(lock_module, "_lock", tell)

    def note(*_arguments) -> None:
        if not thread.ident:
            thread.start()
            assert is_refused.wait(10)

    # The message stands between the look and the end.
    monkeypatch.setattr("data_pipeline.build.corpus.logger.info", note)
    assert build_corpus(config, out, task=(1, 2)) is None
    thread.join(10)
    assert second[0] is not None
    assert files_of(out) == whole


def test_processes_make_the_same_bytes_as_one(tmp_path) -> None:
    for part in range(3):
        rows = np.random.default_rng(part).normal(size=(60, 2))
        lines = [f"{a},{b}" for a, b in rows]
        (tmp_path / f"flow{part}.csv").write_text("\n".join(["in,out", *lines]) + "\n")
    path = tmp_path / "corpus.yaml"
    path.write_text("sources: [{type: csv, path: flow*.csv}]\nshard_size_bytes: 4096\n")
    counted: dict[str, int] = {}

    class Counting:
        def advance(self, source: str, points: int, series: int = 1) -> None:
            counted[source] = counted.get(source, 0) + series

    config = load_corpus_config(path)
    build_corpus(config, tmp_path / "one")
    build_corpus(config, tmp_path / "two", processes=2, progress=Counting())
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert counted == {"flow0": 2, "flow1": 2, "flow2": 2}


def test_unfinished_tasks_leave_no_corpus(config, tmp_path) -> None:
    assert build_corpus(config, tmp_path / "out", task=(1, 3)) is None
    with pytest.raises(DataError, match="has not finished"):
        Corpus.open(tmp_path / "out")


def test_restart_builds_only_what_is_missing(config, whole, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    first = CountingBuilds(monkeypatch, fail_at=5)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(config, out)
    assert first.built == [0, 1, 2, 3, 4]
    monkeypatch.undo()
    second = CountingBuilds(monkeypatch)
    build_corpus(config, out)
    assert second.built == [5, 6, 7]
    assert files_of(out) == whole


@pytest.mark.parametrize("damage", ["cut", "gone", "no result"])
def test_block_with_a_damaged_file_is_built_again(
    config, whole, tmp_path, monkeypatch, damage
) -> None:
    out = tmp_path / "out"
    build_corpus(config, out, task=(1, 2))
    folder = out / "BUILDING" / "00002"
    match damage:
        case "cut":
            shard = next(folder.glob("part-*.arrow"))
            shard.write_bytes(shard.read_bytes()[:-1])
        case "gone":
            (folder / "series.parquet").unlink()
        case "no result":
            (out / "BUILDING" / "00002.json").write_text('{"plan": ')
    counted = CountingBuilds(monkeypatch)
    build_corpus(config, out)
    assert counted.built == [1, 2, 3, 5, 7]
    assert files_of(out) == whole


@pytest.mark.parametrize("last_write", ["part-00001.arrow", "series.arrow", "manifest.json"])
def test_merge_that_was_cut_short_starts_again(
    config, whole, tmp_path, monkeypatch, last_write
) -> None:
    out = tmp_path / "out"
    from data_pipeline.storage.local import LocalStore

    def fail_before(method):
        original = getattr(LocalStore, method)

        def guarded(self, name, *arguments, **settings):
            if last_write in (name, *arguments):
                raise KeyboardInterrupt
            return original(self, name, *arguments, **settings)

        monkeypatch.setattr(LocalStore, method, guarded)

    for method in ("write_bytes", "put_file", "copy"):
        fail_before(method)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(config, out)
    monkeypatch.undo()
    assert not (out / "manifest.json").exists()
    counted = CountingBuilds(monkeypatch)
    build_corpus(config, out)
    assert counted.built == []
    assert files_of(out) == whole


def test_merge_that_was_killed_while_tidying_is_up_to_date(config, whole, tmp_path) -> None:
    out = tmp_path / "out"
    build_corpus(config, out)
    (out / "BUILDING" / "00001").mkdir(parents=True)
    (out / "BUILDING" / "00001" / "part-00000.arrow").write_text("left over")
    assert Corpus.open(out).num_series == 39
    build_corpus(config, out)
    assert files_of(out) == whole


def test_copy_in_another_block_is_dropped_once(config, tmp_path) -> None:
    manifest = build_corpus(config, tmp_path / "out")
    assert manifest.num_series == 39
    duplicate = manifest.drops["duplicate"]
    assert duplicate.count == 1
    assert duplicate.sources["set_0"].examples == ["s3"]
    corpus = Corpus.open(tmp_path / "out")
    assert sum(corpus.item_id(index) == "s3" for index in range(39)) == 1


def test_unfinished_build_of_something_else_is_not_touched(
    config, listed_config, random_records, tmp_path
) -> None:
    out = tmp_path / "out"
    build_corpus(config, out, task=(1, 2))
    before = files_of(out)
    other = listed_config(random_records, name="other")
    with pytest.raises(ConfigError, match="unfinished build of something else"):
        build_corpus(other, out)
    assert files_of(out) == before
    assert build_corpus(other, out, overwrite=True).num_series == 40


def test_source_that_cannot_be_listed_leaves_the_older_corpus(config, whole, tmp_path) -> None:
    path = tmp_path / "corpus.yaml"
    path.write_text("sources: [{type: npy, path: cut.npy}]\n")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"cut\.npy"):
        build_corpus(load_corpus_config(path), tmp_path / "whole", overwrite=True)
    assert files_of(tmp_path / "whole") == whole


def test_remains_of_a_corpus_can_be_overwritten(config, whole, listed_config, tmp_path) -> None:
    out = tmp_path / "whole"
    with pytest.raises(DataError, match="no series is left"):
        build_corpus(listed_config([], name="empty"), out, overwrite=True)
    with pytest.raises(ConfigError, match="what is left of a corpus"):
        build_corpus(config, out)
    assert build_corpus(config, out, overwrite=True).num_series == 39
    assert files_of(out) == whole
    (out / "manifest.json").unlink()
    (out / "thesis.pdf").touch()
    with pytest.raises(ConfigError, match="files that are no corpus"):
        build_corpus(config, out, overwrite=True)


def test_held_out_series_are_listed_and_never_train(listed_config, random_records, tmp_path):
    config = listed_config(
        random_records, unit_sizes=UNITS, shard_size_bytes=4096, held_out_fraction=0.3
    )
    build_corpus(config, tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out")
    is_held = corpus.train_lengths == 0
    assert 4 <= is_held.sum() <= 22  # 12 of 40 expected
    others = listed_config(random_records[:20], held_out_fraction=0.3, unit_sizes=UNITS)
    build_corpus(others, tmp_path / "half")
    half = Corpus.open(tmp_path / "half")
    held_names = {corpus.item_id(int(index)) for index in np.flatnonzero(is_held)}
    half_names = {half.item_id(int(index)) for index in np.flatnonzero(half.train_lengths == 0)}
    assert half_names == {name for name in held_names if int(name[1:]) < 20}


def test_mixtures_hold_nothing_of_series_that_are_held_out(
    listed_config, make_record, tmp_path
) -> None:
    records = []
    for index, values in enumerate(np.random.default_rng(0).normal(5.0, size=(40, 300))):
        name = f"s{index}"
        if is_held_out("plant", name, 0.5):
            values[::9] = np.nan  # gaps go through the mixing, so they show what was mixed
        records.append(make_record(values, item_id=name))
    config = listed_config(
        records,
        held_out_fraction=0.5,
        mixup=MixupConfig(share=1.0, min_length=32, max_length=64),
        clean=CleanConfig(max_missing_fraction=1.0, max_gap_fraction=None),
    )
    build_corpus(config, tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out")
    everything = [corpus.record(index) for index in range(corpus.num_series)]
    mixtures = [record for record in everything if record.source == SOURCE]
    assert len(mixtures) >= 10
    assert not any(np.isnan(record.values).any() for record in mixtures)
