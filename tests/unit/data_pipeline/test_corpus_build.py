import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build import build_corpus, up_to_date_manifest
from data_pipeline.build.plan import make_plan
from data_pipeline.config import load_corpus_config
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.record import Drop
from data_pipeline.shards import Corpus
from data_pipeline.shards.verify import verify_corpus
from data_pipeline.stats import source_statistics
from data_pipeline.steps.clean import CleanConfig
from data_pipeline.tiny import EVALUATION_TABLE, TINY_CORPUS_CONFIG


def csv_corpus(folder: Path, rows: int = 50) -> Path:
    """Write a corpus YAML over one CSV and return its path."""
    lines = [f"{row},{row * row}" for row in range(rows)]
    (folder / "flow.csv").write_text("\n".join(["inflow,outflow", *lines]) + "\n")
    path = folder / "corpus.yaml"
    path.write_text("sources: [{type: csv, path: flow.csv, licence: CC0}]\n")
    return path


def test_embedded_corpus_is_whole(tmp_path) -> None:
    manifest = build_corpus(load_corpus_config(TINY_CORPUS_CONFIG), tmp_path / "tiny")
    assert (manifest.num_series, manifest.num_points) == (489, 2_691_614)
    assert manifest.num_dropped == 0
    assert len(manifest.sources) == 11
    weather = manifest.sources["nyc_airport_weather"]
    assert (weather.series, weather.points) == (16, 111_744)
    assert verify_corpus(tmp_path / "tiny") == []


def test_embedded_weather_ends_before_the_evaluation_begins(tmp_path) -> None:
    from data_pipeline.table import read_table

    build_corpus(load_corpus_config(TINY_CORPUS_CONFIG), tmp_path / "tiny")
    corpus = Corpus.open(tmp_path / "tiny")
    weather = corpus.sources.index("nyc_airport_weather")
    ends = [corpus.record(index).end for index in np.flatnonzero(corpus.source_ids == weather)]
    table = read_table(EVALUATION_TABLE)
    test_start = table.timestamps[len(table.timestamps) * 8 // 10].item()
    assert max(ends) < test_start
    other = corpus.sources.index("airport_weather")
    for index in np.flatnonzero(corpus.source_ids == other):
        record = corpus.record(index)
        assert record.end < test_start or record.start.year > test_start.year


def test_drops_are_counted_by_reason_and_source(tmp_path, listed_config, make_record) -> None:
    items = [
        make_record(np.arange(40), item_id="good"),
        make_record(np.arange(40), item_id="copy"),
        make_record([1, 2], item_id="short", source="other"),
        Drop(item_id="words", source="other", reason="not_numeric"),
        *[make_record(np.ones(40), item_id=f"flat{index}") for index in range(25)],
    ]
    manifest = build_corpus(listed_config(items), tmp_path / "corpus")
    counts = {reason: drops.count for reason, drops in manifest.drops.items()}
    assert counts == {"duplicate": 1, "too_short": 1, "not_numeric": 1, "constant": 25}
    assert manifest.drops["too_short"].sources["other"].examples == ["short"]
    assert manifest.drops["constant"].sources["plant"].examples[-1] == "flat19"
    assert (manifest.num_series, manifest.sources["plant"].points) == (1, 40)


def test_same_input_gives_the_same_fingerprint(tmp_path, listed_config, random_records) -> None:
    first = build_corpus(listed_config(random_records), tmp_path / "a")
    second = build_corpus(listed_config(random_records), tmp_path / "b")
    other = build_corpus(listed_config(random_records[1:]), tmp_path / "c")
    assert first.fingerprint == second.fingerprint != other.fingerprint


def test_restart_does_nothing(tmp_path, caplog) -> None:
    config = load_corpus_config(csv_corpus(tmp_path))
    out = tmp_path / "out"
    manifest = build_corpus(config, out)
    written = (out / "part-00000.arrow").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        assert build_corpus(config, out) == manifest
    assert "up to date" in caplog.text
    assert (out / "part-00000.arrow").stat().st_mtime_ns == written


def test_changed_source_or_setting_needs_overwrite(tmp_path) -> None:
    path, out = csv_corpus(tmp_path), tmp_path / "out"
    config = load_corpus_config(path)
    build_corpus(config, out)
    os.utime(tmp_path / "flow.csv", (time.time(), time.time() + 5))
    assert up_to_date_manifest(config, out) is None
    with pytest.raises(ConfigError, match="choose another --out or pass --overwrite"):
        build_corpus(config, out)

    path.write_text(path.read_text() + "train_fraction: 0.5\n")
    manifest = build_corpus(load_corpus_config(path), out, overwrite=True)
    assert manifest.train_fraction == 0.5
    assert Corpus.open(out).train_lengths.tolist() == [25, 25]


def test_damaged_corpus_is_not_up_to_date(tmp_path) -> None:
    config = load_corpus_config(csv_corpus(tmp_path))
    build_corpus(config, tmp_path / "out")
    (tmp_path / "out" / "part-00000.arrow").unlink()
    with pytest.raises(ConfigError, match="--overwrite"):
        build_corpus(config, tmp_path / "out")


def test_folder_with_other_files_is_never_touched(tmp_path, listed_config, random_records) -> None:
    (tmp_path / "part-00000.arrow").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="no corpus; choose another --out"):
            build_corpus(listed_config(random_records), tmp_path, overwrite=overwrite)
    assert (tmp_path / "part-00000.arrow").read_text() == "mine"


@pytest.mark.parametrize("error", [RuntimeError("cable pulled"), KeyboardInterrupt()])
def test_interrupted_build_leaves_nothing_that_looks_whole(
    tmp_path, listed_config, random_records, error
) -> None:
    out = tmp_path / "out"
    config = listed_config([*random_records, error], shard_size_bytes=4096)
    with pytest.raises(type(error)):
        build_corpus(config, out)
    assert [file.name for file in out.iterdir()] == ["BUILDING"]
    with pytest.raises(DataError, match="has not finished"):
        Corpus.open(out)
    again = listed_config(random_records, shard_size_bytes=4096)
    assert build_corpus(again, out).num_series == len(random_records)


def test_leftovers_of_a_killed_build_are_cleaned_up(
    tmp_path, listed_config, random_records
) -> None:
    # What SIGKILL leaves: half a block, shards that a merge had named already, but no manifest.
    scratch = tmp_path / "BUILDING" / "00000.scratch"
    scratch.mkdir(parents=True)
    for name in ("part-00007.arrow", "BUILDING/00000.scratch/part-00000.arrow.partial"):
        (tmp_path / name).write_bytes(b"half")
    config = listed_config(random_records)
    (tmp_path / "BUILDING" / "plan.json").write_bytes(make_plan(config).to_json())
    with pytest.raises(DataError, match="has not finished"):
        Corpus.open(tmp_path)
    build_corpus(config, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "curation",
        "manifest.json",
        "part-00000.arrow",
        "series.arrow",
    ]
    assert verify_corpus(tmp_path) == []


def test_full_disk_stops_the_build_until_there_is_room(
    tmp_path, listed_config, random_records, monkeypatch
) -> None:
    def fsync(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DataError, match=r"part-00000\.arrow: the disk is full"):
        build_corpus(listed_config(random_records), tmp_path / "out")
    with pytest.raises(DataError, match="has not finished"):
        Corpus.open(tmp_path / "out")
    monkeypatch.undo()
    assert build_corpus(listed_config(random_records), tmp_path / "out").num_series == 40


def test_nothing_left_lists_the_reasons(tmp_path, listed_config, make_record) -> None:
    items = [make_record([1, 2, 3]), make_record(np.ones(50))]
    with pytest.raises(DataError, match=r"constant 1, too_short 1"):
        build_corpus(listed_config(items), tmp_path / "out")
    # Nothing stays that would stand in the way of better settings.
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(DataError, match="sources are empty"):
        build_corpus(listed_config([]), tmp_path / "out")


def test_second_build_in_the_same_folder_is_refused(
    tmp_path, listed_config, random_records
) -> None:
    out = tmp_path / "out"

    class Nested:
        def advance(self, source: str, points: int, series: int = 1) -> None:
            build_corpus(listed_config(random_records, name="second"), out)

    with pytest.raises(ConfigError, match="another build is writing"):
        build_corpus(listed_config(random_records), out, progress=Nested())


def test_statistics_are_those_of_the_series(build_from, make_record) -> None:
    records = [
        make_record([1, np.nan, 3, 4], item_id="a", source="x", freq="D"),
        make_record(np.arange(10), item_id="b", source="x", freq="h"),
        make_record(np.arange(7), item_id="c", source="y", freq=None, domain="Web"),
    ]
    clean = CleanConfig(min_length=1, max_missing_fraction=0.5, max_gap_fraction=None)
    x, y = source_statistics(Corpus.open(build_from(records, clean=clean)))
    assert (x.source, x.series, x.points, x.train_points) == ("x", 2, 14, 3 + 9)
    assert (x.length_min, x.length_median, x.length_max) == (4, 7, 10)
    assert x.missing_fraction == pytest.approx(1 / 14)
    assert (x.domains, x.freqs) == (("Energy",), ("D", "h"))
    assert (y.domains, y.freqs, y.missing_fraction) == (("Web",), (), 0.0)
