"""Get and set one parameter's master weight and Adam moments where ZeRO has spread them over ranks.

Stages 1 and 2 flatten parameters into groups and give each rank a slice of a group; stage 3 gives
each rank a slice of every parameter. Private names of DeepSpeed 0.19.8 are used here; each has a
test that fails when it changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tsmoe.checkpoint.elastic import ParameterState

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroState(Protocol):
    """The training state of a DeepSpeed optimizer, parameter by parameter."""

    def shape_of(self, parameter: nn.Parameter) -> torch.Size:
        """Return a parameter's shape as the model sees it."""
        ...

    def begin_reading(self) -> None:
        """Prepare for `get`."""
        ...

    def begin_writing(self, step: int) -> None:
        """Prepare for `set`: as after `step` optimizer steps, with moments of zero."""
        ...

    def gradient_taken_for_infinite(self) -> AbstractContextManager[None]:
        """Have the optimizer skip an update in the body, whatever its gradient is."""
        ...

    def get(self, parameter: nn.Parameter) -> ParameterState:
        """Assemble a parameter's state. Collective over the ranks that hold a part of it."""
        ...

    def set(self, parameter: nn.Parameter, state: ParameterState) -> None:
        """Set this rank's part of a parameter's state, and the parameter itself."""
        ...


class GroupedState:
    """Stages 1 and 2: each rank holds a slice of every group of parameters."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def shape_of(self, parameter: nn.Parameter) -> torch.Size:
        """Return the shape; parameters are whole."""
        return parameter.shape

    def begin_reading(self) -> None:
        """Link moments to parameters; before the first step they are zeros."""
        if not self._zero.optimizer.state:
            _make_adam_state(self._zero, self._zero.single_partition_of_fp32_groups, 0)
        # DeepSpeed 0.19.8 links them after the first group has stepped and never again, so those
        # of later groups (experts always are one) would not be found.
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def begin_writing(self, step: int) -> None:
        """Make Adam's state, which otherwise comes into being with the first step."""
        _make_adam_state(self._zero, self._zero.single_partition_of_fp32_groups, step)
        self.begin_reading()

    def gradient_taken_for_infinite(self) -> AbstractContextManager[None]:
        """Have the optimizer skip an update in the body."""
        return _method_gives(self._zero, "scaled_global_norm", torch.tensor(math.inf))

    def get(self, parameter: nn.Parameter) -> ParameterState:
        """Assemble a parameter's state."""
        if not parameter.requires_grad:
            return _state_of_frozen(parameter.data)
        return _read_full(parameter)

    def set(self, parameter: nn.Parameter, state: ParameterState) -> None:
        """Set this rank's part, and the parameter itself."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter.data.copy_(state.value)
        if not parameter.requires_grad:
            return
        device = parameter.device
        set_moment: Callable[..., None] = safe_set_full_optimizer_state
        safe_set_full_fp32_param(parameter, state.value.to(device))
        set_moment(parameter, state.exp_avg.to(device), "exp_avg")
        set_moment(parameter, state.exp_avg_sq.to(device), "exp_avg_sq")


class SlicedState:
    """Stage 3: each rank holds a slice of every parameter."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def shape_of(self, parameter: nn.Parameter) -> torch.Size:
        """Return the shape of the whole parameter, of which this rank holds a slice."""
        return torch.Size(parameter.ds_shape)  # type: ignore[attr-defined]

    def begin_reading(self) -> None:
        """Make moments, which are zeros before the first step."""
        if not self._zero.optimizer.state:
            self.begin_writing(0)

    def begin_writing(self, step: int) -> None:
        """Make Adam's state, which otherwise comes into being with the first step."""
        _make_adam_state(self._zero, self._zero.fp32_partitioned_groups_flat, step)

    def gradient_taken_for_infinite(self) -> AbstractContextManager[None]:
        """Have the optimizer skip an update in the body."""
        return _method_gives(self._zero, "_get_norm_groups", [torch.tensor(math.inf)])

    def get(self, parameter: nn.Parameter) -> ParameterState:
        """Assemble a parameter's state."""
        if parameter.requires_grad:
            return _read_full(parameter)
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return _state_of_frozen(parameter.data.clone())

    def set(self, parameter: nn.Parameter, state: ParameterState) -> None:
        """Set this rank's part, and the parameter itself where it is whole (small ones stay so)."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        partitioned: Any = parameter
        # Not safe_set_full_*: in 0.19.8 it fails where ranks do not divide a parameter's size.
        slices = {
            kind: _own_slice(getattr(state, kind), partitioned) for kind in ("value", *_MOMENTS)
        }
        partitioned.ds_tensor.data.copy_(slices["value"])
        if parameter.numel() == partitioned.ds_numel:
            parameter.data.copy_(state.value)
        if not parameter.requires_grad:
            return
        safe_set_local_fp32_param(parameter, slices["value"])
        for moment in _MOMENTS:
            safe_set_local_optimizer_state(parameter, slices[moment], moment)


@contextmanager
def _method_gives(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put a constant in the place of a method while the body runs."""
    getattr(owner, name)  # fails where DeepSpeed calls it otherwise
    setattr(owner, name, lambda *_, **__: value)
    try:
        yield
    finally:
        delattr(owner, name)


def _own_slice(tensor: Tensor, partitioned: Any) -> Tensor:
    """Cut what this rank holds of a tensor; the last slices are padded with zeros."""
    size = partitioned.ds_tensor.numel()
    first = size * partitioned.ds_zero_partition_rank
    piece = tensor.flatten()[first : first + size]
    return torch.cat((piece, piece.new_zeros(size - len(piece))))


def _make_adam_state(zero: Any, partitions: Iterable[Tensor], step: int) -> None:
    for partition in partitions:
        zero.optimizer.state[partition] = {
            "step": torch.tensor(float(step), device=partition.device),
            **{moment: torch.zeros_like(partition) for moment in _MOMENTS},
        }


def _read_full(parameter: nn.Parameter) -> ParameterState:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return ParameterState(
        value=safe_get_full_fp32_param(parameter),
        exp_avg=safe_get_full_optimizer_state(parameter, "exp_avg"),
        exp_avg_sq=safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
    )


def _state_of_frozen(value: Tensor) -> ParameterState:
    zero = torch.zeros_like(value, dtype=torch.float32)
    return ParameterState(value=value.float(), exp_avg=zero, exp_avg_sq=zero)
