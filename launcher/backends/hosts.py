"""What back ends that reach their machines by ssh have in common."""

from __future__ import annotations

from collections.abc import Sequence


def check_hosts(hosts: Sequence[str], nodes: int) -> None:
    """Refuse a count of machines that is not that of their names.

    Raises:
        ValueError: naming both.
    """
    if len(set(hosts)) < len(hosts):
        raise ValueError(f"backend.hosts names a machine twice: {', '.join(hosts)}")
    if max(1, len(hosts)) != nodes:
        raise ValueError(
            f"nodes is {nodes}, but backend.hosts has {len(hosts)} "
            f"({', '.join(hosts) or 'none: this machine'}); make them equal"
        )
