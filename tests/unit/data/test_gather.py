import gc

import numpy as np
import pytest
import torch

from data_pipeline.shards import Corpus
from tsmoe.data import gather as module
from tsmoe.data.gather import Buffers, WindowGather

LENGTH = 24
LENGTHS = {"a": [100, 7, 40, 24, 300, 12], "b": [60, 3, 90]}
MISSING = [(0, 3), (0, 40), (1, 2), (4, 299), (8, 0), (8, 89)]


@pytest.fixture(params=[4096, 300])
def corpus(make_corpus, request) -> Corpus:
    """All in one shard, and a shard for each series or two."""
    return make_corpus(LENGTHS, missing=MISSING, shard_size_bytes=request.param)


def all_windows(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    pairs = [
        (series, start)
        for series, length in enumerate(corpus.lengths)
        for start in range(-LENGTH + 1, length - LENGTH + 1)
    ]
    series, starts = np.array(pairs).T
    return series, starts


def cut(
    corpus: Corpus, series: np.ndarray, starts: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    gather = WindowGather(corpus, LENGTH)
    return gather.cut(gather.place(series, starts))


def test_windows_are_those_of_the_plain_reader(corpus) -> None:
    series, starts = all_windows(corpus)
    generator = np.random.default_rng(0)
    gather = WindowGather(corpus, LENGTH)
    for size in (1, 5, 64, len(series)):
        chosen = generator.permutation(len(series))[:size]
        values, observed = gather.cut(gather.place(series[chosen], starts[chosen]))
        expected = torch.from_numpy(corpus.gather(series[chosen], starts[chosen], LENGTH))
        assert torch.equal(observed, ~expected.isnan())
        assert torch.equal(values, expected.nan_to_num(0.0))


def test_remote_corpus_asks_for_addresses_each_time(corpus, monkeypatch) -> None:
    # Its shards come and go: what holds for a local corpus may not be remembered.
    series, starts = all_windows(corpus)
    expected = cut(corpus, series, starts)
    monkeypatch.setattr(corpus, "max_resident_shards", 4)
    gather = WindowGather(corpus, LENGTH)
    windows = gather.place(series, starts)
    assert windows.addresses is None
    for ours, theirs in zip(gather.cut(windows), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_mask_of_complete_windows_is_a_constant_of_their_own(make_corpus) -> None:
    corpus = make_corpus({"a": [100, 200]})
    gather = WindowGather(corpus, LENGTH)
    windows = gather.place(np.array([0, 1]), np.array([5, 50]))
    (_, first), (_, second) = gather.cut(windows), gather.cut(windows)
    assert first.all()
    assert first.shape == (2, LENGTH)
    with pytest.raises(RuntimeError, match="single memory location"):
        first &= False
    first[0, 0] = False
    assert second.all()


def test_gap_of_a_series_too_long_for_its_stored_share_is_seen(make_corpus, monkeypatch) -> None:
    corpus = make_corpus({"a": [100]}, missing=[(0, 30)])
    # As if 1 of 100 points did not show in a float32.
    monkeypatch.setattr(corpus, "observed_fractions", lambda: np.ones(1, np.float32))
    assert cut(corpus, np.array([0]), np.array([20]))[1].all()
    monkeypatch.setattr(module, "_EXACT_LENGTH", 100)
    assert not cut(corpus, np.array([0]), np.array([20]))[1][0, 10]


def test_infinities_that_cancel_are_kept(make_corpus) -> None:
    corpus = make_corpus({"a": [100]}, missing=[(0, 90)])
    shard = corpus.series(0)
    writable = np.lib.stride_tricks.as_strided(shard).copy()
    writable[[3, 4]] = [np.inf, -np.inf]
    gather = WindowGather(corpus, LENGTH)
    windows = gather.place(np.array([0]), np.array([0]))
    values = torch.from_numpy(writable[:LENGTH][None].copy())
    observed = gather._mask(values, windows)
    assert observed.all()
    assert values[0, 3:5].tolist() == [np.inf, -np.inf]


def test_window_that_ends_after_its_series_is_refused(corpus) -> None:
    with pytest.raises(IndexError, match="series 2, which has 40 points"):
        cut(corpus, np.array([0, 2]), np.array([0, 17]))
    with pytest.raises(IndexError, match="series 9 does not exist"):
        cut(corpus, np.array([9]), np.array([0]))


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    buffers = Buffers()
    first = buffers.take((4, 8), torch.float32)
    address = first.data_ptr()
    assert buffers.take((4, 8), torch.bool).data_ptr() != address
    view = first[1:2, None].transpose(0, 1)
    del first
    gc.collect()
    assert buffers.take((4, 8), torch.float32).data_ptr() != address, "a view holds it"
    del view
    assert buffers.take((4, 8), torch.float32).data_ptr() == address


@pytest.mark.parametrize("kept_as", ["tensor", "numpy", "graph"])
def test_batch_that_is_kept_never_changes(make_corpus, kept_as: str) -> None:
    corpus = make_corpus({"a": [100] * 20})
    gather = WindowGather(corpus, LENGTH)
    weight = torch.ones(LENGTH, requires_grad=True)
    kept = []
    for series in range(20):
        values, _ = gather.cut(gather.place(np.array([series]), np.array([0])))
        expected = values.clone()
        match kept_as:
            case "tensor":
                kept.append((values[:, None], expected))
            case "numpy":
                kept.append((torch.from_numpy(values.numpy()[:, ::2]), expected[:, ::2]))
            case "graph":  # the backward pass needs the values
                kept.append(((weight * values).sum(), expected))
        del values
    for found, expected in kept:
        if kept_as == "graph":
            (gradient,) = torch.autograd.grad(found, weight)
            assert torch.equal(gradient[None], expected)
        else:
            assert torch.equal(found.reshape(expected.shape), expected)
