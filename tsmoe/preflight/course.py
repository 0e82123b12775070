"""The checks in order, rank by rank in step, with a limit on everything that could hang.

On every rank one thread looks and another minds the time. The first rank gathers what all found,
judges it, and says whether the next check is for all. A rank that does not answer is named.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsmoe.config import encode
from tsmoe.engine.deepspeed_config import DeepSpeedEngineConfig
from tsmoe.errors import ConfigError
from tsmoe.exit_code import leave_exit_code
from tsmoe.preflight import (
    clock,
    compute,
    corpus,
    folder,
    gpu,
    host,
    network,
    software,
    trial,
    world,
)
from tsmoe.preflight.meeting import Meeting, MeetingError
from tsmoe.preflight.scene import PreflightOptions, Scene
from tsmoe.preflight.verdict import Check, Place, Row, Told, Verdict, values_of, where, worst
from tsmoe.ranks import check_launch_variables, launched_world_size, stop
from tsmoe.train.run_config import RunConfig
from tsmoe.train.signals import StopRequest

__all__ = ["PreflightOptions", "PreflightReport", "run_preflight"]

logger = logging.getLogger(__name__)

CHECKS: tuple[Check[Any], ...] = (
    world.CHECK,
    software.CHECK,
    gpu.CHECK,
    host.CHECK,
    folder.CHECK,
    corpus.CHECK,
    clock.CHECK,
    compute.CHECK,
    network.JOIN,
    network.NETWORK,
    trial.ENGINE,
    network.EXPERT_GROUPS,
    trial.STEP,
)
# Longer than a check may take: a rank whose check hangs still says so.
_GRACE_SECONDS = 10.0
_SAME_ADVICE = "give all nodes the same command, preset and files"
FAILED = 3
"""Exit code of a preflight that found a failure."""


@dataclass(kw_only=True)
class PreflightReport:
    """What came of it; complete on the first rank, elsewhere only the exit code."""

    exit_code: int
    is_first: bool
    is_stuck: bool = False
    """A thread of this process hangs, so that it can only end at once."""
    is_stopped: bool = False
    """A signal asked this process to end."""
    world_size: int = 1
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    places: dict[int, Place] = field(default_factory=dict)
    findings: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    """By check and rank, as JSON."""


class _StoppedError(Exception):
    """A signal asked this process to end."""


def run_preflight(
    load: Callable[[], RunConfig],
    options: PreflightOptions,
    publish: Callable[[PreflightReport], None],
) -> int:
    """Check all that a run needs. Every rank of the launcher calls it; all return the same code.

    Args:
        load: gives the run's configuration; its errors are told beside those of other ranks.
        options: limits.
        publish: called on the first rank with all that was found, before any rank ends: a launcher
            may stop the others as soon as one has failed.

    Raises:
        ConfigError: if the configuration is wrong on every rank.
        MeetingError: if the ranks cannot meet.
    """
    begun = time.monotonic()
    config = _load(load)
    with StopRequest() as request:
        meeting = Meeting.open(timeout_seconds=options.timeout_seconds)

        def interrupt() -> None:
            if request.is_set:
                raise _StoppedError

        meeting.interrupt = interrupt
        course = Course(meeting, options)
        try:
            report = course.run(config)
        finally:
            meeting.interrupt = lambda: None
        report.seconds = time.monotonic() - begun
        _end(meeting, report, publish, options)
        if report.is_stuck or (report.exit_code and meeting.size > 1):
            # A thread may wait for a lost rank, and leaving a broken group may hang.
            logging.shutdown()
            leave_exit_code(report.exit_code)
            os._exit(report.exit_code)
        stop()
        return report.exit_code


def _load(load: Callable[[], RunConfig]) -> RunConfig | ConfigError:
    """Return the error of a wrong configuration where other ranks can be told of it."""
    try:
        return load()
    except ConfigError as error:
        if launched_world_size() == 1:
            raise
        try:
            check_launch_variables()
        except ConfigError:
            raise error from None
        return error


def _end(
    meeting: Meeting,
    report: PreflightReport,
    publish: Callable[[PreflightReport], None],
    options: PreflightOptions,
) -> None:
    """Publish on the first rank, then let all go; the store lives as long as the first rank."""
    if not report.is_first:
        if report.is_stopped:
            return
        try:
            # It may wait for a check of its own to end, and for other ranks' answers.
            limit = 2 * (options.timeout_seconds + _GRACE_SECONDS)
            report.exit_code = meeting.ask("verdict", limit)
            meeting.tell(f"left/{meeting.rank}", True)
        except (TimeoutError, MeetingError) as error:
            raise MeetingError(f"on {socket.gethostname()}: {error}") from error
        return
    try:
        publish(report)
    except ConfigError as error:
        report.exit_code = error.exit_code
        raise
    finally:
        meeting.tell("verdict", report.exit_code)
        others = meeting.said("left", [rank for rank in report.places if rank])
        meeting.gather(others, _GRACE_SECONDS)


class Course:
    """Goes through the checks on one rank."""

    def __init__(self, meeting: Meeting, options: PreflightOptions) -> None:
        self.meeting, self.options = meeting, options
        self.report = PreflightReport(
            exit_code=FAILED, is_first=meeting.is_first, world_size=meeting.size
        )
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="preflight")
        self._failed: set[str] = set()
        self._current = "waiting for all ranks"

    def run(self, config: RunConfig | ConfigError) -> PreflightReport:
        """Do all checks, as far as one does not hang."""
        report = self.report
        try:
            scene = self._arrive(config)
            if scene is not None:
                for check in CHECKS:
                    if not self._do(check, scene):
                        break
        except _StoppedError:
            found = f"asked to stop during: {self._current}"
            advice = "see the launcher's output: a rank may have died, or time was up"
            self._add([Row(check="preflight", verdict=Verdict.FAIL, found=found, advice=advice)])
            report.is_stuck = report.is_stopped = True
        if self.meeting.is_first:
            report.exit_code = FAILED if worst(report.rows) is Verdict.FAIL else 0
        self._worker.shutdown(wait=not report.is_stuck)
        return report

    def _arrive(self, config: RunConfig | ConfigError) -> Scene | None:
        """Wait for all ranks and compare their settings; None: go no further."""
        meeting, seconds = self.meeting, self.options.timeout_seconds
        is_wrong = isinstance(config, ConfigError)
        own = {
            "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            "settings": str(config) if isinstance(config, ConfigError) else _digest(config),
            "is_wrong": is_wrong,
        }
        meeting.count(f"claims/{meeting.rank}")
        meeting.tell(f"here/{meeting.rank}", own)
        if meeting.is_first:
            here = meeting.gather(meeting.said("here", range(meeting.size)), seconds)
            meeting.tell("all here", here)
        # The first rank may itself have come late.
        everyone = meeting.ask("all here", 2 * seconds + _GRACE_SECONDS)
        hellos = {int(rank): hello for rank, hello in everyone.items()}
        errors = {hello["settings"] for hello in hellos.values() if hello["is_wrong"]}
        if len(errors) == 1 and all(hello["is_wrong"] for hello in hellos.values()):
            raise ConfigError(errors.pop())
        self.report.places = places = {
            rank: Place(node=hello["node"]) for rank, hello in hellos.items()
        }
        rows = judge_settings(hellos, places)
        self._add(rows)
        if any(hello["is_wrong"] for hello in hellos.values()):
            return None
        assert not isinstance(config, ConfigError)
        return Scene(config=config, options=self.options, meeting=meeting, places=places)

    def _do(self, check: Check[Any], scene: Scene) -> bool:
        """Do one check together with the others; False: it hangs somewhere, go no further."""
        meeting, seconds = self.meeting, self.options.timeout_seconds
        self._current = check.name
        blocker = next((name for name in check.needs if name in self._failed), None)
        if meeting.is_first:
            logger.info("%s: %s", check.name, f"needs {blocker}" if blocker else "..")
            meeting.tell(f"{check.name}/go", blocker is None)
        if not meeting.ask(f"{check.name}/go", 2 * (seconds + _GRACE_SECONDS)):
            if meeting.is_first:
                assert blocker is not None
                self._add([_skipped(check, blocker)])
            return True
        asked = scene.node_leaders if check.once_per_node else sorted(scene.places)
        if meeting.rank in asked:
            answer = self._look(check, scene)
            meeting.tell(f"{check.name}/found/{meeting.rank}", answer)
        if meeting.is_first:
            answers = meeting.gather(meeting.said(f"{check.name}/found", asked), _GRACE_SECONDS)
            if not self.report.is_stuck and len(answers) < len(asked):
                answers |= self._later(check, [r for r in asked if r not in answers])
            found = {rank: a["found"] for rank, a in answers.items() if "found" in a}
            self.report.findings[check.name] = found
            self._add(judge_answers(check, asked, answers, scene.places, seconds))
            is_over = len(answers) < len(asked) or any("hangs" in a for a in answers.values())
            meeting.tell(f"{check.name}/over", is_over)
        return not meeting.ask(f"{check.name}/over", 2 * (seconds + _GRACE_SECONDS))

    def _later(self, check: Check[Any], ranks: list[int]) -> dict[int, Any]:
        """Wait for those that take their time, as long as a check may."""
        names = self.meeting.said(f"{check.name}/found", ranks)
        return self.meeting.gather(names, self.options.timeout_seconds)

    def _look(self, check: Check[Any], scene: Scene) -> dict[str, Any]:
        """Look, in the other thread; say what was found, what went wrong, or that it hangs."""
        scene.doing = ""
        future = self._worker.submit(check.look, scene)
        deadline = time.monotonic() + self.options.timeout_seconds
        while not future.done() and time.monotonic() < deadline:
            concurrent.futures.wait([future], timeout=min(1.0, deadline - time.monotonic()))
            self.meeting.interrupt()
        if not future.done():
            self.report.is_stuck = True
            return {"hangs": scene.doing}
        error = future.exception()
        if error is None:
            return {"found": values_of(future.result())}
        # Whatever it is: the other ranks are told, and the traceback is for --debug.
        logger.debug("%s failed", check.name, exc_info=error)
        doing = f", {scene.doing}" if scene.doing else ""
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{doing}"}

    def _add(self, rows: list[Row]) -> None:
        self.report.rows += rows
        self._failed |= {row.check for row in rows if row.verdict in (Verdict.FAIL, Verdict.SKIP)}


def judge_answers(
    check: Check[Any],
    asked: list[int],
    answers: dict[int, dict[str, Any]],
    places: dict[int, Place],
    timeout_seconds: float,
) -> list[Row]:
    """Turn the answers of all ranks into rows: errors and silence first, else what was found."""
    rows = []
    silent = [rank for rank in asked if rank not in answers]
    if silent:
        found = f"no word of {where(silent, places)} within {timeout_seconds:g} s"
        advice = "see whether these ranks live; leave their node out"
        rows.append(Row(check=check.name, verdict=Verdict.FAIL, found=found, advice=advice))
    for word, advice in (
        ("error", "mend that, and start again"),
        ("hangs", "a rank or the network does not answer; see the other rows, or give more time"),
    ):
        texts: dict[str, list[int]] = {}
        for rank, answer in answers.items():
            if word in answer:
                texts.setdefault(answer[word], []).append(rank)
        for text, ranks in texts.items():
            found = f"{where(ranks, places)}: {text}"
            if word == "hangs":
                doing = f": {text}" if text else ""
                found = f"{where(ranks, places)} did not end in {timeout_seconds:g} s{doing}"
            rows.append(Row(check=check.name, verdict=Verdict.FAIL, found=found, advice=advice))
    if rows:
        return rows
    findings = {rank: check.read(answer["found"]) for rank, answer in sorted(answers.items())}
    return check.judge(Told(check.name, findings, places))


def judge_settings(hellos: dict[int, dict[str, Any]], places: dict[int, Place]) -> list[Row]:
    """Compare the resolved configurations of all ranks."""
    rows = []
    groups: dict[tuple[bool, str], list[int]] = {}
    for rank, hello in sorted(hellos.items()):
        groups.setdefault((hello["is_wrong"], hello["settings"]), []).append(rank)
    for (is_wrong, text), ranks in groups.items():
        if is_wrong:
            found = f"{where(ranks, places)}: {text}"
            row = Row(check="settings", verdict=Verdict.FAIL, found=found, advice=_SAME_ADVICE)
            rows.append(row)
    if not rows and len(groups) > 1:
        each = "; ".join(f"{text[:12]} on {where(r, places)}" for (_, text), r in groups.items())
        found = f"the resolved settings differ: {each}"
        rows = [Row(check="settings", verdict=Verdict.FAIL, found=found, advice=_SAME_ADVICE)]
    digest = next(iter(hellos.values()))["settings"][:12]
    found = f"the same on {len(hellos)} ranks ({digest})" if len(hellos) > 1 else digest
    return rows or [Row(check="settings", verdict=Verdict.OK, found=found)]


def _skipped(check: Check[Any], blocker: str) -> Row:
    found = f"not checked: it needs {blocker}"
    return Row(check=check.name, verdict=Verdict.SKIP, found=found)


def _digest(config: RunConfig) -> str:
    """Hash all settings, and the DeepSpeed file that they name."""
    digest = hashlib.sha256(json.dumps(encode(config), sort_keys=True).encode())
    engine = config.engine
    if isinstance(engine, DeepSpeedEngineConfig) and engine.config_file is not None:
        try:
            digest.update(Path(engine.config_file).read_bytes())
        except OSError:
            digest.update(b"missing")  # the engine says so; other nodes may have it
    return digest.hexdigest()
