import numpy as np
import pytest
import torch

from tsmoe.data.patch_mask import PatchMask
from tsmoe.data.permutation import order_key

KEY = order_key("fingerprint", 0)
PATCH, PATCHES = 4, 10
CONTEXT = PATCH * PATCHES


def hidden_patches(lookahead: int, windows: int = 2000) -> np.ndarray:
    """Windows x patches of the context, True where hidden; the patch after it must be shown."""
    mask = PatchMask(context_length=CONTEXT, patch_length=PATCH, lookahead_patches=lookahead)
    observed_BCL = torch.ones(windows, 1, CONTEXT + PATCH, dtype=torch.bool)
    shown_BCL = mask.hide(observed_BCL, np.arange(windows), KEY)
    assert shown_BCL[..., CONTEXT:].all()
    by_patch = shown_BCL[:, 0, :CONTEXT].unflatten(-1, (PATCHES, PATCH))
    assert torch.equal(by_patch.any(-1), by_patch.all(-1))
    return ~by_patch.all(-1).numpy()


def longest_run(row: np.ndarray) -> int:
    return max(len(run) for run in "".join("x" if hidden else " " for hidden in row).split(" "))


@pytest.mark.parametrize("lookahead", [2, 4])
def test_runs_are_as_long_as_a_forecast_looks_ahead_and_never_begin_a_window(lookahead) -> None:
    hidden = hidden_patches(lookahead)
    assert not hidden[:, 0].any()
    assert max(longest_run(row) for row in hidden) == lookahead - 1
    # Every other patch is hidden now and then, the last one of the context too.
    assert (hidden[:, 1:].mean(0) > 0.1).all()
    assert hidden.mean() < 0.6


def test_nothing_is_hidden_where_patches_are_forecast_one_by_one() -> None:
    assert not hidden_patches(1).any()


def test_mask_is_a_function_of_the_position() -> None:
    mask = PatchMask(context_length=CONTEXT, patch_length=PATCH, lookahead_patches=3)
    observed_BCL = torch.ones(6, 1, CONTEXT + PATCH, dtype=torch.bool)
    positions = np.arange(100, 106)
    whole = mask.hide(observed_BCL, positions, KEY)
    assert torch.equal(mask.hide(observed_BCL[:3], positions[3:], KEY), whole[3:])
    assert not torch.equal(mask.hide(observed_BCL, positions, order_key("other", 0)), whole)


@pytest.mark.parametrize("tokens_per_patch", [1, 2])
def test_each_series_of_a_packed_window_is_hidden_as_a_window_is(tokens_per_patch: int) -> None:
    mask = PatchMask(context_length=CONTEXT, patch_length=PATCH, lookahead_patches=4)
    # Two patches of fill, five patches of a series (the last no token), three of another.
    series = np.repeat([-1, -1, 5, 5, 5, 5, -1, 3, 3, 3], tokens_per_patch)
    series = series[: (PATCHES - 1) * tokens_per_patch + 1]
    windows = 2000
    hidden = (
        ~mask.hide(
            torch.ones(windows, 1, CONTEXT + PATCH, dtype=torch.bool),
            np.arange(windows),
            KEY,
            torch.from_numpy(series).expand(windows, 1, -1),
        )[:, 0, :CONTEXT]
        .unflatten(-1, (PATCHES, PATCH))
        .any(-1)
        .numpy()
    )
    assert not hidden[:, [2, 7]].any()
    # A run ends where a series does, and may begin at once in the next.
    assert (hidden[:, [3, 8]].mean(0) > 0.25).all()
    after_a_run = hidden[:, 4:7].all(1)
    assert after_a_run.sum() > 50
    assert 0.2 < hidden[after_a_run][:, 8].mean() < 0.4


def test_what_was_not_recorded_stays_unseen() -> None:
    mask = PatchMask(context_length=CONTEXT, patch_length=PATCH, lookahead_patches=2)
    nothing_BCL = torch.zeros(3, 1, CONTEXT + PATCH, dtype=torch.bool)
    assert not mask.hide(nothing_BCL, np.arange(3), KEY).any()
