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
from tsmoe.cost.engine_memory import engine_memory
from tsmoe.cost.flops import values_per_point
from tsmoe.cost.layout import Layout
from tsmoe.cost.parameters import parameter_sizes
from tsmoe.cost.timeline import Timeline

if TYPE_CHECKING:
    from tsmoe.models.time_tracker import TimeTrackerConfig

_FLOAT32 = 4
# Of moe/piecewise_pass.py.
_PIECE_ROWS = 2048


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
        # As `Experts` chooses: on a GPU grouped products are promised for bf16 only. A processor
        # groups only few rows, and only where float32 is MKL's: too small to tell the two apart.
        is_grouped = layout.is_on_gpu and layout.precision == "bf16"
    return replace(rows, is_grouped=is_grouped)


class _Step:
    """One optimizer step of a rank."""

    def __init__(self, model: TimeTrackerConfig, layout: Layout, rows: Rows) -> None:
        from tsmoe.moe.layer import MoEConfig

        self.model, self.layout, self.rows = model, layout, rows
        self.numerics: Numerics = layout.numerics
        self.moe = model.feed_forward if isinstance(model.feed_forward, MoEConfig) else None
        self.time = Timeline()
        parameters = parameter_sizes(model, expert_parallel_size=layout.expert_parallel_size)
        self.engine = engine_memory(self.time, layout, parameters)
        # One tensor as wide as the residual stream.
        self.tokens_bytes = rows.tokens * model.d_model * self.numerics.element

    def run(self) -> MemoryPlan:
        host = self.engine.hold_states()
        batches = kept.batch_bytes(self.model, self.rows) * self.layout.accumulation_steps
        self.time.take("batch", batches)
        # Passes before the last differ in the gradients that they find only.
        for number in range(min(self.layout.accumulation_steps, 2)):
            is_last = number == min(self.layout.accumulation_steps, 2) - 1
            self._forward()
            self._backward()
            self.engine.pass_ends(is_last=is_last)
        self.engine.update()
        return MemoryPlan(parts=self.time.peak, host=host)

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
        self.engine.forward_begins()
        self.time.take("activations", self._outside_blocks())
        for _ in range(self.model.num_layers):
            if self.layout.recomputes:
                self.time.take("activations", self.tokens_bytes)
            else:
                self.time.take("activations", activations)
                self.time.take("dispatch_buffers", dispatch)
        self.engine.blocks_end()
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
            self.engine.gradients_came("head")
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
        self.engine.gradients_came("embed")
        self.time.give("activations", kept.embedding_bytes(model, self.rows, numerics))
        self.time.give("working", self.tokens_bytes)

    def _norm_backward(self, name: str) -> None:
        # The product of tokens and gradient in float32, both cast to that first, and the result.
        casts = 2 if self.numerics.element != _FLOAT32 else 0
        wide = self.rows.tokens * self.model.d_model * _FLOAT32
        with self.time.working((1 + casts) * wide + (self.tokens_bytes if casts else 0)):
            self.engine.gradients_came(name)
        self.time.give("activations", kept.norm_bytes(self.model, self.rows, self.numerics))

    def _attention_backward(self, name: str) -> None:
        # Gradients of query, key and value, their joint one, and that of the tokens.
        with self.time.working(self.tokens_bytes):
            self.engine.gradients_came(f"{name}.output")
            with self.time.working(6 * self.tokens_bytes):
                pass
        reordered = 0 if self.layout.is_on_gpu else 3 * self.model.d_model**2 * self.numerics.weight
        with self.time.working(4 * self.tokens_bytes + reordered):
            self.engine.gradients_came(f"{name}.query_key_value")
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
                self.engine.gradients_came(f"{name}.router")
            size = kept.router_bytes(self.model, self.moe, self.rows, self.numerics)
            self.time.give("activations", size)

    def _always_on_backward(self, name: str) -> None:
        inner = self.rows.tokens * self._always_on_width * self.numerics.element
        if not inner:
            return
        with self.time.working(inner):
            self.engine.gradients_came(f"{name}.down")
            self.time.give("activations", inner)  # the product of gate and up
            with self.time.working(3 * inner):
                pass
        self.time.give("activations", 2 * inner)
        with self.time.working(2 * inner + self.tokens_bytes):
            self.engine.gradients_came(f"{name}.gate_up")

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
                self.engine.gradients_came(f"{name}.experts")
        else:
            # Scratch for one piece of an expert's rows at a time, were all loaded alike.
            local = moe.num_experts // self.layout.expert_parallel_size
            mean = rows.received // local
            scratch = mean // max(1, -(-mean // _PIECE_ROWS))
            width = 2 * model.d_model + 5 * moe.d_ff_expert
            units = received if rows.is_remote else self.tokens_bytes
            with self.time.working(units + scratch * width * numerics.element):
                self.engine.gradients_came(f"{name}.experts")
        self.time.give("activations", kept.experts_bytes(moe, rows, numerics))
