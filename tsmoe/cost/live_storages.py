"""Bytes of all tensors that are alive, followed through every operator: a peak on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveStorages(TorchDispatchMode):
    """Adds up the storages that operators made and that nobody has let go yet.

    It sees what autograd, custom functions, DDP and DeepSpeed allocate by operators of torch, each
    storage once however many tensors view it. It does not see scratch memory inside a kernel, nor
    what a library (oneDNN, gloo) keeps for itself. Allocation events of torch's profiler give the
    same peak on one rank; on several they miss what gloo's threads give back.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator and note the storages of its results."""
        result = func(*args, **(kwargs or {}))
        has_new = False
        # A view of what is given, or what is written into it, takes nothing more.
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            known = self._storages.get(storage._cdata)
            if storage._cdata not in given and (known is None or known[0].expired()):
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                has_new = True
        if has_new:
            self.peak = max(self.peak, self.alive())
        return result

    def alive(self) -> int:
        """Bytes alive now."""
        gone = [key for key, (storage, _) in self._storages.items() if storage.expired()]
        for key in gone:
            del self._storages[key]
        return sum(size for _, size in self._storages.values())


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_iter(values):
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            yield value.untyped_storage()
