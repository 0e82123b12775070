"""Hashes of windows, and the comparison of values that decides."""

import numpy as np
import pytest

from data_pipeline.similarity.match import extend_match, fit_windows, signatures
from data_pipeline.similarity.windows import WINDOW, hashed_windows, is_informative


def walk(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=length).cumsum().astype(np.float32)


def hashes_of(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    pieces = [piece.hashes.copy() for piece in hashed_windows(values, window)]
    return np.concatenate([np.empty(0, np.uint64), *pieces])


@pytest.mark.parametrize("window", [24, 63, 64])
@pytest.mark.parametrize(("scale", "shift"), [(3.7, 0.0), (-0.02, 0.0), (1.0, 55.0), (-9.0, -4.0)])
def test_hash_keeps_under_scale_sign_and_level(window, scale, shift) -> None:
    values = walk(500)
    copy = (scale * values.astype(np.float64) + shift).astype(np.float32)
    np.testing.assert_array_equal(hashes_of(copy, window), hashes_of(values, window))


def test_hash_keeps_when_moved_in_time_and_over_the_seams_of_pieces() -> None:
    # Pieces are 2**14 offsets long: series that begin elsewhere are cut elsewhere.
    values = walk(40_000)
    whole = hashes_of(values)
    assert len(whole) == len(values) - WINDOW + 1
    for start in (1, 64, 5_000, 16_383, 39_936):
        np.testing.assert_array_equal(hashes_of(values[start:]), whole[start:])
    np.testing.assert_array_equal(hashes_of(values[:16_400]), whole[: 16_400 - WINDOW + 1])


@pytest.mark.parametrize("window", [24, 64])
def test_every_step_of_a_window_counts_and_none_beyond(window) -> None:
    values = walk(window + 30)
    original = hashes_of(values, window)[0]
    for step in range(window - 1):
        mirrored = values.copy()
        mirrored[step + 1 :] = 2 * values[step] - mirrored[step + 1 :]  # this and later steps turn
        mirrored[step + 2 :] = values[step + 2 :] - values[step + 1] + mirrored[step + 1]
        assert hashes_of(mirrored, window)[0] != original, step
    beyond = values.copy()
    beyond[window:] *= -1
    assert hashes_of(beyond, window)[0] == original


def test_hashes_of_a_random_series_are_spread_evenly() -> None:
    # Anchors and buckets go by the leading bits; the directions of a walk are fair coin throws.
    hashes = hashes_of(walk(200_000))
    assert len(np.unique(hashes)) == len(hashes)
    counts = np.bincount((hashes >> np.uint64(60)).astype(np.int64), minlength=16)
    # 12,500 per bin; overlapping windows make the standard deviation larger than 108 but not 5-fold
    assert abs(counts - len(hashes) / 16).max() < 540


def test_missing_values_are_steps_without_direction() -> None:
    values = walk(100)
    values[10] = np.nan
    (piece,) = hashed_windows(values)
    steps = piece.up[0] | piece.down[0]
    assert [bit for bit in range(63) if not int(steps) >> bit & 1] == [9, 10]


def test_series_shorter_than_a_window_has_no_hash() -> None:
    assert len(hashes_of(walk(63))) == 0
    assert len(hashes_of(walk(64))) == 1
    with pytest.raises(ValueError, match="65"):
        list(hashed_windows(walk(100), 65))


def test_windows_that_hardly_turn_are_uninformative() -> None:
    rising = np.arange(64, dtype=np.float32)
    rising[[10, 20, 30]] -= 5  # three falls
    (piece,) = hashed_windows(rising)
    assert is_informative(piece.up, piece.down, 3).all()
    assert not is_informative(piece.up, piece.down, 4).any()
    (piece,) = hashed_windows(-rising)
    assert not is_informative(piece.up, piece.down, 4).any()


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (2.5e-3, 4.0), (-7e4, 1e5)])
def test_fit_finds_scale_and_shift_through_rounding(scale, shift) -> None:
    first = np.stack([walk(64, seed) for seed in range(20)])
    first[3, 7:12] = np.nan
    second = (scale * first.astype(np.float64) + shift).astype(np.float32)
    fits = fit_windows(first, second)
    assert fits.agrees_B.all()
    np.testing.assert_allclose(fits.scale_B, scale, rtol=1e-4)
    np.testing.assert_allclose(fits.shift_B, shift, rtol=1e-3, atol=1e-3 * abs(scale))


@pytest.mark.parametrize("change", ["noise", "one value", "a gap", "flat", "rounding"])
def test_fit_refuses_what_only_looks_alike(change) -> None:
    first = walk(64)[None]
    second = first.copy()
    match change:
        case "noise":
            second += 0.01 * first.std() * np.random.default_rng(1).normal(size=64)
        case "one value":
            second[0, 40] += 0.01 * first.std()
        case "a gap":
            second[0, 40] = np.nan
        case "flat":
            second[:] = 5.0
        case "rounding":
            second = first + np.float32(1e7)  # less than one digit of the values is left
    assert not fit_windows(first, second).agrees_B[0]


def test_signatures_of_matching_windows_are_within_the_slack_and_of_others_seldom() -> None:
    first = np.stack([walk(64, seed) for seed in range(300)])
    first[::7, 20:25] = np.nan
    second = (-3.0 * first.astype(np.float64) + 2_000.0).astype(np.float32)
    second += (2e-4 * np.nanstd(second, axis=1, keepdims=True)).astype(np.float32)
    mine, _ = signatures(first)
    theirs, slack = signatures(second)
    assert fit_windows(first, second).agrees_B.all()
    assert (np.abs(mine - theirs) <= slack).all()
    assert (np.abs(mine - np.roll(theirs, 1)) <= slack).mean() < 0.1


def test_match_is_followed_to_its_ends() -> None:
    common = walk(1_000)
    common[300:310] = np.nan
    first = np.concatenate([walk(50, 1), common, walk(70, 2)])
    second = np.concatenate([walk(333, 3), -2.0 * common + 9.0, walk(5, 4)]).astype(np.float32)
    at = (50 + 600, 333 + 600)
    fit = fit_windows(first[None, at[0] : at[0] + 64], second[None, at[1] : at[1] + 64])[0]
    begin, end = extend_match(first, second, at=at, length=64, fit=fit)
    assert (begin, end) == (50, 1_050)
    assert fit.scale == pytest.approx(-2.0, rel=1e-5)
    assert fit.shift == pytest.approx(9.0, rel=1e-3)


def test_match_does_not_end_in_a_gap_of_both() -> None:
    first = walk(200)
    second = first.copy()
    first[100:130] = second[100:130] = np.nan
    second[130:] += walk(70, 5)
    fit = fit_windows(first[None, :64], second[None, :64])[0]
    assert extend_match(first, second, at=(0, 0), length=64, fit=fit) == (0, 100)
