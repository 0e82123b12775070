"""Hand a snapshot to an engine as if it were read from the files of a checkpoint."""

from pathlib import Path

from torch import Tensor

from tsmoe.checkpoint.elastic import StateReader


class _Tensors(dict[str, Tensor]):
    """A file of tensors in memory."""

    def get_tensor(self, key: str) -> Tensor:
        return self[key]


class _SnapshotReader(StateReader):
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.folder = Path("memory")
        self._files = []
        self._key_to_file = dict.fromkeys(tensors, _Tensors(tensors))


def reader_of(tensors: dict[str, Tensor]) -> StateReader:
    """Return a reader of the merged snapshots of all ranks."""
    return _SnapshotReader(tensors)
