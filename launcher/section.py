"""What all parts of a launch file share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class LaunchSection:
    """Base of every part of a launch file: unknown keys are forbidden."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
