"""One turn of our loader, or of what it is compared with in our environment; see loader.py.

python benchmarks/loader_turns.py NAME FOLDER SECONDS
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_pipeline.shards import Corpus
from tsmoe.batch import WindowBatch
from tsmoe.data.loader import DataConfig, TrainingBatches, load_training
from tsmoe.data.windows import training_windows
from tsmoe.ranks import Ranks
from turns import (
    BATCH_SIZE,
    NUM_WORKERS,
    PATCH_LENGTH,
    WINDOW_LENGTH,
    Batches,
    deliver,
    deliver_by_processes,
    report,
)

# Batches of the small consumer that is busy in Python, and how many calls keep it so.
_BUSY_BATCH_SIZE, _BUSY_CALLS = 64, 200_000


def values(folder: Path) -> np.ndarray:
    """All points of the corpus, one series after another, as a memory map."""
    return np.load(folder / "values.npy", mmap_mode="r")


def starts(folder: Path, seed: int) -> Iterator[np.ndarray]:
    """Random windows, each inside of a series, a batch at a time."""
    ends = np.load(folder / "ends.npy")
    lengths = np.diff(ends, prepend=0)
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(64):
        series = generator.integers(0, len(ends), BATCH_SIZE)
        within = generator.integers(0, lengths[series] - WINDOW_LENGTH + 1)
        drawn.append(ends[series] - lengths[series] + within)
    return itertools.cycle(drawn)


def copied(folder: Path, seed: int) -> Batches:
    """Copy as many bytes as a batch has, from one place after another."""
    points = values(folder)
    size = BATCH_SIZE * WINDOW_LENGTH
    batch = np.empty(size, np.float32)
    for number in itertools.count(seed):
        first = number * size % (len(points) - size)
        np.copyto(batch, points[first : first + size])
        yield batch.size


def gathered(folder: Path, seed: int) -> Batches:
    """Gather windows with numpy: the least that any loader must do."""
    windows = np.lib.stride_tricks.sliding_window_view(values(folder), WINDOW_LENGTH)
    for firsts in starts(folder, seed):
        yield windows[firsts].size


class MapWindows(Dataset[torch.Tensor]):
    """Windows of a memory map as a plain torch data set, one at a time."""

    def __init__(self, folder: Path) -> None:
        # Slices of a plain array: of an np.memmap they take five times as long; copy on write, as
        # torch wants memory that it could write to.
        self.values = np.asarray(np.load(folder / "values.npy", mmap_mode="c"))
        self.starts = np.concatenate(list(itertools.islice(starts(folder, 0), 64)))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, item: int) -> torch.Tensor:
        first = self.starts[item]
        return torch.from_numpy(self.values[first : first + WINDOW_LENGTH])


def forever(loader: DataLoader[Any]) -> Iterator[Any]:
    """Go through a loader again and again."""
    while True:
        yield from loader


def torch_windows(folder: Path) -> Batches:
    """torch's DataLoader with its default collate."""
    loader = DataLoader(
        MapWindows(folder), batch_size=BATCH_SIZE, shuffle=True, num_workers=NUM_WORKERS,
        drop_last=True, persistent_workers=True,
    )  # fmt: skip
    return (batch.numel() for batch in forever(loader))


def hf_windows(folder: Path) -> Batches:
    """Ready windows in a memory-mapped data set of `datasets`, at random."""
    import datasets

    data = datasets.Dataset.from_parquet(
        str(folder / "windows.parquet"), cache_dir=str(folder / "hf"), keep_in_memory=False
    ).with_format("torch", columns=["target"])
    loader = DataLoader(
        data, batch_size=BATCH_SIZE, shuffle=True, num_workers=NUM_WORKERS, drop_last=True,
        persistent_workers=True,
    )  # fmt: skip
    return (batch["target"].numel() for batch in forever(loader))


def hf_stream(folder: Path) -> Batches:
    """Series streamed by `datasets` and cut into windows by its map."""
    import datasets

    data = datasets.load_dataset(
        "parquet", data_files=str(folder / "series*.parquet"), split="train", streaming=True
    )

    def cut(batch: dict[str, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
        found = []
        for series in batch["target"]:
            count = len(series) // WINDOW_LENGTH
            found += list(np.reshape(series[: count * WINDOW_LENGTH], (count, WINDOW_LENGTH)))
        return {"target": found}

    windows = data.with_format("numpy").map(
        cut, batched=True, batch_size=4, remove_columns=data.column_names
    )
    shuffled = windows.shuffle(seed=0, buffer_size=1000).with_format("torch")
    loader = DataLoader(shuffled, batch_size=BATCH_SIZE, num_workers=NUM_WORKERS, drop_last=True)
    return (batch["target"].numel() for batch in forever(loader))


def our_batches(
    folder: Path, *, batch_size: int = BATCH_SIZE, rank: int = 0, size: int = 1
) -> TrainingBatches:
    """Our training batches with default settings: sources mixed, gaps marked."""
    corpus = Corpus.open(folder / "corpus")
    index = training_windows(
        corpus, window_length=WINDOW_LENGTH, patch_length=PATCH_LENGTH, stride=1
    )
    return TrainingBatches(
        corpus, index, DataConfig(), seed=0, global_batch_size=batch_size * size,
        micro_batch_size=batch_size, ranks=Ranks(rank=rank, size=size),
    )  # fmt: skip


def ours(folder: Path, num_workers: int, *, rank: int = 0, size: int = 1) -> Batches:
    """Our loader as a training run has it."""
    batches = load_training(
        our_batches(folder, rank=rank, size=size),
        num_batches=10**9, num_workers=num_workers, timeout_seconds=60,
    )  # fmt: skip
    return (batch.values_BCL.numel() for batch in batches)


def busy(batches: Iterator[WindowBatch]) -> Batches:
    """Consume batches in a loop that holds Python's lock for about ten milliseconds each."""
    for batch in batches:
        total = 0
        for number in range(_BUSY_CALLS):
            total += number & 7
        yield batch.values_BCL.numel()


def busy_alone(folder: Path) -> Batches:
    """Consume the same batch again and again."""
    return busy(itertools.repeat(our_batches(folder, batch_size=_BUSY_BATCH_SIZE)[0]))


def busy_threads(folder: Path) -> Batches:
    """Consume what our threads read ahead."""
    return busy(load_training(
        our_batches(folder, batch_size=_BUSY_BATCH_SIZE),
        num_batches=10**9, num_workers=NUM_WORKERS, timeout_seconds=60,
    ))  # fmt: skip


def busy_processes(folder: Path) -> Batches:
    """Consume what processes of torch's DataLoader read ahead with the same code."""
    batches: Any = our_batches(folder, batch_size=_BUSY_BATCH_SIZE)  # it has what a Dataset has
    loader: DataLoader[WindowBatch] = DataLoader(
        batches, batch_size=None, sampler=range(10**6), num_workers=NUM_WORKERS
    )
    return busy(iter(loader))


BATCHES: dict[str, Callable[[Path], Batches]] = {
    "ours, 0 workers": lambda folder: ours(folder, 0),
    "ours, 1 worker": lambda folder: ours(folder, 1),
    "ours, 2 workers": lambda folder: ours(folder, 2),
    "torch DataLoader, memmap, 2 workers": torch_windows,
    "datasets, memory-mapped windows, 2 workers": hf_windows,
    "datasets, streamed series, 2 workers": hf_stream,
    "busy consumer, no loader": busy_alone,
    "busy consumer, 2 threads": busy_threads,
    "busy consumer, 2 processes": busy_processes,
}
BY_PROCESSES: dict[str, Callable[[Path, int], Batches]] = {
    "memory copy, 2 processes": copied,
    "numpy gather, 2 processes": gathered,
    "ours, 2 ranks of 0 workers": lambda folder, rank: ours(folder, 0, rank=rank, size=2),
}


def main() -> None:
    """Deliver batches and print how fast."""
    name, folder, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    values(folder).sum()  # all of it is in the page cache
    if name in BY_PROCESSES:
        make = BY_PROCESSES[name]
        turn = deliver_by_processes(lambda number: make(folder, number), seconds=seconds)
    else:
        begun = time.perf_counter()
        batches = BATCHES[name](folder)
        opened = time.perf_counter() - begun
        turn = deliver(batches, seconds=seconds) | {"open_seconds": opened}
    report(turn)


if __name__ == "__main__":
    main()
