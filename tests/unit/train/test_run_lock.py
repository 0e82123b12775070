from pathlib import Path

import pytest

from tsmoe.errors import ConfigError
from tsmoe.ranks import Ranks
from tsmoe.train.run_lock import run_lock


def test_second_training_in_a_run_folder_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    # The lock belongs to the open file, so a second opening stands for a second process.
    refused = pytest.raises(ConfigError, match=f"{run}: another process")
    with run_lock(run, Ranks()), refused, run_lock(run, Ranks()):
        pass
    with run_lock(run, Ranks()):
        pass
