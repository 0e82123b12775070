"""Names and shapes of a training state, in one process; ranks are in tests/distributed."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tsmoe.checkpoint.elastic import (
    ParameterState,
    StateReader,
    expert_parameters,
    restore,
    take_snapshot,
)
from tsmoe.checkpoint.layout import CheckpointMeta, FileRecord
from tsmoe.errors import CheckpointError
from tsmoe.models import build_model
from tsmoe.models.time_tracker import TimeTracker, TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.ranks import Ranks


def model_of(**settings: int) -> TimeTracker:
    feed_forward = MoEConfig(num_experts=3, d_ff_expert=8, d_ff_shared=8)
    sizes = {"patch_length": 4, "patch_stride": 4, "context_length": 16, "d_model": 8}
    config = TimeTrackerConfig(
        **(sizes | {"num_layers": 2, "num_heads": 2} | settings), feed_forward=feed_forward
    )
    return build_model(config)


def state_of(parameter: nn.Parameter) -> ParameterState:
    value = parameter.detach()
    return ParameterState(value=value, exp_avg=value * 2, exp_avg_sq=value.square())


@pytest.fixture
def written(tmp_path):
    """The state of a model on disk: a reader of it, and the model."""
    model = model_of()
    model.routers()[0].balance.bias_E.copy_(torch.tensor([1.0, 2.0, 3.0]))
    files = take_snapshot(model, state_of, Ranks())
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name)
    records = tuple(FileRecord(name=name, size_bytes=0, sha256="") for name in files)
    meta = CheckpointMeta(step=1, windows_seen=1, config={}, corpus_fingerprint="", files=records)
    with StateReader(tmp_path, meta) as reader:
        yield reader, model


def test_snapshot_addresses_experts_by_their_global_id(written) -> None:
    _, model = written
    files = take_snapshot(model, state_of, Ranks())
    assert files.keys() == {"dense.safetensors", "experts-00000.safetensors"}
    name = "blocks.1.feed_forward.experts.down_weight"
    weight = dict(model.named_parameters())[name]
    for expert in range(3):
        key = f"exp_avg/{name}/{expert}"
        assert torch.equal(files["experts-00000.safetensors"][key], 2 * weight[expert])
    assert not any(".experts." in key for key in files["dense.safetensors"])
    assert len(expert_parameters(model)) == 4


def test_snapshot_is_a_copy(written) -> None:
    _, model = written
    files = take_snapshot(model, state_of, Ranks())
    before = files["dense.safetensors"]["value/embed.values.weight"].clone()
    with torch.no_grad():
        model.embed.values.weight.add_(1)
    assert torch.equal(files["dense.safetensors"]["value/embed.values.weight"], before)


def test_restored_model_is_the_written_one(written) -> None:
    reader, model = written
    other = model_of()
    for parameter in other.parameters():
        parameter.data.zero_()
    moments = {}

    def set_state(parameter: nn.Parameter, state: ParameterState) -> None:
        parameter.data.copy_(state.value)
        moments[parameter] = state

    restore(other, reader, set_state)
    for (name, tensor), expected in zip(
        other.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, expected), name
    for parameter in other.parameters():
        assert torch.equal(moments[parameter].exp_avg, 2 * parameter)
        assert torch.equal(moments[parameter].exp_avg_sq, parameter.square())


def test_names_of_another_model_are_listed(written) -> None:
    reader, _ = written
    with pytest.raises(CheckpointError) as raised:
        reader.check_names(model_of(num_layers=3))
    message = str(raised.value)
    assert "missing: buffer/blocks.2.feed_forward.router.balance.bias_E" in message
    assert "more; unexpected: none" in message
    with pytest.raises(CheckpointError, match=r"missing: none; unexpected: buffer/blocks\.1"):
        reader.check_names(model_of(num_layers=1))


def test_other_shape_names_both(written) -> None:
    reader, _ = written
    with pytest.raises(CheckpointError, match=r"has shape \(8, 4\).*wants \(16, 4\)"):
        restore(model_of(d_model=16), reader, lambda *_: None)


def test_file_that_is_no_safetensors_is_named(tmp_path) -> None:
    (tmp_path / "dense.safetensors").write_bytes(b"x" * 100)
    records = (FileRecord(name="dense.safetensors", size_bytes=100, sha256=""),)
    meta = CheckpointMeta(step=1, windows_seen=1, config={}, corpus_fingerprint="", files=records)
    with pytest.raises(CheckpointError, match=r"dense\.safetensors: cannot be read"):
        StateReader(tmp_path, meta)
