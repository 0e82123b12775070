import pytest
import torch

from tsmoe.nn.spans import NO_SERIES, SeriesSpans, mean_within

# Fill, a series of three tokens and its target, one of a single token and its target, two more.
SERIES_BCN = torch.tensor([[[-1, -1, 4, 4, 4, -1, 9, -1, 2, 2]]])


def test_spans_are_those_of_equal_neighbours_and_each_other_token_alone() -> None:
    spans = SeriesSpans.of(SERIES_BCN)
    assert spans.is_token_BCN.tolist() == (SERIES_BCN != NO_SERIES).tolist()
    assert spans.first_BCN[0, 0].tolist() == [0, 1, 2, 2, 2, 5, 6, 7, 8, 8]
    assert spans.last_BCN[0, 0].tolist() == [0, 1, 4, 4, 4, 5, 6, 7, 9, 9]
    assert spans.is_last()[0, 0].nonzero()[:, 0].tolist() == [4, 6, 9]


def test_series_that_follow_one_another_directly_are_apart() -> None:
    spans = SeriesSpans.of(torch.tensor([[[3, 3, 5, 5]]]))
    assert spans.first_BCN[0, 0].tolist() == [0, 0, 2, 2]
    assert spans.last_BCN[0, 0].tolist() == [1, 1, 3, 3]


def test_past_and_whole_of_a_span() -> None:
    spans = SeriesSpans.of(SERIES_BCN)
    past = [row.nonzero()[:, 0].tolist() for row in spans.is_past()[0, 0]]
    assert past == [[0], [1], [2], [2, 3], [2, 3, 4], [5], [6], [7], [8], [8, 9]]
    same = [row.nonzero()[:, 0].tolist() for row in spans.is_same()[0, 0]]
    assert same == [[0], [1], [2, 3, 4], [2, 3, 4], [2, 3, 4], [5], [6], [7], [8, 9], [8, 9]]


def test_mean_is_over_what_is_within() -> None:
    spans = SeriesSpans.of(SERIES_BCN)
    values_BCND = torch.arange(10.0)[None, None, :, None] ** 2
    means = mean_within(values_BCND, spans.is_past())[0, 0, :, 0].tolist()
    assert means[:5] == pytest.approx([0, 1, 4, 6.5, 29 / 3])
    assert means[8:] == [64, 72.5]


def test_spans_of_a_batch_are_found_for_each_window() -> None:
    other_BCN = torch.tensor([[[1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]])
    both = SeriesSpans.of(torch.cat((SERIES_BCN, other_BCN)))
    assert torch.equal(both.first_BCN[:1], SeriesSpans.of(SERIES_BCN).first_BCN)
    assert both.last_BCN[1, 0].tolist() == [9] * 10
