"""Where an engine keeps weights, gradients and optimizer states over a step.

One class an engine or ZeRO stage. Lifetimes are those of torch's DDP and AdamW and of DeepSpeed
0.19.8 (`stage_1_and_2.py`, `stage3.py`).
"""

from __future__ import annotations

from tsmoe.cost.layout import Layout
from tsmoe.cost.parameters import ParameterSize
from tsmoe.cost.timeline import Timeline

_FLOAT32 = 4


def owned_elements(
    parameters: tuple[ParameterSize, ...], layout: Layout
) -> dict[tuple[bool, bool], int]:
    """Say how much of each optimizer group a rank of ZeRO keeps masters and moments of.

    Routed experts are partitioned over the ranks that hold the same ones only: with as many ranks
    in an expert-parallel group as there are, not at all (DeepSpeed issue 7156).

    Returns:
        Elements by (is_routed, is_decayed).
    """
    sizes: dict[tuple[bool, bool], int] = {}
    for parameter in parameters:
        if parameter.is_trained:
            key = parameter.is_routed, parameter.is_decayed
            sizes[key] = sizes.get(key, 0) + parameter.numel
    return {key: -(-size // _sharers(layout, is_routed=key[0])) for key, size in sizes.items()}


def engine_memory(
    time: Timeline, layout: Layout, parameters: tuple[ParameterSize, ...]
) -> EngineMemory:
    """Choose by the layout's ZeRO stage."""
    kinds = (PlainMemory, ZeroOneMemory, ZeroTwoMemory, ZeroThreeMemory)
    return kinds[layout.zero_stage](time, layout, parameters)


class EngineMemory:
    """What every engine does; `gradient_came` differs, and what lives between steps."""

    def __init__(
        self, time: Timeline, layout: Layout, parameters: tuple[ParameterSize, ...]
    ) -> None:
        self.time, self.layout, self.parameters = time, layout, parameters
        self.weight = layout.numerics.weight
        self.trained = sum(p.numel for p in parameters if p.is_trained)
        self.owned = owned_elements(parameters, layout)
        self.is_first_pass = True
        self._by_module: dict[str, list[ParameterSize]] = {}
        for parameter in parameters:
            words = parameter.name.split(".")
            for depth in range(len(words)):
                module = ".".join(words[: depth + 1])
                self._by_module.setdefault(module, []).append(parameter)

    def hold_states(self) -> int:
        """Take what outlives a step; return what the host holds instead of the device."""
        raise NotImplementedError

    def forward_begins(self) -> None:
        """Take what a pass needs of weights."""
        if self.layout.numerics.is_autocast:
            # Autocast keeps its bf16 copies of the matrices until their gradients are there.
            self.time.take("working", 2 * sum(p.numel for p in self.parameters if p.is_decayed))

    def blocks_end(self) -> None:
        """Let go what the blocks' forward pass alone needed."""

    def gradients_came(self, module: str) -> None:
        """Take the gradients of a module."""
        for parameter in self._by_module.get(module, ()):
            if parameter.is_trained:
                self.gradient_came(parameter)
                if self.layout.numerics.is_autocast and parameter.is_decayed:
                    self.time.give("working", 2 * parameter.numel)

    def gradient_came(self, parameter: ParameterSize) -> None:
        """Take one gradient."""
        raise NotImplementedError

    def pass_ends(self, *, is_last: bool) -> None:  # noqa: ARG002 - used by some of them
        """Exchange what is to be exchanged after a backward pass."""
        self.is_first_pass = False

    def update(self) -> None:
        """Clip and step."""


class PlainMemory(EngineMemory):
    """Whole gradients and moments; with several ranks DDP's buckets hold gradients once more."""

    def hold_states(self) -> int:
        """Take what outlives a step."""
        self.time.take("weights", self.weight * sum(p.numel for p in self.parameters))
        self.time.take("moments", 2 * _FLOAT32 * self.trained)
        if self.layout.world_size > 1:
            self.time.take("reduction_buckets", _FLOAT32 * self.trained)
        return 0

    def gradient_came(self, parameter: ParameterSize) -> None:
        """Keep it; later passes add to it."""
        if self.is_first_pass:
            self.time.take("gradients", self.weight * parameter.numel)


class ZeroOneMemory(EngineMemory):
    """Whole gradients, reduced at the end; masters and moments of the own partition."""

    def __init__(
        self, time: Timeline, layout: Layout, parameters: tuple[ParameterSize, ...]
    ) -> None:
        super().__init__(time, layout, parameters)
        everything = sum(p.numel for p in parameters)
        # The engine lets no bucket be larger than the model.
        self.bucket = self.weight * min(layout.bucket_elements, everything)
        self.partition = self.weight * sum(self.owned.values())
        self.has_bucket = False

    def hold_states(self) -> int:
        """Take what outlives a step."""
        self.time.take("weights", self.weight * sum(p.numel for p in self.parameters))
        return self._hold_optimizer()

    def _hold_optimizer(self) -> int:
        count = sum(self.owned.values())
        if not self.layout.offloads_optimizer:
            self.time.take("masters", _FLOAT32 * count)
            self.time.take("moments", 2 * _FLOAT32 * count)
            return 0
        # Masters, moments and gradients in float32, and a buffer for the weights' way back; on
        # both sides room for the largest gradient.
        largest = self.weight * max(p.numel for p in self.parameters)
        self.time.take("working", largest)
        accumulated = self.weight * count if self.layout.accumulation_steps > 1 else 0
        return (4 * _FLOAT32 + self.weight) * count + largest + accumulated

    def gradient_came(self, parameter: ParameterSize) -> None:
        """Keep it until the end of the last pass."""
        self._take_bucket()
        if self.is_first_pass:
            self.time.take("gradients", self.weight * parameter.numel)

    def _take_bucket(self) -> None:
        if not self.has_bucket:
            self.time.take("reduction_buckets", self.bucket)
            self.has_bucket = True

    def pass_ends(self, *, is_last: bool) -> None:
        """Fill the bucket with copies, then make the partition's buffer beside what is left."""
        super().pass_ends(is_last=is_last)
        if is_last:
            total = self.weight * self.trained
            self.time.give("gradients", min(total, self.bucket))
            if not self.layout.offloads_optimizer:
                self.time.take("gradients", self.partition)
            self.time.give("gradients", total - min(total, self.bucket))
        self.time.give("reduction_buckets", self.bucket)
        self.has_bucket = False

    def update(self) -> None:
        """Flatten each group's partition in turn and make it float32."""
        if self.layout.offloads_optimizer:
            return
        copies = self.weight + (_FLOAT32 if self.weight != _FLOAT32 else 0)
        with self.time.working(copies * max(self.owned.values())):
            pass


class ZeroTwoMemory(ZeroOneMemory):
    """Gradients go into the bucket as they come, and from there to the partition."""

    def __init__(
        self, time: Timeline, layout: Layout, parameters: tuple[ParameterSize, ...]
    ) -> None:
        super().__init__(time, layout, parameters)
        self.in_bucket = 0
        self.has_partition = False

    def gradient_came(self, parameter: ParameterSize) -> None:
        """Copy it into the bucket."""
        self._take_bucket()
        size = self.weight * parameter.numel
        if self.in_bucket + size > self.bucket:
            self._flush()
        self.in_bucket += size
        with self.time.working(size):
            pass

    def _flush(self) -> None:
        """Reduce what was collected: it is flattened once more, then copied to the partition."""
        with self.time.working(min(self.in_bucket, self.bucket)):
            pass
        if not self.has_partition and not self.layout.offloads_optimizer:
            self.has_partition = True
            self.time.take("gradients", self.partition)
        self.in_bucket = 0

    def pass_ends(self, *, is_last: bool) -> None:
        """Reduce the rest; the next pass makes another partition, which is added to this one."""
        self.is_first_pass = False
        self._flush()
        self.has_partition = is_last
        self.time.give("reduction_buckets", self.bucket)
        self.has_bucket = False


class ZeroThreeMemory(ZeroTwoMemory):
    """Weights are partitioned too, and gathered for a pass; buffers outlive the step."""

    def __init__(
        self, time: Timeline, layout: Layout, parameters: tuple[ParameterSize, ...]
    ) -> None:
        super().__init__(time, layout, parameters)
        self.gathered = 0
        self.is_routed = False
        self.has_partition = self.has_bucket = True

    def hold_states(self) -> int:
        """Take what outlives a step."""
        self.time.take("weights", self.weight * sum(map(self._share, self.parameters)))
        self.time.take("reduction_buckets", self.bucket)
        if self.layout.offloads_optimizer:
            # Masters, moments and gradients in float32, and gradients as they come.
            return 4 * _FLOAT32 * sum(self.owned.values()) + self.partition
        self.time.take("gradients", self.partition)
        return self._hold_optimizer()

    def _share(self, parameter: ParameterSize) -> int:
        return -(-parameter.numel // _sharers(self.layout, is_routed=parameter.is_routed))

    def _is_gathered(self, parameter: ParameterSize) -> bool:
        return _sharers(self.layout, is_routed=parameter.is_routed) > 1

    def forward_begins(self) -> None:
        """Gather: what the backward pass will use again soon enough is not let go in between."""
        super().forward_begins()
        count = sum(p.numel for p in self.parameters if self._is_gathered(p))
        self.gathered = min(count, self.layout.gathered_elements)
        self.time.take("weights", self.weight * self.gathered)
        # What is gathered together comes in one buffer and is copied out of it one by one.
        self.time.take(
            "working",
            self.weight
            * min(count, self.layout.prefetched_elements, self.layout.gathered_elements),
        )

    def blocks_end(self) -> None:
        """Let the buffer of gathered weights go."""
        count = sum(p.numel for p in self.parameters if self._is_gathered(p))
        self.time.give(
            "working",
            self.weight
            * min(count, self.layout.prefetched_elements, self.layout.gathered_elements),
        )

    def gradient_came(self, parameter: ParameterSize) -> None:
        """Copy it into the bucket, which holds gradients of one group of ranks only."""
        if parameter.is_routed != self.is_routed:
            self._flush()
            self.is_routed = parameter.is_routed
        super().gradient_came(parameter)
        if self._is_gathered(parameter):
            freed = min(parameter.numel, self.gathered)
            self.time.give("weights", self.weight * freed)
            self.gathered -= freed

    def pass_ends(self, *, is_last: bool) -> None:  # noqa: ARG002
        """Reduce the rest, and let go what was gathered."""
        self._flush()
        self.time.give("weights", self.weight * self.gathered)
        self.gathered = 0


def _sharers(layout: Layout, *, is_routed: bool) -> int:
    return layout.expert_data_parallel_size if is_routed else layout.world_size
