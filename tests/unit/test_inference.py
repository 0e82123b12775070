import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tsmoe.checkpoint.package import load_package, save_package
from tsmoe.errors import CheckpointError, ConfigError
from tsmoe.heads import QuantileHeadConfig
from tsmoe.inference import Forecaster

CARD = {"licence": "CC0"}
PARTS = ("card.json", "model.safetensors", "model.yaml")


def forecaster_of(model) -> Forecaster:
    return Forecaster(model, CARD, torch.device("cpu"))


@pytest.fixture
def forecaster(make_model) -> Forecaster:
    return forecaster_of(make_model())


@pytest.fixture
def quantile_forecaster(make_model) -> Forecaster:
    return forecaster_of(make_model(head=QuantileHeadConfig(levels=(0.1, 0.5, 0.9))))


@pytest.fixture
def package(make_model, tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    save_package(folder, make_model(), CARD)
    return folder


def context(*shape: int) -> np.ndarray:
    steps = np.random.default_rng(0).standard_normal(shape)
    return (20 + steps.cumsum(-1)).astype(np.float32)


def test_forecast_is_the_last_tokens_prediction_in_the_unit_of_the_input(forecaster) -> None:
    context_BCL = torch.from_numpy(context(1, 2, 64))
    output = forecaster.model(context_BCL, torch.ones_like(context_BCL, dtype=torch.bool))
    statistics = output.statistics
    expected = output.prediction_BCNPK[..., 0] * statistics.scale_BCN1 + statistics.loc_BCN1
    found = forecaster.forecast(context_BCL[0].numpy(), 8)
    assert found.quantiles_BCQK is None
    torch.testing.assert_close(torch.from_numpy(found.mean_BCQ), expected[:, :, -1].detach())


@pytest.mark.parametrize("given", [64, 21])
def test_long_horizon_is_rolled_patch_by_patch(forecaster, given: int) -> None:
    known_BCL = context(3, 2, given)
    patches = []
    for _ in range(3):
        patches.append(forecaster.forecast_batch(known_BCL[..., -64:], 8).mean_BCQ)
        known_BCL = np.concatenate((known_BCL, patches[-1]), axis=-1)
    expected_BCQ = np.concatenate(patches, axis=-1)[..., :20]
    found_BCQ = forecaster.forecast_batch(context(3, 2, given), 20).mean_BCQ
    np.testing.assert_array_equal(found_BCQ, expected_BCQ)


@pytest.mark.parametrize("stride", [8, 4])
def test_patches_are_forecast_in_one_pass_behind_a_gap(make_model, stride: int) -> None:
    model = make_model(lookahead_patches=3, patch_stride=stride)
    known_BCL = context(2, 1, 64)
    found_BCQ = forecaster_of(model).forecast_batch(known_BCL, 24).mean_BCQ
    for ahead in range(3):
        # What a patch further ahead is forecast from: all that was known, then unseen patches.
        seen_BCL = torch.zeros(2, 1, 64 + 8 * ahead)
        seen_BCL[..., :64] = torch.from_numpy(known_BCL)
        observed_BCL = torch.ones_like(seen_BCL, dtype=torch.bool)
        observed_BCL[..., 64:] = False
        # The context of all three is the same one, moved on by the gap of the last.
        start = 8 * 2
        output = model(seen_BCL[..., start:], observed_BCL[..., start:])
        statistics = output.statistics
        expected = output.prediction_BCNPK[..., 0] * statistics.scale_BCN1 + statistics.loc_BCN1
        patch_BCQ = found_BCQ[..., 8 * ahead : 8 * (ahead + 1)]
        # The pass is causal; only the shape of its sums differs.
        np.testing.assert_allclose(patch_BCQ, expected[:, :, -1].detach(), rtol=1e-4, atol=1e-4)


def test_longer_horizons_roll_several_patches_at_a_time(make_model) -> None:
    forecaster = forecaster_of(make_model(lookahead_patches=2))
    known_BCL = context(2, 1, 64)
    first = forecaster.forecast_batch(known_BCL, 16).mean_BCQ
    second = forecaster.forecast_batch(np.concatenate((known_BCL, first), -1), 16).mean_BCQ
    found = forecaster.forecast_batch(known_BCL, 30).mean_BCQ
    np.testing.assert_array_equal(found, np.concatenate((first, second), -1)[..., :30])


def test_quantiles_are_rolled_by_the_median(quantile_forecaster) -> None:
    known_BCL = context(2, 1, 64)
    first = quantile_forecaster.forecast_batch(known_BCL, 8)
    known_BCL = np.concatenate((known_BCL, first.mean_BCQ), axis=-1)
    second = quantile_forecaster.forecast_batch(known_BCL, 8)
    found = quantile_forecaster.forecast_batch(context(2, 1, 64), 16)
    np.testing.assert_array_equal(found.quantiles_BCQK[:, :, :8], first.quantiles_BCQK)
    np.testing.assert_array_equal(found.quantiles_BCQK[:, :, 8:], second.quantiles_BCQK)


def test_quantiles_ascend_and_their_middle_is_the_point_forecast(quantile_forecaster) -> None:
    found = quantile_forecaster.forecast_batch(context(4, 2, 64), 20)
    assert found.quantiles_BCQK.shape == (4, 2, 20, 3)
    # The head is untrained, so its levels cross where nothing sorts them.
    assert (np.diff(found.quantiles_BCQK, axis=-1) >= 0).all()
    np.testing.assert_array_equal(found.mean_BCQ, found.quantiles_BCQK[..., 1])


def test_shorter_horizon_is_the_start_of_a_longer_one(forecaster) -> None:
    long_BCQ = forecaster.forecast_batch(context(2, 1, 64), 13).mean_BCQ
    assert forecaster.forecast_batch(context(2, 1, 64), 1).mean_BCQ.shape == (2, 1, 1)
    np.testing.assert_array_equal(
        forecaster.forecast_batch(context(2, 1, 64), 1).mean_BCQ, long_BCQ[..., :1]
    )


def test_of_a_long_context_the_last_points_are_used(forecaster) -> None:
    context_CL = context(2, 100)
    found = forecaster.forecast(context_CL, 8).mean_BCQ
    np.testing.assert_array_equal(found, forecaster.forecast(context_CL[:, -64:], 8).mean_BCQ)
    assert (found != forecaster.forecast(context_CL[:, -63:], 8).mean_BCQ).any()


@pytest.mark.parametrize("length", [1, 5, 8, 33])
def test_short_context_has_a_finite_forecast(forecaster, length: int) -> None:
    assert np.isfinite(forecaster.forecast(context(2, length), 20).mean_BCQ).all()


def test_gaps_are_allowed_and_matter(forecaster) -> None:
    context_CL = context(1, 64)
    whole = forecaster.forecast(context_CL, 20).mean_BCQ
    context_CL[:, 30:50] = np.nan
    gappy = forecaster.forecast(context_CL, 20).mean_BCQ
    assert np.isfinite(gappy).all()
    assert (gappy != whole).any()


def test_variate_without_observations_is_forecast_as_zero(forecaster) -> None:
    context_CL = context(2, 64)
    context_CL[0] = np.nan
    found = forecaster.forecast(context_CL, 20).mean_BCQ
    assert np.abs(found[0, 0]).max() < 1e-9
    alone = forecaster.forecast(context_CL[1:], 20).mean_BCQ[0, 0]
    # Products of matrices of other sizes round otherwise; the values are near 20.
    np.testing.assert_allclose(found[0, 1], alone, rtol=1e-5)


def test_number_of_sequences_in_a_pass_does_not_matter(forecaster) -> None:
    together = forecaster.forecast_batch(context(5, 2, 64), 12).mean_BCQ
    apart = forecaster.forecast_batch(context(5, 2, 64), 12, batch_size=3).mean_BCQ
    # Products of matrices of other sizes round otherwise; the values are near 20.
    np.testing.assert_allclose(apart, together, rtol=1e-5)


def test_forecast_of_another_unit_is_in_that_unit(forecaster) -> None:
    plain = forecaster.forecast(context(1, 64), 20).mean_BCQ
    tiny = forecaster.forecast(context(1, 64) * np.float32(1e-9), 20).mean_BCQ
    np.testing.assert_allclose(tiny * 1e9, plain, rtol=1e-4)


@pytest.mark.filterwarnings("error")
def test_any_layout_and_number_type_is_read(forecaster) -> None:
    context_CL = context(2, 64).round()
    expected = forecaster.forecast(context_CL, 8).mean_BCQ
    mirrored_CL = np.ascontiguousarray(context_CL[:, ::-1])[:, ::-1]
    context_CL.setflags(write=False)
    for same_CL in (mirrored_CL, context_CL, context_CL.astype(np.int64), context_CL.tolist()):
        np.testing.assert_array_equal(forecaster.forecast(same_CL, 8).mean_BCQ, expected)


@pytest.mark.parametrize(
    ("context_CL", "length", "named"),
    [
        (np.full((1, 8), np.inf), 8, "infinite"),
        (np.full((1, 8), 1e300), 8, "infinite"),
        (np.zeros((1, 8)), 0, "prediction_length is 0"),
        (np.zeros((1, 0)), 8, r"\(1, 1, 0\)"),
        (np.zeros(8), 8, r"\(1, 8\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_impossible_requests_are_refused(forecaster, context_CL, length: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        forecaster.forecast(context_CL, length)


@pytest.mark.parametrize("head", ["point", "quantile"])
def test_saved_package_forecasts_as_the_model(
    forecaster, quantile_forecaster, tmp_path: Path, head: str
) -> None:
    original = forecaster if head == "point" else quantile_forecaster
    original.model.routers()[0].balance.bias_E += torch.tensor([0.5, 0.0, -0.5, 0.0])
    original.save_pretrained(tmp_path / "package")
    loaded = Forecaster.load(tmp_path / "package", device="cpu")
    assert loaded.quantile_levels == original.quantile_levels
    assert (loaded.context_length, loaded.patch_length) == (64, 8)
    assert loaded.card["licence"] == "CC0"
    np.testing.assert_array_equal(
        loaded.forecast(context(2, 64), 20).mean_BCQ, original.forecast(context(2, 64), 20).mean_BCQ
    )


def test_package_can_be_loaded_by_path_and_saved_again(package: Path, tmp_path: Path) -> None:
    again = Forecaster.from_pretrained(str(package), device="cpu")
    again.save_pretrained(tmp_path / "again")
    for name in PARTS:
        assert (tmp_path / "again" / name).read_bytes() == (package / name).read_bytes()


def test_unknown_device_is_refused(package: Path) -> None:
    with pytest.raises(ConfigError, match="'tpu'"):
        Forecaster.load(package, device="tpu")


def test_package_is_read_and_used_without_deepspeed(package: Path) -> None:
    program = """
import sys
import numpy as np
from tsmoe.inference import Forecaster
Forecaster.load(sys.argv[1], device="cpu").forecast(np.zeros((1, 64)), 9)
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "deepspeed"}))
"""
    process = subprocess.run(
        [sys.executable, "-c", program, str(package)], capture_output=True, text=True, check=False
    )
    assert process.stdout.split() == ["torch"], process.stderr


@pytest.mark.parametrize("name", PARTS)
def test_missing_part_is_named(package: Path, name: str) -> None:
    (package / name).unlink()
    with pytest.raises(CheckpointError, match=f"no {name}"):
        load_package(package)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_package(tmp_path / "nowhere")


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("keep", [0.0, 0.7])
def test_truncated_part_is_named(package: Path, name: str, keep: float) -> None:
    content = (package / name).read_bytes()
    (package / name).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r"package.*model\.|card\.json"):
        load_package(package)


def edit_yaml(package: Path, **changes: object) -> None:
    path = package / "model.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def test_altered_config_is_told_by_the_shape_that_does_not_fit(package: Path) -> None:
    edit_yaml(package, d_model=32)
    with pytest.raises(CheckpointError, match=r"has shape \(.*16.*model\.yaml wants \(.*32"):
        load_package(package)


def test_altered_config_is_told_by_missing_and_unexpected_names(package: Path) -> None:
    edit_yaml(package, num_layers=3)
    with pytest.raises(CheckpointError, match=r"missing: blocks\.2\..*unexpected: none"):
        load_package(package)
    edit_yaml(package, num_layers=1)
    with pytest.raises(CheckpointError, match=r"missing: none; unexpected: blocks\.1\."):
        load_package(package)


def test_config_with_an_unknown_key_is_refused(package: Path) -> None:
    edit_yaml(package, d_modell=3)
    with pytest.raises(CheckpointError, match=r"model\.yaml: d_modell"):
        load_package(package)


@pytest.mark.parametrize("version", [2, None, "1"])
def test_package_of_another_version_is_refused(package: Path, version: object) -> None:
    (package / "card.json").write_text(json.dumps({"format_version": version}))
    with pytest.raises(CheckpointError, match=f"version {version}.*reads 1"):
        load_package(package)


def test_card_that_is_no_object_is_refused(package: Path) -> None:
    (package / "card.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"card\.json"):
        load_package(package)


@pytest.mark.parametrize("has_older", [False, True])
def test_full_disk_leaves_nothing_half_written(
    make_model, tmp_path: Path, monkeypatch, has_older: bool
) -> None:
    folder = tmp_path / "package"
    if has_older:
        save_package(folder, make_model(), {"licence": "older"})

    def fill_the_disk(state: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.save_file", fill_the_disk)
    with pytest.raises(CheckpointError, match=r"package.*No space left"):
        save_package(folder, make_model(), CARD)
    assert list(tmp_path.iterdir()) == ([folder] if has_older else [])
    if has_older:
        assert load_package(folder)[1]["licence"] == "older"


def test_altered_weights_are_refused(package: Path) -> None:
    weights = package / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*was altered"):
        load_package(package)


def test_package_replaces_an_older_one_whole(package: Path, make_model) -> None:
    (package / "leftover").write_text("of the older one")
    save_package(package, make_model(num_layers=1), CARD)
    assert sorted(path.name for path in package.iterdir()) == list(PARTS)
    assert load_package(package)[0].config.num_layers == 1


def test_what_is_no_package_is_never_overwritten(make_model, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for target in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(CheckpointError, match=f"{target}: exists and is no package"):
            save_package(target, make_model(), CARD)
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.tex"]


def test_empty_folder_may_become_a_package(make_model, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    save_package(tmp_path / "package", make_model(), CARD)
    assert load_package(tmp_path / "package")[1].items() >= {"format_version": 1, **CARD}.items()
