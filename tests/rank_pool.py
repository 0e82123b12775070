"""Run a function on several ranks, each a process of its own, in about a second.

A server process imports torch and DeepSpeed once and forks the ranks on request. It never computes
anything itself: a process that has run a backward pass has autograd's threads, which a fork does
not copy, so that the backward pass of a child would wait for ever. pytest's own process is such a
one. A rank that fails, dies or hangs fails the test with its traceback, and the others are killed.
"""

import atexit
import contextlib
import faulthandler
import functools
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NoReturn

SERVER_START_SECONDS = 120
_LOG_TAIL = 4000


class RankError(AssertionError):
    """A rank raised, died or did not end in time; the message has its traceback."""


def run_on_ranks(
    function: Callable[..., Any], *arguments: Any, num_ranks: int = 2, time_limit: float = 60.0
) -> list[Any]:
    """Call a module's function in `num_ranks` new processes and return what each returned.

    The environment of each process is that of a launcher (RANK, WORLD_SIZE, MASTER_PORT, ..), so
    that `tsmoe.ranks.start` joins them. Arguments and results must be picklable.

    Raises:
        RankError: if any rank fails, with the traceback and output of the first that did.
    """
    payload = pickle.dumps((function, arguments))
    return _server().run(payload, num_ranks=num_ranks, time_limit=time_limit)


@functools.cache
def _server() -> "_Server":
    server = _Server()
    atexit.register(server.close)
    return server


class _Server:
    """The pytest side of the server process."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            # A session of its own, so that ranks can be killed together with the server.
            start_new_session=True,
            env=os.environ
            | threads
            | {
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "DS_ACCELERATOR": "cpu",
                "CUDA_VISIBLE_DEVICES": "",
            },
        )
        theirs.close()
        self._receive(SERVER_START_SECONDS)

    def run(self, payload: bytes, *, num_ranks: int, time_limit: float) -> list[Any]:
        self._connection.send_bytes(pickle.dumps((payload, num_ranks, time_limit)))
        reply = pickle.loads(self._receive(time_limit + 30))
        if isinstance(reply, str):
            raise RankError(reply)
        return [pickle.loads(result) for result in reply]

    def close(self) -> None:
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _receive(self, seconds: float) -> bytes:
        try:
            if self._connection.poll(seconds):
                return self._connection.recv_bytes()
            reason = f"did not answer within {seconds} s"
        except EOFError:
            reason = "died"
        self.close()
        _server.cache_clear()  # the next test gets a new one
        self._log.seek(0)
        raise RankError(f"the rank server {reason}:\n{self._log.read().decode()[-_LOG_TAIL:]}")


@dataclass
class _Rank:
    """A forked rank as the server sees it."""

    number: int
    process: int
    pipe: Connection
    log: Path
    result: bytes | None = None

    def tail(self) -> str:
        text = self.log.read_text(errors="replace")[-_LOG_TAIL:].strip()
        return f"--- output of rank {self.number}\n{text}\n" if text else ""


def _serve(connection: Connection) -> None:
    connection.send_bytes(b"ready")
    while True:
        try:
            payload, num_ranks, time_limit = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        with tempfile.TemporaryDirectory() as folder:
            ranks = _fork(payload, num_ranks, Path(folder))
            try:
                failure = _collect(ranks, connection, time.monotonic() + time_limit)
            finally:
                for rank in ranks:
                    os.kill(rank.process, signal.SIGKILL)  # a zombie at most, until waited for
                    os.waitpid(rank.process, 0)
                    rank.pipe.close()
            reply = failure or [rank.result for rank in ranks]
            connection.send_bytes(pickle.dumps(reply))


def _fork(payload: bytes, num_ranks: int, folder: Path) -> list[_Rank]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for number in range(num_ranks):
        ours, theirs = Pipe(duplex=False)
        log = folder / f"rank_{number}.log"
        process = os.fork()
        if process == 0:
            _be_rank(number, num_ranks, port, payload, theirs, log)
        theirs.close()
        ranks.append(_Rank(number, process, ours, log))
    return ranks


def _collect(ranks: list[_Rank], connection: Connection, deadline: float) -> str | None:
    """Fill in the results; return None, or what to say of the first rank that failed."""
    waiting = {rank.pipe: rank for rank in ranks}
    while waiting:
        ready = wait([*waiting, connection], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            for rank in waiting.values():
                os.kill(rank.process, signal.SIGUSR2)  # faulthandler writes where it hangs
            time.sleep(0.5)
            hung = ", ".join(str(rank.number) for rank in waiting.values())
            return f"rank {hung} did not end in time\n" + "".join(r.tail() for r in ranks)
        if connection in ready:
            sys.exit("pytest is gone")  # the ranks are killed on the way out
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[call-overload]
            try:
                is_done, content = pickle.loads(rank.pipe.recv_bytes())
            except EOFError:
                is_done, content = False, "died without a word"
            if not is_done:
                return f"rank {rank.number}: {content}\n" + "".join(r.tail() for r in ranks)
            rank.result = content
    return None


def _be_rank(
    number: int, num_ranks: int, port: int, payload: bytes, pipe: Connection, log: Path
) -> NoReturn:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.register(signal.SIGUSR2)
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        function, arguments = pickle.loads(payload)
        result = pickle.dumps(function(*arguments))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # rank 0 holds the store that others may still read
        pipe.send_bytes(pickle.dumps((True, result)))
    except BaseException:  # whatever it is, the test shall show it
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    # What the ranks need, imported once; nothing of it may start a thread.
    import accelerate  # noqa: F401
    import deepspeed
    import deepspeed.moe.layer
    import deepspeed.runtime.zero.muon.muon_optimizer  # and half of torch's compiler with it
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo
    import torch.utils.tensorboard

    import tsmoe.engine.deepspeed_engine
    import tsmoe.train.loop  # noqa: F401

    torch.set_num_threads(1)
    _serve(Connection(int(sys.argv[1])))
