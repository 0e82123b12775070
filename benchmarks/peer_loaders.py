"""One turn of a peer's loader, run by the interpreter of the peers' environment; see loader.py.

    python benchmarks/peer_loaders.py --list
    python benchmarks/peer_loaders.py NAME FOLDER SECONDS

Each peer has its own best format and gets two workers; what it prepares before training (files in
its format) is not counted.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from turns import (
    BATCH_SIZE,
    CONTEXT_LENGTH,
    NUM_WORKERS,
    PATCH_LENGTH,
    WINDOW_LENGTH,
    Batches,
    deliver,
    report,
)


def series_of(folder: Path) -> list[np.ndarray]:
    """Series of the corpus, as views of a memory map."""
    values = np.load(folder / "values.npy", mmap_mode="r")
    return np.split(values, np.load(folder / "ends.npy")[:-1])


def forever(loader: DataLoader[Any]) -> Iterator[Any]:
    """Go through a loader again and again."""
    while True:
        yield from loader


def gluonts(folder: Path) -> Batches:
    """GluonTS: series in Arrow, windows of each at random, by its own splitter and loader."""
    import pandas as pd
    from gluonts.dataset.arrow import ArrowWriter
    from gluonts.dataset.common import FileDataset
    from gluonts.dataset.loader import TrainDataLoader
    from gluonts.transform import ExpectedNumInstanceSampler, InstanceSplitter

    files = [folder / f"gluonts{number}.feather" for number in range(NUM_WORKERS)]
    if not files[-1].exists():
        start = pd.Period("2020-01-01", freq="h")
        for number, path in enumerate(files):
            ArrowWriter(compression=None).write_to_file(
                (
                    {"target": series, "start": start, "item_id": str(i)}
                    for i, series in enumerate(series_of(folder)[number::NUM_WORKERS])
                ),
                path,
            )

    def stacked(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        # As gluonts.torch.batchify does, which wants lightning to be installed.
        keys = ("past_target", "future_target", "past_is_pad")
        return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in keys}

    ends = np.load(folder / "ends.npy")
    # As many windows of a series as it holds: what is passed over for one serves for all.
    per_series = max(1.0, float(ends[0]) / WINDOW_LENGTH)

    class Split(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            worker = torch.utils.data.get_worker_info()
            assert worker is not None
            splitter = InstanceSplitter(
                target_field="target", is_pad_field="is_pad", start_field="start",
                forecast_start_field="forecast_start", past_length=CONTEXT_LENGTH,
                future_length=PATCH_LENGTH, instance_sampler=ExpectedNumInstanceSampler(
                    num_instances=per_series, min_past=CONTEXT_LENGTH, min_future=PATCH_LENGTH),
            )  # fmt: skip
            data = FileDataset(files[worker.id], freq="h")
            yield from TrainDataLoader(
                data, transform=splitter, batch_size=BATCH_SIZE, stack_fn=stacked
            )

    loader = DataLoader(Split(), batch_size=None, num_workers=NUM_WORKERS)
    return (b["past_target"].numel() + b["future_target"].numel() for b in loader)


def mosaic(folder: Path) -> Batches:
    """mosaicml-streaming: ready windows in its shards, shuffled by it."""
    _stand_in_for_torchvision()
    from streaming import MDSWriter, StreamingDataset

    out = folder / "mds"
    if not out.exists():
        columns = {"target": f"ndarray:float32:{WINDOW_LENGTH}"}
        with MDSWriter(out=str(out), columns=columns, size_limit=2**26) as writer:
            for series in series_of(folder):
                for number in range(len(series) // WINDOW_LENGTH):
                    first = number * WINDOW_LENGTH
                    writer.write({"target": np.array(series[first : first + WINDOW_LENGTH])})
    data = StreamingDataset(local=str(out), shuffle=True, batch_size=BATCH_SIZE)
    loader = DataLoader(data, batch_size=BATCH_SIZE, num_workers=NUM_WORKERS, drop_last=True)
    return (batch["target"].numel() for batch in forever(loader))


def _stand_in_for_torchvision() -> None:
    """Let mosaicml-streaming be imported: its picture data sets want torchvision, we none of it."""
    vision = types.ModuleType("torchvision")
    vision.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    for name, members in (
        ("datasets", ("VisionDataset", "ImageFolder")),
        ("transforms", ("ToTensor", "Compose")),
        ("transforms.functional", ("to_tensor", "pil_to_tensor")),
    ):
        module = types.ModuleType(f"torchvision.{name}")
        for member in members:
            setattr(module, member, type(member, (), {}))
        sys.modules[f"torchvision.{name}"] = module
        setattr(vision, name.split(".")[0], sys.modules[f"torchvision.{name.split('.')[0]}"])
    sys.modules["torchvision"] = vision


def time_moe(folder: Path) -> Batches:
    """Time-MoE: its binary format, z-normalised windows."""
    out = folder / "time_moe"
    if not out.exists():
        out.mkdir()
        ends = np.load(folder / "ends.npy")
        np.load(folder / "values.npy", mmap_mode="r").tofile(out / "data-1-of-1.bin")
        lengths = np.diff(ends, prepend=0)
        begins = (ends - lengths).tolist()
        meta = {
            "num_sequences": len(ends), "dtype": "float32",
            "files": {"data-1-of-1.bin": int(ends[-1])},
            "scales": [
                {"offset": begin, "length": length}
                for begin, length in zip(begins, lengths.tolist(), strict=True)
            ],
        }  # fmt: skip
        (out / "meta.json").write_text(json.dumps(meta))
    from time_moe.datasets.time_moe_dataset import TimeMoEDataset
    from time_moe.datasets.time_moe_window_dataset import TimeMoEWindowDataset

    data = TimeMoEWindowDataset(
        TimeMoEDataset(str(out), normalization_method="zero"), context_length=WINDOW_LENGTH
    )
    return (batch["input_ids"].numel() for batch in _at_random(data))


def openltm(folder: Path) -> Batches:
    """OpenLTM: a .npy file for each series, all held in memory."""
    out = folder / "openltm"
    if not out.exists():
        out.mkdir()
        for number, series in enumerate(series_of(folder)):
            np.save(out / f"{number}.npy", series[:, None])
    from data_provider.data_loader import UTSD_Npy

    data = UTSD_Npy(str(out), flag="train", size=[CONTEXT_LENGTH, PATCH_LENGTH, PATCH_LENGTH])
    # What was not in the context comes with the targets: a patch.
    return (x.numel() + len(x) * PATCH_LENGTH for x, *_ in _at_random(data))


def large_time_series_model(folder: Path) -> Batches:
    """Large-Time-Series-Model: its class for UTSD, all held in memory."""
    import datasets

    table = datasets.Dataset.from_parquet(sorted(map(str, folder.glob("series*.parquet"))))
    datasets.load_dataset = lambda *_, **__: table.with_format("numpy")  # it has the hub built in
    from utsdataset import UTSDataset

    data = UTSDataset(input_len=CONTEXT_LENGTH, output_len=PATCH_LENGTH)

    def inputs(rows: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
        # Its labels begin where a window ends: the last windows have none, which no batch can hold.
        return torch.utils.data.default_collate([x for x, _ in rows])

    return (x.numel() for x in _at_random(data, collate_fn=inputs))


def _at_random(data: Any, **settings: Any) -> Iterator[Any]:
    # Not by shuffle: the list of an order of 20 million windows takes longer than a turn.
    order = torch.utils.data.RandomSampler(data, replacement=True, num_samples=10**6)
    loader = DataLoader(
        data, batch_size=BATCH_SIZE, sampler=order, num_workers=NUM_WORKERS, drop_last=True,
        persistent_workers=True, **settings,
    )  # fmt: skip
    return forever(loader)


BATCHES: dict[str, Callable[[Path], Batches]] = {
    "GluonTS Arrow + InstanceSplitter, 2 workers": gluonts,
    "mosaicml-streaming MDS windows, 2 workers": mosaic,
}
# Peers that are no packages: the folder in PEERS that each is imported from.
CLONES: dict[str, tuple[str, Callable[[Path], Batches]]] = {
    "Time-MoE windows, 2 workers": ("Time-MoE", time_moe),
    "OpenLTM UTSD_Npy, 2 workers": ("OpenLTM", openltm),
    "UTSD's own class, 2 workers": (
        "Large-Time-Series-Model/scripts/UTSD",
        large_time_series_model,
    ),
}


def contenders() -> dict[str, Callable[[Path], Batches]]:
    """All peers that are there; those in PEERS are made importable."""
    found = dict(BATCHES)
    if peers := os.environ.get("PEERS"):
        for name, (part, make) in CLONES.items():
            if (path := Path(peers) / part).is_dir():
                sys.path.append(str(path))
                found[name] = make
    return found


def main() -> None:
    """Deliver batches and print how fast, or list what there is."""
    if sys.argv[1] == "--list":
        print(json.dumps(list(contenders())))
        return
    name, folder, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)
    batches = contenders()[name](folder)
    report(deliver(batches, seconds=seconds))


if __name__ == "__main__":
    main()
