import re
import sysconfig

import pytest
import torch

from tsmoe.errors import ConfigError
from tsmoe.models import build_model
from tsmoe.models.block import DenseConfig
from tsmoe.models.compiled import compile_blocks
from tsmoe.models.time_tracker import TimeTracker, TimeTrackerConfig


def model() -> TimeTracker:
    feed_forward = DenseConfig(d_ff=8)
    return build_model(
        TimeTrackerConfig(d_model=8, num_heads=1, num_layers=1, feed_forward=feed_forward)
    )


def test_missing_compiler_is_one_clear_error(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"training\.compiles_blocks.*no-such-compiler.*CXX"):
        compile_blocks(model(), device=torch.device("cpu"))


def test_missing_header_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "Python.h"))):
        compile_blocks(model(), device=torch.device("cpu"))


def test_gpu_needs_no_cpp_compiler(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    compile_blocks(model(), device=torch.device("cuda"))
