"""Where ranks tell one another what they found, without a collective that one could hang in.

It is the store by which the ranks of torch.distributed meet anyway. Each rank leaves its answer
there; whoever waits for one waits for a limited time, and knows whose is missing.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tsmoe.errors import TsmoeError
from tsmoe.ranks import check_launch_variables, launched_world_size

# Between two looks: many ranks ask one store.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.01, 0.3


class MeetingError(TsmoeError, RuntimeError):
    """The ranks cannot meet, or the first one is gone."""

    exit_code = 3


class Meeting:
    """A board of small plain values by name, that all ranks of a launch can write and read."""

    def __init__(self, store: dist.Store, *, rank: int = 0, size: int = 1) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.interrupt: Callable[[], None] = lambda: None
        """Called again and again in a wait; may raise."""

    @classmethod
    def open(cls, *, timeout_seconds: float) -> Meeting:
        """Go to where the launcher says that the ranks meet; waits for the first rank alone.

        Raises:
            ConfigError: if the launcher's variables are incomplete.
            MeetingError: if the place cannot be reached, or is taken.
        """
        size = launched_world_size()
        if size == 1:
            return cls(dist.HashStore())
        check_launch_variables()
        rank, host = int(os.environ["RANK"]), os.environ["MASTER_ADDR"]
        # torchrun keeps the store itself, and starts its ranks again after a failure.
        is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        port = int(os.environ["MASTER_PORT"])
        is_host = rank == 0 and not is_kept
        try:
            if not is_host:
                _wait_for_host(host, port, timeout_seconds)
            store = dist.TCPStore(
                host, port, None, is_host,
                timeout=timedelta(seconds=timeout_seconds), wait_for_workers=False,
                multi_tenant=True,
            )  # fmt: skip
        except (dist.DistError, OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            problem = "start the ranks with another MASTER_PORT, or MASTER_ADDR of this node"
            if rank:
                problem = "see that rank 0 was started, on that node, and that no firewall is there"
            raise MeetingError(
                f"ranks are to meet at {host}:{port} (MASTER_ADDR, MASTER_PORT), but this one "
                f"cannot within {timeout_seconds:g} s ({reason}); {problem}"
            ) from error
        return cls(dist.PrefixStore(f"tsmoe/{attempt}", store), rank=rank, size=size)

    @property
    def is_first(self) -> bool:
        """Whether this rank gathers and decides."""
        return self.rank == 0

    def tell(self, name: str, value: Any) -> None:
        """Leave a value under a name."""
        self.store.set(name, json.dumps(value))

    def ask(self, name: str, seconds: float) -> Any:
        """Wait for a value that another rank leaves.

        Raises:
            TimeoutError: if it did not come.
            MeetingError: if the first rank is gone.
        """
        values = self.gather({0: name}, seconds)
        if not values:
            raise TimeoutError(f"no word of {name} within {seconds:g} s")
        return values[0]

    def gather(self, names: dict[int, str], seconds: float) -> dict[int, Any]:
        """Wait for several values; return those that came in time, by the keys of `names`.

        Raises:
            MeetingError: if the first rank is gone.
        """
        deadline = time.monotonic() + seconds
        missing, values, pause = dict(names), {}, _SHORTEST_PAUSE
        while missing:
            # Asked again and again: a wait in the store could not be interrupted, and logs its end.
            if self._has(list(missing.values())):
                come = list(missing)
            else:
                come = [key for key, name in missing.items() if self._has([name])]
            for key in come:
                values[key] = json.loads(self.store.get(missing.pop(key)))
            self.interrupt()
            if time.monotonic() > deadline:
                break
            if missing:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        return values

    def count(self, name: str) -> int:
        """Add one to a number, and return it."""
        return self.store.add(name, 1)

    def said(self, name: str, ranks: Iterable[int]) -> dict[int, str]:
        """Names under which each of the ranks leaves its value of that name."""
        return {rank: f"{name}/{rank}" for rank in ranks}

    def _has(self, names: list[str]) -> bool:
        try:
            return self.store.check(names)
        except (dist.DistError, RuntimeError) as error:
            raise self._lost() from error

    def _lost(self) -> MeetingError:
        return MeetingError(
            "the first rank is gone; see its output, and that of the launcher on its node"
        )


def _wait_for_host(host: str, port: int, seconds: float) -> None:
    """Wait until somebody listens there; the store would log each vain try at length.

    Raises:
        OSError: of the last try.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_LONGEST_PAUSE)
