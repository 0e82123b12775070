"""What an earlier program wrote of a model."""

from typing import Any

from tsmoe.config import decode, encode
from tsmoe.errors import ConfigError
from tsmoe.models import PatchMoEConfig, TimeTrackerConfig


def complete_model(section: dict[str, Any]) -> dict[str, Any]:
    """Add the settings that are younger than what an earlier program wrote of a model.

    What that was built with is their default. What is no section of a model is left as it is.
    """
    kind = PatchMoEConfig if section.get("type") == "patch_moe" else TimeTrackerConfig
    try:
        return encode(decode(kind, section, origin="checkpoint"))
    except ConfigError:
        return section
