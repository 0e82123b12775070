"""Put the layers of a configuration on top of one another: preset < YAML files < `key=value`.

YAML holds values only: no import paths, arithmetic, interpolation or environment variables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tsmoe.errors import ConfigError


def merge_layers(*layers: dict[str, Any]) -> dict[str, Any]:
    """Merge nested values, later layers first.

    Where a layer changes the `type` of a section, the keys that lower layers gave to that section
    are dropped: they belong to another variant.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: if the file is missing, not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: expected a mapping of keys at the top, got {type(values).__name__}"
        )
    return values


def parse_override(argument: str) -> dict[str, Any]:
    """Turn `training.steps=500` into nested values; the value is read as YAML.

    Raises:
        ConfigError: if there is no `=` or the value is not YAML.
    """
    key, separator, text = argument.partition("=")
    if not separator or not key.strip():
        raise ConfigError(
            f"{argument!r} is not a setting; write KEY=VALUE, such as training.steps=500"
        )
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"the value of {key} is not valid YAML: {text!r}") from None
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    changes_variant = "type" in above and "type" in below and above["type"] != below["type"]
    merged = {} if changes_variant else dict(below)
    for key, value in above.items():
        lower = merged.get(key)
        if isinstance(value, dict) and isinstance(lower, dict):
            merged[key] = _merge(lower, value)
        else:
            merged[key] = value
    return merged
