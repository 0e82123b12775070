"""Memory of a rank: walk through one optimizer step as it runs and note the fullest moment.

Order and lifetimes are those of the code (models/, moe/, train/step.py) and of DeepSpeed 0.19.8's
`stage_1_and_2.py`. What counts are bytes of tensors: the CUDA context, fragmentation and the
libraries' own workspaces are not among them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tsmoe.cost import activations as kept
from tsmoe.cost.activations import Numerics, Rows
from tsmoe.cost.flops import values_per_point
from tsmoe.cost.layout import Layout
from tsmoe.cost.parameters import ParameterSize, parameter_sizes
from tsmoe.cost.timeline import Timeline

if TYPE_CHECKING:
    from tsmoe.models.time_tracker import TimeTrackerConfig

_FLOAT32 = 4
# Of moe/experts.py and moe/piecewise_pass.py.
_FEW_ROWS = 64
_PIECE_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a rank holds at the fullest moment of a step."""

    parts: dict[str, int]
    """Bytes by part, see `timeline.PARTS`."""
    host: int
    """Bytes in host memory where the optimizer is offloaded."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())


def plan_memory(
    model: TimeTrackerConfig, layout: Layout, *, variates: int = 1, imbalance: float = 1.0
) -> MemoryPlan:
    """Predict the peak of a rank, after its first step (which makes Adam's moments).

    Args:
        model: sizes.
        layout: over ranks.
        variates: of each window, every one by itself.
        imbalance: rows that the fullest rank of an expert-parallel group receives, over the mean.
    """
    rows = rows_of(model, layout, variates=variates, imbalance=imbalance)
    return _Step(model, layout, rows).run()


def rows_of(model: TimeTrackerConfig, layout: Layout, *, variates: int, imbalance: float) -> Rows:
    """Count what a rank's micro-batch holds. Arguments as above."""
    from tsmoe.moe.layer import MoEConfig
    from tsmoe.nn.patch import num_patches

    moe = model.feed_forward if isinstance(model.feed_forward, MoEConfig) else None
    rows = Rows(
        windows=layout.micro_batch_size,
        series=layout.micro_batch_size * variates,
        patches=num_patches(
            model.context_length, patch_length=model.patch_length, patch_stride=model.patch_stride
        ),
        top_k=0 if moe is None else moe.router.top_k,
        is_remote=moe is not None and layout.expert_parallel_size > 1,
        imbalance=imbalance if layout.expert_parallel_size > 1 else 1.0,
    )
    if moe is None:
        return rows
    is_grouped = moe.compute == "grouped"
    if moe.compute == "auto":
        # As `Experts` chooses: on a GPU grouped products are promised for bf16 only.
        few = _FEW_ROWS * moe.num_experts // layout.expert_parallel_size
        is_grouped = layout.precision == "bf16" if layout.is_on_gpu else rows.received < few
    return replace(rows, is_grouped=is_grouped)


class _Step:
    """One optimizer step of a rank."""

    def __init__(self, model: TimeTrackerConfig, layout: Layout, rows: Rows) -> None:
        from tsmoe.moe.layer import MoEConfig

        self.model, self.layout, self.rows = model, layout, rows
        self.numerics: Numerics = layout.numerics
        self.moe = model.feed_forward if isinstance(model.feed_forward, MoEConfig) else None
        self.time = Timeline()
        self.parameters = parameter_sizes(model, expert_parallel_size=layout.expert_parallel_size)
        self.gradients = _Gradients(self.time, layout, self.parameters)
        # One tensor as wide as the residual stream.
        self.tokens_bytes = rows.tokens * model.d_model * self.numerics.element

    def run(self) -> MemoryPlan:
        host = self._hold_states()
        batches = kept.batch_bytes(self.model, self.rows) * self.layout.accumulation_steps
        self.time.take("batch", batches)
        # Passes before the last differ in the gradients that they find only.
        for number in range(min(self.layout.accumulation_steps, 2)):
            is_last = number == min(self.layout.accumulation_steps, 2) - 1
            self._forward()
            self._backward()
            self.gradients.finish(is_last=is_last)
        self.gradients.update()
        return MemoryPlan(parts=self.time.peak, host=host)

    def _hold_states(self) -> int:
        """Hold what outlives the step and return what the host holds instead."""
        layout, trained = self.layout, [p for p in self.parameters if p.is_trained]
        everything = sum(p.numel for p in self.parameters)
        self.time.take("weights", everything * self.numerics.weight)
        if not layout.zero_stage:
            count = sum(p.numel for p in trained)
            self.time.take("moments", 2 * _FLOAT32 * count)
            if layout.world_size > 1:  # DDP's buckets hold all gradients once more
                self.time.take("reduction_buckets", _FLOAT32 * count)
            return 0
        partition = sum(owned_elements(trained, layout).values())
        if layout.offloads_optimizer:
            return 4 * _FLOAT32 * partition
        self.time.take("masters", _FLOAT32 * partition)
        self.time.take("moments", 2 * _FLOAT32 * partition)
        return 0

    # Forward

    def _block_activations(self) -> tuple[int, int]:
        """Bytes that one block keeps: activations, and buffers of the dispatch."""
        model, rows, numerics = self.model, self.rows, self.numerics
        size = 2 * kept.norm_bytes(model, rows, numerics)
        size += kept.attention_bytes(model, rows, numerics)
        size += kept.feed_forward_bytes(self._always_on_width, rows, numerics)
        dispatch = 0
        if self.moe is not None:
            size += kept.router_bytes(model, self.moe, rows, numerics)
            size += kept.experts_bytes(self.moe, rows, numerics)
            dispatch = kept.dispatch_bytes(model, self.moe, rows, numerics)
        return size, dispatch

    @property
    def _always_on_width(self) -> int:
        from tsmoe.models.block import DenseConfig

        if isinstance(self.model.feed_forward, DenseConfig):
            return self.model.feed_forward.d_ff
        return self.model.feed_forward.num_shared_experts * self.model.feed_forward.d_ff_shared

    def _outside_blocks(self) -> int:
        model, rows, numerics = self.model, self.rows, self.numerics
        size = kept.embedding_bytes(model, rows, numerics)
        size += kept.norm_bytes(model, rows, numerics)
        return size + kept.head_bytes(model, rows, numerics)

    def _forward(self) -> None:
        activations, dispatch = self._block_activations()
        if self.numerics.is_autocast:
            # Autocast keeps its bf16 copies of the matrices until their gradients are there.
            count = sum(p.numel for p in self.parameters if p.is_decayed)
            self.time.take("working", 2 * count)
        self.time.take("activations", self._outside_blocks())
        for _ in range(self.model.num_layers):
            if self.layout.recomputes:
                self.time.take("activations", self.tokens_bytes)
            else:
                self.time.take("activations", activations)
                self.time.take("dispatch_buffers", dispatch)
        points = self.rows.tokens * self.model.patch_length * values_per_point(self.model)
        # Errors of both sides, their maximum and its mean, before the first of them is let go.
        self.time.take("activations", kept.loss_bytes(self.model, self.rows))
        with self.time.working(2 * _FLOAT32 * points):
            pass

    # Backward, last layer first

    def _backward(self) -> None:
        model, numerics = self.model, self.numerics
        points = self.rows.tokens * model.patch_length * values_per_point(model)
        with self.time.working(3 * _FLOAT32 * points):
            self.time.give("activations", kept.loss_bytes(model, self.rows))
        with self.time.working(points * numerics.element + self.tokens_bytes):
            self.gradients.ready("head")
        self.time.give("activations", kept.head_bytes(model, self.rows, numerics))
        self._norm_backward("output_norm")
        self.time.take("working", self.tokens_bytes)  # the gradient on its way down
        activations, dispatch = self._block_activations()
        for layer in reversed(range(model.num_layers)):
            if self.layout.recomputes:
                self.time.take("activations", activations)
                self.time.take("dispatch_buffers", dispatch)
            self._feed_forward_backward(f"blocks.{layer}.feed_forward")
            self._norm_backward(f"blocks.{layer}.feed_forward_norm")
            self._attention_backward(f"blocks.{layer}.attention")
            self._norm_backward(f"blocks.{layer}.attention_norm")
            if self.layout.recomputes:
                self.time.give("activations", self.tokens_bytes)
        self.gradients.ready("embed")
        self.time.give("activations", kept.embedding_bytes(model, self.rows, numerics))
        self.time.give("working", self.tokens_bytes)

    def _norm_backward(self, name: str) -> None:
        # The product of tokens and gradient in float32, both cast to that first, and the result.
        casts = 2 if self.numerics.element != _FLOAT32 else 0
        wide = self.rows.tokens * self.model.d_model * _FLOAT32
        with self.time.working((1 + casts) * wide + (self.tokens_bytes if casts else 0)):
            self.gradients.ready(name)
        self.time.give("activations", kept.norm_bytes(self.model, self.rows, self.numerics))

    def _attention_backward(self, name: str) -> None:
        # Gradients of query, key and value, their joint one, and that of the tokens.
        with self.time.working(self.tokens_bytes):
            self.gradients.ready(f"{name}.output")
            with self.time.working(6 * self.tokens_bytes):
                pass
        with self.time.working(4 * self.tokens_bytes):
            self.gradients.ready(f"{name}.query_key_value")
        self.time.give("activations", kept.attention_bytes(self.model, self.rows, self.numerics))

    def _feed_forward_backward(self, name: str) -> None:
        """Backward of what ran last first: experts of other ranks answer after the shared ones."""
        if self.moe is None:
            self._always_on_backward(name)
        elif self.rows.is_remote:
            with self.time.working(self.tokens_bytes):
                self._routed_backward(name)
                self._always_on_backward(f"{name}.always_on")
        else:
            self._always_on_backward(f"{name}.always_on")
            with self.time.working(self.tokens_bytes):
                self._routed_backward(name)
        if self.moe is not None:
            with self.time.working(self.rows.tokens * self.model.d_model * _FLOAT32):
                self.gradients.ready(f"{name}.router")
            size = kept.router_bytes(self.model, self.moe, self.rows, self.numerics)
            self.time.give("activations", size)

    def _always_on_backward(self, name: str) -> None:
        inner = self.rows.tokens * self._always_on_width * self.numerics.element
        if not inner:
            return
        with self.time.working(inner):
            self.gradients.ready(f"{name}.down")
            self.time.give("activations", inner)  # the product of gate and up
            with self.time.working(3 * inner):
                pass
        self.time.give("activations", 2 * inner)
        with self.time.working(2 * inner + self.tokens_bytes):
            self.gradients.ready(f"{name}.gate_up")

    def _routed_backward(self, name: str) -> None:
        assert self.moe is not None
        model, moe, rows, numerics = self.model, self.moe, self.rows, self.numerics
        sent = rows.sent * model.d_model * numerics.element
        received = rows.received * model.d_model * numerics.element
        copies = received if rows.is_grouped else 0
        if not rows.is_remote:
            with self.time.working(copies):  # the gradient of each answer
                self._experts_backward(name)
            with self.time.working(copies + self.tokens_bytes):
                pass
        else:
            with self.time.working(sent + received):
                pass
            with self.time.working(received + copies):
                self._experts_backward(name)
            # Gradients of what came go back; they are summed to those of the tokens.
            with self.time.working(sent + received):
                pass
            with self.time.working(sent + self.tokens_bytes):
                pass
        self.time.give("dispatch_buffers", kept.dispatch_bytes(model, moe, rows, numerics))

    def _experts_backward(self, name: str) -> None:
        assert self.moe is not None
        model, moe, rows, numerics = self.model, self.moe, self.rows, self.numerics
        received = rows.received * model.d_model * numerics.element
        if rows.is_grouped:
            # Gradient of the product, its activation and its square, gate and up, and the rows'.
            inner = rows.received * moe.d_ff_expert * numerics.element
            with self.time.working(5 * inner):
                pass
            with self.time.working(4 * inner + received):
                self.gradients.ready(f"{name}.experts")
        else:
            # Scratch for one piece of the rows at a time.
            scratch = min(_PIECE_ROWS, rows.received)
            width = 2 * model.d_model + 4 * moe.d_ff_expert
            units = received if rows.is_remote else self.tokens_bytes
            with self.time.working(units + scratch * width * numerics.element):
                self.gradients.ready(f"{name}.experts")
        self.time.give("activations", kept.experts_bytes(moe, rows, numerics))


def owned_elements(trained: list[ParameterSize], layout: Layout) -> dict[tuple[bool, bool], int]:
    """Say how much of each optimizer group a rank of ZeRO keeps masters and moments of.

    Routed experts are partitioned over the ranks that hold the same ones only: with as many ranks
    in an expert-parallel group as there are, not at all (DeepSpeed issue 7156).

    Returns:
        Elements by (is_routed, is_decayed).
    """
    sizes: dict[tuple[bool, bool], int] = {}
    for parameter in trained:
        key = parameter.is_routed, parameter.is_decayed
        sizes[key] = sizes.get(key, 0) + parameter.numel
    return {
        key: -(-size // (layout.expert_data_parallel_size if key[0] else layout.world_size))
        for key, size in sizes.items()
    }


class _Gradients:
    """Gradients of a step, where an engine keeps them, and what the update needs."""

    def __init__(
        self, time: Timeline, layout: Layout, parameters: tuple[ParameterSize, ...]
    ) -> None:
        self.time, self.layout = time, layout
        self.trained = [p for p in parameters if p.is_trained]
        self.by_module: dict[str, list[ParameterSize]] = {}
        for parameter in self.trained:
            words = parameter.name.split(".")
            for depth in range(len(words)):
                module = ".".join(words[: depth + 1])
                self.by_module.setdefault(module, []).append(parameter)
        self.size = layout.numerics.weight
        everything = sum(p.numel for p in parameters)
        self.bucket = min(layout.bucket_elements, everything) * self.size
        self.has_bucket = False
        self.in_bucket = 0
        self.pass_number = 0
        self.partition = 0

    def ready(self, module: str) -> None:
        """Take the gradients of a module, or of a parameter."""
        for parameter in self.by_module.get(module, ()):
            self._ready(parameter.numel * self.size)
            if self.layout.numerics.is_autocast and parameter.is_decayed:
                self.time.give("working", 2 * parameter.numel)

    def _ready(self, size: int) -> None:
        if not self.layout.zero_stage:
            if self.pass_number == 0:
                self.time.take("gradients", size)
            return
        if not self.has_bucket:
            self.time.take("reduction_buckets", self.bucket)
            self.has_bucket = True
        if self.layout.zero_stage == 1:
            if self.pass_number == 0:
                self.time.take("gradients", size)
            return
        if self.in_bucket + size > self.bucket:
            self._flush()
        self.in_bucket += size
        with self.time.working(size):
            pass

    def _flush(self) -> None:
        """Reduce what stage 2 has collected: flattened once more, then copied to the partition."""
        with self.time.working(min(self.in_bucket, self.bucket)):
            pass
        if not self.partition:
            self.partition = self._partition_bytes()
            self.time.take("gradients", self.partition)
        self.in_bucket = 0

    def _partition_bytes(self) -> int:
        return sum(owned_elements(self.trained, self.layout).values()) * self.size

    def finish(self, *, is_last: bool) -> None:
        """End a backward pass."""
        self.pass_number += 1
        if self.layout.zero_stage == 1 and is_last:
            # The first bucket is filled with copies, then the partition is made beside the rest.
            total = sum(p.numel for p in self.trained) * self.size
            self.time.give("gradients", min(total, self.bucket))
            self.partition = self._partition_bytes()
            self.time.take("gradients", self.partition)
            self.time.give("gradients", total - min(total, self.bucket))
        if self.layout.zero_stage == 2:
            self._flush()
            if not is_last:
                self.partition = 0  # the next pass makes another, which is added to this one
        if self.has_bucket:
            self.time.give("reduction_buckets", self.bucket)
            self.has_bucket = False

    def update(self) -> None:
        """Clip and step: each group's partition is flattened and made float32 in turn."""
        if not self.layout.zero_stage:
            return
        largest = max(owned_elements(self.trained, self.layout).values())
        copies = self.size + (_FLOAT32 if self.size != _FLOAT32 else 0)
        with self.time.working(copies * largest):
            pass
