import pytest
import torch

from tsmoe.errors import ConfigError
from tsmoe.ranks import (
    CommunicationMeter,
    CommunicationRecord,
    ExchangeLabel,
    Ranks,
    launched_world_size,
)

OUT = ExchangeLabel(3, "to_experts")


def test_meter_adds_up_by_kind_and_label_and_starts_anew_when_read() -> None:
    meter = CommunicationMeter()
    meter.record("all_to_all", OUT, bytes_out=8, rows_out=2)
    meter.record("all_to_all", OUT, bytes_out=4, rows_out=1, seconds=0.5)
    meter.record("all_reduce", bytes_out=16)
    records = {(record.kind, record.label): record for record in meter.take()}
    assert records["all_to_all", OUT] == CommunicationRecord(
        kind="all_to_all", label=OUT, calls=2, bytes_out=12, rows_out=3, seconds=0.5
    )
    assert records["all_reduce", None].bytes_out == 16
    assert meter.take() == []


def test_time_is_that_of_the_body_and_a_wait_is_no_call() -> None:
    meter = CommunicationMeter()
    meter.record("all_to_all", OUT)
    with meter.waiting("all_to_all", OUT, torch.device("cpu")):
        sum(range(100_000))
    (record,) = meter.take()
    assert record.calls == 1
    assert record.seconds > 0


def test_one_process_sends_nothing() -> None:
    meter = CommunicationMeter()
    assert Ranks(meter=meter).sum(torch.ones(3)).tolist() == [1, 1, 1]
    assert meter.take() == []


def test_fewer_ranks_than_planned_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSMOE_RANKS", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched_world_size() == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"4 ranks were to train together, .* groups of 2"):
        launched_world_size()
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ConfigError, match="groups of 1"):
        launched_world_size()
