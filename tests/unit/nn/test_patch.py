import math

import pytest
import torch

from tsmoe.nn.patch import PatchEmbedding, cut_patches, num_patches, patch_ends


@pytest.mark.parametrize(
    ("length", "patch_length", "patch_stride"),
    [
        (96, 24, 24),
        (97, 24, 24),
        (119, 24, 24),
        (96, 24, 12),
        (97, 24, 12),
        (25, 24, 5),
        (24, 24, 1),
    ],
)
def test_number_of_patches_is_the_papers(length: int, patch_length: int, patch_stride: int) -> None:
    cut = {"patch_length": patch_length, "patch_stride": patch_stride}
    expected = math.ceil((length - patch_length) / patch_stride + 1)
    assert num_patches(length, **cut) == expected
    assert cut_patches(torch.zeros(1, 1, length), **cut).shape == (1, 1, expected, patch_length)


@pytest.mark.parametrize("length", [1, 3, 4])
def test_window_no_longer_than_a_patch_is_one_patch(length: int) -> None:
    assert num_patches(length, patch_length=4, patch_stride=2) == 1


def test_last_patch_ends_at_the_last_point() -> None:
    points_BCL = torch.arange(1.0, 11.0)[None, None]
    patches_BCNP = cut_patches(points_BCL, patch_length=4, patch_stride=4)
    assert patches_BCNP[0, 0].tolist() == [[0, 0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]


def test_overlapping_patches_are_padded_at_the_left() -> None:
    points_BCL = torch.arange(1.0, 8.0)[None, None]
    patches_BCNP = cut_patches(points_BCL, patch_length=4, patch_stride=2)
    assert patches_BCNP[0, 0].tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]


def test_padding_of_a_mask_is_not_observed() -> None:
    observed_BCL = torch.ones(1, 1, 3, dtype=torch.bool)
    patches_BCNP = cut_patches(observed_BCL, patch_length=4, patch_stride=4)
    assert patches_BCNP.flatten().tolist() == [False, True, True, True]


def test_patch_ends_count_points() -> None:
    ends = patch_ends(3, patch_length=4, patch_stride=2, device=torch.device("cpu"))
    assert ends.tolist() == [4, 6, 8]


def test_gap_is_embedded_unlike_a_value_at_the_mean() -> None:
    torch.manual_seed(0)
    embed = PatchEmbedding(4, 8)
    patches_BCNP = torch.zeros(1, 1, 1, 4)
    observed_BCNP = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    whole = embed(patches_BCNP, observed_BCNP)
    torch.testing.assert_close(whole, embed.values(patches_BCNP), rtol=0, atol=0)
    observed_BCNP[..., 2] = False
    assert (embed(patches_BCNP, observed_BCNP) - whole).abs().max() > 0.01
