"""Attention over a graph of variates: tiles against dense masks, time and peak memory.

One layer forward and backward, of one window of 672 points or of several where variates are few;
then training passes of a model. Variants run in turns, so that a busy machine slows all alike.

    python benchmarks/attention.py          # about 2 minutes of one core, 2 GiB
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from record import record
from tsmoe.models import build_model
from tsmoe.models.time_tracker import TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.nn.attention import AnyVariateAttention
from tsmoe.nn.causal_attention import attend_to_past
from tsmoe.nn.matmul import exact_onednn_matmul
from tsmoe.nn.rotary import rotary_tables, split_rotated

CONTEXT_LENGTH, D_MODEL, NUM_HEADS = 672, 256, 4
VARIATES = (1, 7, 21, 128, 321, 862)
DEGREES = (5, 20)
# Tokens of a layer's batch: as many windows as bring few variates to as many tokens.
TOKENS = 1536
# Dense masks are not run beyond: they would need more than some GiB.
DENSE_TOKENS_AT_MOST = 4500
CAUSAL_SHAPES = ((256, 14, 256, 4), (64, 14, 64, 4), (8, 120, 384, 6))


class DenseMaskAttention(AnyVariateAttention):
    """The same layer with a mask over all pairs of tokens, as it was before tiles."""

    def forward(self, tokens_BCND: Tensor, adjacency_BCC: Any = None, spans: Any = None) -> Tensor:
        """Attend with the biases in a mask that learns."""
        del spans
        windows, variates, patches, _ = tokens_BCND.shape
        projected = self.query_key_value(tokens_BCND.flatten(0, 1))
        tables = rotary_tables(torch.arange(patches), self.head_width, base=self.rotary_base)
        heads = split_rotated(projected.unflatten(-1, (3, self.num_heads, -1)), *tables)
        query, key, value = (
            part.unflatten(0, (windows, variates)).flatten(1, 2).transpose(1, 2) for part in heads
        )
        is_past_NN = torch.ones(patches, patches, dtype=torch.bool).tril()
        is_allowed = adjacency_BCC[:, :, None, :, None] & is_past_NN[:, None, :]
        is_allowed_BSS = is_allowed.flatten(3, 4).flatten(1, 2)
        variate_S = torch.arange(variates).repeat_interleave(patches)
        bias_HSS = torch.where(
            variate_S[:, None] == variate_S,
            self.same_variate_bias_H[:, None, None],
            self.other_variate_bias_H[:, None, None],
        )
        mask_BHSS = torch.where(is_allowed_BSS[:, None], bias_HSS, float("-inf"))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_BHSS)
        attended_BSD = attended.transpose(1, 2).flatten(2)
        return self.output(attended_BSD).unflatten(1, (variates, patches))


def random_graph(windows: int, variates: int, degree: int | None) -> Tensor:
    """Draw as many neighbours for each variate of each window, itself among them; None: all."""
    shape = (windows, variates, variates)
    if degree is None:
        return torch.ones(shape, dtype=torch.bool)
    draw_BCC = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    draw_BCC.diagonal(dim1=1, dim2=2).fill_(2)
    chosen_BCK = draw_BCC.topk(degree, dim=-1).indices
    return torch.zeros(shape, dtype=torch.bool).scatter_(2, chosen_BCK, True)


def cpu_seconds_in_turns(
    passes: dict[str, Callable[[], object]], *, rounds: int
) -> dict[str, float]:
    """Return the best CPU time of each after a pass that warms up."""
    best = dict.fromkeys(passes, float("inf"))
    for turn in range(rounds + 1):
        for name, run in passes.items():
            begun = time.process_time()
            run()
            if turn:
                best[name] = min(best[name], time.process_time() - begun)
    return best


def peak_mib(run: Callable[[], object]) -> float:
    """Return what a pass allocates at most at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = profiled.profiler.kineto_results.events()
    held = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        peak = max(peak, held)
    return round(peak / 2**20, 1)


def compare_layers(variates: int, patches: int, degree: int | None, rounds: int) -> dict[str, Any]:
    """Time dense masks, tiles and, as the floor, each variate by itself; measure their peaks."""
    windows = max(TOKENS // (variates * patches), 1)
    tokens = variates * patches
    torch.manual_seed(0)
    tiles = AnyVariateAttention(D_MODEL, NUM_HEADS, rotary_base=10000.0)
    dense = DenseMaskAttention(D_MODEL, NUM_HEADS, rotary_base=10000.0)
    dense.load_state_dict(tiles.state_dict())
    adjacency_BCC = random_graph(windows, variates, degree)
    tokens_BCND = torch.randn(windows, variates, patches, D_MODEL, requires_grad=True)

    def training_pass(layer: AnyVariateAttention, graph: Tensor | None) -> Callable[[], object]:
        return lambda: layer(tokens_BCND, graph).square().sum().backward()

    passes = {"tiles": training_pass(tiles, adjacency_BCC), "alone": training_pass(tiles, None)}
    if tokens <= DENSE_TOKENS_AT_MOST:
        passes["dense"] = training_pass(dense, adjacency_BCC)
    seconds = cpu_seconds_in_turns(passes, rounds=rounds)
    found: dict[str, Any] = {
        "variates": variates, "patches": patches, "degree": degree or variates,
        "windows": windows, "tokens_per_window": tokens,
        "cpu_ms": {name: round(second * 1e3, 1) for name, second in seconds.items()},
        "peak_mib": {name: peak_mib(run) for name, run in passes.items()},
    }  # fmt: skip
    if "dense" in passes:
        found["speed_over_dense"] = round(seconds["dense"] / seconds["tiles"], 2)
    else:
        # Mask, scores, weights and their gradients: at least four of these at a time.
        found["gib_of_one_dense_score_matrix"] = round(NUM_HEADS * tokens**2 * 4 / 2**30, 2)
    print(found, flush=True)
    return found


def train_model(variates: int, degree: int | None) -> dict[str, Any]:
    """Measure one training pass of a model over a window of 672 points of many variates."""
    feed_forward = MoEConfig(d_ff_expert=D_MODEL, d_ff_shared=2 * D_MODEL)
    model = build_model(TimeTrackerConfig(
        patch_length=48, patch_stride=48, context_length=CONTEXT_LENGTH, d_model=D_MODEL,
        num_layers=4, num_heads=NUM_HEADS, feed_forward=feed_forward, num_channel_mixed_layers=4,
    ))  # fmt: skip
    values_BCL = torch.randn(1, variates, CONTEXT_LENGTH).cumsum(-1)
    observed_BCL = torch.ones_like(values_BCL, dtype=torch.bool)
    adjacency_BCC = random_graph(1, variates, degree)
    seconds = 0.0

    def training_pass() -> None:
        nonlocal seconds
        begun = time.process_time()
        output = model(values_BCL, observed_BCL, adjacency_BCC)
        output.prediction_BCNPK.square().mean().backward()
        seconds = time.process_time() - begun

    peak = peak_mib(training_pass)
    found = {
        "variates": variates, "degree": degree or variates, "layers": 4,
        "cpu_seconds": round(seconds, 2), "peak_gib": round(peak / 1024, 2),
    }  # fmt: skip
    print(found, flush=True)
    return found


def compare_rotations(windows: int, tokens: int, d_model: int, heads: int) -> dict[str, Any]:
    """Time the causal path between its projections against rotation left to autograd."""
    projected = torch.randn(windows, tokens, 3, heads, d_model // heads, requires_grad=True)
    tables = rotary_tables(torch.arange(tokens), d_model // heads, base=10000.0)

    def plainly(cos_Sd: Tensor, sin_Sd: Tensor) -> tuple[Tensor, ...]:
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        turned = []
        for part in (query, key):
            first, second = part.chunk(2, dim=-1)
            pair = (first * cos_Sd - second * sin_Sd, second * cos_Sd + first * sin_Sd)
            turned.append(torch.cat(pair, dim=-1))
        return *turned, value

    def fused(cos_Sd: Tensor, sin_Sd: Tensor) -> tuple[Tensor, ...]:
        # Turned anew in place each time: lengths stay.
        return tuple(part.transpose(1, 2) for part in split_rotated(projected, cos_Sd, sin_Sd))

    def training_pass(rotate: Callable[..., tuple[Tensor, ...]]) -> Callable[[], object]:
        def run() -> None:
            projected.grad = None
            query, key, value = rotate(*tables)
            attended = attend_to_past(query, key, value)
            attended.transpose(1, 2).flatten(2).sum().backward()

        return run

    passes = {"fused": training_pass(fused), "plain": training_pass(plainly)}
    seconds = cpu_seconds_in_turns(passes, rounds=30)
    return {
        "shape": f"{windows} x {tokens} tokens, d_model {d_model}",
        "cpu_ms": {name: round(second * 1e3, 2) for name, second in seconds.items()},
        "speed_over_plain": round(seconds["plain"] / seconds["fused"], 2),
    }


@exact_onednn_matmul()  # as in training
def main() -> None:
    """Measure layers, models and the causal path and record what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variates", type=int, nargs="+", default=VARIATES)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    layers = []
    for variates in args.variates:
        for degree in (*(degree for degree in DEGREES if degree < variates), None):
            rounds = args.rounds if variates <= 128 else 1
            layers.append(compare_layers(variates, CONTEXT_LENGTH // 48, degree, rounds))
    for variates in (count for count in args.variates if count > 128):
        layers.append(compare_layers(variates, CONTEXT_LENGTH // 96, None, 1))
    models = [
        train_model(variates, degree)
        for variates in args.variates
        if variates > 128
        for degree in (20, None)
    ]
    results = {
        "d_model": D_MODEL, "num_heads": NUM_HEADS, "context_length": CONTEXT_LENGTH,
        "layers": layers,
        "models": models,
        "causal_path": [compare_rotations(*shape) for shape in CAUSAL_SHAPES],
    }  # fmt: skip
    record(
        "attention",
        results,
        notes="forward and backward, float32, one thread, CPU time, products as in training",
    )


if __name__ == "__main__":
    main()
