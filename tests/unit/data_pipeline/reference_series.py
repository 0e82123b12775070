"""Series for which the values of other packages are stored: the same numbers on every machine."""

import numpy as np


def noise(length: int) -> np.ndarray:
    """Numbers in [-0.5, 0.5) that look random and are the same everywhere."""
    steps = np.arange(length, dtype=np.int64)
    return ((steps * steps * 7919 + steps * 104729) % 10007 / 10007 - 0.5).astype(np.float32)


def reference_series(kind: str, length: int) -> np.ndarray:
    steps = np.arange(length)
    values = {
        "noise": noise(length),
        "walk": np.cumsum(noise(length)),
        "daily": np.sin(steps * 2 * np.pi / 24) + 0.3 * noise(length),
        "trend": 0.01 * steps + noise(length),
        "gaps": np.where(steps % 17 == 0, np.nan, 20 + np.cumsum(noise(length))),
        "offset": 1e4 + noise(length) + np.sin(steps / 9),
    }[kind]
    return values.astype(np.float32)
