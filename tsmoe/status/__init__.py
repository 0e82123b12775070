"""Tell how runs stand, from the files in their folders; nothing is ever written there."""

from tsmoe.status.state import Health, RunStatus, look_at

__all__ = ["Health", "RunStatus", "look_at"]
