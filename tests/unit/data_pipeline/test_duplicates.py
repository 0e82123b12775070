"""Duplicates over blocks: which series go, which stay, and that the way of looking is no matter."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.similarity.candidates import (
    FIRST_PARTNERS,
    PAIRS_PER_SERIES,
    SharedAnchors,
)
from data_pipeline.similarity.duplicates import (
    DUPLICATE,
    NEAR_DUPLICATE,
    DuplicatesConfig,
    contained_share,
    find_duplicates,
)
from data_pipeline.similarity.sketch import (
    ANCHOR_SHARE,
    MAX_ANCHORS,
    MIN_ANCHORS,
    Sketch,
    SketchWriter,
    anchor_limit,
)


def walk(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=length).cumsum().astype(np.float32)


class Blocks:
    """Blocks of series with their sketches, and a count of the series that were read."""

    def __init__(self, folder: Path, *blocks: Sequence[np.ndarray]) -> None:
        self.blocks = blocks
        self.paths = []
        self.num_read = 0
        for number, block in enumerate(blocks):
            writer = SketchWriter()
            for values in block:
                writer.add(values)
            self.paths.append(folder / f"{number}.npy")
            writer.write(self.paths[-1])

    def values(self, block: int, row: int) -> np.ndarray:
        self.num_read += 1
        return self.blocks[block][row]

    def copies(self, *, memory_bytes: int = 2**28, **settings) -> list[tuple]:
        found = find_duplicates(
            self.paths, self.values, DuplicatesConfig(**settings), memory_bytes=memory_bytes
        )
        return [
            (copy.block, copy.row, copy.kept_block, copy.kept_row, copy.reason) for copy in found
        ]


def test_first_of_exact_copies_stays(tmp_path) -> None:
    a, b, short = walk(300), walk(300, 1), np.array([1.0], np.float32)
    blocks = Blocks(tmp_path, [a, short], [b, a], [short, b, a])
    assert blocks.copies() == [
        (1, 1, 0, 0, DUPLICATE),
        (2, 0, 0, 1, DUPLICATE),
        (2, 1, 1, 0, DUPLICATE),
        (2, 2, 0, 0, DUPLICATE),
    ]
    assert blocks.num_read == 0


def test_all_kinds_of_nan_and_zero_are_one_value(tmp_path) -> None:
    a = walk(100_000)
    a[[5, 70_000]] = np.nan
    a[[6, 70_001]] = 0.0
    b = a.copy()
    b.view(np.uint32)[[5, 70_000]] = 0xFFC12345
    b[[6, 70_001]] = -0.0
    assert Blocks(tmp_path, [a, b]).copies(similar=False) == [(0, 1, 0, 0, DUPLICATE)]
    b[70_001] = 1e-30
    assert Blocks(tmp_path, [a, b]).copies(similar=False) == []


@pytest.mark.parametrize("length", [90, 300, 5_000, 120_000])
@pytest.mark.parametrize(
    "change",
    [
        lambda a: -2.5 * a + 3.0,
        lambda a: a[len(a) // 10 :],
        lambda a: np.concatenate([walk(len(a) // 10, 9), 1e-3 * a[: len(a) - len(a) // 8]]),
    ],
    ids=["negated", "later start", "shifted and cut"],
)
def test_near_duplicates_are_found(tmp_path, length, change) -> None:
    a = walk(length)
    copy = change(a.astype(np.float64)).astype(np.float32)
    blocks = Blocks(tmp_path, [walk(length, 1), a], [walk(length + 7, 2), copy])
    assert blocks.copies() == [(1, 1, 0, 1, NEAR_DUPLICATE)]
    assert blocks.copies(similar=False) == []


def test_longest_stays_whatever_the_order(tmp_path) -> None:
    whole = walk(4_000)
    parts = [whole[:1_500], 2 * whole[1_200:3_900]]
    blocks = Blocks(tmp_path, parts, [whole])
    assert blocks.copies() == [(0, 0, 1, 0, NEAR_DUPLICATE), (0, 1, 1, 0, NEAR_DUPLICATE)]


@pytest.mark.parametrize(("shared", "is_copy"), [(0.85, True), (0.75, False)])
def test_containment_decides(tmp_path, shared, is_copy) -> None:
    a = walk(3_000)
    own = int(3_000 * (1 - shared))
    b = np.concatenate([walk(own, 5), a[own:]])
    copies = Blocks(tmp_path, [a, b]).copies()
    assert copies == ([(0, 1, 0, 0, NEAR_DUPLICATE)] if is_copy else [])
    # Of a series of twice the length the same stretch is only half as much.
    assert Blocks(tmp_path, [a, np.concatenate([b, walk(3_000, 6)])]).copies() == (
        [(0, 0, 0, 1, NEAR_DUPLICATE)] if is_copy else []
    )


def test_copy_of_a_copy_points_to_what_stays(tmp_path) -> None:
    whole = walk(5_000)
    middle = -whole[100:4_000]
    inner = 3 * middle[500:3_000]
    blocks = Blocks(tmp_path, [inner, middle], [middle, whole, inner])
    assert blocks.copies() == [
        (0, 0, 1, 1, NEAR_DUPLICATE),
        (0, 1, 1, 1, NEAR_DUPLICATE),
        (1, 0, 1, 1, DUPLICATE),
        (1, 2, 1, 1, DUPLICATE),
    ]


def test_chain_does_not_drop_what_nothing_contains(tmp_path) -> None:
    # Each is 85 % of the one before, but the last is only 70 % of the first, which is what stays.
    whole = walk(6_000)
    a, b, c = whole[:4_000], whole[600:4_590], whole[1_200:5_180]
    blocks = Blocks(tmp_path, [a, b, c])
    assert blocks.copies() == [(0, 1, 0, 0, NEAR_DUPLICATE)]


def test_stretches_where_nothing_happens_do_not_count(tmp_path) -> None:
    # Both are flat for nine tenths; what happens in the rest is common in one case only.
    event, other = walk(500), walk(500, 1)
    a = np.concatenate([np.zeros(4_500, np.float32), event])
    b = np.concatenate([np.zeros(4_400, np.float32), event[:100], other])
    copies = Blocks(tmp_path, [a, b]).copies()
    assert copies == []
    share, _ = contained_share(b, a, np.array([4_420]), np.array([4_520]))
    assert 0.1 < share < 0.3


def test_common_pattern_does_not_make_copies_nor_hide_them(tmp_path) -> None:
    pattern = walk(200, 77)
    series = [
        np.concatenate([walk(150, seed), pattern, walk(150, 1_000 + seed)]) for seed in range(120)
    ]
    series.append(2 * series[60])
    blocks = Blocks(tmp_path, series)
    assert blocks.copies() == [(0, 120, 0, 60, NEAR_DUPLICATE)]


def test_work_grows_with_the_series_of_a_family_and_not_with_their_pairs(tmp_path) -> None:
    a = walk(400)
    family = [(1.0 + number) * a for number in range(150)]
    blocks = Blocks(tmp_path, family)
    assert blocks.copies() == [(0, row, 0, 0, NEAR_DUPLICATE) for row in range(1, 150)]
    assert blocks.num_read <= 150 * 2 * (FIRST_PARTNERS + 1)


def test_pairs_of_a_family_are_few(tmp_path) -> None:
    a = walk(20_000)
    blocks = Blocks(tmp_path, [(1.0 + number) * a for number in range(30)])
    sketches = [Sketch(path) for path in blocks.paths]
    with SharedAnchors(sketches, np.arange(30), 2**28) as shared:
        pairs = dict(shared)
    assert sorted(pairs) == list(range(1, 30))
    assert all(len(of_series) == PAIRS_PER_SERIES for of_series in pairs.values())
    assert set(pairs[29][:, 0].tolist()) == {*range(FIRST_PARTNERS), 28}
    np.testing.assert_array_equal(pairs[29][:, 1], pairs[29][:, 2])


def test_copy_of_its_neighbour_is_found_though_all_its_windows_are_common(tmp_path) -> None:
    # Patterns that begin and end at 0, with rest between them, in an order of their own each.
    patterns = []
    for seed in range(12):
        pattern = walk(150 + 7 * seed, seed)
        patterns.append(np.concatenate([[0.0], pattern, [0.0] * 70]).astype(np.float32))
    generator = np.random.default_rng(0)
    series = [
        np.concatenate([patterns[place] for place in generator.permutation(12)]) for _ in range(8)
    ]
    blocks = Blocks(tmp_path, [*series, 2 * series[7]])
    assert blocks.copies() == [(0, 8, 0, 7, NEAR_DUPLICATE)]


def test_what_stays_is_never_left_out_itself(tmp_path) -> None:
    # The innermost shares anchors with the middle one only: of the whole too few are anchors.
    whole = walk(600_000)
    middle = 2 * whole[100_000:110_000]
    inner = middle[6_000:6_500] - 7
    blocks = Blocks(tmp_path, [inner, middle, whole])
    hashes, rows, _ = Sketch(blocks.paths[0]).anchors(0, 10**6)
    assert np.intersect1d(hashes[rows == 0], hashes[rows == 1]).size
    assert not np.intersect1d(hashes[rows == 0], hashes[rows == 2]).size
    assert blocks.copies() == [(0, 0, 0, 2, NEAR_DUPLICATE), (0, 1, 0, 2, NEAR_DUPLICATE)]


def test_steps_that_agree_by_chance_do_not_count() -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.integers(0, 2, 3_000).astype(np.float32) for _ in range(2))
    b[:600] = a[:600]
    share, lag = contained_share(b, a, np.array([100]), np.array([100]))
    assert share == pytest.approx(0.2, abs=0.03)
    assert lag == 0


@pytest.mark.parametrize("memory_bytes", [4_000, 20_000, 100_000])
def test_outcome_does_not_depend_on_the_memory(tmp_path, memory_bytes) -> None:
    generator = np.random.default_rng(4)
    series = [walk(int(generator.integers(20, 3_000)), seed) for seed in range(60)]
    for _ in range(60):
        original = series[generator.integers(60)]
        start, end = np.sort(generator.integers(0, len(original) + 1, 2))
        series.append(original if generator.random() < 0.3 else -original[start:end])
    generator.shuffle(series)
    blocks = Blocks(tmp_path, series[:50], [], series[50:])
    expected = blocks.copies()
    assert {reason for *_, reason in expected} == {DUPLICATE, NEAR_DUPLICATE}
    assert blocks.copies(memory_bytes=memory_bytes) == expected


def test_no_series_no_copies(tmp_path) -> None:
    assert Blocks(tmp_path).copies() == []
    assert Blocks(tmp_path, []).copies() == []


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (100, MIN_ANCHORS),
        (1_000, MIN_ANCHORS),
        (20_000, 20_000 * ANCHOR_SHARE),
        (300_000, MAX_ANCHORS),
    ],
)
def test_number_of_anchors(tmp_path, length, expected) -> None:
    writer = SketchWriter()
    for seed in range(8):
        writer.add(walk(length, seed))
    writer.write(tmp_path / "sketch.npy")
    mean = len(Sketch(tmp_path / "sketch.npy").hashes) / 8
    assert abs(mean - expected) < 4 * np.sqrt(expected / 8)
    assert anchor_limit(63) == anchor_limit(64) == np.uint64(2**64 - 1)


def test_sketch_of_a_block_is_small_sorted_and_whole(tmp_path) -> None:
    path = tmp_path / "sketch.npy"
    writer = SketchWriter()
    for seed in range(20):
        writer.add(walk(30_000, seed))
    writer.write(path)
    sketch = Sketch(path)
    assert path.stat().st_size < 0.07 * 20 * 30_000 * 4
    assert sketch.lengths.tolist() == [30_000] * 20
    assert (np.diff(sketch.hashes) >= 0).all()
    hashes, rows, offsets = sketch.anchors(0, len(sketch.hashes))
    assert set(rows.tolist()) == set(range(20))
    assert offsets.max() <= 30_000 - 64
    assert (hashes <= anchor_limit(30_000)).all()


def test_file_without_sketches_is_refused(tmp_path) -> None:
    path = tmp_path / "sketch.npy"
    for content in (b"", b"PK\x03\x04 no array", np.arange(5)):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content)
        with pytest.raises(DataError, match=r"sketch\.npy.*build again"):
            Sketch(path)


def test_containment_must_be_a_share() -> None:
    for value in (0.0, 1.1):
        with pytest.raises(ValueError, match=str(value)):
            DuplicatesConfig(containment=value)
