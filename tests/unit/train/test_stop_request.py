import os
import signal
import threading
from pathlib import Path

import pytest

from tsmoe.__main__ import main
from tsmoe.train.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_sets_the_flag_and_does_not_end_the_process(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.is_set
        signal.raise_signal(number)
        assert stop.is_set


def test_second_ctrl_c_means_now() -> None:
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_second_sigterm_is_still_a_request() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set


def test_former_handlers_come_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_signals_that_were_blocked_come_once_a_handler_stands() -> None:
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        # Other threads of these tests do not block it, and one of them would end of it.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        with StopRequest() as stop:
            assert stop.is_set
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def test_commands_that_do_not_train_can_be_ended(capsys) -> None:
    blocked = {signal.SIGTERM, signal.SIGUSR1}
    former = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        assert main(["config", "time_tracker_tiny"]) == 0
        assert not blocked & signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def limits(stop: StopRequest) -> tuple[float, float]:
    return stop._limit_seconds(in_step=False), stop._limit_seconds(in_step=True)


def test_a_step_may_last_as_long_as_those_before_allow(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("tsmoe.train.signals.time.monotonic", lambda: now[0])
    stop = StopRequest(stuck_seconds=20, timeout_seconds=600)
    assert limits(stop) == (600, 600)  # nothing is known yet
    for seconds, limit in ((300, 600), (1, 20), (10, 30), (2, 30)):
        with stop.step():
            now[0] += seconds
        assert limits(stop) == (600, limit)


def test_note_is_heard_unless_an_earlier_start_was_meant(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("TSMOE_RANKS", raising=False)
    note = tmp_path / "STOP"
    with StopRequest(note=note) as stop:
        assert not stop.is_set
    note.touch()
    os.utime(note, (1, 1))
    with StopRequest(note=note) as stop:
        assert not stop.is_set
    note.touch()
    with StopRequest(note=note) as stop:
        assert stop.is_set


def test_note_that_came_while_tsmoe_launch_started_the_ranks_is_heard(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("TSMOE_RANKS", "2")
    note = tmp_path / "STOP"
    note.touch()
    os.utime(note, (1, 1))
    with StopRequest(note=note) as stop:
        assert stop.is_set
