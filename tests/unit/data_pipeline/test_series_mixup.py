import numpy as np
import pytest

from data_pipeline.steps.mixup import MixupConfig, SeriesMixer
from data_pipeline.steps.split import train_length

NAN = np.nan


def mixtures(records, *, block="b0", train_fraction=0.9, **settings):
    mixer = SeriesMixer(MixupConfig(**settings), train_fraction, block)
    for record in records:
        mixer.add(record)
    return list(mixer.mixed())


@pytest.fixture
def waves(make_record):
    steps = np.arange(400)
    return [
        make_record(np.sin(steps / (3 + i)) * 10**i + 1, item_id=f"s{i}", source=f"set{i % 3}")
        for i in range(8)
    ]


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        a.item_id == b.item_id and np.array_equal(a.values, b.values)
        for a, b in zip(first, second, strict=True)
    )


def test_mixtures_depend_on_seed_block_and_series_alone(waves) -> None:
    first = mixtures(waves, share=1.0)
    assert same(first, mixtures(waves, share=1.0))
    assert not same(first, mixtures(waves, share=1.0, seed=1))
    assert not same(first, mixtures(waves, share=1.0, block="b1"))
    assert not same(first, mixtures(waves[1:], share=8 / 7))


def test_mixture_is_a_convex_combination_of_scaled_pieces(make_record) -> None:
    # Constants of any size are 1 once scaled, so every convex combination of them is 1.
    records = [make_record(np.full(300, 10.0**i), item_id=f"s{i}") for i in range(6)]
    for record in mixtures(records, share=20.0):
        np.testing.assert_allclose(record.values, 1.0, rtol=1e-6)
    # Two pieces of which each point says which one it is: weights are positive and sum to 1.
    ones, alternating = np.ones(300), np.tile([2.0, 0.0], 150)
    records = [make_record(ones), make_record(alternating, item_id="b")]
    weights = []
    for record in mixtures(records, share=50.0):
        low, high = record.values.min(), record.values.max()
        assert low + high == pytest.approx(2.0, abs=0.02)  # w * 1 + (1 - w) * {0, 2}, odd lengths
        assert 0.0 < low < 1.0
        weights.append(low)
    assert np.std(weights) > 0.1


def test_lengths_lie_in_their_range_and_in_the_series(make_record) -> None:
    records = [make_record(np.arange(1, length + 1)) for length in (150, 200, 5000, 9000)]
    lengths = [len(r.values) for r in mixtures(records, share=50.0, min_length=100, max_length=400)]
    assert min(lengths) >= 100
    assert max(lengths) <= 400
    assert len(set(lengths)) > 20
    assert any(length > 200 for length in lengths)


def test_validation_points_are_never_mixed(make_record) -> None:
    for fraction in (0.5, 0.9):
        values = np.ones(1000)
        values[train_length(1000, fraction) :] = 1e9
        records = [make_record(values, item_id=str(i)) for i in range(4)]
        for record in mixtures(records, share=20.0, train_fraction=fraction, max_length=1000):
            np.testing.assert_allclose(record.values, 1.0, rtol=1e-6)


def test_series_that_are_too_short_or_zero_are_left_out(make_record) -> None:
    records = [
        make_record(np.full(300, 2.0)),
        make_record(np.tile([1.0, 3.0], 70), item_id="short"),  # 126 points to train on
        make_record(np.zeros(300), item_id="zero"),
    ]
    assert mixtures(records, share=5.0) == []  # one piece is no mixture
    assert len(mixtures([*records, make_record(np.ones(300))], share=5.0)) == 20


def test_missing_points_stay_missing(make_record) -> None:
    holed = np.full(300, 3.0)
    holed[50:60] = NAN
    records = [make_record(holed), make_record(np.full(300, 2.0))]
    settings = {"train_fraction": 1.0, "min_length": 300, "max_length": 300, "share": 3.0}
    for record in mixtures(records, **settings):
        assert np.isnan(record.values).sum() == 10
        np.testing.assert_allclose(record.values[~np.isnan(record.values)], 1.0, rtol=1e-6)


def test_record_says_that_it_is_synthetic(waves) -> None:
    for index, record in enumerate(mixtures(waves, share=1.0)):
        assert (record.source, record.domain) == ("tsmixup", "Synthetic")
        assert (record.start, record.end, record.freq, record.variate) == (None, None, None, 0)
        assert record.item_id == f"tsmixup_b0_{index}"
        assert record.values.dtype == np.float32


def test_share_counts_in_small_blocks_too(waves) -> None:
    made = [len(mixtures(waves, share=0.2, block=str(i))) for i in range(300)]
    assert set(made) == {1, 2}
    assert np.mean(made) == pytest.approx(1.6, abs=0.1)
    assert mixtures(waves, share=0.0) == []


def test_reservoir_is_bounded_and_fair(make_record) -> None:
    counts = np.zeros(40)
    for block in range(200):
        mixer = SeriesMixer(MixupConfig(reservoir_size=8), 0.9, str(block))
        for number in range(40):
            source = f"set{number % 7}"
            mixer.add(make_record(np.full(200, number + 1.0), source=source))
        held = [int(piece[0]) - 1 for pieces in mixer._pieces.values() for piece in pieces]
        assert len(held) == len(set(held)) == 8
        counts[held] += 1
    # 200 draws of 8 among 40: each is held 40 times, give or take 4 standard deviations.
    assert np.abs(counts - 40).max() < 4 * np.sqrt(200 * 0.2 * 0.8)


def test_data_sets_are_drawn_evenly(make_record) -> None:
    """A data set of one series meets as many mixtures as one of a hundred."""
    many = [make_record(np.full(300, 1.0), item_id=str(i), source="many") for i in range(100)]
    one = make_record(np.tile([2.0, 0.0], 150), item_id="one", source="one")
    made = mixtures([*many, one], share=3.0, max_components=2)
    with_one = np.mean([record.values.std() > 1e-3 for record in made])
    # Only many-many, a quarter, is without it: after one-one the second is drawn again.
    assert with_one == pytest.approx(3 / 4, abs=0.08)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share": -0.1}, "share .* -0.1"),
        ({"share": float("inf")}, "share .* inf"),
        ({"max_components": 1}, "max_components .* 1"),
        ({"alpha": 0.0}, "alpha .* 0.0"),
        ({"min_length": 10, "max_length": 5}, r"min_length \(10\) .* max_length \(5\)"),
        ({"reservoir_size": 2}, r"reservoir_size \(2\) .* max_components \(3\)"),
    ],
)
def test_impossible_settings_are_refused(settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        MixupConfig(**settings)
