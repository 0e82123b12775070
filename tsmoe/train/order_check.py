"""Whether a run that goes on would see its windows in the order in which it began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsmoe.checkpoint.layout import CheckpointMeta
from tsmoe.config import encode
from tsmoe.data.loader import DataConfig
from tsmoe.errors import CheckpointError
from tsmoe.train.run_config import RunConfig

_OF_ORDER = (
    "window_stride",
    "source_temperature",
    "source_weights",
    "domain_caps",
    "mixup_share",
    "packs_short_series",
    "resident_shards",
)
_OF_STREAM_ORDER = (
    "path",
    "name",
    "split",
    "revision",
    "train_fraction",
    "windows_per_series",
    "mixed_windows",
)


def check_same_order(config: RunConfig, folder: Path, meta: CheckpointMeta) -> None:
    """Compare what decides the order of windows; phases that are yet to come may change.

    Raises:
        CheckpointError: naming the first setting that differs, and both values.
    """
    saved, wanted = meta.config, encode(config)
    found: list[tuple[str, Any, Any]] = [("seed", saved["seed"], wanted["seed"])]
    # A setting that is younger than the checkpoint had its default then.
    saved_data = encode(DataConfig()) | saved["data"]
    if config.stream is not None:
        found += [
            (f"stream.{key}", saved["stream"].get(key), wanted["stream"][key])
            for key in _OF_STREAM_ORDER
        ]
    found += [(f"data.{key}", saved_data[key], wanted["data"][key]) for key in _OF_ORDER]
    before, now = (_begun(data["curriculum"], meta.step) for data in (saved_data, wanted["data"]))
    found.append(("data.curriculum", before, now))
    if config.data.curriculum:
        # Phases begin at steps, and windows are counted: both agree for one size of the step.
        sizes = [values["training"]["global_batch_size"] for values in (saved, wanted)]
        found.append(("training.global_batch_size", *sizes))
    for name, before, now in found:
        if before != now:
            raise CheckpointError(
                f"{folder}: trained with {name}={before}, but {name} is {now}; the order of "
                "windows would jump; use the same, or another run="
            )


def _begun(phases: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    return [phase for phase in phases if phase["from_step"] < step]
