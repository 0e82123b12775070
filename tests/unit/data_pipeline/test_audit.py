"""The overlap audit: what it must find, what it must not, and what it cannot tell."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards import Corpus
from data_pipeline.similarity.audit import audit
from data_pipeline.similarity.duplicates import DuplicatesConfig
from data_pipeline.similarity.findings import AuditReport
from data_pipeline.similarity.probes import Probes
from data_pipeline.similarity.tables import read_variates
from data_pipeline.similarity.windows import hashed_windows
from data_pipeline.steps.clean import CleanConfig

KEEPS_ALL = CleanConfig(
    min_length=1,
    max_missing_fraction=1.0,
    max_gap_fraction=None,
    drops_constant=False,
    max_constant_fraction=None,
    max_clipped_fraction=None,
    max_spike_fraction=None,
)
KEEPS_COPIES = DuplicatesConfig(exact=False, similar=False)


def walk(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=length).cumsum().astype(np.float32)


def write_wide(path: Path, **variates: np.ndarray) -> Path:
    pq.write_table(pa.table(variates), path)
    return path


@pytest.fixture
def audit_of(build_from, make_record, tmp_path):
    """Audit a corpus of these series against wide tables of these variates."""

    def run(series: list[np.ndarray], *tables: dict[str, np.ndarray], **settings) -> AuditReport:
        records = [make_record(values, item_id=f"s{row}") for row, values in enumerate(series)]
        corpus = Corpus.open(
            build_from(records, clean=KEEPS_ALL, duplicates=KEEPS_COPIES, **settings)
        )
        files = [
            write_wide(tmp_path / f"table_{number}.parquet", **variates)
            for number, variates in enumerate(tables)
        ]
        return audit(corpus, files)

    return run


def test_nothing_in_common_is_clean(audit_of) -> None:
    report = audit_of([walk(3_000, 1), walk(40, 2)], {"x": walk(1_000), "y": walk(1_000, 3)})
    (table,) = report.tables
    assert report.is_clean
    assert (table.variates, table.windows, table.uninformative, table.found) == (2, 32, 0, 0)
    assert (report.series, report.points) == (2, 3_040)


@pytest.mark.parametrize(
    ("scale", "shift"), [(1.0, 0.0), (0.01, 0.0), (-12.5, 0.0), (1.0, -300.0), (-2.0, 40.0)]
)
def test_planted_copy_is_found_and_described(audit_of, scale, shift) -> None:
    values = walk(2_000)
    stretch = scale * values[500:900].astype(np.float64) + shift
    planted = np.concatenate([walk(333, 1), stretch, walk(100, 2)]).astype(np.float32)
    report = audit_of([walk(700, 3), planted], {"y": walk(2_000, 4), "x": values})
    assert not report.is_clean
    (table,) = report.tables
    (overlap,) = table.overlaps
    assert (overlap.variate, overlap.row, overlap.steps) == ("x", 501, 400)
    assert (overlap.item_id, overlap.source, overlap.position) == ("s1", "plant", 334)
    assert overlap.scale == pytest.approx(scale, rel=1e-4)
    assert overlap.shift == pytest.approx(
        shift, abs=1e-3 * abs(scale) * float(np.abs(values).max())
    )
    assert table.found == overlap.windows == 6  # at 512, 576, ..., 832
    assert report.as_json()["clean"] is False


def test_127_common_steps_are_always_found(audit_of) -> None:
    values = walk(1_000)
    places = [*range(0, 874, 13), 873]
    planted = [
        np.concatenate([walk(30, 10 + at), -3 * values[at : at + 127], walk(30, 900 + at)])
        for at in places
    ]
    (table,) = audit_of(planted, {"x": values}).tables
    assert {overlap.item_id for overlap in table.overlaps} == {f"s{n}" for n in range(len(places))}
    assert all(overlap.steps >= 127 for overlap in table.overlaps)


def test_short_variates_are_cut_into_shorter_windows_or_not_checked(audit_of) -> None:
    long, mid, short = walk(63), walk(24, 1), walk(23, 2)
    series = [np.concatenate([walk(50, 5), long[10:57], walk(9, 6), mid, short])]
    report = audit_of(series, {"x": long}, {"x": mid}, {"x": short})
    assert [table.found > 0 for table in report.tables] == [True, True, False]
    assert [table.too_short for table in report.tables] == [0, 0, 1]
    assert [table.windows for table in report.tables] == [3, 1, 0]
    assert report.tables[0].overlaps[0].steps == 47


def test_windows_do_not_reach_into_the_next_series(audit_of) -> None:
    # The halves of a window stand at the end of one series and the start of the next.
    values = walk(64)
    report = audit_of(
        [np.concatenate([walk(80, 1), values[:32]]), np.concatenate([values[32:], walk(80, 2)])],
        {"x": values},
    )
    assert report.is_clean


def test_windows_that_say_nothing_are_counted_and_do_not_alarm(audit_of) -> None:
    steps = np.arange(640)
    dull = {
        "flat": np.zeros(640, np.float32),
        "rising": steps.astype(np.float32),
        "switch": (steps // 3 % 2).astype(np.float32),
        "counter": (steps % 16).astype(np.float32),
        "coin": np.random.default_rng(0).integers(0, 2, 640).astype(np.float32),
    }
    dull["gaps"] = np.where(steps % 7 % 3 == 1, np.nan, dull["coin"])
    half_dull = np.concatenate([dull["switch"], walk(640)])
    report = audit_of([7 * values + 1 for values in dull.values()], dull, {"x": half_dull})
    table, other = report.tables
    assert (table.windows, table.uninformative, table.unchecked) == (60, 60, 6)
    assert (other.windows, other.uninformative, other.unchecked) == (20, 10, 0)
    assert report.is_clean


def test_gaps_are_part_of_a_copy(audit_of) -> None:
    values = walk(640)
    values[100:120] = np.nan
    same, filled = 2 * values, 2 * values
    filled[100:120] = 0.0
    (table,) = audit_of([same, filled], {"x": values}).tables
    by_item = {overlap.item_id: overlap for overlap in table.overlaps}
    assert (by_item["s0"].row, by_item["s0"].steps) == (1, 640)
    assert (by_item["s1"].row, by_item["s1"].steps) == (121, 520)


def test_same_directions_with_other_values_are_no_copy(audit_of) -> None:
    values = walk(640)
    bent = np.sign(values - values.min() + 1) * np.sqrt(values - values.min() + 1)
    assert audit_of([bent], {"x": values}).is_clean


def test_copy_in_pieces_is_counted_whole_and_shown_by_its_longest(audit_of) -> None:
    values = walk(1_280)
    broken = values.copy()
    broken[[300, 1_000]] += 5.0
    (table,) = audit_of([broken], {"x": values}).tables
    (overlap,) = table.overlaps
    assert (overlap.row, overlap.steps, overlap.windows) == (302, 699, 18)


def test_overlaps_over_many_shards(audit_of) -> None:
    values = walk(12_800)
    series = [values[start : start + 1_000] for start in range(0, 12_000, 1_000)]
    report = audit_of([*series, walk(5_000, 3)], {"x": values}, shard_size_bytes=4096)
    assert len({overlap.item_id for overlap in report.tables[0].overlaps}) == 12
    assert all(overlap.steps == 1_000 for overlap in report.tables[0].overlaps)


def test_longest_overlaps_are_kept_and_all_are_counted(audit_of, monkeypatch) -> None:
    monkeypatch.setattr("data_pipeline.similarity.findings.OVERLAPS_KEPT", 2)
    values = walk(2_000)
    (table,) = audit_of([values[:steps] for steps in range(200, 1_400, 100)], {"x": values}).tables
    assert [overlap.steps for overlap in table.overlaps] == [1_300, 1_200]
    assert table.num_overlaps == 12
    assert table.found == 20


def test_popular_hashes_are_compared_without_comparing_all(audit_of, monkeypatch) -> None:
    """Zigzags all have one hash; only those with like values may be compared."""
    from data_pipeline.similarity import audit as module

    generator = np.random.default_rng(0)
    zigzag = np.tile(np.array([1.0, -1.0]), 6_400)
    table, other = (
        (zigzag * generator.uniform(1, 2, len(zigzag))).astype(np.float32) for _ in range(2)
    )
    other[5_000:5_200] = table[6_400:6_600]
    compared = 0
    original = module.fit_windows

    def counted(first, second):
        nonlocal compared
        compared += len(first)
        return original(first, second)

    monkeypatch.setattr(module, "fit_windows", counted)
    (report,) = audit_of([other], {"x": table}).tables
    assert [overlap.steps for overlap in report.overlaps] == [200]
    assert 0 < compared < 0.1 * 200 * len(other)


def test_probes_find_their_hashes_and_no_others() -> None:
    values = walk(6_400)
    probes = Probes(values, [0, 6_400], [0], 64)
    other = np.concatenate([piece.hashes.copy() for piece in hashed_windows(walk(90_000, 1))])
    assert len(probes.find(other)[0]) == 0
    own = np.concatenate([piece.hashes.copy() for piece in hashed_windows(values)])
    positions, numbers = probes.find(own)
    assert positions.tolist() == list(range(0, 6_337, 64))
    assert sorted(numbers.tolist()) == list(range(100))


def test_layouts_of_evaluation_tables(tmp_path) -> None:
    rows = 90
    long = pa.table(
        {
            "entity": ["2021-06", "2021-01", "2021-06"] * (rows // 3),  # names, and no times
            "split": ["train"] * 45 + ["test"] * 45,
            "f0": np.arange(rows, dtype=np.float32),
            "label": np.zeros(rows, np.float32),
            "window_label": np.zeros(rows, np.int8),
        }
    )
    pq.write_table(long, tmp_path / "long.parquet")
    cases = pa.table({"label": ["a", "b"], "dims": [[[1.0, 2.0], [3.0]], [[4.0], [5.0, None]]]})
    pq.write_table(cases, tmp_path / "cases.parquet")
    series = pa.table({"item_id": ["p", "q"], "target": [[1.0, 2.0], [3.0]]})
    pq.write_table(series, tmp_path / "series.parquet")
    (tmp_path / "wide.csv").write_text("date,a,label\n2020-01-01,1,0\n2020-01-01,,1\n")

    def read(name: str) -> dict[str, list[float]]:
        return {item.name: item.values.tolist() for item in read_variates(tmp_path / name)}

    found = read("long.parquet")
    assert sorted(found) == [
        f"2021-{name}/f0" for name in ("01/test", "01/train", "06/test", "06/train")
    ]
    assert found["2021-06/test/f0"][:4] == [45.0, 47.0, 48.0, 50.0]
    assert found["2021-01/train/f0"][:3] == [1.0, 4.0, 7.0]
    found = read("cases.parquet")
    assert found.keys() == {"row 1/0", "row 1/1", "row 2/0", "row 2/1"}
    assert found["row 1/0"] == [1.0, 2.0]
    assert np.isnan(found["row 2/1"][1])
    assert read("series.parquet") == {"p": [1.0, 2.0], "q": [3.0]}
    found = read("wide.csv")
    assert found.keys() == {"a"}
    assert found["a"][0] == 1.0
    assert np.isnan(found["a"][1])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone.parquet", None, "no such file"),
        ("broken.parquet", b"PAR1 nothing", "cannot be read as Parquet"),
        ("empty.csv", b"", "empty"),
        ("words.csv", b"name,label\nx,1\n", "no column of numbers"),
    ],
)
def test_table_that_cannot_be_read_is_named(tmp_path, name, content, says) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*{says}"):
        list(read_variates(path))
    with pytest.raises(DataError, match=r"is a folder"):
        list(read_variates(tmp_path))
