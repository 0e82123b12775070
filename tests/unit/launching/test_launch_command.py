"""What `tsmoe launch` refuses before anything is queued."""

from pathlib import Path

import pytest
import yaml

from tsmoe.__main__ import main


@pytest.mark.parametrize(("least", "code"), [(2, 0), (3, 2), (4, 0)])
def test_fewer_nodes_must_be_able_to_share_the_batch_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], least: int, code: int
) -> None:
    path = tmp_path / "launch.yaml"
    backend = {"type": "slurm", "least_nodes": least}
    path.write_text(yaml.safe_dump({"nodes": 4, "folder": str(tmp_path), "backend": backend}))
    sizes = ["training.global_batch_size=128", "training.micro_batch_size=16"]
    words = ["launch", str(path), "--dry-run", "--", "pretrain", "time_tracker_tiny", *sizes]
    assert main(words) == code
    assert ("backend.least_nodes is 3" in capsys.readouterr().err) == (least == 3)
